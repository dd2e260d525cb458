"""A corpus as tokens, split into a training part and a held-out part."""

from pathlib import Path
from typing import NamedTuple

import torch

from mygpt.data.corpus import load_corpus
from mygpt.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from mygpt.errors import CorpusError
from mygpt.recipe.tables import DataTable

DEFAULT_VOCAB_SIZE = 1024
"""Tokens of a byte-pair encoding that is trained, as in the course."""


class Dataset(NamedTuple):
    """The two parts of a corpus, 1-d tensors of token ids in the smallest type that holds them."""

    tokenizer: Tokenizer
    train: torch.Tensor
    val: torch.Tensor
    """Empty without `val_split`."""
    sha256: str
    """The corpus's, in hexadecimal."""

    def to(self, device: torch.device) -> "Dataset":
        return self._replace(train=self.train.to(device), val=self.val.to(device))


def load_dataset(table: DataTable, seq_len: int) -> Dataset:
    """Read the corpus, make its tokenizer, encode it and hold out its end.

    Raises:
        CorpusError: it cannot be read, has a single distinct character, or is too short for windows of seq_len.
        TokenizerError: the tokenizer cannot be read or trained, or needs a package that is not installed.
    """
    corpus = load_corpus(table.corpus)
    tokenizer = make_tokenizer(table, corpus.text)
    if tokenizer.vocab_size < 2:
        raise CorpusError(f"{table.corpus}: has a single distinct character; expected a text to learn from")
    tokens = torch.from_numpy(tokenizer.encode(corpus.text))
    return Dataset(tokenizer, *split(tokens, table.val_split, seq_len, table.tokenizer), corpus.sha256)


def make_tokenizer(table: DataTable, text: str) -> Tokenizer:
    """The tokenizer that the recipe asks for, of this text.

    Raises:
        TokenizerError: see `load_dataset`.
    """
    if table.tokenizer == "char":
        return CharTokenizer(text)
    if table.tokenizer == "byte":
        return ByteTokenizer()
    from mygpt.data import bpe  # an extra

    if table.tokenizer == "gpt2":
        return bpe.gpt2()
    if table.tokenizer_file:
        return bpe.read_tokenizer(Path(table.tokenizer_file))
    # Text that is held out chooses no token.
    return bpe.train_bpe([text[: int((1 - table.val_split) * len(text))]], table.vocab_size or DEFAULT_VOCAB_SIZE)


def split(
    tokens: torch.Tensor, val_split: float, seq_len: int, tokenizer: str = "char"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training part, the first `int((1 - val_split) * n)` of the `tokens` (n,), and the held-out rest.

    Raises:
        CorpusError: a part has at most seq_len + 1 tokens, so that no window can be drawn from it. The held-out part
            may be empty if val_split is 0.
    """
    boundary = int((1 - val_split) * len(tokens))
    parts = tokens[:boundary], tokens[boundary:]
    unit = "characters" if tokenizer == "char" else "tokens"
    for name, part in zip(("training", "held-out"), parts if val_split else parts[:1], strict=False):
        if len(part) <= seq_len + 1:
            raise CorpusError(
                f"the {name} part has {len(part):,} of the corpus's {len(tokens):,} {unit}, expected more than "
                f"seq_len + 1 = {seq_len + 1}; give a longer text, a smaller seq_len or another val_split"
            )
    return parts
