"""A prepared corpus: a folder with the tokens of many documents, their tokenizer, and a manifest with all hashes.

The tokens are one tensor in a safetensors file, memory-mapped when they are used: memory does not grow with the corpus,
and the processes of a machine share the pages.
"""

import json
import os
import struct
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from mygpt.data.build import tokenizer_from
from mygpt.data.sources import Sha256, Source
from mygpt.data.tokenizer import Tokenizer, TokenizerMetadata, fingerprint
from mygpt.disk import file_sha256
from mygpt.errors import CorpusError, DamagedCorpusError
from mygpt.recipe.reading import read_file
from mygpt.recipe.tables import Table

MANIFEST_FILE = "manifest.json"
TOKENS_FILE = "tokens.safetensors"
TOKENIZER_FILE = "tokenizer.json"
HEADER_BYTES = 256  # room for the header of the tokens' file, which is written when their number is known

TYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "U16": np.dtype("<u2"), "I32": np.dtype("<i4")}
"""The types of tokens, by their names in a safetensors file."""


class CorpusManifest(Table):
    """manifest.json: what a prepared corpus was made of, and what its files must be."""

    format: Literal[1] = 1
    tokenizer: str
    """The kind of the tokenizer."""
    tokenizer_sha256: Sha256
    """The fingerprint of the tokenizer."""
    trained_on: dict[str, Any] | None = None
    """Bytes and sha256 of the text on which the tokenizer was trained; None: it was not trained."""
    dtype: Literal["U8", "U16", "I32"]
    tokens: Annotated[int, Field(ge=1)]
    documents: Annotated[int, Field(ge=1)]
    text_bytes: int
    tokens_sha256: Sha256
    """The hash of the tokens' file."""
    field: str
    """The field or column that had the text."""
    sources: tuple[Source, ...]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


class Prepared(NamedTuple):
    """A prepared corpus that is open."""

    manifest: CorpusManifest
    tokenizer: Tokenizer
    tokens: npt.NDArray[np.integer]
    """(tokens,), memory-mapped."""
    file: Path
    state: tuple[int, int, int]
    """Size, time of the last change, and inode of the tokens' file."""

    def decode(self, ids: npt.NDArray[np.integer]) -> str:
        """The text of some of the tokens (n,).

        Raises:
            DamagedCorpusError: the tokenizer has no such token.
        """
        try:
            return self.tokenizer.decode(ids.tolist())
        except IndexError as error:
            raise DamagedCorpusError(f"{self.file}: damaged: {error}; prepare it again") from None

    def check_unchanged(self) -> None:
        """Compare the state of the tokens' file with that at opening: reading beyond a new end would kill the process.

        Raises:
            DamagedCorpusError: it has changed, or is gone.
        """
        try:
            is_same = _state(self.file) == self.state
        except OSError:
            is_same = False
        if not is_same:
            raise DamagedCorpusError(
                f"{self.file}: has changed while it was in use; prepare it again, and the same command continues"
            )


def open_prepared(folder: Path, *, verify: bool = True) -> Prepared:
    """Open a prepared corpus; `verify` compares its tokens with their hash, which reads all of them once.

    Raises:
        CorpusError: it is no prepared corpus; DamagedCorpusError if it is not as it was prepared.
        TokenizerError: its tokenizer needs a package that is not installed.
    """
    manifest = read_corpus_manifest(folder)
    raw = read_file(folder / TOKENIZER_FILE, CorpusError, expected="a tokenizer", missing="missing: damaged corpus")
    try:
        metadata: Any = TypeAdapter(TokenizerMetadata).validate_json(raw)
    except ValidationError as error:
        raise CorpusError(f"{folder / TOKENIZER_FILE}: damaged: {error.errors()[0]['msg']}") from None
    if fingerprint(metadata) != manifest.tokenizer_sha256:
        raise CorpusError(
            f"{folder / TOKENIZER_FILE}: not the tokenizer that the tokens are of; prepare the corpus again"
        )
    file, dtype = folder / TOKENS_FILE, TYPES[manifest.dtype]
    try:
        state, size = _state(file), HEADER_BYTES + manifest.tokens * dtype.itemsize
        if state[0] != size:
            raise DamagedCorpusError(f"{file}: has {state[0]:,} bytes, expected {size:,}: truncated or not complete")
        if verify and file_sha256(file) != manifest.tokens_sha256:
            raise DamagedCorpusError(
                f"{file}: damaged: its sha256 is not that in {MANIFEST_FILE}; prepare the corpus again"
            )
        with file.open("rb") as content:
            if content.read(HEADER_BYTES) != header(manifest.dtype, manifest.tokens):
                raise DamagedCorpusError(f"{file}: damaged: its header is not that of {manifest.tokens:,} tokens")
        # Not to be written: the system would want to have memory for all that may be written.
        tokens = np.memmap(file, dtype, mode="r", offset=HEADER_BYTES, shape=(manifest.tokens,))
    except OSError as error:
        raise DamagedCorpusError(f"{file}: cannot be read: {error.strerror}") from None
    return Prepared(manifest, tokenizer_from(metadata), tokens, file, state)


def read_corpus_manifest(folder: Path) -> CorpusManifest:
    """The manifest of a prepared corpus.

    Raises:
        CorpusError: there is none, or it is damaged.
    """
    file = folder / MANIFEST_FILE
    if os.path.isfile(folder):
        raise CorpusError(f"{folder}: a file; expected a folder that `mygpt data prepare` made")
    missing = "missing: a corpus is a text file, or a folder that `mygpt data prepare` made"
    raw = read_file(file, CorpusError, expected="a manifest", missing=missing)
    try:
        return CorpusManifest.model_validate_json(raw)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise CorpusError(f"{file}: damaged: {where}: {error.errors()[0]['msg']}") from None


def header(dtype: str, tokens: int) -> bytes:
    """The first `HEADER_BYTES` of the tokens' file: a safetensors header of the tensor "tokens", and spaces."""
    size = tokens * TYPES[dtype].itemsize
    entry = {"tokens": {"dtype": dtype, "shape": [tokens], "data_offsets": [0, size]}}
    text = json.dumps(entry, separators=(",", ":")).encode().ljust(HEADER_BYTES - 8)
    return struct.pack("<Q", len(text)) + text


def type_name(vocab_size: int) -> Literal["U8", "U16", "I32"]:
    """The smallest type for ids of a vocabulary."""
    return "U8" if vocab_size <= 1 << 8 else "U16" if vocab_size <= 1 << 16 else "I32"


def _state(file: Path) -> tuple[int, int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns, status.st_ino
