"""Run directories: where things are in them, how one is made, tidied and locked, and how a checkpoint in one is found.

A run directory holds the resolved recipe, run.json, metrics.jsonl, timing.jsonl, one directory `step-NNNNNN` per
checkpoint, `latest` and `best`, which name one of these, and `.lock`. A step directory has its name only once it is
whole: it is written as `.tmp-step-NNNNNN`, and removed as `.tmp-old-NNNNNN`. Imports no torch.
"""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mygpt.errors import CheckpointError, DamagedCheckpointError
from mygpt.runs.files import LOCK_FILE, sync


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make the run directory where there is none, and keep other processes from writing to it.

    The kernel releases the lock when the process ends, however that ends. It is on a file that is open for writing: on
    NFS a lock on a directory holds for one machine only, and a file must be writable for a lock that holds for all.

    Raises:
        CheckpointError: another process trains into it.
        DamagedCheckpointError: the disk refused it.
    """
    is_new = not run.exists()
    try:
        descriptor = _lock(run)
    except BlockingIOError:
        raise CheckpointError(
            f"output: another process is training into {run}; wait for it, or choose another --output"
        ) from None
    except OSError as error:
        raise DamagedCheckpointError(f"output: {run}: cannot be written: {error.strerror}") from None
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
    """The descriptor of the lock file of `run`, locked if the disk has locks.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the disk refused the directory or the file.
    """
    file = run / LOCK_FILE
    while True:
        if not run.exists():
            run.mkdir(parents=True, exist_ok=True)
            sync(run.parent)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # a run that ended meanwhile has removed its directory
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            print(f"{run}: cannot be locked ({error.strerror}): see that no two runs write there", file=sys.stderr)
            return descriptor
        # The process that held it may have removed the file since it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.lstat()):
                return descriptor
        os.close(descriptor)
