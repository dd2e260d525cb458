"""Files that are written atomically, and hashed."""

import functools
import hashlib
import os
from contextlib import suppress
from pathlib import Path


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


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
