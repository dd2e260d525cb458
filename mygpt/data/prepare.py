"""Makes a prepared corpus of text files on all cores and in bounded memory; can be killed and continued.

The documents are cut into chunks that depend on the sources alone. The tokens of each are appended to a file, and a
journal has a record of each chunk: the hashes of its text and of its tokens. The same command reads the sources again,
and goes on after the chunks whose hashes are right: it gives the same bytes as a command that was never killed.
"""

import errno
import hashlib
import itertools
import json
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from mygpt.cores import core_count
from mygpt.data.build import tokenizer_from
from mygpt.data.formats import DEFAULT_FIELD
from mygpt.data.prepared import (
    HEADER_BYTES,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    TOKENS_FILE,
    TYPES,
    CorpusManifest,
    header,
    type_name,
)
from mygpt.data.sources import NULL, Piece, Source, read_pieces
from mygpt.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    TokenizerMetadata,
    distinct_code_points,
    fingerprint,
)
from mygpt.disk import WRONG_PLACE, file_sha256, flush, make_directory, replace_bytes, sync
from mygpt.errors import CorpusError, DiskError, MygptError, TokenizerError, counted, print_note
from mygpt.posix import lock_file
from mygpt.recipe.reading import read_file

CHUNK = 1 << 20  # characters that one thread tokenizes at a time
PIECE_COST = 64  # what a document adds to a chunk beside its characters, so that many empty ones make a chunk, too
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_SAMPLE = 1 << 26  # characters to train an encoding on; the library needs some thirty times their memory
SYNC_SECONDS = 1.0  # of work that a power failure can cost
JOURNAL_FILE = "journal"
SETTINGS_FILE = "settings.json"
WORKING_FILES = (SETTINGS_FILE, JOURNAL_FILE, TOKENIZER_FILE, TOKENS_FILE, MANIFEST_FILE)

Progress = Callable[[int], None]
"""Is given the number of bytes of text that have been encoded since the last call."""


class Encoded(NamedTuple):
    """A chunk, which is consecutive pieces of documents, as tokens."""

    sha256: bytes
    """The hash of their text, and of where documents end."""
    ids_sha256: bytes
    """The hash of all else in the record; see `_ids_sha256`."""
    tokens: int
    documents: int
    text_bytes: int
    ids: npt.NDArray[np.integer] | None = None
    """The ids of the tokens; None: the file has them already."""


RECORD = struct.Struct("<32s32sQQQ")  # of an `Encoded` in the journal


class TokenizerChoice(NamedTuple):
    """Which tokenizer a corpus gets."""

    kind: str
    vocab_size: int
    file: Path | None


def prepare(
    sources: Sequence[Path],
    out: Path,
    choice: TokenizerChoice,
    *,
    field: str = DEFAULT_FIELD,
    workers: int | None = None,
    progress: Progress = lambda _: None,
) -> CorpusManifest:
    """Make the prepared corpus `out` of these files; a command that was killed is continued.

    Raises:
        CorpusError: a source cannot be read, or `out` exists.
        DiskError: the disk refused it.
        TokenizerError: the tokenizer cannot be made.
    """
    if os.path.lexists(out) or out.name in ("", ".."):
        raise CorpusError(f"{out}: exists; choose another --out, or remove it")
    partial = out.with_name(f".tmp-{out.name}")
    missing = [parent for parent in out.parents if not os.path.lexists(parent)]
    try:
        make_directory(out.parent)
        with _locked(out):
            if partial.is_symlink() or (partial.exists() and not _is_own(partial)):
                raise CorpusError(f"{partial}: in the way of the folder to work in; remove it, or choose another --out")
            make_directory(partial)
            try:
                tokenizer, trained_on = _tokenizer(partial, sources, choice, field)
                workers = workers or core_count()
                manifest = _write_tokens(partial, sources, tokenizer, trained_on, field, workers, progress)
            except MygptError as error:
                if kept := _kept_bytes(partial):
                    how = f"mend this, and the command continues after the {kept:,} bytes of text that {partial} keeps"
                    raise type(error)(f"{error}; {how}", error.exit_code) from None
                _clear(partial)
                partial.rmdir()
                raise
            replace_bytes(partial / MANIFEST_FILE, manifest.to_json().encode())
            for name in (SETTINGS_FILE, JOURNAL_FILE):
                (partial / name).unlink(missing_ok=True)
            sync(partial)
            partial.rename(out)
            sync(out.parent)
            return manifest
    except MygptError:
        _remove_empty(missing)
        raise
    except OSError as error:
        text = f"{error.filename or partial}: {error.strerror or error}"
        if error.errno in WRONG_PLACE:
            _remove_empty(missing)
            raise CorpusError(f"{text}; choose another --out") from None
        advice = "make room, and the same command continues" if error.errno in NO_ROOM else "the same command continues"
        raise DiskError(f"{text}; {advice}") from None


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it was not made, or another command uses it
            folder.rmdir()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other commands from preparing `out` meanwhile."""
    path, refusal = out.with_name(f".tmp-{out.name}.lock"), f"{out}: another command prepares it, or has just done so"
    try:
        descriptor = lock_file(path)
    except BlockingIOError:
        raise CorpusError(refusal) from None
    try:
        if os.path.lexists(out):
            raise CorpusError(refusal)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_own(partial: Path) -> bool:
    """Whether a folder has nothing but what a command that was killed may have left there."""
    return partial.is_dir() and all(path.name.removeprefix(".tmp-") in WORKING_FILES for path in partial.iterdir())


def _clear(partial: Path) -> None:
    """Remove what a command has written. The settings go first: without them the other files are not used."""
    for name in WORKING_FILES:
        for path in (partial / name, partial / f".tmp-{name}"):
            path.unlink(missing_ok=True)
    sync(partial)


def _kept_bytes(partial: Path) -> int:
    """How many bytes of text are encoded in the folder to work in, as its journal says."""
    journal = partial / JOURNAL_FILE
    return sum(encoded.text_bytes for encoded in _records(journal.read_bytes())) if journal.exists() else 0


def _records(journal: bytes) -> Iterator[Encoded]:
    whole = len(journal) - len(journal) % RECORD.size  # the last record may be cut short
    return itertools.starmap(Encoded, RECORD.iter_unpack(journal[:whole]))


def _tokenizer(
    partial: Path, sources: Sequence[Path], choice: TokenizerChoice, field: str
) -> tuple[Tokenizer, dict[str, Any] | None]:
    """The tokenizer that a killed command has kept, if it is of the same settings and files; otherwise a new one."""
    settings, made_tokens = _settings(sources, choice, field), ""
    with suppress(OSError, ValueError, KeyError, TypeError):  # pydantic's errors are ValueErrors
        before = json.loads((partial / SETTINGS_FILE).read_bytes())
        made_tokens = before["tokenizer_sha256"]
        if before["settings"] == settings:
            kept: Any = TypeAdapter(TokenizerMetadata).validate_json((partial / TOKENIZER_FILE).read_bytes())
            if fingerprint(kept) == made_tokens:
                return tokenizer_from(kept), before["trained_on"]
    tokenizer, trained_on = _make_tokenizer(sources, choice, field)
    if tokenizer.fingerprint != made_tokens:
        _clear(partial)
    metadata = json.dumps(tokenizer.metadata.model_dump(), sort_keys=True)
    replace_bytes(partial / TOKENIZER_FILE, metadata.encode())
    record = {"settings": settings, "tokenizer_sha256": tokenizer.fingerprint, "trained_on": trained_on}
    replace_bytes(partial / SETTINGS_FILE, json.dumps(record).encode())
    return tokenizer, trained_on


def _settings(sources: Sequence[Path], choice: TokenizerChoice, field: str) -> list[Any]:
    """Everything on which the tokenizer depends, as JSON."""
    settings: list[Any] = [choice.kind, choice.vocab_size, field]
    if choice.file:
        settings.append(
            read_file(choice.file, TokenizerError, expected="a tokenizer.json", missing="no such file").hex()
        )
    elif choice.kind in ("char", "bpe"):  # made of the text
        settings += [[str(file), (found := file.stat()).st_size, found.st_mtime_ns] for file in sources]
    return settings


def _make_tokenizer(
    sources: Sequence[Path], choice: TokenizerChoice, field: str
) -> tuple[Tokenizer, dict[str, Any] | None]:
    if choice.kind == "byte":
        return ByteTokenizer(end_of_text=True), None
    pieces = read_all(sources, field, [])
    if choice.kind == "char":
        vocab = distinct_code_points(piece.text for piece in pieces)
        return CharTokenizer("".join(map(chr, vocab)), end_of_text=True), None
    from mygpt.data import bpe  # an extra

    if choice.kind == "gpt2":
        return bpe.gpt2(), None
    if choice.file:
        return bpe.read_tokenizer(choice.file), None
    texts = ([piece.text for piece in chunk] for chunk in chunks(pieces, bpe.cut_words))
    sample = take_sample(texts, MAX_SAMPLE)
    if not any(sample):
        raise _no_text(sources)
    digest = hashlib.sha256()
    for text in sample:
        digest.update(text.encode())
    trained_on = {"bytes": sum(len(text.encode()) for text in sample), "sha256": digest.hexdigest()}
    return bpe.train_bpe(sample, choice.vocab_size), trained_on


def _no_text(sources: Sequence[Path]) -> CorpusError:
    named = ", ".join(map(str, sources[:3]))
    if len(sources) > 3:
        return CorpusError(f"{named} and {len(sources) - 3:,} more: have no text in them")
    return CorpusError(f"{named}: no text in {'it' if len(sources) == 1 else 'them'}")


def take_sample(chunks: Iterable[Sequence[str]], size: int) -> list[str]:
    """The texts of chunks taken evenly from all, of up to `size` characters together; all, if they have no more."""
    kept: list[Sequence[str]] = []
    every, total = 1, 0
    for index, chunk in enumerate(chunks):
        if index % every:
            continue
        kept.append(chunk)
        total += sum(map(len, chunk))
        while total > size and len(kept) > 1:
            kept, every = kept[::2], every * 2
            total = sum(len(text) for chunk in kept for text in chunk)
    return [text for chunk in kept for text in chunk]


def read_all(
    sources: Sequence[Path], field: str, done: list[Source], note: Callable[[str], None] = lambda _: None
) -> Iterator[Piece]:
    """The documents of all sources in pieces. Documents that are null are left out, and a note counts them.

    Raises:
        CorpusError: see `read_pieces`.
    """
    for source in sources:
        nulls = 0
        for piece in read_pieces(source, field, done):
            if piece is NULL:
                nulls += 1
            else:
                yield piece
        if nulls:
            note(f"{source}: left out, as {field!r} is null: {counted(nulls, 'document')}")


def chunks(pieces: Iterable[Piece], cut: Callable[[str], Iterable[str]]) -> Iterator[list[Piece]]:
    """The pieces of documents in chunks of about `CHUNK` characters, cut where `cut` allows it."""
    ready: list[Piece] = []
    size, rest = 0, ""
    for text, is_last in pieces:
        *whole, rest = cut(rest + text)
        ready += [Piece(part, is_last=False) for part in whole]
        if is_last:
            ready.append(Piece(rest, is_last=True))
            rest = ""
        size += sum(map(len, whole)) + (len(ready[-1].text) + PIECE_COST if is_last else 0)
        if size >= CHUNK:
            yield ready
            ready, size = [], 0
    if ready:
        yield ready


def _text_sha256(chunk: Sequence[Piece]) -> bytes:
    digest = hashlib.sha256()
    for text, is_last in chunk:
        data = text.encode()
        digest.update(b"%d,%d:" % (len(data), is_last))
        digest.update(data)
    return digest.digest()


def encode_chunk(tokenizer: Tokenizer, chunk: Sequence[Piece], sha256: bytes, dtype: np.dtype[Any]) -> Encoded:
    """The tokens of a chunk; each document ends with `end_of_text`, where the tokenizer has it."""
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    parts = [part for text, is_last in chunk for part in (tokenizer.encode(text), np.array(end * is_last, dtype))]
    ids = np.concatenate(parts, dtype=dtype, casting="unsafe")
    documents, text_bytes = sum(piece.is_last for piece in chunk), sum(len(piece.text.encode()) for piece in chunk)
    return Encoded(sha256, _ids_sha256(ids.data, documents, text_bytes), len(ids), documents, text_bytes, ids)


def _ids_sha256(ids: Any, documents: int, text_bytes: int) -> bytes:
    """The hash of all that the journal says of a chunk beside the hash of its text."""
    digest = hashlib.sha256(b"%d,%d:" % (documents, text_bytes))
    digest.update(ids)
    return digest.digest()


def _write_tokens(
    partial: Path,
    sources: Sequence[Path],
    tokenizer: Tokenizer,
    trained_on: dict[str, Any] | None,
    field: str,
    workers: int,
    progress: Progress,
) -> CorpusManifest:
    name = type_name(tokenizer.vocab_size)
    dtype, read = TYPES[name], list[Source]()
    with (
        _open(partial / TOKENS_FILE) as file,
        _open(partial / JOURNAL_FILE) as records,
        ThreadPoolExecutor(workers) as pool,
    ):
        sync(partial)  # or both files may be gone after a power failure, however often they are synced
        journal = _Journal(file, records, dtype.itemsize)
        pending: deque[Future[Encoded]] = deque()

        def write() -> None:
            encoded = pending.popleft().result()
            journal.add(encoded)
            progress(encoded.text_bytes)

        try:
            for chunk in chunks(read_all(sources, field, read, print_note), tokenizer.cut):
                pending.append(_encode_in(pool, tokenizer, chunk, dtype, journal))
                if len(pending) > workers:
                    write()
            while pending:
                write()
        except CorpusError:  # of a source: the chunks before it are whole
            while pending:
                write()
            journal.sync()
            raise
        finally:
            for future in pending:
                future.cancel()
        if not journal.tokens or not journal.text_bytes:
            raise _no_text(sources)
        journal.finish(header(name, journal.tokens))
    return CorpusManifest(
        tokenizer=tokenizer.metadata.type,
        tokenizer_sha256=tokenizer.fingerprint,
        trained_on=trained_on,
        dtype=name,
        tokens=journal.tokens,
        documents=journal.documents,
        text_bytes=journal.text_bytes,
        tokens_sha256=file_sha256(partial / TOKENS_FILE),
        field=field,
        sources=tuple(read),
    )


def _encode_in(
    pool: Executor, tokenizer: Tokenizer, chunk: Sequence[Piece], dtype: np.dtype[Any], journal: "_Journal"
) -> Future[Encoded]:
    """Have a thread encode a chunk, unless the journal has it."""
    sha256 = _text_sha256(chunk)
    if not (kept := journal.take(sha256)):
        return pool.submit(encode_chunk, tokenizer, chunk, sha256, dtype)
    future: Future[Encoded] = Future()
    future.set_result(kept)
    return future


class _Journal:
    """Writes tokens to their file, and a record per chunk to the journal, which has it on the disk after its tokens."""

    def __init__(self, tokens_file: IO[bytes], journal_file: IO[bytes], token_bytes: int):
        self._tokens_file, self._journal_file, self._token_bytes = tokens_file, journal_file, token_bytes
        self._chunks = self.tokens = self.documents = self.text_bytes = 0  # added so far
        self._kept: deque[Encoded] = deque()
        """The next chunks, of those that a command that was killed has written."""
        size = tokens_file.seek(0, os.SEEK_END)
        tokens_file.seek(HEADER_BYTES)
        for record in _records(journal_file.read()):
            ids = tokens_file.read(min(record.tokens * token_bytes, size))  # a damaged record may have any number
            if _ids_sha256(ids, record.documents, record.text_bytes) != record.ids_sha256:
                break
            self._kept.append(record)
        self._unwritten = b""
        self._synced_at = time.monotonic()

    def take(self, sha256: bytes) -> Encoded | None:
        """The record of the next chunk, whose text has this hash; None: it and all after it are to be written."""
        if self._kept and self._kept[0].sha256 == sha256:
            return self._kept.popleft()
        self._kept.clear()
        return None

    def add(self, encoded: Encoded) -> None:
        """Add the next chunk, and write it if the files do not have it."""
        if encoded.ids is not None:
            if not self._unwritten:  # what follows in the journal is of another text, or damaged
                self._journal_file.truncate(self._journal_file.seek(self._chunks * RECORD.size))
            self._tokens_file.seek(HEADER_BYTES + self.tokens * self._token_bytes)
            self._tokens_file.write(encoded.ids.tobytes())
            self._unwritten += RECORD.pack(*encoded[:-1])
            if time.monotonic() - self._synced_at >= SYNC_SECONDS:
                self.sync()
        self._chunks += 1
        self.tokens += encoded.tokens
        self.documents += encoded.documents
        self.text_bytes += encoded.text_bytes

    def sync(self) -> None:
        for file, data in ((self._tokens_file, b""), (self._journal_file, self._unwritten)):
            file.write(data)
            file.flush()
            flush(file.fileno())
        self._unwritten = b""
        self._synced_at = time.monotonic()

    def finish(self, header: bytes) -> None:
        """Write the header of the tokens' file, and remove what may be left behind its last token."""
        self._tokens_file.truncate(HEADER_BYTES + self.tokens * self._token_bytes)
        self._tokens_file.seek(0)
        self._tokens_file.write(header)
        self._tokens_file.flush()
        flush(self._tokens_file.fileno())


def _open(path: Path) -> IO[bytes]:
    return path.open("r+b") if path.exists() else path.open("w+b")
