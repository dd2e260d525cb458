"""Names of the files in a run directory, and safe ways to read, write and remove them.

A run directory holds the resolved recipe, run.json, metrics.jsonl, timing.jsonl, evaluations.jsonl, one directory
`step-NNNNNN` per checkpoint, the files `latest` and `best`, which name one of these, and `.lock`. A step directory is
written as `.tmp-step-NNNNNN` and renamed when it is complete; before it is deleted it is renamed to
`.tmp-old-step-NNNNNN`.
"""

import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from mygpt.disk import WRONG_PLACE
from mygpt.disk import file_sha256 as file_sha256
from mygpt.disk import replace_bytes as replace_bytes
from mygpt.disk import sync as sync
from mygpt.errors import DamagedCheckpointError, DiskError, MygptError

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
MANIFEST_FILE = "manifest.json"
TIMING_FILE = "timing.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
LATEST_FILE = "latest"
BEST_FILE = "best"
LOCK_FILE = ".lock"
REPLACED_NAME = "replaced-run"
"""Of the directory with the run that `--overwrite` replaces; see mygpt/runs/replacing.py."""

ORIGIN_NAME = "origin"
"""Of the directory, in that of a fork, with the run as it was after the step after which the fork begins."""

METADATA_KEY = "mygpt"
"""The only metadata key of a safetensors file: with several keys safetensors orders them at random."""

STEP_NAME = re.compile(r"step-(\d{6}|[1-9]\d{6,})")
FAILED_NAME = re.compile(r"failed-step-(\d{6,})")
TEMPORARY_NAME = re.compile(r"\.tmp-(step-\d{6,}|failed-step-\d{6,}|old-.*|at-.*|[a-z]+(\.[a-z]+)?)")

# What belongs to a run, and is removed with it: not its lock, the run that it replaces, and what was kept as damaged.
RUN_ENTRY = re.compile(
    rf"recipe\.toml|run\.json|metrics\.jsonl|timing\.jsonl|evaluations\.jsonl|latest|best|{ORIGIN_NAME}"
    rf"|{STEP_NAME.pattern}|{FAILED_NAME.pattern}|{TEMPORARY_NAME.pattern}"
)

CANNOT_READ = "{path}: cannot be read: {reason}"
CANNOT_WRITE = "output: {file}: cannot be written: {reason}"
CANNOT_SAVE = "{path}: cannot be saved: {error}; earlier checkpoints are as they were"
MEND_DISK = "; mend the disk or make room, and the same command continues"


@contextmanager
def explain_disk_error(message: str, path: Path, kind: type[MygptError] = DiskError) -> Iterator[None]:
    """Raise a disk error as one of this `kind` whose message names {path}, {file}, {reason} or {error}.

    The file is the one that the system names in its error, or else the path.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        file, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        text = message.format(path=path, file=file or path, reason=reason or error, error=error)
        raise kind(text) from error


@contextmanager
def explain_refusal(out: Path) -> Iterator[None]:
    """Raise a disk error as a MygptError about the file `out`, with exit code 2 if another place would do."""
    try:
        yield
    except OSError as error:
        is_mistake = error.errno in WRONG_PLACE
        way = "choose another --out" if is_mistake else "mend the disk or make room, and give the same command again"
        code = 2 if is_mistake else 1
        raise MygptError(f"{out}: cannot be written: {error.strerror}; {way}", code) from None


def is_directory(path: Path) -> bool:
    """Whether it is a directory, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def real_path(path: Path) -> Path:
    """The path without links; unlike `Path.resolve`, links in a circle are no error here, but when it is read."""
    return Path(os.path.realpath(path))


def regular(file: Path) -> Path:
    """The file itself, which may be missing; OSError if it is a link, a directory or a device."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def read_bytes(file: Path) -> bytes:
    """The content of a regular file; DamagedCheckpointError if it cannot be read."""
    with explain_disk_error(CANNOT_READ, file, DamagedCheckpointError):
        return regular(file).read_bytes()


def replace_text(path: Path, text: str) -> None:
    """As `replace_bytes`, of UTF-8; a file that holds this text already is left as it is."""
    content = text.encode()
    with suppress(OSError):
        if regular(path).read_bytes() == content:
            return
    replace_bytes(path, content)


def publish(partial: Path, target: Path) -> None:
    """Rename a complete and synced temporary directory to its name; a damaged one of that name is set aside."""
    if os.path.lexists(target):
        set_aside(target)
    partial.rename(target)
    sync(target.parent)


def set_aside(path: Path, *, copy: bool = False) -> Path:
    """Rename a damaged entry, or copy it, to a free name that no run uses; returns that path."""
    names = (path.with_name(f"damaged-{path.name}-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    if copy:
        shutil.copyfile(path, aside)
        sync(aside)
    else:
        path.rename(aside)
    sync(aside.parent)
    return aside


def remove(entry: Path) -> None:
    """Remove a file, a link or a directory, which gets a temporary name first: half of it is no checkpoint."""
    if not is_directory(entry):
        entry.unlink()
        return
    if not TEMPORARY_NAME.fullmatch(entry.name):
        doomed = entry.with_name(f".tmp-old-{entry.name}")
        while os.path.lexists(doomed):
            doomed = doomed.with_name(f"{doomed.name}-again")
        entry = entry.rename(doomed)
        sync(entry.parent)  # or a power failure may leave the name, and not all files
    shutil.rmtree(entry, ignore_errors=True)  # files that a network disk keeps open are left for the next start
