"""Run directories: where things are in them, how one is made, tidied and locked, and how a checkpoint in one is found.

A run directory holds the resolved recipe, run.json, metrics.jsonl, timing.jsonl, one directory `step-NNNNNN` per
checkpoint, `latest` and `best`, which name one of these, and `.lock`. A step directory has its name only once it is
whole: it is written as `.tmp-step-NNNNNN`, and removed as `.tmp-old-NNNNNN`. Imports no torch.
"""

import errno
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mygpt.errors import DamagedCheckpointError

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
MANIFEST_FILE = "manifest.json"
TIMING_FILE = "timing.jsonl"
LATEST_FILE = "latest"
BEST_FILE = "best"
LOCK_FILE = ".lock"

METADATA_KEY = "mygpt"
"""The only key: safetensors writes two or more in random order, and the file's bytes should be repeatable."""

STEP_NAME = re.compile(r"step-(\d{6,})")
FAILED_NAME = re.compile(r"failed-step-(\d{6,})")
TEMPORARY_NAME = re.compile(r"\.tmp-(step-\d{6,}|failed-step-\d{6,}|old-.*|[a-z]+(\.[a-z]+)?)")

# What a run writes into its directory; replacing a run removes nothing else.
RUN_ENTRY = re.compile(
    rf"recipe\.toml|run\.json|metrics\.jsonl|timing\.jsonl|latest|best"
    rf"|{STEP_NAME.pattern}|{FAILED_NAME.pattern}|{TEMPORARY_NAME.pattern}"
)


def file_sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# ---- keeping a run tidy


def publish(partial: Path, target: Path) -> None:
    """Give a complete, synced temporary directory its name.

    Whatever is in its place, which resuming has found to be damaged, is set aside under another name, and not deleted.
    """
    if os.path.lexists(target):
        set_aside(target)
    partial.rename(target)
    sync(target.parent)


def set_aside(path: Path, *, copy: bool = False) -> Path:
    """Keep what is damaged, or a copy of it, under a name that no run uses; returns that path."""
    names = (path.with_name(f"damaged-{path.name}-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    shutil.copyfile(path, aside) if copy else path.rename(aside)
    return aside


def remove(entry: Path) -> None:
    """Remove a file, a link or a directory of ours; a directory loses its name first, so that no part of it counts."""
    if entry.is_dir() and not entry.is_symlink():
        doomed = entry.with_name(f".tmp-old-{entry.name.removeprefix('.tmp-')}")
        if entry != doomed:
            while os.path.lexists(doomed):
                doomed = doomed.with_name(f"{doomed.name}-again")
            entry.rename(doomed)
        entry = doomed
    _delete(entry)


def _delete(entry: Path) -> None:
    # rmtree follows no links. What it cannot remove yet, as where a network disk has a file open, is swept later.
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink()


# ---- files


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one, on the disk when this returns."""
    content = text.encode()
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    partial = path.with_name(f".tmp-{path.name}")
    partial.unlink(missing_ok=True)  # a leftover could be a link
    partial.write_bytes(content)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the system write a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _regular(file: Path) -> Path:
    """The path itself, which must not be a link, a directory or a device."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise OSError(errno.EINVAL, "not a regular file")
    return file


@contextmanager
def _naming_disk(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DamagedCheckpointError(f"output: {error.filename or run}: cannot be written: {error.strerror}") from None
