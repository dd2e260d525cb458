"""Byte-pair encodings on Hugging Face's tokenizers: trained here, read from a tokenizer.json, or tiktoken's GPT-2.

Source: Sennrich et al., "Neural machine translation of rare words with subword units" (2016), on bytes as in GPT-2.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import islice, pairwise, takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from mygpt.data.tokenizer import END_OF_TEXT, BPEMetadata, Tokenizer, id_type
from mygpt.errors import TokenizerError, printable
from mygpt.recipe.reading import decode_utf8, read_file

PIECE = 1 << 16  # characters, or a few more, that are one string of the library: its memory and time grow faster
PIECES_AT_A_TIME = 32  # pieces encoded at a time: the library takes hundreds of bytes of memory for each token
CONTEXT = 256  # characters to either side of a place by which is decided whether a text may be cut there
SPACE = re.compile(rf"(?<!\s)\s{{1,{CONTEXT // 2}}}(?!\s)")  # of a longer run the context shows no beginning or end
MAX_PIECE = 1 << 20  # characters after which a text that has no place to cut is cut all the same, to bound memory
MAX_VOCAB_SIZE = 1 << 20  # of a trained encoding: the library takes memory for all tokens at once
MAX_ID = 1 << 24  # of a token: the table of tokens has a place for each smaller one, too
MAX_WORD = 1 << 12  # bytes of a word on which an encoding is trained: time grows with the square of a word
FILE = "the tokenizer.json of the tokenizers library"
PROBE = (
    "".join(map(chr, (*range(0x180), 0x2028, 0x3000, 0x1F600))) + "  a  b\r\n\n c\t\td's 'LL 12345 \u0301e\u0301  \n "
)
"""Text that an encoding must give back."""


class BPETokenizer(Tokenizer):
    """A byte-level byte-pair encoding: any text can be encoded, and decoding gives the same bytes back.

    Raises:
        TokenizerError: `json_text`, which an error calls `name`, is not one; or tokenizers is not installed.
    """

    metadata: BPEMetadata

    def __init__(self, json_text: str, name: str):
        library, settings = _library(), _parse(json_text, name)
        try:
            self._tokenizer = library.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises no narrower class
            reason = f"tokenizers {library.__version__} cannot read it: {printable(str(error))}"
            raise TokenizerError(f"{name}: not a tokenizer.json: {reason}") from None
        _check_settings(settings, name)
        added = settings.get("added_tokens", [])
        for token in added:
            if (got := self._tokenizer.token_to_id(token["content"])) != token["id"]:
                ids = f"the id {token['id']}, and the tokenizers library gives it {'none' if got is None else got}"
                raise TokenizerError(f"{name}: its token {token['content']!r} has {ids}")
        # What the file adds around and cuts off a text is for other uses; in a text, names of special tokens are text.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.metadata = BPEMetadata(json_text=json_text)
        ordinary = _ordinary_tokens(settings["model"])
        self._added = [token for token in added if token["content"] not in ordinary]
        self._special = {token["content"]: token["id"] for token in self._added if token.get("special")}
        self.end_of_text = self._special.get(END_OF_TEXT)
        self._id_type = id_type(self.vocab_size)
        try:
            ids = self._tokenizer.encode_batch_fast([PROBE], add_special_tokens=False)[0].ids
        except Exception as error:  # as above
            raise TokenizerError(f"{name}: cannot encode texts: {printable(str(error))}") from None
        if b"".join(self.tokens[token] for token in ids) != PROBE.encode():
            raise TokenizerError(f"{name}: changes texts, as by a space that it adds; expected one that does not")

    @cached_property
    def tokens(self) -> list[bytes]:
        byte_of = {character: byte for byte, character in _byte_characters().items()}
        added = {token["id"]: token["content"] for token in self._added}
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        tokens = [b""] * (max(vocab.values()) + 1)
        for text, token in vocab.items():
            is_bytes = token not in added and all(character in byte_of for character in text)
            tokens[token] = bytes(byte_of[character] for character in text) if is_bytes else text.encode()
        return tokens

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._special.values())

    def encode(self, text: str, name: str = "text") -> npt.NDArray[np.integer]:
        # Lone surrogates stand for bytes that were not UTF-8, which no string of the library can hold.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        parts = [np.empty(0, dtype=self._id_type)]
        pieces = self.cut(text)
        while batch := list(islice(pieces, PIECES_AT_A_TIME)):
            encodings = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            parts += [np.array(encoding.ids, dtype=self._id_type) for encoding in encodings]
        ids = np.concatenate(parts)
        if (got := self.byte_lengths[ids].sum()) != (size := len(text.encode())):
            raise TokenizerError(f"{name}: its {size:,} bytes have become tokens of {got:,}: it changes texts")
        return ids

    def cut(self, text: str) -> Iterator[str]:
        if self._tokenizer.pre_tokenizer is None:  # then a token may span any two characters
            return iter([text])
        return cut(text, self._words_and_ids)

    def _words_and_ids(self, text: str) -> tuple[list[str], list[int]]:
        words = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return words, self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _parse(json_text: str, name: str) -> dict[str, Any]:
    """The settings in a tokenizer.json, called `name`; with another kind of tokenizer the library may panic."""
    try:
        settings = json.loads(json_text)
    except (ValueError, RecursionError):
        raise TokenizerError(f"{name}: not JSON; expected {FILE}") from None
    model = settings.get("model") if isinstance(settings, dict) else None
    if not isinstance(model, dict):
        is_vocabulary = isinstance(settings, dict) and {*map(type, settings.values())} == {int}
        kind = "a vocabulary alone" if is_vocabulary else "JSON of another kind"
        raise TokenizerError(f"{name}: {kind}; expected {FILE}")
    is_bpe = model.get("type") == "BPE" or (model.get("type") is None and "merges" in model)
    vocab = model.get("vocab")
    has_bytes = is_bpe and isinstance(vocab, dict) and set(_byte_characters().values()) <= vocab.keys()
    if not has_bytes or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        kind = "a byte-level BPE, with all 256 bytes in its vocabulary, as GPT-2's"
        raise TokenizerError(f"{name}: got a tokenizer of another kind, expected {kind}")
    return settings


def _ordinary_tokens(model: dict[str, Any]) -> set[str]:
    """The tokens that text can become: all bytes, and what is joined of them."""
    return {"".join(pair).replace(" ", "") for pair in model["merges"]} | set(_byte_characters().values())


def _does_nothing(normalizer: Any) -> bool:
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        return all(map(_does_nothing, normalizer["normalizers"]))
    return normalizer is None


def _check_settings(settings: Any, name: str) -> None:
    """Refuse what makes an encoding change texts. The library has read the settings: they have the right types."""
    model = settings["model"]
    if model.get("dropout"):
        raise TokenizerError(f"{name}: its dropout gives other ids each time; remove it")
    if not _does_nothing(settings.get("normalizer")):
        raise TokenizerError(f"{name}: changes texts by its normalizer; remove it")
    added = settings.get("added_tokens", [])
    ordinary = _ordinary_tokens(model)
    for token in added:
        content = token["content"]
        if not token["special"] and (token["lstrip"] or token["rstrip"]):
            raise TokenizerError(f"{name}: changes texts: its token {content!r} takes away space beside it")
        if not token["special"] and content in ordinary and not content.isascii():
            raise TokenizerError(f"{name}: changes texts: its added token {content!r} also stands for other bytes")
    texts: dict[int, str] = {}
    for text, number in [*model["vocab"].items(), *((token["content"], token["id"]) for token in added)]:
        if number > MAX_ID:
            raise TokenizerError(f"{name}: has a token with the id {number}, expected at most {MAX_ID}")
        if texts.setdefault(number, text) != text:
            raise TokenizerError(f"{name}: the id {number} has two tokens: {texts[number]!r} and {text!r}")


def read_tokenizer(path: Path) -> BPETokenizer:
    """The encoding in a tokenizer.json.

    Raises:
        TokenizerError: the file cannot be read, or holds another kind of tokenizer.
    """
    raw = read_file(path, TokenizerError, expected="a tokenizer.json", missing="no such tokenizer.json")
    return BPETokenizer(decode_utf8(raw, path, TokenizerError, f"; expected {FILE}"), name=str(path))


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """The byte-pair encoding of these texts with `vocab_size` tokens: END_OF_TEXT, all bytes, and pairs of tokens.

    Words are cut as in GPT-2. The same texts give the same encoding.

    Raises:
        TokenizerError: the texts have too few pairs that occur twice, or vocab_size is below 257.
    """
    library = _library()
    alphabet = sorted(_byte_characters().values())
    if vocab_size < len(alphabet) + 1:
        raise TokenizerError(f"vocab_size: got {vocab_size}, expected at least 257: all bytes and {END_OF_TEXT}")
    if vocab_size > MAX_VOCAB_SIZE:
        raise TokenizerError(f"vocab_size: got {vocab_size}, expected at most {MAX_VOCAB_SIZE}")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
        [_gpt2_words(), library.pre_tokenizers.FixedLength(length=MAX_WORD)]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a token that occurs once saves nothing
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in cut_words(text)), trainer)
    tokenizer.pre_tokenizer = _gpt2_words()
    if (got := tokenizer.get_vocab_size()) < vocab_size:
        raise TokenizerError(
            f"vocab_size: got {vocab_size}, and the text allows {got}; give --vocab-size {got}, or more text"
        )
    return BPETokenizer(tokenizer.to_str(), name="tokenizer")


def gpt2() -> BPETokenizer:
    """GPT-2's encoding, from tiktoken, which downloads its tables once and checks their hash.

    Raises:
        TokenizerError: tiktoken is not installed, or cannot download them.
    """
    try:
        import tiktoken
    except ImportError:
        raise TokenizerError(
            'tokenizer = "gpt2" needs tiktoken: pip install tiktoken, or set tokenizer = "bpe" and tokenizer_file to '
            "the path of GPT-2's tokenizer.json"
        ) from None
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests and tiktoken raise their own kinds
        raise TokenizerError(
            f'gpt2: tiktoken cannot load it ({type(error).__name__}); set tokenizer = "bpe" and tokenizer_file to the '
            "path of GPT-2's tokenizer.json"
        ) from None
    number = encoding.encode_single_token
    ranks = {token: number(token) for token in encoding.token_byte_values()}
    return from_ranks(ranks, sorted(encoding.special_tokens_set, key=number))


def from_ranks(ranks: Mapping[bytes, int], special: Sequence[str]) -> BPETokenizer:
    """The encoding that tiktoken describes by the rank of each token, with words cut as in GPT-2.

    `special` tokens follow, in this order. A token is made of the two that its bytes come down to if only pairs of
    lower rank are joined.
    """
    library, characters = _library(), _byte_characters()
    text = {token: "".join(characters[byte] for byte in token) for token in ranks}
    pairs = (_join(token, ranks, ranks[token]) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    model = library.models.BPE(
        vocab={text[token]: rank for token, rank in ranks.items()},
        merges=[(text[left], text[right]) for left, right in pairs],
    )
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = _gpt2_words()
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return BPETokenizer(tokenizer.to_str(), name="gpt2")


def _join(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """The parts of `token` after joining pairs, the lowest rank first, whose rank is `below` this."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        pair_ranks = [ranks.get(left + right, below) for left, right in pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest >= below:
            break
        at = pair_ranks.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def cut_words(text: str) -> Iterator[str]:
    """As `cut`, of words as in GPT-2."""
    words = _gpt2_words()
    return cut(text, lambda part: ([word for word, _ in words.pre_tokenize_str(part)],))


def _gpt2_words() -> Any:
    return _library().pre_tokenizers.ByteLevel(add_prefix_space=False)


def cut(text: str, parse: Callable[[str], Sequence[list[Any]]], size: int | None = None) -> Iterator[str]:
    """The text in pieces of at least `size` characters (None: `PIECE`), whose tokens, joined, are those of the whole.

    A text is cut before or after white space, where `parse`, which gives the words and the tokens of a short text,
    finds the same in the parts as in the whole; `CONTEXT` characters to either side decide. Where there is no such
    place for `MAX_PIECE` characters, as in a text without spaces, it is cut there, and one token may become two. Only
    the last piece depends on where the text ends, so that a longer text is cut at the same places.
    """
    size, start = size or PIECE, 0

    def may_end(at: int) -> bool:
        before, after = text[max(start, at - CONTEXT) : at], text[at : at + CONTEXT]
        parts = zip(parse(before + after), parse(before), parse(after), strict=True)
        return all(whole == first + second for whole, first, second in parts)

    while len(text) - start > size + CONTEXT:
        last = min(len(text) - CONTEXT, start + size + MAX_PIECE)
        places = (place for space in SPACE.finditer(text, start + size) for place in space.span())
        end = next(filter(may_end, takewhile(last.__ge__, places)), None)
        if end is None:
            if last < start + size + MAX_PIECE:
                break  # the text may go on
            end = last
        yield text[start:end]
        start = end
    yield text[start:]


@cache
def _byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary: that of its number, or one from U+0100 on."""
    own = sorted({*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)})
    others = sorted({*range(0x100)} - {*own})
    return {byte: chr(byte) for byte in own} | {byte: chr(0x100 + index) for index, byte in enumerate(others)}


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError:
        raise TokenizerError("byte-pair encodings need tokenizers: pip install tokenizers") from None
    return tokenizers
