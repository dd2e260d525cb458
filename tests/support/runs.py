"""Small recipes, and what their runs leave on the disk."""

import hashlib
import time
from pathlib import Path

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


def flags_of(keys) -> list[str]:
    """The keys as flags, each followed by its value."""
    return [part for key, value in keys.items() for part in (f"--{key.replace('_', '-')}", str(value))]


FLAGS = flags_of(TINY)


def contents(run: Path) -> dict[str, str]:
    """The hash of every file of a run but timing.jsonl, and the names of its directories.

    A run names its text by an absolute path: that of the folder around the run does not count.
    """
    folder = str(run.resolve().parent).encode()
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes().replace(folder, b"FOLDER")).hexdigest()
        if path.is_file()
        else "directory"
        for path in run.rglob("*")
        if path.name != "timing.jsonl"
    }


def assert_undisturbed(place, quiet_place):
    """The run directory and what was printed are those of the run that was never disturbed."""
    assert contents(place / "run") == contents(quiet_place / "run")
    assert (place / "out").read_text() == (quiet_place / "out").read_text()


def wait_for(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "what is waited for does not happen"
        time.sleep(0.005)
