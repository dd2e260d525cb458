"""The run that `--overwrite` replaces stays in RUN/replaced-run until the new run saves its first checkpoint.

The checkpoint of a run that a signal stops does not count: the user may have noticed a mistaken `--overwrite`.
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mygpt.disk import make_directory
from mygpt.errors import CheckpointError
from mygpt.recipe.files import RECIPE_FILE, RUN_FILE
from mygpt.runs import files
from mygpt.runs.files import REPLACED_NAME
from mygpt.runs.steps import step_directories, verify_checkpoint

PARTIAL_NAME = f".{REPLACED_NAME}"
"""Of the directory while the run is being moved there or back: the rest of it is where it was."""

KEPT = (RUN_FILE, RECIPE_FILE)
"""Copied, and never missing: the first marks a directory as a run, and the command may name the second."""


def set_aside_run(run: Path) -> None:
    """Move the run in this directory into RUN/replaced-run.

    If RUN/replaced-run holds a run already, and the run that was to replace it has no checkpoint that counts, the
    former stays, and the latter is removed.
    """
    replaced, partial = run / REPLACED_NAME, run / PARTIAL_NAME
    if files.is_directory(replaced):
        if not _has_counting_checkpoint(run):
            _remove_entries(run)
            return
        files.remove(replaced)
    make_directory(partial)
    for name in KEPT:
        if (run / name).is_file() and not (run / name).is_symlink():
            files.replace_bytes(partial / name, (run / name).read_bytes())
    for entry in _entries(run):
        entry.rename(partial / entry.name)
    files.sync(partial)
    partial.rename(replaced)
    files.sync(run)


def put_back(run: Path, *, partial_only: bool = False) -> bool:
    """Undo `set_aside_run` if the new run has no checkpoint, or, with `partial_only`, if it was killed in between.

    Returns whether a run has been put back. A kill at any moment leaves what the next call completes.

    Raises:
        DiskError: the disk refused it.
    """
    replaced, partial = run / REPLACED_NAME, run / PARTIAL_NAME
    with files.explain_disk_error(files.CANNOT_WRITE, run):
        if not partial_only and files.is_directory(replaced) and not step_directories(run):
            _remove_entries(run)
            for name in KEPT:
                if (replaced / name).exists():
                    files.replace_bytes(run / name, (replaced / name).read_bytes())
            replaced.rename(partial)
            files.sync(run)
        if not files.is_directory(partial):
            return False
        for entry in partial.iterdir():
            if entry.name not in KEPT:
                entry.rename(run / entry.name)
        files.sync(run)
        shutil.rmtree(partial)
    return True


def _entries(run: Path) -> Iterator[Path]:
    """What a run has written into its directory, without run.json and recipe.toml."""
    return (entry for entry in [*run.iterdir()] if files.RUN_ENTRY.fullmatch(entry.name) and entry.name not in KEPT)


def _has_counting_checkpoint(run: Path) -> bool:
    for directory in step_directories(run).values():
        with suppress(CheckpointError):
            if verify_checkpoint(directory).reason != "interrupted":
                return True
    return False


def _remove_entries(run: Path) -> None:
    # Checkpoints first: without them `put_back` completes this after a kill.
    for entry in sorted(_entries(run), key=lambda entry: not files.STEP_NAME.fullmatch(entry.name)):
        files.remove(entry)
