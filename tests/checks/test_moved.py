"""Runs that were handed to somebody: the texts and models that they read are at other paths."""

import json
import re
import shutil

import pytest

from mygpt.checks.compare import compare
from mygpt.runs.files import file_sha256
from mygpt.runs.records import read_records
from mygpt.training.train import train


@pytest.fixture
def handed(tiny, text, tmp_path):
    """A function that makes a run and moves all that it has read to `here`; returns the run and that folder."""

    def make(**keys):
        there, here = tmp_path / "there", tmp_path / "here"
        there.mkdir()
        (there / "text.txt").write_text(text, encoding="utf-8", newline="")
        (there / "val.txt").write_text(text[:5000], encoding="utf-8", newline="")
        train(tiny(corpus=str(there / "text.txt"), output=str(there / "base")))
        paths = {key: str(there / keys.pop(key)) for key in ("val_corpus", "init_from") if key in keys}
        recipe = tiny(corpus=str(there / "text.txt"), save_every=3, keep_last=0, **keys, **paths)
        run = train(recipe)
        there.rename(here)
        return run, here

    return make


def test_a_run_is_run_again_with_its_text_at_another_path(handed, call, tmp_path):
    """`verify`, `at`, `fork` and `bisect` name the flag that says where it is, and take it."""
    run, here = handed()
    twin = tmp_path / "twin"
    shutil.copytree(run, twin)
    given = ("--corpus", here / "text.txt")
    for arguments in (
        ("verify", run),
        ("at", run, 2, "--out", tmp_path / "at"),
        ("fork", run, 2, "--output", tmp_path / "fork"),
        ("bisect", run, twin),
    ):
        if arguments[0] != "bisect":  # which needs no text for runs that are the same
            code, _, err = call(*arguments)
            assert code == 2
            sha256 = file_sha256(here / "text.txt")[:12]
            assert f"cannot be read: {tmp_path / 'there' / 'text.txt'}: " in err
            assert f"say with --corpus where it is now (sha256 {sha256})\n" in err
            assert not (tmp_path / arguments[-1]).exists() or arguments[0] == "verify"
        code, out, err = call(*arguments, *given)
        assert code == 0, err
        assert "identical" in out or arguments[0] == "fork"
    assert json.loads((tmp_path / "at" / "run.json").read_text())["recipe"]["data"]["corpus"] == str(here / "text.txt")
    assert compare(run, tmp_path / "fork").identical
    code, _, err = call("at", run, 3, "--out", tmp_path / "copied", *given)
    assert code == 0
    code, _, err = call("train", tmp_path / "copied" / "recipe.toml", "--steps", 4)
    assert code == 0, err


def test_bisect_looks_into_a_step_with_the_text_at_another_path(handed, call, tmp_path):
    """Of runs that differ, it trains steps of both again."""
    run, here = handed()
    code, _, err = call("fork", run, 2, "--lr", 1, "--output", tmp_path / "fork", "--corpus", here / "text.txt")
    assert code == 0, err
    shutil.rmtree(tmp_path / "fork" / "step-000003")
    (here / "text.txt").rename(here / "renamed.txt")
    code, _, err = call("bisect", run, tmp_path / "fork")
    assert code == 2
    assert "say with --corpus where it is now" in err
    code, out, err = call("bisect", run, tmp_path / "fork", "--corpus", here / "renamed.txt")
    assert code == 1, err
    assert "the first step that differs is step 3, in learning rate" in out


def test_fork_whose_text_moves_keeps_its_directory(handed, call, tmp_path):
    """The path of the same text is not in its name; that of another text is."""
    run, here = handed()
    assert call("fork", run, 2, "--lr", 1, "--corpus", here / "text.txt")[0] == 0
    fork = run.with_name(f"{run.name}-at-2-lr=1.0")
    assert fork.exists()
    (here / "text.txt").rename(here / "moved.txt")
    code, _, err = call("fork", run, 2, "--lr", 1, "--corpus", here / "moved.txt")
    assert (code, f"{fork} is complete" in err) == (0, True)
    (here / "other.txt").write_text((here / "moved.txt").read_text()[:-20])
    assert call("fork", run, 3, "--corpus", here / "other.txt")[0] == 0
    assert list(run.parent.glob(f"{run.name}-at-3-corpus=*"))


def test_what_a_run_has_not_read_is_refused(handed, call, tmp_path):
    """One line with the hash that was expected, and nothing is created."""
    run, here = handed()
    (here / "other.txt").write_text("another text " * 1000)
    there = sorted(tmp_path.iterdir())
    wanted = file_sha256(here / "text.txt")[:12]
    for arguments in (("verify", run), ("at", run, 2, "--out", tmp_path / "at"), ("bisect", run, here / "base")):
        code, out, err = call(*arguments, "--corpus", here / "other.txt")
        assert (code, out) == (2, "")
        assert re.fullmatch(rf"mygpt: --corpus: \S+ has the sha256 \w{{12}}, expected {wanted}, which .* read\n", err)
        code, out, err = call(*arguments, "--val-corpus", here / "other.txt")
        assert (code, out) == (2, "")
        assert "read no val_corpus; leave it out" in err
    assert sorted(tmp_path.iterdir()) == there


def test_held_out_text_and_model_may_be_moved_too(handed, call, tmp_path):
    """--val-corpus and --init-from say where they are."""
    run, here = handed(val_corpus="val.txt", init_from="base", val_every=3)
    given = ["--corpus", here / "text.txt"]
    code, _, err = call("verify", run, *given)
    assert code == 2
    assert "the text that it held out cannot be read" in err
    assert "say with --val-corpus where it is now" in err
    given += ["--val-corpus", here / "val.txt"]
    code, _, err = call("verify", run, *given)
    assert code == 2
    assert "say with --init-from where they are now" in err
    given += ["--init-from", here / "base"]
    assert call("verify", run, *given)[:2] == (0, "identical: 6 records and 2 checkpoints up to step 6\n")
    assert call("at", run, 2, "--out", tmp_path / "at", *given)[0] == 0
    code, _, err = call("fork", run, 2, "--output", tmp_path / "fork", *given)
    assert code == 0, err
    assert compare(run, tmp_path / "fork").identical
    code, _, err = call("fork", run, 4, "--output", tmp_path / "x", *given[:-1], run)
    assert code == 2
    assert "--init-from: a fork begins with the weights of its run; leave it out" in err


@pytest.mark.parametrize("keys", [{"val_split": 0.2}, {"val_corpus": "val.txt"}], ids=["part", "own"])
def test_eval_finds_the_moved_text_by_its_hash(handed, call, keys):
    """What the run held out of it is evaluated, to the recorded bits, and said; of another text, all."""
    run, here = handed(val_every=3, sampling="full", **keys)
    code, _, err = call("eval", run)
    assert code == 2
    assert "say with --corpus where the text of the run is now" in err
    text = here / ("text.txt" if "val_split" in keys else "val.txt")
    code, out, err = call("eval", run, "--corpus", text, "--json")
    assert code == 0
    assert json.loads(out)["loss"]["mean"] == read_records(run)[-1].val
    assert err == f"{text} is the text of the run: what it held out of this text is evaluated\n"
    (here / "other.txt").write_text(text.read_text()[:-1])
    code, out, err = call("eval", run, "--corpus", here / "other.txt", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["tokens"] == len(text.read_text()) - 2
