"""Characters to ids and back."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt.errors import TokenizerError
from mygpt.tokenizer import CHUNK, CharTokenizer


@given(st.text(min_size=1))
def test_decoding_undoes_encoding(text):
    """Any text survives, and ids are the places among its sorted distinct characters."""
    tokenizer = CharTokenizer(text)
    letters = sorted(set(text))
    assert tokenizer.vocab == "".join(letters)
    assert tokenizer.encode(text).tolist() == [letters.index(c) for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert CharTokenizer(tokenizer.vocab).vocab == tokenizer.vocab


@pytest.mark.parametrize("unknown", ["z", "é", "\U0001f600", "\udcff"])
@pytest.mark.parametrize("position", [0, 2, CHUNK + 1])
def test_unknown_character_is_named_with_its_place(unknown, position):
    """Also beyond the largest known code point, and beyond the first piece of a long text."""
    with pytest.raises(TokenizerError, match=rf"U\+{ord(unknown):04X}\) at position {position} "):
        CharTokenizer("abcx").encode("a" * position + unknown + "bc")


@pytest.mark.parametrize(("size", "kind"), [(2, np.uint8), (256, np.uint8), (257, np.int16), (40_000, np.int32)])
def test_ids_take_the_smallest_type(size, kind):
    """A large corpus of few characters is kept at one byte each."""
    text = "".join(map(chr, range(0x10000, 0x10000 + size)))
    ids = CharTokenizer(text).encode(text)
    assert ids.dtype == kind
    assert ids.tolist() == list(range(size))


def test_large_text_is_encoded_in_a_small_multiple_of_its_memory():
    """Ten million characters: ids of one byte each and a bounded working set, within seconds."""
    text = "the quick brown fox jumps over the lazy dog\n" * 227_273
    tracemalloc.start()
    started_at = time.perf_counter()
    ids = CharTokenizer(text).encode(text)
    elapsed_seconds = time.perf_counter() - started_at
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(ids) == len(text) > 10_000_000
    assert peak < 5 * len(text)
    assert elapsed_seconds < 5


def test_empty_text_has_no_vocabulary():
    """There is nothing to learn from no text."""
    with pytest.raises(TokenizerError, match="empty"):
        CharTokenizer("")
