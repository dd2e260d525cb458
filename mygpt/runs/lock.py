"""The lock of a run directory, which keeps two processes from training into it at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mygpt.disk import make_directory
from mygpt.errors import CheckpointError
from mygpt.posix import lock_file
from mygpt.runs.files import CANNOT_WRITE, LOCK_FILE, explain_disk_error


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which is made if it is missing.

    Raises:
        CheckpointError: another process trains into it.
        DiskError: the disk refused it.
    """
    is_new = not run.exists()
    descriptor: int | None = None
    with explain_disk_error(CANNOT_WRITE, run):
        while descriptor is None:
            if not run.exists():
                make_directory(run)
            with suppress(FileNotFoundError):  # a run that ended meanwhile has removed its directory
                try:
                    descriptor = lock_file(run / LOCK_FILE)
                except BlockingIOError:
                    raise CheckpointError(
                        f"output: another process is training into {run}; wait for it, or choose another --output"
                    ) from None
    try:
        yield
    finally:
        # A run that failed before it wrote anything leaves nothing.
        with suppress(OSError):
            if [entry.name for entry in run.iterdir()] == [LOCK_FILE]:
                (run / LOCK_FILE).unlink()
                if is_new:
                    run.rmdir()
        os.close(descriptor)
