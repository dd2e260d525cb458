"""What only POSIX systems have: file locks and limits. Where they are missing, importing this says what to do."""

import os
from contextlib import suppress
from pathlib import Path

from mygpt.errors import MygptError, print_note

try:
    import fcntl
    import resource as resource
except ImportError:
    raise MygptError(
        "this needs the file locks and signals of Linux or macOS; on Windows run mygpt in WSL, which `wsl --install` "
        "sets up"
    ) from None


def lock_file(file: Path) -> int:
    """Open a file, which is made if it is missing, and lock it until the returned descriptor is closed.

    The kernel frees the lock of a killed process. The process that holds the lock may remove the file. Where the disk
    has no locks, a note says so.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be opened.
    """
    # The package filelock would not do: where a disk has no locks, it fails or relies on a file that a killed process
    # leaves behind.
    while True:
        # On NFS a lock on a directory holds for one machine only, and a lock on a file needs a writable descriptor.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            print_note(f"{file.parent}: cannot be locked ({error.strerror}): see that no two commands write there")
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.lstat()):
                return descriptor
        os.close(descriptor)  # the process that held the lock has removed this file
