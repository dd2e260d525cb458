"""What a tokenizer is, and the two that need no training: characters and bytes.

A tokenizer is a table with the bytes of each token, and a rule that cuts a text into them. All else follows from the
table: decoding, also of a stream that breaks off within a character, and how many bytes of text a token stands for.

To add one: a subclass of `Tokenizer` in a module of its own, its metadata in `TokenizerMetadata`, a line in
`tokenizer_from` (build.py), and its name among those of the recipe's `tokenizer` key.
"""

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mygpt.errors import TokenizerError
from mygpt.recipe.tables import Table

CHUNK = 1 << 20  # characters converted at a time: 4 bytes each
DEFAULT_VOCAB_SIZE = 1024  # of a byte-pair encoding that is trained, as in the course
END_OF_TEXT = "<|endoftext|>"  # the token between two documents; in a text these are ordinary characters


class CharMetadata(Table):
    """A character tokenizer: the characters of its vocabulary in code point order."""

    type: Literal["char"] = "char"
    vocab: Annotated[str, Field(min_length=1)]
    end_of_text: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether a token for the end of a document follows the characters."""


class ByteMetadata(Table):
    """A byte tokenizer: a token's id is its byte."""

    type: Literal["byte"] = "byte"
    end_of_text: Annotated[bool, Field(exclude_if=lambda value: not value)] = False
    """Whether a token for the end of a document follows the bytes."""


class BPEMetadata(Table):
    """A byte-pair encoding."""

    type: Literal["bpe"] = "bpe"
    json_text: str
    """A tokenizer.json of Hugging Face's tokenizers."""


TokenizerMetadata = Annotated[CharMetadata | ByteMetadata | BPEMetadata, Field(discriminator="type")]
"""All that a tokenizer is built from."""


class Tokenizer(ABC):
    """Cuts text into tokens, and joins tokens to text."""

    metadata: CharMetadata | ByteMetadata | BPEMetadata
    """All that it is built from: `tokenizer_from` makes an equal one."""
    end_of_text: int | None = None
    """The id of the token that ends a document; None: it has none."""

    @abstractmethod
    def encode(self, text: str, name: str = "text") -> npt.NDArray[np.integer]:
        """The ids of a text's tokens, shape (tokens,), in the smallest type that holds the vocabulary.

        `name` is what an error calls the text.

        Raises:
            TokenizerError: the text has a character that the vocabulary lacks; gives it and its position (0-based).
        """

    def cut(self, text: str) -> Iterator[str]:
        """The text in pieces, which may be empty, whose ids, joined, are those of the whole text; at least one piece.

        The last can be joined with text that follows, and cut again.
        """
        yield text
        yield ""

    @cached_property
    @abstractmethod
    def tokens(self) -> list[bytes]:
        """The UTF-8 bytes of each token, by id; a special token has those of its name."""

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @cached_property
    def byte_lengths(self) -> npt.NDArray[np.int32]:
        """How many bytes of text each token stands for, (vocab_size,); a special token for none."""
        lengths = np.array([len(token) for token in self.tokens], dtype=np.int32)
        lengths[list(self.special_ids)] = 0
        return lengths

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of the tokens that stand for no text."""
        return frozenset() if self.end_of_text is None else frozenset({self.end_of_text})

    @property
    def fingerprint(self) -> str:
        """The sha256 of what it is built from: equal fingerprints, equal ids."""
        return fingerprint(self.metadata)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            IndexError: an id is negative, or not below `vocab_size`.
        """
        return "".join(self.stream_decode(ids))

    def stream_decode(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of a sequence of ids, piece by piece: a character comes with the id that completes it.

        Raises:
            IndexError: see `decode`.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in map(int, ids):
            # A negative index would count from the end.
            if not 0 <= token < self.vocab_size:
                raise IndexError(f"token id {token}: expected 0 to {self.vocab_size - 1}")
            if text := decoder.decode(self.tokens[token]):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class CharTokenizer(Tokenizer):
    """One token per character; the vocabulary is the sorted distinct characters of a text.

    Any text with the same distinct characters gives the same tokenizer, so `CharTokenizer(tokenizer.vocab)` is a copy.

    Raises:
        TokenizerError: the text is empty.
    """

    def __init__(self, text: str, *, end_of_text: bool = False):
        vocab = distinct_code_points([text])
        if len(vocab) == 0:
            raise TokenizerError("a vocabulary cannot be made from an empty text")
        self.vocab = "".join(map(chr, vocab))
        """All characters of the vocabulary, in code point order; a token's id is its index here."""
        self.metadata = CharMetadata(vocab=self.vocab, end_of_text=end_of_text)
        if end_of_text:
            self.end_of_text = len(vocab)
        # The last entry stands for every code point beyond the largest known one.
        self._id_of_code_point = np.full(vocab[-1] + 2, -1, dtype=np.int32)
        self._id_of_code_point[vocab] = np.arange(len(vocab), dtype=np.int32)
        self._id_type = id_type(len(vocab) + end_of_text)

    @cached_property
    def tokens(self) -> list[bytes]:
        special = [END_OF_TEXT.encode()] if self.end_of_text is not None else []
        return [character.encode("utf-8", "surrogatepass") for character in self.vocab] + special

    def encode(self, text: str, name: str = "text") -> npt.NDArray[np.integer]:
        ids: npt.NDArray[np.integer] = np.empty(len(text), dtype=self._id_type)
        beyond = len(self._id_of_code_point) - 1
        for start in range(0, len(text), CHUNK):
            piece = self._id_of_code_point[np.minimum(_code_points(text[start : start + CHUNK]), beyond)]
            if piece.min() < 0:
                position = start + int(piece.argmin())
                character = text[position]
                raise TokenizerError(
                    f"{name}: character {character!r} (U+{ord(character):04X}) at position {position} is not among "
                    f"the {len(self.vocab)} characters of the vocabulary"
                )
            ids[start : start + len(piece)] = piece
        return ids


class ByteTokenizer(Tokenizer):
    """One token per byte of the text's UTF-8; the vocabulary is all 256 bytes, so that any text can be encoded."""

    def __init__(self, *, end_of_text: bool = False):
        self.metadata = ByteMetadata(end_of_text=end_of_text)
        if end_of_text:
            self.end_of_text = 256
        self._id_type = id_type(256 + end_of_text)

    @cached_property
    def tokens(self) -> list[bytes]:
        special = [END_OF_TEXT.encode()] if self.end_of_text is not None else []
        return [bytes([byte]) for byte in range(256)] + special

    def encode(self, text: str, name: str = "text") -> npt.NDArray[np.integer]:
        # A prompt from the command line may hold lone surrogates, which stand for bytes that were not UTF-8.
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(self._id_type)


def id_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest type for ids that torch can index with and compute with on all devices."""
    return next(np.dtype(t) for t in (np.uint8, np.int16, np.int32) if vocab_size <= np.iinfo(t).max + 1)


def fingerprint(metadata: Table) -> str:
    """The sha256 of a tokenizer's metadata, as JSON in which equal values are equal text."""
    text = json.dumps(metadata.model_dump(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def describe_tokenizer(metadata: CharMetadata | ByteMetadata | BPEMetadata) -> str:
    """A tokenizer's kind, and the beginning of its fingerprint: "bpe 0123456789ab"."""
    return f"{metadata.type} {fingerprint(metadata)[:12]}"


def distinct_code_points(texts: Iterable[str]) -> npt.NDArray[np.intp]:
    """The code points of the characters in these texts, each once, in order."""
    seen = np.zeros(0x110000, dtype=bool)
    for text in texts:
        for start in range(0, len(text), CHUNK):
            seen[_code_points(text[start : start + CHUNK])] = True
    return np.flatnonzero(seen)


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    # A prompt from the command line may hold lone surrogates, which stand for bytes that were not UTF-8.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
