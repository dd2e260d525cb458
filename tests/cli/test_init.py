"""`mygpt init` as a user calls it."""

import errno
import gzip
import os
import shutil
from pathlib import Path

import pytest
from support.runs import FLAGS

from mygpt import disk
from mygpt.planning import plan as planning
from mygpt.recipe.files import load_recipe


@pytest.fixture
def here(tmp_path, monkeypatch, text_file):
    """A folder to work in, with text.txt, on a machine of which nothing has to be timed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "time_training", lambda recipe, text, device: 10_000.0)
    shutil.copy(text_file, "text.txt")
    return tmp_path


def test_text_becomes_a_recipe_that_trains(call, here):
    """What it prints is what the recipe says in its comments."""
    code, out, err = call("init", "text.txt", "--minutes", "5")
    assert code == 0
    assert out.startswith("text: ")
    assert "wrote text.toml; train it with: mygpt train text.toml" in err
    comments = (here / "text.toml").read_text()
    assert comments.startswith("# Made by `mygpt init text.txt --minutes 5`")
    assert all(line in comments for line in out.splitlines())
    code, _, err = call("train", "text.toml", *FLAGS, "--warmup", "2", "--val-every", "3")
    assert code == 0, err
    assert load_recipe("checkpoints/text/recipe.toml").train.steps == 6


def test_missing_tokenizers_are_named(call, here, monkeypatch):
    """The recipe does without them, and not in silence."""
    assert "pip install" not in call("init", "text.txt", "--out", "with.toml")[2]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call("init", "text.txt", "--out", "without.toml")
    assert code == 0
    assert "pip install tokenizers" in err


def test_machine_is_timed(command, tmp_path, text_file):
    """For real, in a new process."""
    done = command("init", text_file, "--minutes", "5", "--out", "own.toml")
    assert done.returncode == 0, done.stderr
    assert "weights" in done.stdout
    assert "tokens/s" in done.stderr
    assert load_recipe(tmp_path / "own.toml").expected.expected_minutes <= 5


def test_recipe_elsewhere_finds_the_text(call, here):
    """A path in a recipe is relative to the recipe."""
    (here / "recipes").mkdir()
    assert call("init", "text.txt", "--out", "recipes/own.toml")[0] == 0
    assert 'corpus = "../text.txt"' in (here / "recipes" / "own.toml").read_text()


def test_named_corpus(call, here):
    assert call("init", "python-docs", "--minutes", "1")[0] == 0
    assert load_recipe("python-docs.toml").data.corpus == "python-docs"


def test_several_texts_are_prepared_first(call, here):
    """Beside the recipe, once: the message names the command that uses them."""
    with gzip.open("more.txt.gz", "wb") as file:
        file.write((here / "text.txt").read_bytes().lower())
    arguments = ("init", "text.txt", "more.txt.gz", "--out", "both.toml")
    code, _, err = call(*arguments)
    assert code == 0, err
    assert "prepared both-tokens" in err
    assert load_recipe("both.toml").data.corpus == "both-tokens"
    assert call("train", "both.toml", *FLAGS, "--warmup", "2", "--val-every", "3")[0] == 0
    (here / "both.toml").unlink()
    code, _, err = call(*arguments)
    assert code == 0
    assert "both-tokens is prepared already" in err
    assert call("init", "both-tokens", "--out", "again.toml")[0] == 0
    code, _, err = call("init", "more.txt.gz", "text.txt", "text.txt", "--out", "both-.toml")
    assert code == 0
    (here / "both.toml").unlink()
    (here / "text.txt").write_text((here / "text.txt").read_text().upper())
    code, _, err = call(*arguments)
    assert (code, err) == (
        2,
        "mygpt: both-tokens: was prepared from other texts; remove it, or choose another --out\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "TEXT missing; usage: mygpt init TEXT... [FLAGS]; `mygpt init --help` tells more"),
        (["absent.txt"], "absent.txt: no such source"),
        (["short.txt", "short.txt", "--out", "a.toml"], "short.txt: has 5 bytes"),
        (["short.jsonl"], "short.jsonl: has 5 bytes"),
        (["short.txt"], "short.txt: has 5 bytes, expected at least 10,000"),
        (["text.txt", "--minutes", "0"], "--minutes: got 0.0, expected greater than 0"),
        (["text.txt", "--minutes", "inf"], "--minutes: got inf, expected a finite number"),
        (["*.txt"], "name the recipe to write: --out NAME.toml"),
        (["text.txt", "short.txt"], "name the recipe to write: --out NAME.toml"),
        (["text.txt", "--out", "x" * 300 + ".toml"], "x" * 300),
        (["text.txt", "--minutes", "nan"], "--minutes: got nan, expected a finite number"),
        (["text.txt", "--minutes", "0.001"], "--minutes 0.001: too short for 100 steps"),
        (["text.txt", "--out", "own.txt"], "--out: got 'own.txt', expected a name that ends in .toml"),
        (["text.txt", "--out", "there.toml"], "there.toml: exists"),
        (["text.txt", "--out", "absent/own.toml"], "absent/own.toml: absent is not a folder"),
    ],
)
def test_mistakes_cost_one_line(arguments, message, call, here):
    """And nothing is written."""
    (here / "short.txt").write_text("short")
    (here / "short.jsonl").write_text('{"text": "short"}')
    (here / "there.toml").touch()
    before = sorted(here.rglob("*"))
    code, _, err = call("init", *arguments)
    assert code in (1, 2)
    assert err.splitlines()[-1].startswith(f"mygpt: {message}")
    assert sorted(here.rglob("*")) == before


def test_disk_that_refuses_the_recipe_is_named_and_nothing_is_left(call, here, monkeypatch):
    """A full disk has exit code 1; a folder in which nothing can be made is a mistake, and found before the work."""
    before = sorted(here.rglob("*"))

    def fail(number):
        raise OSError(number, os.strerror(number))

    for module, name, number, code, way in (
        (disk, "sync", errno.ENOSPC, 1, "mend the disk or make room, and give the same command again"),
        (Path, "touch", errno.EROFS, 2, "choose another --out"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_, number=number: fail(number))
            got, _, err = call("init", "text.txt", "--out", "own.toml")
        message = f"mygpt: own.toml: cannot be written: {os.strerror(number)}; {way}"
        assert (got, err.splitlines()[-1]) == (code, message)
        assert sorted(here.rglob("*")) == before


def test_file_with_the_name_of_a_corpus(call, here):
    """It is another text."""
    shutil.copy("text.txt", "python-docs")
    assert call("init", "./python-docs", "--minutes", "1")[0] == 0
    assert 'corpus = "./python-docs"' in (here / "python-docs.toml").read_text()
    assert f"{(here / 'text.txt').stat().st_size:,} bytes" in (here / "python-docs.toml").read_text()


def test_texts_that_repeat_themselves_are_prepared_as_bytes(call, here):
    """Their pairs run out."""
    for name in ("a.txt", "b.txt"):
        (here / name).write_text(f"log {name}\n" + "three different lines\nof a log\nagain and again\n" * 3000)
    code, _, err = call("init", "a.txt", "b.txt", "--out", "log.toml")
    assert code == 0, err
    assert call("data", "info", "log-tokens")[1].count("byte ") == 1


def test_name_that_is_not_utf_8(call, here):
    """A recipe cannot hold it."""
    name = os.fsdecode(b"\xff.txt")
    shutil.copy("text.txt", name)
    code, _, err = call("init", name, "--out", "own.toml")
    assert code == 2
    assert "its name is not UTF-8, as a recipe is; rename it" in err


def test_name_of_a_text_cannot_end_the_comment(call, here):
    """It would be read as a recipe."""
    name = "a\n[train]\nsteps = 7\n.txt"
    (here / name).write_bytes((here / "text.txt").read_bytes())
    assert call("init", name, "--out", "own.toml")[0] == 0
    recipe = load_recipe("own.toml")
    assert recipe.train.steps != 7
    assert recipe.data.corpus == name
