"""Small recipes, and comparisons of their run directories."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mygpt.runs.held_out import Evaluation, Windows
from mygpt.runs.records import read_records

# Small enough for a training run in a tenth of a second.
TINY = {
    "embed_dim": 16,
    "num_heads": 2,
    "num_layers": 2,
    "max_seq_len": 16,
    "seq_len": 16,
    "batch_size": 4,
    "steps": 6,
    "threads": 1,
    "log_every": 1,
    "device": "cpu",
}

# Their bytes do not depend on the number of processes.
EXACT = TINY | {"reduction": "exact", "dropout": 0.1, "save_every": 1, "keep_last": 0}


def flags_of(keys) -> list[str]:
    """The keys as flags with their values; one that is True is a flag alone."""
    flags = []
    for key, value in keys.items():
        flags += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


FLAGS = flags_of(TINY)


def contents(run: Path, *, without=()) -> dict[str, str]:
    """The hash of every file of a run but timing.jsonl and `without`, and the names of its directories.

    A run holds the absolute path of its text: the folder around the run is left out of it.
    """
    folder = str(run.resolve().parent).encode()
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes().replace(folder, b"FOLDER")).hexdigest()
        if path.is_file()
        else "directory"
        for path in run.rglob("*")
        if path.name not in ("timing.jsonl", *without)
    }


def steps_of(run: Path) -> list[int]:
    """The steps whose checkpoints a run has."""
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


def evaluation_of(losses, *, step=0, tokens=1, consecutive=False, starts=None) -> Evaluation:
    """An evaluation whose windows, of so many tokens each, have these losses per token."""
    losses = np.atleast_1d(np.asarray(losses, dtype=np.float32))
    lengths = np.full(len(losses), tokens, dtype=np.int32)
    starts = np.arange(len(losses)) * tokens if starts is None else starts
    return Evaluation(step, Windows(starts, lengths, lengths, consecutive), losses * tokens)


def latest_step(run: Path) -> int:
    return int((run / "latest").read_text().removeprefix("step-"))


def model_bytes(run: Path) -> bytes:
    """The newest weights."""
    return (run / f"step-{latest_step(run):06d}" / "model.safetensors").read_bytes()


def assert_same_run(run: Path, expected: Path):
    """The newest weights and state, records and evaluations have the bytes of the run in `expected`."""
    step = (expected / "latest").read_text().strip()
    names = [f"{step}/model.safetensors", f"{step}/state.safetensors", "metrics.jsonl"]
    names += ["evaluations.jsonl"] if (expected / "evaluations.jsonl").exists() else []
    for name in names:
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name


def assert_close_records(run: Path, expected: Path, *names, **tolerance):
    """The records of `run` have the values of the records of `expected`, within the tolerance of pytest.approx."""
    for record, other in zip(read_records(run), read_records(expected), strict=True):
        for name in names:
            value = getattr(other, name)
            assert getattr(record, name) == (value and pytest.approx(value, **tolerance)), (record.step, name)


def assert_undisturbed(place, undisturbed_place):
    """The run in `place` and its printed lines equal the run that was never disturbed."""
    assert contents(place / "run") == contents(undisturbed_place / "run")
    assert (place / "out").read_text() == (undisturbed_place / "out").read_text()
