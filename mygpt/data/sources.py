"""Finds files and reads documents from them: text, JSON, CSV and Parquet, also compressed, piece by piece.

Memory holds one piece of a text at a time, or one document of the other formats.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import zlib
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import IO, Annotated, Any, AnyStr, NamedTuple

from pydantic import Field

from mygpt.data.download import find_tinyshakespeare
from mygpt.data.formats import (
    COMPRESSED,
    DEFAULT_FIELD,
    FORMS,
    HEAD,
    PARQUET,
    Form,
    convert_command,
    ending_of,
    find_compression,
    find_form,
    plain_json_note,
    prepare_command,
)
from mygpt.errors import CorpusError, print_note
from mygpt.recipe.tables import Table

BLOCK = 1 << 20  # bytes read at a time
ZSTD_BLOCK = 1 << 9  # compressed; what they stand for is in memory at once, and can be thirty thousand times as much
MAX_RECORD = 1 << 26  # characters of a record of JSON or a field of CSV, which may not end where the file is damaged
BEFORE_FIRST, BEFORE_RECORD = re.compile(r"\s*\[\s*(?=\{)"), re.compile(r"\s*,\s*(?=\{)")  # of a JSON array
OWN_FOLDERS = {
    "run directory": {"run.json", "recipe.toml"},
    "prepared corpus": {"manifest.json", "tokens.safetensors"},
}
"""What mygpt makes, and the files by which it is known: what these hold is no text."""
MAX_COPIES, MAX_KINDS = 5, 8  # copies that are named, and kinds of files left out; the rest is counted


class Piece(NamedTuple):
    """A part of a document, with which it ends or not."""

    text: str
    is_last: bool


NULL = Piece("", is_last=True)
"""Stands for a document whose text is null: it is no document."""


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Source(Table):
    """A file that was read, as a manifest names it."""

    path: str
    bytes: int
    sha256: Sha256


class NoFieldError(CorpusError):
    """A record has no such field, or a table no such column."""


def find_sources(names: Sequence[str], field: str = DEFAULT_FIELD) -> list[Path]:
    """The files that a user names: files, folders, patterns and tinyshakespeare, each file and each content once.

    A folder stands for all files of known endings in it, without hidden files and mygpt's own folders. The files of a
    folder or a pattern come in the order of their paths. Notes say what is left out.

    Raises:
        CorpusError: a name stands for no file, or no file has fields, and `field` is not the default.
    """
    if not names:
        raise CorpusError("expected a source: a file, a folder or a pattern")
    found: dict[str, Path] = {}
    for name in names:
        path = Path(name)
        try:
            is_there = path.exists()
        except OSError as error:  # as of a name that is too long
            raise CorpusError(f"{name}: {error.strerror}; expected a file, a folder or a pattern") from None
        if path.is_dir():
            files = _files_in(path, field)
        elif is_there:
            files = [path]
        elif name == "tinyshakespeare":
            files = [find_tinyshakespeare()]
        else:
            files = sorted(path for path in map(Path, glob.glob(name, recursive=True)) if path.is_file())
        if not files:
            expected = f"a file, a pattern, or a folder with files that end in {', '.join(FORMS)}"
            raise CorpusError(f"{name}: no such source; expected {expected}, also compressed ({', '.join(COMPRESSED)})")
        for file in files:
            if not file.is_file():
                raise CorpusError(f"{file}: not a regular file")
            found.setdefault(os.path.realpath(file), file)
    return _each_content_once([*found.values()], field)


def decode_text(file: Path, raw: bytes) -> str:
    """The text of a file with these bytes, if it is one document, as `read_pieces` reads it.

    Raises:
        CorpusError: see `read_pieces`; or it has to be prepared.
    """
    form, compression, _ = identify(file, raw)
    if compression or form != "text":
        name = COMPRESSED[compression][1] if compression else form
        way = "" if compression or form == "Parquet" else "copy it to a .txt to take it as it is, or "
        raise CorpusError(f"{file}: {name}; {way}prepare it, and give the folder: {prepare_command(file)}")
    return "".join(piece.text for piece in _text(file, [raw]))


def identify(file: Path, content: bytes | None = None) -> tuple[Form, str, bytes]:
    """The form of a file, the ending of its compression ("": none), and the beginning of what it holds, decompressed.

    `content` is that of the file, if it is known.

    Raises:
        CorpusError: it cannot be read, or is no text.
    """
    try:
        with file.open("rb") if content is None else io.BytesIO(content) as raw:
            compression = find_compression(file, raw.read(HEAD))
            raw.seek(0)
            head, _ = _peek(_decompressed(file, _Hashing(raw)))
    except OSError as error:
        raise CorpusError(f"{file}: cannot be read: {error.strerror or error}") from None
    return find_form(file, head), compression, head


def _files_in(folder: Path, field: str) -> list[Path]:
    """The files of known endings in a folder and its subfolders. Hidden files, such as unfinished ones, are left out.

    Links to folders are not followed: they may lead in a circle. A note counts what is left out.
    """

    def refuse(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot be read: {error.strerror}") from None

    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for parent, folders, names in os.walk(folder, onerror=refuse):
        if own := next((kind for kind, known in OWN_FOLDERS.items() if known <= {*names}), None):
            left_out[own] += 1
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        left_out["link to a folder"] += sum(Path(parent, name).is_symlink() for name in folders)
        for file in (Path(parent, name) for name in names if not name.startswith(".")):
            ending = ending_of(file)
            if not file.is_file() or ending not in FORMS:
                is_compressed = file.suffix.lower() in COMPRESSED
                left_out[Path(file.stem).suffix * is_compressed + file.suffix or "no ending"] += 1
            elif ending in (".json", ".csv") and not _has_field(file, field):
                left_out[f"{ending} without {field!r}"] += 1
            else:
                files.append(file)
    if left_out := +left_out:
        kinds = sorted(left_out, key=lambda kind: (-left_out[kind], kind))
        shown = [f"{kind} ({left_out[kind]:,})" for kind in kinds[:MAX_KINDS]]
        if others := sum(left_out[kind] for kind in kinds[MAX_KINDS:]):
            shown.append(f"others ({others:,})")
        if not files:
            named = next((kind for kind in kinds if kind.startswith(".") and " " not in kind), None)
            pattern = shlex.quote(f"{glob.escape(str(folder))}/**/*{named}")
            way = f"; to read all {named} as texts: {pattern}" if named else ""
            raise CorpusError(f"{folder}: no texts in it, only: {', '.join(shown)}{way}")
        print_note(f"note: {folder}: left out: {', '.join(shown)}")
    return sorted(files)


def _has_field(file: Path, field: str) -> bool:
    """Whether a file has records with this field. True of a file that cannot be read: reading it says why."""
    try:
        if identify(file)[0] == "text":
            return False
        next(read_pieces(file, field, []), None)
    except NoFieldError:
        return False
    except CorpusError:
        pass
    return True


def _each_content_once(files: Sequence[Path], field: str) -> list[Path]:
    """The files without copies, which hold, decompressed, the same bytes as an earlier file; notes name the copies."""
    kept: list[Path] = []
    copies: list[str] = []
    alike: dict[tuple[Form, bytes], list[Path]] = {}
    sha256, has_fields = cache(_content_sha256), False
    for file in files:
        try:
            form, _, head = identify(file)
            others = alike.setdefault((form, hashlib.sha256(head).digest()), [])
            # Only of files that begin alike is all compared.
            same = next((other for other in others if head and sha256(other) == sha256(file)), None)
        except (CorpusError, OSError):  # reading it says why
            kept.append(file)
            has_fields = True
            continue
        has_fields |= form != "text"
        if form == "text" and ending_of(file) == ".json":
            print_note(f"note: {plain_json_note(file)}")
        if same:
            copies.append(f"note: {file}: passed over: it holds the same as {same}")
        else:
            others.append(file)
            kept.append(file)
    if field != DEFAULT_FIELD and not has_fields:
        raise CorpusError(
            f"--field {field}: no source has such a field; correct it, or leave it out if all sources are plain texts"
        )
    for copy in copies[:MAX_COPIES]:
        print_note(copy)
    if len(copies) > MAX_COPIES:
        print_note(f"note: {len(copies) - MAX_COPIES:,} more files passed over that hold the same as another")
    return kept


def _content_sha256(file: Path) -> bytes:
    """The hash of what a file holds, decompressed."""
    digest = hashlib.sha256()
    with file.open("rb") as raw:
        for block in _decompressed(file, _Hashing(raw)):
            digest.update(block)
    return digest.digest()


def read_pieces(file: Path, field: str, done: list[Source]) -> Iterator[Piece]:
    """The documents of a file in pieces; at its end its hash is added to `done`.

    A text file is one document. In the other formats each line, record or row is one: the text in `field`, or `NULL`
    itself.

    Raises:
        CorpusError: it cannot be read, is not of the format that its ending says, or is not UTF-8; or a package that
            its format needs is not installed.
    """
    try:
        with file.open("rb") as raw:
            hashing = _Hashing(raw)
            head, blocks = _peek(_decompressed(file, hashing))
            form = find_form(file, head)
            if form == "Parquet":
                yield from _parquet(file, raw, head, field)
                raw.seek(0)
                hashing = _Hashing(raw)
            elif form == "JSON Lines":
                yield from _json_lines(file, blocks, field)
            elif form == "text":
                yield from _text(file, blocks)
            else:
                texts = filter(None, (piece.text for piece in _text(file, blocks)))
                start = next(texts, "").removeprefix("\ufeff")
                yield from (_csv if form == "CSV" else _json_array)(file, filter(None, chain([start], texts)), field)
            while hashing.read(BLOCK):  # what a decompressor leaves unread
                pass
    except OSError as error:
        raise CorpusError(f"{file}: cannot be read: {error.strerror or error}") from None
    done.append(Source(path=name_in_manifest(file), bytes=hashing.size, sha256=hashing.hash.hexdigest()))


def name_in_manifest(file: Path) -> str:
    """The file's path in UTF-8, with other bytes escaped."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


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
    """The blocks of a file's content."""
    stream: Any = io.BufferedReader(raw, BLOCK)
    head = stream.peek(4)
    try:
        ending = find_compression(file, head)
        if ending == ".zst":
            yield from _zstd(file, stream)
            return
        if ending == ".gz":
            if not head:
                raise CorpusError(f"{file}: damaged gzip: the file is empty")
            stream = gzip.GzipFile(fileobj=stream)
        while block := stream.read(BLOCK):
            yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{file}: damaged gzip: {error}") from None


def _peek(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first bytes of some blocks, and all of the blocks."""
    first, size = list[bytes](), 0
    for block in blocks:
        first.append(block)
        size += len(block)
        if size >= HEAD:
            break
    return b"".join(first)[:HEAD], chain(first, blocks)


def _zstd(file: Path, stream: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise CorpusError(f"{file}: .zst needs zstandard: pip install zstandard") from None
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
    decoder, offset = getincrementaldecoder("utf-8")(), 0
    for block in chain(blocks, [b""]):  # an empty one stands for the file's end
        if b"\0" in block:
            at = offset + block.index(b"\0")
            raise CorpusError(f"{file}: not a text: byte 0x00 at offset {at}; remove such bytes, if the rest is text")
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at, byte = offset - pending + error.start, error.object[error.start]
            way = f"convert it to UTF-8; if it is Windows-1252: {convert_command(file, 'cp1252')}"
            raise CorpusError(f"{file}: not UTF-8: byte {byte:#04x} at offset {at}; {way}") from None
        yield Piece(text, is_last=not block)
        offset += len(block)


def _json_lines(file: Path, blocks: Iterable[bytes], field: str) -> Iterator[Piece]:
    for number, line in enumerate(map(bytes.strip, _lines(blocks, b"\n")), start=1):
        if not line:
            continue
        where = f"{file}: line {number}"
        try:
            text = json.loads(line)[field]
        except UnicodeDecodeError:
            raise CorpusError(f"{where}: not UTF-8; convert it to UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where}: not JSON: {error}") from None
        except (TypeError, KeyError):
            raise NoFieldError(f"{where}: no JSON object with a field {field!r}; see --field") from None
        yield _document(text, where, field)


def _json_array(file: Path, texts: Iterable[str], field: str) -> Iterator[Piece]:
    """The documents of an array in `texts`, none of which is empty."""
    text, number, scan = "", 0, json.JSONDecoder().raw_decode
    for part in chain(texts, [""]):  # an empty one stands for the file's end
        text, at = text + part, 0
        while before := (BEFORE_RECORD if number else BEFORE_FIRST).match(text, at):
            try:
                record, end = scan(text, before.end())
            except (ValueError, RecursionError) as error:
                if part and len(text) - at < MAX_RECORD:
                    break  # the rest of the record may follow
                reason = str(error).partition(":")[0]  # a position follows, of what has been read
                raise CorpusError(f"{file}: record {number + 1}: not JSON: {reason}") from None
            number, at = number + 1, end
            where = f"{file}: record {number}"
            if field not in record:
                raise _no_field(where, "field", field, record)
            yield _document(record[field], where, field)
        text = text[at:]
        if not before:
            text = "".join(text.split())
            if text not in (["", ",", "]"] if number else ["", "[", "[]"]) or not (part or text.endswith("]")):
                raise CorpusError(f"{file}: after record {number}: expected , and an object, or ] at the end")


def _csv(file: Path, texts: Iterable[str], field: str) -> Iterator[Piece]:
    csv.field_size_limit(MAX_RECORD)  # of all readers: a document may be longer than the default
    rows = csv.reader(_lines(texts, "\n"), strict=True)
    try:
        columns = next(rows, [])
        if field not in columns:
            raise _no_field(file, "column", field, columns)
        for row in filter(None, rows):
            if len(row) != len(columns):
                raise CorpusError(f"{file}: line {rows.line_num}: {len(row)} columns, expected {len(columns)}")
            yield Piece(row[columns.index(field)], is_last=True)
    except csv.Error as error:
        raise CorpusError(f"{file}: line {rows.line_num}: not CSV: {error}") from None


def _no_field(where: object, kind: str, field: str, names: Iterable[str]) -> NoFieldError:
    others = ", ".join(names)
    return NoFieldError(f"{where}: has no {kind}" + (f" {field!r} but {others}; see --field" if others else "s"))


def _lines(parts: Iterable[AnyStr], newline: AnyStr) -> Iterator[AnyStr]:
    """The lines of a text with their ends."""
    rest: list[AnyStr] = []
    nothing = newline[:0]
    for part in parts:
        pieces = part.split(newline)
        for line in pieces[:-1]:
            rest.append(line)
            yield nothing.join(rest) + newline
            rest.clear()
        rest.append(pieces[-1])
    if last := nothing.join(rest):
        yield last


def _parquet(file: Path, raw: IO[bytes], head: bytes, field: str) -> Iterator[Piece]:
    raw.seek(0)
    if head.startswith(PARQUET) and raw.read(len(PARQUET)) != PARQUET:
        raise CorpusError(f"{file}: Parquet in a compressed file; decompress it")
    try:
        import pyarrow.parquet
    except ImportError:
        raise CorpusError(f"{file}: .parquet needs pyarrow: pip install pyarrow") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True) as table:
            columns = table.schema_arrow.names
            if field not in columns:
                raise _no_field(file, "column", field, columns)
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
