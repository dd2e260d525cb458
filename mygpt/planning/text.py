"""Looks at a text that is to be trained on: its size, a sample, and how well an n-gram model predicts it."""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mygpt.data.corpus import load_corpus
from mygpt.data.prepared import Prepared, open_prepared
from mygpt.data.tokenizer import DEFAULT_VOCAB_SIZE, Tokenizer
from mygpt.errors import CorpusError

SAMPLE = 4_000_000
"""Characters that are looked at, in pieces from all over the text."""
PIECES = 64

NGRAM = 5
"""Bytes: four and the one that follows."""
NGRAM_FIT, NGRAM_TEST = 900_000, 100_000
"""Bytes to fit and to test the n-gram model with, at most."""

TO_LEARN_MERGES = 100_000
"""Bytes of text from which its byte pairs are worth learning."""
MOST_CHARACTERS = 256
"""Distinct ones, up to which characters are the tokens of a short text, and else bytes."""

LEAST_BYTES = 10_000
"""A text with fewer has nothing to hold out."""


class Text(NamedTuple):
    """A text as a run will read it."""

    corpus: str
    """The recipe's key: a named corpus, a file or a prepared folder."""
    bytes: int
    sample: str
    """Pieces from all over the text; a short text as it is."""
    bits_per_byte: float
    """That a 5-gram model needs for the end of the sample. What a GPT needs is near, since texts differ more than
    models do."""
    tokenizer: Tokenizer | None
    """The tokenizer of a prepared corpus; None: the text is not cut into tokens yet."""


def look_at(corpus: str, *, is_prepared: bool) -> Text:
    """Look at a text file, a named corpus or a prepared folder.

    Raises:
        CorpusError: it cannot be read, or is too short.
    """
    if is_prepared:
        prepared = open_prepared(Path(corpus), verify=False)
        size, sample, tokenizer = prepared.manifest.text_bytes, _sample_of_tokens(prepared), prepared.tokenizer
    else:
        text = load_corpus(corpus).text
        size, tokenizer = len(text.encode()), None
        sample = "".join(text[part] for part in _pieces(len(text), SAMPLE))
    if size < LEAST_BYTES:
        raise CorpusError(
            f"{corpus}: has {size:,} bytes, expected at least {LEAST_BYTES:,}, to learn from and to hold out a part"
        )
    return Text(corpus, size, sample, ngram_bits(sample), tokenizer)


def tokenizer_keys(size: int, sample: str | None = None) -> dict[str, Any]:
    """The recipe's keys for the tokenizer of a text of `size` bytes; without a sample, of one that is to be prepared.

    Byte-pair encoding reaches a lower loss in the same time, if the text is long enough for its tokens to recur.
    """
    if size >= TO_LEARN_MERGES and importlib.util.find_spec("tokenizers"):
        return {"tokenizer": "bpe", "vocab_size": DEFAULT_VOCAB_SIZE}
    if sample is None or len(set(sample)) > MOST_CHARACTERS:
        return {"tokenizer": "byte"}
    return {"tokenizer": "char"}


def ngram_bits(text: str) -> float:
    """Bits per byte that an n-gram model of bytes, fitted to the first nine tenths of a text, needs for the rest."""
    data = text.encode()
    boundary = len(data) * 9 // 10
    fitted_to, rest = (
        np.frombuffer(b"".join(part[piece] for piece in _pieces(len(part), limit)), dtype=np.uint8)
        for part, limit in ((data[:boundary], NGRAM_FIT), (data[boundary:], NGRAM_TEST))
    )
    return float(-np.log2(ngram_probabilities(fitted_to, rest)).mean())


def ngram_probabilities(text: npt.NDArray[np.uint8], rest: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """The probability (n,) of each byte of `rest` (n,) after the NGRAM - 1 before it, by their counts in `text`.

    Each order's counts are mixed with the order below in the proportion of Witten & Bell, "The zero-frequency problem"
    (1991): as often as something new followed the same bytes.
    """
    probabilities = np.full(len(rest), 1 / 256)
    for order in range(NGRAM):
        grams, counts = np.unique(_windows(text, order + 1), return_counts=True)
        contexts, first, kinds = np.unique(grams >> 8, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        wanted = _windows(rest, order + 1)
        seen, count = _look_up(grams, counts, wanted)
        known, total = _look_up(contexts, totals, wanted >> 8)
        new = _look_up(contexts, kinds, wanted >> 8)[1]
        lower = probabilities[order:]
        mixed = (np.where(seen, count, 0) + new * lower) / (total + new)
        probabilities[order:] = np.where(known, mixed, lower)
    return probabilities


def _windows(data: npt.NDArray[np.uint8], length: int) -> npt.NDArray[np.int64]:
    """Every `length` bytes in a row, as a number."""
    count = len(data) - length + 1
    packed = np.zeros(count, dtype=np.int64)
    for start in range(length):
        packed = packed << 8 | data[start : start + count]
    return packed


def _look_up(
    keys: npt.NDArray[np.int64], values: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Which of `wanted` (n,) are in the sorted `keys`, and the values there; of others, any value."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return keys[places] == wanted, values[places]


def _sample_of_tokens(prepared: Prepared) -> str:
    tokens, mean_bytes = prepared.tokens, prepared.manifest.text_bytes / prepared.manifest.tokens
    parts = _pieces(len(tokens), round(SAMPLE / mean_bytes))
    return "".join(prepared.tokenizer.decode(tokens[part].tolist()) for part in parts)


def _pieces(length: int, limit: int) -> list[slice]:
    """All of a sequence, or equal pieces from its beginning to its end that have `limit` elements together."""
    if length <= limit:
        return [slice(0, length)]
    size = limit // PIECES
    starts = (number * (length - size) // (PIECES - 1) for number in range(PIECES))
    return [slice(start, start + size) for start in starts]
