"""A corpus as tokens, split into a training part and a held-out part."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mygpt.data.corpus import load_corpus
from mygpt.data.prepared import Prepared, open_prepared, read_corpus_manifest
from mygpt.data.tokenizer import DEFAULT_VOCAB_SIZE, ByteTokenizer, CharTokenizer, Tokenizer, describe_tokenizer
from mygpt.errors import CorpusError, counted
from mygpt.recipe.seeds import held_out_pieces_seed
from mygpt.recipe.tables import NAMED_CORPORA, DataTable

GPT2_VOCAB_SIZE = 50_257
PIECES = 32
"""With hold_out = "pieces". With 30 an interval from their losses, of which each counts as one number, held the truth
in 93 to 97% of cases on every text that was tried."""
MAX_ON_DEVICE = 1 << 30  # bytes of a prepared corpus; of a larger one a GPU gets the windows of each batch
MAX_COMPARED = 1 << 30  # bytes of a prepared corpus whose documents are compared at the start: other processes wait
MAX_ENCODED_AGAIN = 1 << 28  # bytes of a prepared held-out text of another tokenizer, which is encoded again in memory
BLOCK = 1 << 20  # tokens searched at a time


class Dataset(NamedTuple):
    """The two parts of a corpus, 1-d tensors of token ids in the smallest type that holds them."""

    tokenizer: Tokenizer
    train: torch.Tensor
    val: torch.Tensor
    """Empty without `val_split`."""
    sha256: str
    """The hash of the corpus, in hexadecimal; of a prepared corpus, the hash of its tokens."""
    check_unchanged: Callable[[], None] | None = None
    """Raises CorpusError if the file that holds the tokens has changed; None: they are in memory."""
    piece_tokens: int = 0
    """The length of each of the pieces that `val` is made of; 0: it is one stretch of the corpus."""
    held_out_sha256: str | None = None
    """The hash of `val_corpus`; None: the held-out part is of the corpus."""

    @property
    def bytes(self) -> int:
        """The size of all tokens."""
        return sum(part.numel() * part.element_size() for part in (self.train, self.val))

    def unseen_characters(self) -> str:
        """The characters that occur only in the held-out part, of a text in memory whose tokens are characters."""
        if self.check_unchanged or not isinstance(self.tokenizer, CharTokenizer):
            return ""
        train, val = (torch.bincount(part, minlength=self.tokenizer.vocab_size) for part in (self.train, self.val))
        return self.tokenizer.decode(((train == 0) & (val > 0)).nonzero().flatten().tolist())

    def count_copies(self) -> tuple[int, int]:
        """How many documents of a prepared held-out part are in the training part, too, and how many it has.

        (0, 0): nothing was compared, since nothing is held out, no token ends a document, or the corpus is large.
        """
        end_of_text = self.tokenizer.end_of_text
        if not len(self.val) or self.check_unchanged is None or end_of_text is None or self.bytes > MAX_COMPARED:
            return 0, 0
        held_out = Counter(_document_hashes(self.val.to(self.train.dtype), end_of_text))
        documents = held_out.total()
        return sum(held_out.pop(digest, 0) for digest in _document_hashes(self.train, end_of_text)), documents

    def to(self, device: torch.device) -> "Dataset":
        """The dataset on the device, or where it is, if it is mapped from a file and large."""
        if self.check_unchanged and (device.type == "cpu" or self.bytes > MAX_ON_DEVICE):
            return self
        parts = (part.int() if part.dtype == torch.uint16 else part for part in (self.train, self.val))
        train, val = (part.to(device) for part in parts)
        return self._replace(train=train, val=val, check_unchanged=None)


def load_dataset(
    table: DataTable,
    seq_len: int,
    *,
    verify: bool = True,
    tokenizer: Tokenizer | None = None,
    only_held_out: bool = False,
) -> Dataset:
    """Read the corpus, make its tokenizer, encode it and hold out its end; or open one that has been prepared.

    With `verify` the hash of prepared tokens is checked. A `tokenizer` is used in place of the corpus's own. With
    `only_held_out` a `val_corpus` stands for the corpus, too, which is not read; the `tokenizer` must be known.

    Raises:
        CorpusError: it cannot be read, has a single distinct character, is too short for windows of seq_len, or is
            prepared with another tokenizer.
        TokenizerError: the tokenizer cannot be read or trained, needs a package that is not installed, or lacks a
            character of the text.
    """
    if tokenizer:
        check_kind(table, tokenizer, "init_from")
    if table.val_corpus:
        return _load_two(table, table.val_corpus, seq_len, tokenizer, verify=verify, only_held_out=only_held_out)
    whole = _read_corpus(table, tokenizer, verify=verify)
    tokenizer, tokens, is_text = whole.tokenizer, whole.train, whole.check_unchanged is None
    if table.hold_out == "documents" and is_text:
        raise CorpusError(
            f'hold_out: got "documents", and {table.corpus} is one text; prepare it with `mygpt data prepare`'
        )
    if table.hold_out == "pieces" and not is_text:
        raise CorpusError(f'hold_out: got "pieces", and {table.corpus} is prepared; hold out "documents" or "tokens"')
    if table.hold_out == "documents" and tokenizer.end_of_text is None:
        raise CorpusError(f'{table.corpus}: its tokenizer has no token between documents; set hold_out = "tokens"')
    if table.hold_out == "pieces" and table.val_split:
        pieces = place_pieces(len(tokens), table.val_split)
        val = torch.cat([tokens[piece.start : piece.stop] for piece in pieces])
        train = torch.cat([tokens[gap.start : gap.stop] for gap in gaps_between(pieces, len(tokens))])
        lengths = {"training part": len(train), "first held-out piece": len(pieces[0])}
        _check_lengths(lengths, len(tokens), seq_len, tokenizer.metadata.type)
        return whole._replace(train=train, val=val, piece_tokens=len(pieces[0]))
    end_of_text = tokenizer.end_of_text if table.hold_out == "documents" else None
    train, val = split(tokens, table.val_split, seq_len, tokenizer.metadata.type, end_of_text)
    return whole._replace(train=train, val=val)


def _read_corpus(table: DataTable, tokenizer: Tokenizer | None, *, verify: bool, further_text: str = "") -> Dataset:
    """The corpus, all of it as the training part, in tokens of the `tokenizer` or of its own.

    `further_text` will be encoded, too: characters that only it has are among the tokens.
    """
    if is_prepared(table.corpus):
        prepared, tokens = _open_tokens(Path(table.corpus), tokenizer, verify=verify)
        check_kind(table, prepared.tokenizer, table.corpus)
        sha256, check = prepared.manifest.tokens_sha256, prepared.check_unchanged
        return Dataset(prepared.tokenizer, tokens, tokens[:0], sha256, check)
    text, sha256 = load_corpus(table.corpus)
    if tokenizer is None:
        tokenizer = CharTokenizer(text + further_text) if table.tokenizer == "char" else make_tokenizer(table, text)
        if tokenizer.vocab_size < 2:
            raise CorpusError(f"{table.corpus}: has a single distinct character; expected a text to learn from")
    tokens = torch.from_numpy(tokenizer.encode(text, name=table.corpus))
    return Dataset(tokenizer, tokens, tokens[:0], sha256)


def is_prepared(corpus: str) -> bool:
    """Whether a corpus is a folder, as `mygpt data prepare` makes them."""
    return corpus not in NAMED_CORPORA and os.path.isdir(corpus)


def corpus_sha256(corpus: str) -> str:
    """The hash that a dataset of this corpus has; raises CorpusError if it cannot be read."""
    return read_corpus_manifest(Path(corpus)).tokens_sha256 if is_prepared(corpus) else load_corpus(corpus).sha256


def check_kind(table: DataTable, tokenizer: Tokenizer, owner: str) -> None:
    """Raises CorpusError if the recipe asks for another kind of tokenizer than the one that `owner` brings."""
    kind = tokenizer.metadata.type
    is_gpt2 = kind == "bpe" and tokenizer.vocab_size == GPT2_VOCAB_SIZE
    fits = table.tokenizer in ("char", kind) or (table.tokenizer == "gpt2" and is_gpt2)
    if not fits or table.vocab_size or table.tokenizer_file:
        raise CorpusError(f"{owner}: its tokenizer is {kind!r}; leave tokenizer, vocab_size and tokenizer_file out")


def _open_tokens(
    folder: Path, tokenizer: Tokenizer | None, *, verify: bool, max_other: int = 0
) -> tuple[Prepared, torch.Tensor]:
    """A prepared corpus and its tokens.

    If the `tokenizer` is known, a corpus of more than `max_other` bytes of text must be prepared with it.
    """
    prepared = open_prepared(folder, verify=verify)
    if tokenizer and prepared.tokenizer.metadata != tokenizer.metadata and prepared.manifest.text_bytes > max_other:
        known, other = (describe_tokenizer(each.metadata) for each in (tokenizer, prepared.tokenizer))
        raise CorpusError(f"{folder}: is prepared with the tokenizer {other}, expected {known}; prepare it with that")
    with warnings.catch_warnings():
        # torch has no tensors that cannot be written to, and says so once; nothing writes to these.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return prepared, torch.from_numpy(prepared.tokens)


def _load_two(
    table: DataTable,
    val_corpus: str,
    seq_len: int,
    tokenizer: Tokenizer | None,
    *,
    verify: bool,
    only_held_out: bool,
) -> Dataset:
    """The corpus as the training part, or none with `only_held_out`, and `val_corpus` as the held-out part.

    A prepared `val_corpus` of another tokenizer than the corpus's is decoded and encoded.
    """
    val_text = None if is_prepared(val_corpus) else load_corpus(val_corpus)
    corpus = None
    if not (tokenizer and only_held_out):
        corpus = _read_corpus(table, tokenizer, verify=verify, further_text=val_text.text if val_text else "")
        tokenizer = corpus.tokenizer
    if val_text:
        val, held_out_sha256 = torch.from_numpy(tokenizer.encode(val_text.text, name=val_corpus)), val_text.sha256
        check = None
    else:
        prepared, val = _open_tokens(Path(val_corpus), tokenizer, verify=verify, max_other=MAX_ENCODED_AGAIN)
        held_out_sha256, check = prepared.manifest.tokens_sha256, prepared.check_unchanged
        if prepared.tokenizer.metadata != tokenizer.metadata:
            val, check = _encode_again(prepared, tokenizer, val_corpus), None
    corpus = corpus or Dataset(tokenizer, val, val, held_out_sha256)
    unit = "character" if tokenizer.metadata.type == "char" else "token"
    for name, part in ((table.corpus, corpus.train), (val_corpus, val)):
        if len(part) <= seq_len + 1:
            expected = f"more than seq_len + 1 = {seq_len + 1}; give a longer text, or train with a smaller seq_len"
            raise CorpusError(f"{name}: has {counted(len(part), unit)}, expected {expected}")

    checks = [each for each in (corpus.check_unchanged, check) if each]

    def check_unchanged() -> None:
        for each in checks:
            each()

    return corpus._replace(
        val=val, held_out_sha256=held_out_sha256, check_unchanged=check_unchanged if checks else None
    )


def _encode_again(prepared: Prepared, tokenizer: Tokenizer, name: str) -> torch.Tensor:
    """A prepared corpus, called `name`, as tokens of the `tokenizer`; each document ends as that has it."""
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    parts = []
    for document in _documents(np.asarray(prepared.tokens), prepared.tokenizer.end_of_text):
        ids = tokenizer.encode(prepared.decode(document), name=name)
        parts += [ids, np.array(end, ids.dtype)]
    return torch.from_numpy(np.concatenate(parts))


def _documents(tokens: npt.NDArray[np.integer], end_of_text: int | None) -> Iterator[npt.NDArray[np.integer]]:
    """The parts of `tokens` (n,) that end before each `end_of_text`, and what follows the last."""
    start = 0
    for block in range(0, len(tokens), BLOCK) if end_of_text is not None else ():
        for end in (block + np.flatnonzero(tokens[block : block + BLOCK] == end_of_text)).tolist():
            yield tokens[start:end]
            start = end + 1
    if start < len(tokens):
        yield tokens[start:]


def _document_hashes(tokens: torch.Tensor, end_of_text: int) -> Iterator[bytes]:
    """A hash of each document in `tokens` (n,) that is not empty."""
    for document in filter(len, _documents(tokens.numpy(), end_of_text)):
        yield hashlib.blake2b(np.ascontiguousarray(document).data, digest_size=16).digest()


def make_tokenizer(table: DataTable, text: str) -> Tokenizer:
    """The tokenizer that the recipe asks for, of this text; raises TokenizerError as `load_dataset` does."""
    if table.tokenizer == "char":
        return CharTokenizer(text)
    if table.tokenizer == "byte":
        return ByteTokenizer()
    from mygpt.data import bpe  # an extra

    if table.tokenizer == "gpt2":
        return bpe.gpt2()
    if table.tokenizer_file:
        return bpe.read_tokenizer(Path(table.tokenizer_file))
    # The tokens of the held-out part are not known yet: these characters are about the training part.
    known = [range(int((1 - table.val_split) * len(text)))]
    if table.hold_out == "pieces":
        known = gaps_between(place_pieces(len(text), table.val_split), len(text))
    return bpe.train_bpe([text[part.start : part.stop] for part in known], table.vocab_size or DEFAULT_VOCAB_SIZE)


def place_pieces(tokens: int, val_split: float) -> list[range]:
    """The held-out pieces of a text of so many tokens: `PIECES` pieces of equal length, in order, at random positions.

    All runs have the same positions. Every arrangement without an overlap is equally likely.
    """
    length = int(val_split * tokens) // PIECES
    generator = torch.Generator().manual_seed(held_out_pieces_seed())
    between = torch.randint(0, tokens - PIECES * length + 1, (PIECES,), generator=generator).sort().values.tolist()
    starts = (before + number * length for number, before in enumerate(between))
    return [range(start, start + length) for start in starts]


def gaps_between(pieces: Sequence[range], tokens: int) -> list[range]:
    """What is left of a text without these pieces, in order."""
    ends, starts = [0, *(piece.stop for piece in pieces)], [*(piece.start for piece in pieces), tokens]
    return [range(end, start) for end, start in zip(ends, starts, strict=True)]


def split(
    tokens: torch.Tensor, val_split: float, seq_len: int, tokenizer: str = "char", end_of_text: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training part, the first `int((1 - val_split) * n)` of the `tokens` (n,), and the held-out rest.

    With `end_of_text` the training part ends with the last one in it, so that it has whole documents.

    Raises:
        CorpusError: a part has at most seq_len + 1 tokens, so that no window can be drawn from it. The held-out part
            may be empty if val_split is 0.
    """
    boundary = int((1 - val_split) * len(tokens))
    if val_split and end_of_text is not None:
        boundary = after_last(tokens[:boundary], end_of_text)
        if not boundary:
            raise CorpusError("hold_out: no document ends in the training part; lower val_split, or hold out tokens")
    parts = tokens[:boundary], tokens[boundary:]
    names = ("training part", "held-out part") if val_split else ("training part",)
    lengths = {name: len(part) for name, part in zip(names, parts, strict=False)}
    _check_lengths(lengths, len(tokens), seq_len, tokenizer)
    return parts


def _check_lengths(lengths: Mapping[str, int], tokens: int, seq_len: int, tokenizer: str) -> None:
    """Check that a window can be drawn from each part; `lengths` has the tokens of each by its name."""
    unit = "character" if tokenizer == "char" else "token"
    for name, length in lengths.items():
        if length <= seq_len + 1:
            raise CorpusError(
                f"the {name} has {length:,} of the corpus's {counted(tokens, unit)}, expected more than "
                f"seq_len + 1 = {seq_len + 1}; give a longer text, a smaller seq_len or another val_split"
            )


def after_last(tokens: torch.Tensor, token: int) -> int:
    """The position after the last occurrence of `token` in `tokens` (n,); 0: there is none."""
    for end in range(len(tokens), 0, -BLOCK):  # from the end, so that little of a large file is read
        start = max(0, end - BLOCK)
        if len(found := (tokens[start:end].int() == token).nonzero()):
            return start + int(found[-1]) + 1
    return 0
