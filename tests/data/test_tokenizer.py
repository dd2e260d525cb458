"""Characters to ids and back."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt.data.build import tokenizer_from
from mygpt.data.tokenizer import CHUNK, END_OF_TEXT, ByteTokenizer, CharTokenizer
from mygpt.errors import TokenizerError


@given(st.text(min_size=1))
def test_decoding_undoes_encoding(text):
    """Any text survives, and ids are positions among its sorted distinct characters."""
    tokenizer = CharTokenizer(text)
    letters = sorted(set(text))
    assert tokenizer.vocab == "".join(letters)
    assert tokenizer.encode(text).tolist() == [letters.index(c) for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert CharTokenizer(tokenizer.vocab).vocab == tokenizer.vocab


@given(st.text(), st.booleans())
def test_bytes_of_any_text_are_its_utf_8(text, end_of_text):
    """Ids are bytes, in the smallest type; decoding undoes encoding."""
    tokenizer = ByteTokenizer(end_of_text=end_of_text)
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert ids.dtype == (np.int16 if end_of_text else np.uint8)
    assert tokenizer.decode(ids) == text


@given(st.text(min_size=1), st.sampled_from(["char", "byte"]), st.booleans())
def test_tokenizer_is_built_again_from_its_metadata(text, kind, end_of_text):
    """Same fingerprint, ids and bytes; the token for a document's end comes last and stands for no bytes."""
    tokenizer = (
        CharTokenizer(text, end_of_text=end_of_text) if kind == "char" else ByteTokenizer(end_of_text=end_of_text)
    )
    copy = tokenizer_from(type(tokenizer.metadata).model_validate_json(tokenizer.metadata.model_dump_json()))
    assert copy.fingerprint == tokenizer.fingerprint
    ids = copy.encode(text)
    assert ids.tolist() == tokenizer.encode(text).tolist()
    assert copy.byte_lengths[ids].sum() == len(text.encode())
    assert copy.end_of_text == (copy.vocab_size - 1 if end_of_text else None)
    if end_of_text:
        assert copy.byte_lengths[copy.end_of_text] == 0
        assert copy.decode([*ids, copy.end_of_text]) == text + END_OF_TEXT


def test_characters_come_with_the_byte_that_completes_them():
    """No text until then; what is left at the end, or is no UTF-8, becomes U+FFFD."""
    assert list(ByteTokenizer().stream_decode("aé€".encode())) == ["a", "é", "€"]
    assert list(ByteTokenizer().stream_decode("a€".encode()[:-1])) == ["a", "\ufffd"]
    assert ByteTokenizer().decode([0xFF, 0x41]) == "\ufffdA"
    assert ByteTokenizer().encode("\udcff").tolist() == [0xFF]


@pytest.mark.parametrize("unknown", ["z", "é", "\U0001f600", "\udcff"])
@pytest.mark.parametrize("position", [0, 2, CHUNK + 1])
def test_unknown_character_is_named_with_its_position(unknown, position):
    """Also beyond the largest known code point, and beyond the first chunk of a long text."""
    with pytest.raises(TokenizerError, match=rf"U\+{ord(unknown):04X}\) at position {position} "):
        CharTokenizer("abcx").encode("a" * position + unknown + "bc")


@pytest.mark.parametrize(("size", "kind"), [(2, np.uint8), (256, np.uint8), (257, np.int16), (40_000, np.int32)])
def test_ids_take_the_smallest_type(size, kind):
    """A large corpus of few distinct characters takes one byte per character."""
    text = "".join(map(chr, range(0x10000, 0x10000 + size)))
    ids = CharTokenizer(text).encode(text)
    assert ids.dtype == kind
    assert ids.tolist() == list(range(size))


@pytest.mark.slow
@pytest.mark.fault(57)
def test_a_hundred_megabytes_load_in_seconds(tmp_path):
    """Read, hashed, decoded, encoded and split; beyond torch itself, memory is a small multiple of the text."""
    size = 100_000_000
    with (tmp_path / "large.txt").open("w") as file:
        for _ in range(100):
            file.write("the quick brown fox jumps over the lazy dog\n" * 22_728)
    code = """
import resource, time
from mygpt.data.dataset import load_dataset
from mygpt.recipe.tables import DataTable
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, started_at = peak(), time.perf_counter()
dataset = load_dataset(DataTable(corpus="large.txt", val_split=0.1), 64)
print(len(dataset.train) + len(dataset.val), peak() - before, time.perf_counter() - started_at)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    tokens, extra_bytes, elapsed_seconds = map(float, done.stdout.split())
    assert tokens >= size
    assert extra_bytes < 4 * size
    assert elapsed_seconds < 5


def test_empty_text_has_no_vocabulary():
    """The error names the reason."""
    with pytest.raises(TokenizerError, match="empty"):
        CharTokenizer("")


@pytest.mark.parametrize("unknown", [-1, -3, 3, 1000])
def test_ids_outside_the_vocabulary_are_refused(unknown):
    """Negative ids too, which would otherwise count from the end; the error names the id and the range."""
    with pytest.raises(IndexError, match=rf"^token id {unknown}: expected 0 to 2$"):
        CharTokenizer("abc").decode([0, unknown])
