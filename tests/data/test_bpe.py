"""Byte-pair encodings: trained here, read from a tokenizer.json, and GPT-2's by tiktoken's tables."""

import hashlib
import json
import random
import re
import sys
import time
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mygpt.data import bpe
from mygpt.data.bpe import BPETokenizer, cut, from_ranks, gpt2, read_tokenizer, train_bpe
from mygpt.data.build import tokenizer_from
from mygpt.data.corpus import load_corpus
from mygpt.data.dataset import make_tokenizer, place_pieces
from mygpt.data.tokenizer import END_OF_TEXT
from mygpt.errors import TokenizerError
from mygpt.recipe.tables import DataTable

pytest.importorskip("tokenizers", reason="needs tokenizers")
import tokenizers
from tokenizers import Regex, pre_tokenizers

WORDS = "the quick brown fox jumps over the lazy dog and the cat; it's 2,000 times\n\n"
# Words and line ends as GPT-4's tokenizer cuts them, which joins line ends to what is before.
OTHER_WORDS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(
            Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


@pytest.fixture(scope="module")
def trained(text) -> BPETokenizer:
    return train_bpe([text], 400)


def test_same_text_gives_the_same_encoding():
    """Byte for byte, so that a run that trains its tokenizer can be repeated; the hash is that of these versions."""
    first, second = (train_bpe([WORDS * 50], 300) for _ in range(2))
    assert first.metadata == second.metadata
    settings = json.loads(first.metadata.json_text)
    merges = json.dumps(settings["model"]["merges"])
    assert hashlib.sha256(merges.encode()).hexdigest()[:16] == "75f21024f37270df"


@given(st.text())
@settings(max_examples=200)
def test_any_text_survives(trained, text):
    """Decoding undoes encoding, and the bytes of the tokens are those of the text."""
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.byte_lengths[ids].sum() == len(text.encode())


def test_trained_encoding(trained, text):
    """It has as many tokens as asked for, shortens the text, and is built again from its metadata."""
    assert trained.vocab_size == 400
    assert trained.end_of_text == 0
    assert trained.tokens[0] == END_OF_TEXT.encode()
    ids = trained.encode(text)
    assert ids.dtype == np.int16
    assert len(ids) < 0.7 * len(text)
    assert tokenizer_from(trained.metadata).encode(text).tolist() == ids.tolist()


def test_names_of_special_tokens_are_text(trained):
    """A corpus or a prompt cannot end a document."""
    ids = trained.encode(f"a{END_OF_TEXT}b")
    assert trained.end_of_text not in ids
    assert trained.decode(ids) == f"a{END_OF_TEXT}b"
    assert trained.decode([trained.end_of_text]) == END_OF_TEXT
    assert trained.byte_lengths[trained.end_of_text] == 0


# Also with long runs of one character, and with white space that Python and the library count differently.
TEXTS = st.lists(
    st.text("ab1 .'!\n\r\té", max_size=60)
    | st.builds(str.__mul__, st.sampled_from(" \n\u3000\x1cx1"), st.integers(1, 60)),
    max_size=15,
).map("".join)


@pytest.mark.parametrize("words", [pre_tokenizers.ByteLevel(add_prefix_space=False), OTHER_WORDS])
@given(TEXTS, st.integers(0, 600))
@settings(max_examples=200)
def test_long_text_is_cut_where_it_changes_no_token(words, text, end):
    """The words of the pieces are those of the whole text; a text that goes on is cut at the same places."""

    def words_of(part):
        return [word for word, _ in words.pre_tokenize_str(part)]

    def cut_small(text):
        return list(cut(text, lambda part: (words_of(part),), size=20))

    with patch.multiple(bpe, CONTEXT=32, SPACE=re.compile(r"(?<!\s)\s{1,16}(?!\s)")):
        pieces = cut_small(text)
        assert "".join(pieces) == text
        assert all(len(piece) >= 20 for piece in pieces[:-1])
        assert [word for piece in pieces for word in words_of(piece)] == words_of(text)
        *first, rest = cut_small(text[:end])
        assert [*first, *cut_small(rest + text[end:])] == pieces


def test_text_without_a_place_to_cut(trained, monkeypatch):
    """It is cut after so many characters, wherever the text that is known so far ends."""
    monkeypatch.setattr(bpe, "MAX_PIECE", 100)
    text = "international" * 50
    pieces = list(cut(text, trained._words_and_ids, size=20))
    assert {len(piece) for piece in pieces[:-1]} == {120}
    *first, rest = cut(text[:300], trained._words_and_ids, size=20)
    assert [*first, *cut(rest + text[300:], trained._words_and_ids, size=20)] == pieces
    assert trained.decode(trained.encode(text)) == text


def test_added_tokens_may_hold_white_space(trained):
    """A text is not cut within one."""
    values = json.loads(trained.metadata.json_text)
    token = values["added_tokens"][0] | {"id": 400, "content": "cat sat", "special": False}
    tokenizer = BPETokenizer(json.dumps(values | {"added_tokens": [*values["added_tokens"], token]}), name="t.json")
    text = "the cat sat on it. " * 8000
    expected = tokenizer._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    assert 400 in expected
    assert tokenizer.encode(text).tolist() == expected


def test_tokenizer_without_added_tokens(trained):
    """Documents then follow each other without a token in between."""
    values = json.loads(trained.metadata.json_text)
    del values["added_tokens"]
    assert BPETokenizer(json.dumps(values), name="t.json").end_of_text is None


def test_whole_text_gives_the_ids_of_its_pieces(trained, monkeypatch):
    """Those of the library for the text as one string, though it is encoded in many pieces."""
    text = load_corpus("python-docs").text
    expected = trained._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    monkeypatch.setattr(bpe, "PIECE", 1000)
    assert len(list(trained.cut(text))) > 100
    assert trained.encode(text).tolist() == expected


def test_file_of_another_program(trained, tmp_path, text):
    """Padding, truncation and tokens around a text, which a file may ask for, are left out."""
    other = tokenizers.Tokenizer.from_str(trained.metadata.json_text)
    other.enable_padding()
    other.enable_truncation(5)
    other.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    other.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path / "tokenizer.json")
    assert read.encode(text).tolist() == trained.encode(text).tolist()
    assert read.fingerprint != trained.fingerprint


ADDED = {"id": 400, "content": "<mask>", "special": False, "single_word": False, "normalized": False} | {
    "lstrip": False,
    "rstrip": False,
}


def changed(trained, **settings):
    values = json.loads(trained.metadata.json_text)
    model = settings.pop("model", {})
    return json.dumps(values | settings | {"model": values["model"] | model})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}}, "changes texts by its"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
         "changes texts, as by a space that it adds"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"String": "-"}, "behavior": "Removed", "invert": False}},
         "changes texts, as by a space that it adds"),
        ({"added_tokens": [ADDED | {"lstrip": True}]}, "its token '<mask>' takes away space beside it"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}, "changes texts by its normalizer"),
        ({"added_tokens": [ADDED | {"id": 300}]}, "the id 300 has two tokens"),
        ({"added_tokens": [ADDED | {"id": 500}]}, "'<mask>' has the id 500, and the tokenizers library gives it 400"),
        ({"added_tokens": [ADDED | {"content": "!"}]}, "'!' has the id 400, and the tokenizers library gives it 1"),
        ({"added_tokens": [ADDED | {"content": ""}]}, "'' has the id 400, and the tokenizers library gives it none"),
        ({"added_tokens": [ADDED | {"content": "\u0120", "id": 221}]}, "'\u0120' also stands for other bytes"),
        ({"added_tokens": [ADDED | {"id": 3_000_000_000}]}, "has a token with the id 3000000000"),
        ({"model": {"dropout": 0.1}}, "its dropout gives other ids each time"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "expected a byte-level BPE"),
        ({"model": {"continuing_subword_prefix": "##"}}, "expected a byte-level BPE"),
    ],
    ids=["normalizer", "prefix", "removed", "lstrip", "sequence", "two", "gap", "known", "empty", "space", "large-id",
         "dropout", "word-level", "subword"],
)  # fmt: skip
@pytest.mark.fault(76)
def test_encoding_that_cannot_be_trusted_is_refused(trained, settings, message):
    """One line that says why."""
    with pytest.raises(TokenizerError, match=f"t.json: .*{message}"):
        BPETokenizer(changed(trained, **settings), name="t.json")


@pytest.mark.parametrize("depth", range(3))
def test_empty_sequence_is_no_normalizer(trained, depth):
    """Nor is one of empty sequences: it changes no text."""
    normalizer = {"type": "Sequence", "normalizers": []}
    for _ in range(depth):
        normalizer = {"type": "Sequence", "normalizers": [normalizer, normalizer]}
    tokenizer = BPETokenizer(changed(trained, normalizer=normalizer), name="t.json")
    assert tokenizer.encode(WORDS).tolist() == trained.encode(WORDS).tolist()


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("content", ["!", "\u0120the"])
def test_added_token_that_is_an_ordinary_one_stands_for_its_text(trained, content, special):
    """As where padding is a token of the text; one that would change a text is refused."""
    values = json.loads(trained.metadata.json_text)
    number = values["model"]["vocab"][content]
    token = ADDED | {"id": number, "content": content, "special": special}
    added = changed(trained, added_tokens=[*values["added_tokens"], token])
    if not special and content != "!":
        with pytest.raises(TokenizerError, match=r"t\.json: changes texts: its added token '\u0120the' also stands"):
            BPETokenizer(added, name="t.json")
        return
    tokenizer = BPETokenizer(added, name="t.json")
    text = "wait! \u0120the end of the text!!"
    ids = tokenizer.encode(text)
    assert number in ids
    assert ids.tolist() == trained.encode(text).tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_ids == trained.special_ids


@pytest.mark.parametrize(
    ("content", "is_what"),
    [
        (b'{"a": 0, "b": 1}', "a vocabulary alone"),
        (b'{"a": 0, "b": 1, "model": 2}', "a vocabulary alone"),
        (b"{}", "JSON of another kind"),
        (b"[1, 2]", "JSON of another kind"),
        (b"null", "JSON of another kind"),
        (b'{"tokenizer_class": "GPT2Tokenizer", "model": null}', "JSON of another kind"),
        (b"#version: 0.2\na b\n", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"", "not JSON"),
        (b"\x0a\x0e\xff", "not UTF-8: byte 0xff at offset 2"),
    ],
)
@pytest.mark.fault(76)
def test_file_in_the_place_of_a_tokenizer_json_is_named(tmp_path, content, is_what):
    """A vocab.json, a merges.txt, a configuration: one line says what it is, and what is expected."""
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(tmp_path / "t.json")
    assert (
        str(caught.value) == f"{tmp_path / 't.json'}: {is_what}; expected the tokenizer.json of the tokenizers library"
    )


PLACES = st.lists(st.integers(0, 1 << 16), min_size=1, max_size=4)
VALUES = st.recursive(
    st.sampled_from([None, True, -1, 0, 1, 1.5, 1 << 40, "", "a\nb", "BPE"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "a"]), inner, max_size=2),
    max_leaves=4,
)


@given(PLACES, VALUES, st.booleans())
@settings(max_examples=300, deadline=None)
@pytest.mark.fault(76)
def test_damaged_tokenizer_json_is_a_tokenizer_or_costs_one_line(trained, places, value, removes):
    """Whatever is in its place, or missing, anywhere in the file: no word of Python, and no traceback."""
    document = json.loads(trained.metadata.json_text)
    inner = document
    for place in places:
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        key = keys[place % len(keys)]
        outer, inner = inner, inner[key]
        if not isinstance(inner, dict | list) or not inner:
            break
    if removes:
        del outer[key]
    else:
        outer[key] = value
    decoded = decoded_words(json.dumps(document))
    if decoded != WORDS:
        assert decoded.startswith(("t.json: ", "text: its"))
        assert len(decoded.splitlines()) == 1
        assert not any(word in decoded for word in ("object", "NoneType", "subscript", "indices", "instances"))


def decoded_words(json_text):
    """WORDS as a tokenizer gives them back, or its error."""
    try:
        tokenizer = BPETokenizer(json_text, name="t.json")
        return tokenizer.decode(tokenizer.encode(WORDS))
    except TokenizerError as error:
        return str(error)


@pytest.mark.fault(76)
def test_mistakes_are_named(tmp_path, trained):
    """A file that is missing or something else, a vocabulary too small or too large, a package that is not there."""
    with pytest.raises(TokenizerError, match=r"none\.json: no such tokenizer\.json"):
        read_tokenizer(tmp_path / "none.json")
    with pytest.raises(TokenizerError, match="vocab_size: got 256, expected at least 257"):
        train_bpe([WORDS], 256)
    with pytest.raises(
        TokenizerError, match=r"vocab_size: got 1000, and the text allows (2\d\d); give --vocab-size \1, or more text"
    ):
        train_bpe([WORDS], 1000)


def test_tokenizer_that_loses_text_is_found_out(trained, monkeypatch):
    """Whatever in its file does it: the bytes of the tokens are those of the text."""
    monkeypatch.setitem(trained.__dict__, "byte_lengths", np.zeros(trained.vocab_size, dtype=np.int64))
    with pytest.raises(TokenizerError, match="text: its 3 bytes have become tokens of 0: it changes texts"):
        trained.encode("abc")


def test_text_without_white_space_is_trained_on():
    """In time that grows with the text, and not with its square."""
    text = "".join(random.Random(0).choices("ACGT", k=300_000))
    started_at = time.perf_counter()
    assert train_bpe([text], 300).vocab_size == 300
    assert time.perf_counter() - started_at < 20  # it was 20 in one piece of 300,000


def test_long_words_are_cut_in_training_alone():
    """Of more than 4096 bytes. Others are whole, as short ones without spaces in Chinese are."""
    whole = tokenizers.Tokenizer(tokenizers.models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"vocab_size": 500, "min_frequency": 2, "special_tokens": [END_OF_TEXT], "show_progress": False}
    texts = ["一二三、四五六七。" * 1000, "ab" * 2048, "cd" * 2000]
    whole.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, **settings))
    found = train_bpe(texts, whole.get_vocab_size())
    assert found._tokenizer.get_vocab() == whole.get_vocab()
    assert json.loads(found.metadata.json_text)["pre_tokenizer"]["type"] == "ByteLevel"


def test_vocabulary_has_a_largest_size():
    """The library would take memory for all of it at once."""
    with pytest.raises(TokenizerError, match="vocab_size: got 4000000000, expected at most 1048576"):
        train_bpe([WORDS], 4_000_000_000)


def test_columns_of_a_table_are_cut_right(trained, monkeypatch):
    """Between them are long runs of white space."""
    monkeypatch.setattr(bpe, "PIECE", 1000)
    chance = random.Random(0)
    rows = (f"{chance.choice(WORDS.split())}{' ' * chance.choice([1, 40, 128, 129, 600])}12.50\n" for _ in range(2000))
    text = "".join(rows)
    expected = trained._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    assert trained.encode(text).tolist() == expected


def test_missing_packages_are_named(monkeypatch, trained):
    """With the command that installs them."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(TokenizerError, match="pip install tiktoken, or set"):
        gpt2()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match="pip install tokenizers"):
        tokenizer_from(trained.metadata)


@pytest.fixture(scope="module")
def ranked(text):
    """An encoding, and the same in tiktoken."""
    tiktoken = pytest.importorskip("tiktoken", reason="needs tiktoken")
    trained = train_bpe([text], 1000)
    # Without the special token, which comes first here and last in tiktoken.
    ranks = {token: rank - 1 for rank, token in enumerate(trained.tokens) if rank}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return ranks, tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 999})


def test_tables_of_tiktoken_give_its_ids(ranked, monkeypatch):
    """On half a megabyte, through the function that asks tiktoken for GPT-2's."""
    import tiktoken

    ranks, encoding = ranked
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    tokenizer = gpt2()
    text = load_corpus("python-docs").text
    assert tokenizer.encode(text).tolist() == encoding.encode_ordinary(text)
    assert tokenizer.end_of_text == 999
    assert tokenizer.tokens[:999] == sorted(ranks, key=ranks.__getitem__)
    assert from_ranks(ranks, [END_OF_TEXT]).metadata == tokenizer.metadata


def test_tables_that_cannot_be_loaded_cost_one_line(monkeypatch):
    """As without a network; the line says what else can be done."""
    tiktoken = pytest.importorskip("tiktoken", reason="needs tiktoken")

    def fail(_name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(TokenizerError, match=r'cannot load it \(ConnectionError\); set tokenizer = "bpe" and tokeniz'):
        gpt2()


def test_byte_that_is_not_utf_8_is_encoded_as_the_replacement_character(trained):
    """As in an argument of a command, of which Python makes a surrogate."""
    assert trained.encode("a\udcffb").tolist() == trained.encode("a\ufffdb").tolist()


def test_model_without_a_type_is_known_by_its_merges(trained, tmp_path):
    """As in files of older versions of the tokenizers library."""
    settings = json.loads(trained.metadata.json_text)
    del settings["model"]["type"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    old = read_tokenizer(tmp_path / "tokenizer.json")
    assert old.encode("some words").tolist() == trained.encode("some words").tolist()


def test_encoding_is_trained_on_what_is_not_held_out():
    """Of pieces, too, which lie between parts of the training text."""
    table = DataTable(tokenizer="bpe", vocab_size=262, hold_out="pieces", val_split=0.3)
    text = ["ab"[number % 2] for number in range(6400)]
    for piece in place_pieces(len(text), table.val_split):
        text[piece.start : piece.stop] = "c" * len(piece)
    tokens = make_tokenizer(table, "".join(text)).tokens
    assert any(b"ab" in token or b"ba" in token for token in tokens)
    assert not any(b"cc" in token for token in tokens)
