"""Reads documents from files: plain text, JSON Lines and Parquet, also compressed, piece by piece.

Memory holds one piece of a text at a time, or one document of the other formats.
"""

import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from mygpt.errors import CorpusError

BLOCK = 1 << 20
"""Bytes read at a time."""
ZSTD_BLOCK = 1 << 9
"""Compressed bytes at a time: what they stand for is in memory at once, and can be thirty thousand times as much."""
ENDINGS = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".parquet")
COMPRESSED = (".gz", ".zst")


class Piece(NamedTuple):
    """A part of a document, with which it ends or not."""

    text: str
    is_last: bool


NULL = Piece("", is_last=True)
"""Stands for a document whose text is null: it is no document."""


class Source(NamedTuple):
    """A file that was read, as a manifest names it."""

    path: str
    bytes: int
    sha256: str


def find_sources(names: Sequence[str]) -> list[Path]:
    """The files that a user names: files, folders and patterns, each file once.

    A folder stands for all files of known endings in it but hidden ones. Those of a folder or a pattern come in the
    order of their paths.

    Raises:
        CorpusError: a name stands for no file.
    """
    if not names:
        raise CorpusError("expected a source: a file, a folder or a pattern")
    found: dict[str, Path] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = sorted(_files_in(path))
        elif path.exists():
            files = [path]
        else:
            files = sorted(path for path in map(Path, glob.glob(name, recursive=True)) if path.is_file())
        if not files:
            expected = f"a file, a pattern, or a folder with files that end in {', '.join(ENDINGS)}"
            raise CorpusError(f"{name}: no such source; expected {expected}, also compressed ({', '.join(COMPRESSED)})")
        for file in files:
            if not file.is_file():
                raise CorpusError(f"{file}: not a regular file")
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def is_plain(file: Path) -> bool:
    """Whether a file is read as one document, byte by byte as it is."""
    return file.suffix.lower() not in COMPRESSED and _kind(file) in (None, ".txt", ".text", ".md")


def _files_in(folder: Path) -> Iterator[Path]:
    """The files of known endings in a folder and those in it, but for hidden ones, as what mygpt is still writing.

    Links to folders are not followed: they may lead in a circle.
    """

    def refuse(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot be read: {error.strerror}") from None

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(parent, name) for name in names if not name.startswith("."))
        yield from (file for file in files if _kind(file) and file.is_file())


def read_pieces(file: Path, field: str, done: list[Source]) -> Iterator[Piece]:
    """The documents of a file in pieces; at its end its hash is added to `done`.

    A text file is one document. In the other formats each line or row is one: the text in `field`, or `NULL` itself.

    Raises:
        CorpusError: it cannot be read, is not of the format that its ending says, or is not UTF-8; or a package that
            its format needs is not installed.
    """
    kind = _kind(file) or ".txt"
    try:
        with file.open("rb") as raw:
            hashing = _Hashing(raw)
            if kind == ".parquet":
                yield from _parquet(file, raw, field)
                raw.seek(0)
            elif kind in (".jsonl", ".ndjson"):
                yield from _json_lines(file, _decompressed(file, hashing), field)
            else:
                yield from _text(file, _decompressed(file, hashing))
            while hashing.read(BLOCK):  # what a decompressor leaves unread
                pass
    except OSError as error:
        raise CorpusError(f"{file}: cannot be read: {error.strerror or error}") from None
    done.append(Source(name_in_manifest(file), hashing.size, hashing.hash.hexdigest()))


def name_in_manifest(file: Path) -> str:
    """The file's path in UTF-8, with other bytes escaped."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def _kind(file: Path) -> str | None:
    """The ending that says what a file holds, without that of a compression; None: another one."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in ENDINGS else None


class _Hashing(io.RawIOBase):
    """Hashes what is read through it."""

    def __init__(self, raw: IO[bytes]):
        self._raw, self.hash, self.size = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self.hash.update(data)
        self.size += len(data)
        return len(data)


def _decompressed(file: Path, raw: _Hashing) -> Iterator[bytes]:
    """The blocks of a file's content.

    Raises:
        CorpusError: it is not what its ending says, or is cut short.
    """
    ending = file.suffix.lower()
    stream: Any = io.BufferedReader(raw, BLOCK)
    try:
        if ending == ".gz":
            stream = gzip.GzipFile(fileobj=stream)
        elif ending == ".zst":
            yield from _zstd(file, stream)
            return
        is_empty = True
        while block := stream.read(BLOCK):
            is_empty = False
            yield block
        if is_empty and ending == ".gz" and not raw.size:
            raise CorpusError(f"{file}: damaged gzip: the file is empty")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{file}: damaged gzip: {error}") from None


def _zstd(file: Path, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise CorpusError(f"{file}: .zst needs zstandard: pip install 'mygpt[text]'") from None
    # Not the library's reader, which does not tell a frame that is cut short from one that ends.
    decompressor, frames = None, 0
    try:
        while block := stream.read(ZSTD_BLOCK):
            while block:
                decompressor = decompressor or zstandard.ZstdDecompressor().decompressobj()
                if data := decompressor.decompress(block):
                    yield data
                block = decompressor.unused_data
                if decompressor.eof:  # another frame may follow
                    decompressor, frames = None, frames + 1
    except zstandard.ZstdError as error:
        if "too much memory" in str(error):
            raise CorpusError(f"{file}: needs over 128 MiB to be decompressed; compress it without --long") from None
        if "Dictionary" in str(error):
            raise CorpusError(f"{file}: was compressed with a dictionary; compress it without") from None
        raise CorpusError(f"{file}: damaged zstd: {error}") from None
    if decompressor is not None or not frames:
        raise CorpusError(f"{file}: damaged zstd: it ends too early")


def _text(file: Path, blocks: Iterable[bytes]) -> Iterator[Piece]:
    decoder = getincrementaldecoder("utf-8")()
    offset = 0

    def decode(block: bytes, *, final: bool = False) -> str:
        pending = len(decoder.getstate()[0])
        if b"\0" in block:
            at = offset + block.index(b"\0")
            raise CorpusError(f"{file}: not a text: byte 0x00 at offset {at}; convert it to UTF-8")
        try:
            return decoder.decode(block, final)
        except UnicodeDecodeError as error:
            at, byte = offset - pending + error.start, error.object[error.start]
            raise CorpusError(f"{file}: not UTF-8: byte {byte:#04x} at offset {at}; convert it to UTF-8") from None

    for block in blocks:
        yield Piece(decode(block), is_last=False)
        offset += len(block)
    yield Piece(decode(b"", final=True), is_last=True)


def _json_lines(file: Path, blocks: Iterable[bytes], field: str) -> Iterator[Piece]:
    number, rest = 0, [b""]

    def document(line: bytes) -> Piece:
        try:
            text = json.loads(line)[field]
        except UnicodeDecodeError:
            raise CorpusError(f"{file}: line {number}: not UTF-8; convert it to UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{file}: line {number}: not JSON: {error}") from None
        except (TypeError, KeyError):
            raise CorpusError(f"{file}: line {number}: no JSON object with a field {field!r}; see --field") from None
        return _document(text, f"{file}: line {number}", field)

    for block in blocks:
        head, *lines = block.split(b"\n")
        rest.append(head)
        for line in lines:
            number += 1
            if whole := b"".join(rest).strip():
                yield document(whole)
            rest = [line]
    number += 1
    if whole := b"".join(rest).strip():
        yield document(whole)


def _parquet(file: Path, raw: IO[bytes], field: str) -> Iterator[Piece]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise CorpusError(f"{file}: .parquet needs pyarrow: pip install 'mygpt[text]'") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True) as table:
            columns = table.schema_arrow.names
            if field not in columns:
                raise CorpusError(f"{file}: has no column {field!r} but {', '.join(columns)}; see --field")
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    yield _document(value.as_py(), f"{file}: row {row}", field)
    except UnicodeDecodeError:
        raise CorpusError(f"{file}: row {row}: {field!r} is not UTF-8") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{file}: damaged Parquet: {str(error).splitlines()[0]}") from None


def _document(text: Any, where: str, field: str) -> Piece:
    if text is None:
        return NULL
    if isinstance(text, bytes):  # of a binary column
        text = text.decode()
    if not isinstance(text, str):
        raise CorpusError(f"{where}: {field!r} is {type(text).__name__}, expected text; see --field")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CorpusError(f"{where}: {field!r} has half of a surrogate pair, which is no text") from None
    return Piece(text, is_last=True)
