"""The README's commands, each run as it stands but shorter."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from support.commands import REPOSITORY, run_process

from mygpt.recipe.flags import parse_recipe

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SETUP = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt "
BIN = Path(sys.executable).parent

# A training command is cut down to these, so that step 1999 of 2000 becomes step 3 of 4.
SHORTER = {"steps": 4, "warmup": 2, "val_every": 2, "embed_dim": 16, "max_seq_len": 16, "seq_len": 16, "save_every": 3}


def shorten(words: list[str]) -> list[str]:
    """A training command with smaller values: in place where it names the key, at its end elsewhere."""
    target = next(i for i, word in enumerate(words) if word in ("train", "doctor") or word.endswith(".py")) + 1
    recipe, _ = parse_recipe(words[target:], "mygpt train")
    values = {key: value for _, table in recipe for key, value in table}
    if words[target].endswith(".toml") or "/" not in words[target]:
        # Any text does for seeing that a command runs.
        words += ["--corpus", "tinyshakespeare.txt"]
    for key, value in SHORTER.items():
        flag = f"--{key.replace('_', '-')}"
        if flag in words:
            words[words.index(flag) + 1] = str(value)
        elif values[key]:
            words += [flag, str(value)]
    if words[target - 1].endswith("benchmarks/step.py"):
        words += ["--rounds", "1", "--steps-per-round", "2"]
    return words


def test_fresh_machine_commands_are_the_ones_that_ci_runs():
    """The two commands for a fresh machine: set-up, then a whole first run or the tests. CI starts from the second."""
    first, second = COMMANDS[:2]
    assert first.startswith(SETUP + "-e . && mygpt train quickstart && mygpt generate ")
    assert second == SETUP + "-e '.[dev]' && pytest"
    assert "README.md" in (REPOSITORY / ".ci" / "run").read_text()


@pytest.mark.slow
def test_every_command_runs(text_file, tmp_path, monkeypatch):
    """In the README's order, from a folder like a checkout, so that later commands find what earlier ones made."""
    for folder in ("recipes", "scripts", "tests"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    (tmp_path / "tinyshakespeare.txt").symlink_to(text_file)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for command in [part for line in COMMANDS for part in line.split(" && ")]:
        words = shlex.split(
            command.replace("step-001999", "step-000003").replace("step-002000", "step-000004"), comments=True
        )
        if words[0] in ("python3", ".", "pip", "pytest"):
            continue
        if {"train", "doctor"} & set(words) or any(word.endswith(".py") for word in words):
            words = shorten(words)
        result = run_process([BIN / words[0], *words[1:]], tmp_path)
        # `compare` finds the runs identical that the README says are: it would exit with 1 otherwise.
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        ran += 1
    assert ran >= 20
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
def test_python_example_runs(text_file, tmp_path, command):
    """The lines for Python, on a run of the hardened recipe made small."""
    (tmp_path / "tinyshakespeare.txt").symlink_to(text_file)
    small = ["--corpus", text_file, "--steps", 2, "--warmup", 0, "--output", "checkpoints/hardened"]
    assert command("train", "hardened", *small).returncode == 0
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    result = run_process([sys.executable, "-W", "ignore::ResourceWarning", "-c", example], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ROMEO:")
    assert "loss = " in result.stdout
    assert (tmp_path / "checkpoints" / "mine.safetensors").is_file()


def test_recipe_example_is_a_recipe(tmp_path):
    """The TOML that the README shows can be run."""
    (example,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.toml").write_text(example)
    recipe, _ = parse_recipe([str(tmp_path / "mine.toml")], "mygpt train")
    assert recipe.validation.sampling == "full"


def test_every_key_is_in_the_table():
    """The README's table of keys is whole, and default.toml explains each of them."""
    from mygpt.recipe.tables import TABLE_OF_KEY

    rows = dict(re.findall(r"^\| `\[(\w+)\]` \| (.*) \|$", README, re.MULTILINE))
    named = {key: table for table, keys in rows.items() for key in re.findall(r"`(\w+)`", keys)}
    assert named == TABLE_OF_KEY
    spelled_out = (REPOSITORY / "recipes" / "default.toml").read_text()
    assert all(re.search(rf"^(# )?{key} = ", spelled_out, re.MULTILINE) for key in TABLE_OF_KEY)


def test_pictures_are_there():
    """Every file that the documentation links to exists."""
    for document in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", (REPOSITORY / document).read_text()):
            assert (REPOSITORY / link).exists(), link
    assert shutil.which("mygpt", path=str(BIN))
