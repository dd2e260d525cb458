"""The lock of a run directory, which keeps two processes from training into it at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mygpt.disk import make_directory
from mygpt.errors import CheckpointError, print_note
from mygpt.posix import fcntl
from mygpt.runs.files import CANNOT_WRITE, LOCK_FILE, explain_disk_error


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which is made if it is missing. The kernel frees the lock of a killed process.

    Raises:
        CheckpointError: another process trains into it.
        DamagedCheckpointError: the disk refused it.
    """
    is_new = not run.exists()
    with explain_disk_error(CANNOT_WRITE, run):
        descriptor = _lock(run)
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


def _lock(run: Path) -> int:
    """The descriptor of the lock file, locked unless the disk has no locks.

    On NFS a lock on a directory holds for one machine only, and a lock on a file needs a descriptor that may write.
    """
    file = run / LOCK_FILE
    while True:
        if not run.exists():
            make_directory(run)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # a run that ended meanwhile has removed its directory
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"output: another process is training into {run}; wait for it, or choose another --output"
            ) from None
        except OSError as error:
            print_note(f"{run}: cannot be locked ({error.strerror}): see that no two runs write there")
            return descriptor
        # The process that held it may have removed the file since it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.lstat()):
                return descriptor
        os.close(descriptor)
