"""Files that are written atomically, and hashed."""

import errno
import functools
import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

WRONG_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG),
)
"""Errors of a file or a folder that could be made in another place."""


def file_sha256(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@functools.cache
def code_sha256() -> str:
    """The sha256 of mygpt's own Python files, names and bytes: a comment counts, too."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: it holds the old or the new content, and the new one is on the disk on return."""
    partial = path.with_name(f".tmp-{path.name}")
    partial.unlink(missing_ok=True)  # a link that was left there would be followed
    try:
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)  # it may have filled the disk
        raise
    sync(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory and those above it; on return they are on the disk. Those that are there stay as they are."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    except OSError as error:
        # Some network and FUSE disks have no way to flush a directory.
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """Flush what was written to a descriptor to the disk. On macOS fsync leaves it in the cache of the drive.

    Source: fsync(2) of macOS.
    """
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:  # a disk that has fsync alone
            if error.errno not in UNSUPPORTED:
                raise
    os.fsync(descriptor)


UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY)
