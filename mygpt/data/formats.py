"""What a file holds, by its first bytes and its ending, and how to get at the text of a file that cannot be read."""

import codecs
import json
import shlex
from pathlib import Path
from typing import Literal

from mygpt.errors import CorpusError

HEAD = 1 << 16  # bytes at the beginning of a file that are looked at
COMPRESSED = {".gz": (b"\x1f\x8b", "a gzip file"), ".zst": (b"\x28\xb5\x2f\xfd", "a zstd file")}
PARQUET = b"PAR1"
DEFAULT_FIELD = "text"  # of a record, or the column, that has a document's text
Form = Literal["text", "JSON Lines", "a JSON array", "CSV", "Parquet"]
"""A text is one document; the others have a document in a field of each record."""
FORMS: dict[str, Form] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".json": "text",
    ".csv": "CSV",
    ".parquet": "Parquet",
}
"""By ending; what a .json holds depends on its first bytes."""

FOREIGN = (
    (0, b"PK\x03\x04", "a zip archive", "unpack it: unzip {}"),
    (257, b"ustar", "a tar archive", "unpack it: tar -xf {}"),
    (0, b"\xfd7zXZ\0", "an xz file", "decompress it: xz -dk {}"),
    (4, b"1AY&SY", "a bzip2 file", "decompress it: bunzip2 -k {}"),
    (0, b"%PDF-", "a PDF", "extract its text first, such as with pdftotext"),
)
"""Where the bytes are that tell a format, which they are, its name, and the way to its text."""
WORD = b"word/document.xml"  # the member of a zip archive that makes it a Word document
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def find_compression(file: Path, head: bytes) -> str:
    """The ending of the compression of a file that begins with `head`; "": it is not compressed."""
    by_bytes = (ending for ending, (magic, _) in COMPRESSED.items() if head.startswith(magic))
    return next(by_bytes, file.suffix.lower() if file.suffix.lower() in COMPRESSED else "")


def find_form(file: Path, head: bytes) -> Form:
    """The form of a file whose content begins with `head`, decompressed.

    Raises:
        CorpusError: it is no UTF-8 text; names its format and the way to its text.
    """
    path = shlex.quote(str(file))
    for offset, magic, name, way in FOREIGN:
        if head.startswith(magic, offset):
            if WORD in head and name == "a zip archive":
                name, way = "a Word document", "save it as plain text, or convert it, such as with pandoc -t plain"
            raise CorpusError(f"{file}: {name}; {way.format(path)}")
    if encoding := _wide_encoding(head):
        name = encoding[:6].upper()
        raise CorpusError(f"{file}: {name} text; convert it: {convert_command(file, encoding)}")
    if head.startswith(PARQUET):
        return "Parquet"
    ending = ending_of(file)
    return _form_of_json(head) if ending == ".json" else FORMS.get(ending, "text")


def ending_of(file: Path) -> str:
    """A file's last ending in small letters, without that of a compression; "": it has none."""
    return _decompressed_name(file).suffix.lower()


def convert_command(file: Path, encoding: str) -> str:
    """The command that makes a UTF-8 text of the file, beside it."""
    name, path, iconv = _decompressed_name(file), shlex.quote(str(file)), f"iconv -f {encoding} -t utf-8"
    out = shlex.quote(str(file.with_name(f"{name.stem}-utf8{name.suffix}")))
    unpack = {".gz": "gzip -dc", ".zst": "zstd -dc"}.get(file.suffix.lower())
    return f"{unpack} {path} | {iconv} > {out}" if unpack else f"{iconv} {path} > {out}"


def plain_json_note(file: Path | str) -> str:
    """About a .json that is one document."""
    return f"{file}: taken as plain text: it is no JSON array of objects, and its first line is no JSON object"


def prepare_command(file: Path) -> str:
    """The command that makes a corpus of the file."""
    return shlex.join(["mygpt", "data", "prepare", str(file), "--out", f"data/{_decompressed_name(file).stem}"])


def _decompressed_name(file: Path) -> Path:
    return Path(file.stem if file.suffix.lower() in COMPRESSED else file.name)


def _form_of_json(head: bytes) -> Form:
    """An array of objects, lines of which the first is an object, or else one text, as a file of settings is."""
    content = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if content.startswith(b"[") and content[1:].lstrip()[:1] in (b"{", b"]"):
        return "a JSON array"
    line, newline, _ = content.partition(b"\n")
    if line.startswith(b"{"):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return "text" if newline or len(head) < HEAD else "JSON Lines"
        return "JSON Lines"
    return "text"


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, as `iconv` calls it; without a byte order mark if more than half is Latin in that encoding."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" in head:
        for encoding, width in (("utf-32le", 4), ("utf-32be", 4), ("utf-16le", 2), ("utf-16be", 2)):
            latin = sum("\0" < character < "\u0250" for character in head.decode(encoding, "ignore"))
            if 2 * latin * width > len(head):
                return encoding
    return None
