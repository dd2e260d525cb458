"""Reads the files that a user names, such as recipes, and explains why one cannot be read."""

from pathlib import Path

from mygpt.errors import MygptError


def read_file(
    path: Path, error_type: type[MygptError], *, expected: str, missing: str, unreadable: str = "cannot be read"
) -> bytes:
    """The bytes of a regular file.

    Raises:
        error_type: the path is `missing`, is not the kind of file `expected`, or is `unreadable`.
    """
    try:
        if path.exists() and not path.is_file():
            raise error_type(f"{path}: not a regular file; expected {expected}")
        return path.read_bytes()
    except FileNotFoundError:
        raise error_type(f"{path}: {missing}") from None
    except OSError as error:
        raise error_type(f"{path}: {unreadable}: {error.strerror}") from None
    except ValueError as error:  # a path with a NUL character
        raise error_type(f"{str(path)!r}: not a path: {error}") from None


def decode_utf8(raw: bytes, path: Path, error_type: type[MygptError], remedy: str = "") -> str:
    """The text in the bytes of the file `path`.

    Raises:
        error_type: they are not UTF-8; the message ends with `remedy`.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte {raw[error.start]:#04x} at offset {error.start}"
        raise error_type(f"{path}: not UTF-8: {place}{remedy}") from None
