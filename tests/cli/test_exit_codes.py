"""The tables of exit codes and streams in the reference: every code, and every command, gives what they say."""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
from support.commands import MYGPT, REPOSITORY
from support.forked import run as run_forked
from support.runs import FLAGS, TINY, flags_of

from mygpt.cli import train as train_commands
from mygpt.cli.main import COMMANDS
from mygpt.errors import NonFiniteError
from mygpt.recipe.tables import Recipe
from mygpt.training.train import train

REFERENCE = (REPOSITORY / "docs" / "reference.md").read_text(encoding="utf-8")
SECTION = REFERENCE[REFERENCE.index("## Exit codes and streams") :]
CODES = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", SECTION, re.MULTILINE) for code in row.split(",")}
STREAMS = {
    name: (stdout, other.strip())
    for name, stdout, other in re.findall(r"^\| `(\w+)` \| (.*?) \|(.*?)\|$", SECTION, re.MULTILINE)
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, text_file):
    """A folder with runs of every kind: two that differ, one that diverged, one whose record was changed."""
    place = tmp_path_factory.mktemp("exit-codes")
    shutil.copy(text_file, place / "text.txt")
    keys = TINY | {"corpus": str(place / "text.txt"), "val_split": 0.2, "val_every": 3, "save_every": 3}
    for name, seed in (("run", 0), ("other", 1), ("changed", 0)):
        train(Recipe.of(**keys, output=str(place / name), init_seed=seed))
    with pytest.raises(NonFiniteError):
        train(Recipe.of(**keys, output=str(place / "broken"), lr=1e30))
    lines = (place / "changed" / "metrics.jsonl").read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {"loss": 1.0})
    (place / "changed" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    small = Recipe.of(**keys).replace(threads=None, corpus="text.txt")
    (place / "small.toml").write_text(small.to_toml())
    return place


def answers() -> dict[str, list[tuple[int, tuple[object, ...]]]]:
    """Calls of each command, with the exit codes that they have."""
    return {
        "init": [(0, ("text.txt", "--minutes", 1, "--out", "new.toml")), (2, ("nothing.txt",))],
        "train": [
            (0, ("text.txt", *FLAGS, "--output", "new")),
            (1, ("text.txt", *FLAGS, "--lr", "1e30", "--output", "bad")),
            (2, ("text.txt", "--lr", -1)),
        ],
        "study": [
            (0, ("small.toml", "--seeds", 2, "--out", "study", "--side-by-side", 1)),
            (2, ("small.toml", "--seeds", 1)),
        ],
        "generate": [(0, ("--checkpoint", "run", "--max-new-tokens", 3)), (2, ("--checkpoint", "nothing"))],
        "eval": [(0, ("run",)), (2, ("nothing",))],
        "compare": [(0, ("run", "run")), (1, ("run", "other")), (2, ("run", "nothing"))],
        "check": [(0, ("run",)), (1, ("broken",)), (2, ("nothing",))],
        "verify": [(0, ("run",)), (1, ("changed",)), (2, ("nothing",))],
        "at": [
            (0, ("run", 4, "--out", "at")),
            (1, ("changed", 5, "--from-beginning", "--out", "no")),
            (2, ("run", 9, "--out", "no")),
        ],
        "fork": [(0, ("run", 4, "--lr", 1e-4)), (1, ("changed", 5, "--lr", 1e-4)), (2, ("run", 9))],
        "bisect": [(0, ("run", "same")), (1, ("run", "other")), (2, ("run", "run"))],
        "replay": [(0, ("broken", "--device", "cpu")), (2, ("run",))],
        "plot": [(0, ("run",)), (2, ("nothing",))],
        "data": [(0, ("prepare", "text.txt", "--tokenizer", "byte", "--out", "tokens")), (2, ("info", "nothing"))],
        "doctor": [(0, ("text.txt", "--threads", 1)), (2, ("text.txt", "--batch-size", 0))],
        "recipe": [(0, ("list",)), (2, ("show", "nothing.toml"))],
    }


def test_tables_name_every_command_and_code():
    """And no other."""
    assert STREAMS.keys() == COMMANDS.keys() == answers().keys()
    assert {0, 1, 2, 130, 143, 141} == CODES


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_the_codes_and_streams_of_the_table(place, tmp_path, command, call, monkeypatch):
    """Answers are on stdout alone; an error is a line on stderr alone. What is said of code 1 is seen."""
    here = tmp_path / "here"
    shutil.copytree(place, here)
    shutil.copytree(here / "run", here / "same")
    monkeypatch.chdir(here)
    stdout, other = STREAMS[command]
    calls = answers()[command]
    for code, arguments in calls:
        got, out, err = call(command, *arguments)
        assert got == code, err + out
        errors = [line for line in err.splitlines() if line.startswith("mygpt: ")]
        if code == 0 or (code == 1 and not errors):
            assert bool(out) == (stdout != "nothing")
            assert not errors
        else:
            assert errors
        if code == 2:
            assert out == ""
    assert (
        not other or any(code == 1 for code, _ in calls) or command == "replay"
    )  # see tests/faults/test_non_finite.py


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_has_its_code(folder, number, code):
    """The answer of a stopped run is on stderr: where it was saved."""
    place = folder("stopped")
    arguments = ("text.txt", *flags_of(TINY | {"steps": 100_000}), "--output", "run")
    process = subprocess.Popen(
        [*MYGPT, "train", *arguments], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step     1"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err.splitlines()[-1].startswith("mygpt: stopped by SIG")


@pytest.mark.parametrize(
    ("stop", "code", "name"), [(KeyboardInterrupt(), 130, "SIGINT"), (SystemExit(143), 143, "SIGTERM")]
)
def test_signal_while_there_is_nothing_to_save_says_so(call, monkeypatch, stop, code, name):
    """Whatever the command was at."""

    def stopped(_arguments):
        raise stop

    monkeypatch.setattr(train_commands, "recipe", stopped)
    assert call("recipe", "list") == (code, "", f"mygpt: stopped by {name}\n")


def test_reader_that_has_gone_has_its_code(place):
    """As a shell reports it for a program that SIGPIPE ends."""
    process = subprocess.Popen([*MYGPT, "recipe", "schema"], stdout=subprocess.PIPE, cwd=place)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 141


def test_disk_that_is_full_has_code_1(folder):
    """An outside failure, as opposed to a mistake."""
    place = folder("full")
    assert run_forked(("text.txt", *FLAGS, "--output", "run"), place, "disk-full") == 1
    assert os.path.lexists(place / "run")
