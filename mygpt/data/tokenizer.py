"""Converts text to token ids and back, one token per character."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mygpt.errors import TokenizerError

CHUNK = 1 << 20
"""Characters converted at a time, so that memory holds the code points of one piece and not of all the text."""


class CharTokenizer:
    """A character tokenizer whose vocabulary is the sorted distinct characters of a text.

    Any text with the same distinct characters gives the same tokenizer, so `CharTokenizer(tokenizer.vocab)` is a copy.

    Raises:
        TokenizerError: the text is empty.
    """

    def __init__(self, text: str):
        seen = np.zeros(0x110000, dtype=bool)
        for start in range(0, len(text), CHUNK):
            seen[_code_points(text[start : start + CHUNK])] = True
        vocab = np.flatnonzero(seen)
        if len(vocab) == 0:
            raise TokenizerError("a vocabulary cannot be made from an empty text")
        self.vocab = "".join(map(chr, vocab))
        """All characters of the vocabulary, in code point order; a token's id is its index here."""
        # The last entry stands for every code point beyond the largest known one.
        self._id_of_code_point = np.full(vocab[-1] + 2, -1, dtype=np.int32)
        self._id_of_code_point[vocab] = np.arange(len(vocab), dtype=np.int32)
        # Types that torch can index with; most corpora then take one or two bytes a character.
        self._id_type = next(np.dtype(t) for t in (np.uint8, np.int16, np.int32) if len(vocab) <= np.iinfo(t).max + 1)

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def encode(self, text: str, name: str = "text") -> npt.NDArray[np.integer]:
        """The ids of a text's characters, shape (len(text),), in the smallest type that holds the vocabulary.

        `name` is what an error calls the text.

        Raises:
            TokenizerError: a character is not in the vocabulary; gives the character and its position (0-based).
        """
        ids: npt.NDArray[np.integer] = np.empty(len(text), dtype=self._id_type)
        beyond = len(self._id_of_code_point) - 1
        for start in range(0, len(text), CHUNK):
            piece = self._id_of_code_point[np.minimum(_code_points(text[start : start + CHUNK]), beyond)]
            if piece.min() < 0:
                position = start + int(piece.argmin())
                character = text[position]
                raise TokenizerError(
                    f"{name}: character {character!r} (U+{ord(character):04X}) at position {position} is not among "
                    f"the {self.vocab_size} characters of the vocabulary"
                )
            ids[start : start + len(piece)] = piece
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a sequence of ids.

        Raises:
            IndexError: an id is negative, or not below `vocab_size`.
        """
        characters = []
        for token in map(int, ids):
            # A negative index would count from the end.
            if not 0 <= token < self.vocab_size:
                raise IndexError(f"token id {token}: expected 0 to {self.vocab_size - 1}")
            characters.append(self.vocab[token])
        return "".join(characters)


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    # A prompt from the command line may hold lone surrogates, which stand for bytes that were not UTF-8.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
