"""A corpus as tokens: its training part, its held-out part, and the windows drawn from them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from mygpt.corpus import load_corpus
from mygpt.errors import CorpusError
from mygpt.recipe import DataTable, ValidationTable
from mygpt.tokenizer import CharTokenizer


class Dataset(NamedTuple):
    """The two parts of a corpus, 1-d tensors of token ids in the smallest type that holds them."""

    tokenizer: CharTokenizer
    train: torch.Tensor
    val: torch.Tensor
    """Empty without `val_split`."""
    sha256: str
    """Of the corpus."""

    def to(self, device: torch.device) -> "Dataset":
        return self._replace(train=self.train.to(device), val=self.val.to(device))


class Batch(NamedTuple):
    """Windows of token ids and, one position later, what follows each token; both int64 (batch, seq_len)."""

    inputs: torch.Tensor
    targets: torch.Tensor


class Rows(NamedTuple):
    """The rows of every global batch that one of `num_processes` processes takes."""

    process_index: int = 0
    num_processes: int = 1

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's consecutive share of `rows`; the shares of all processes join to `rows`."""
        return rows.tensor_split(self.num_processes)[self.process_index]


def load_dataset(table: DataTable, seq_len: int) -> Dataset:
    """Read the corpus, make its vocabulary, encode it and hold out its end.

    Raises:
        CorpusError: it cannot be read, or is too short for windows of seq_len.
    """
    corpus = load_corpus(table.corpus)
    tokenizer = CharTokenizer(corpus.text)
    if tokenizer.vocab_size < 2:
        raise CorpusError(f"{table.corpus}: has a single distinct character; expected a text to learn from")
    tokens = torch.from_numpy(tokenizer.encode(corpus.text))
    return Dataset(tokenizer, *split(tokens, table.val_split, seq_len), corpus.sha256)


def split(tokens: torch.Tensor, val_split: float, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The training part, `int((1 - val_split) * n)` tokens from the start, and the held-out rest, maybe empty.

    Raises:
        CorpusError: a part that is in use is not longer than seq_len + 1, so that no window can be drawn from it.
    """
    boundary = int((1 - val_split) * len(tokens))
    parts = tokens[:boundary], tokens[boundary:]
    for name, part in zip(("training", "held-out"), parts if val_split else parts[:1], strict=False):
        if len(part) <= seq_len + 1:
            raise CorpusError(
                f"the {name} part has {len(part):,} of the corpus's {len(tokens):,} characters, expected more than "
                f"seq_len + 1 = {seq_len + 1}; give a longer text, a smaller seq_len or another val_split"
            )
    return parts


def get_batch(data: torch.Tensor, batch_size: int, seq_len: int, generator: torch.Generator | None = None) -> Batch:
    """`batch_size` windows at random places of `data` (n,).

    Draws once from `generator`, or from torch's global one.
    """
    return windows(data, draw_starts(data, batch_size, seq_len, generator), seq_len)


def draw_starts(
    data: torch.Tensor, batch_size: int, seq_len: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Random places (batch_size,) at which a window of seq_len and one more token fit into `data`."""
    return torch.randint(0, len(data) - seq_len - 1, (batch_size,), generator=generator)


def windows(data: torch.Tensor, starts: torch.Tensor, seq_len: int) -> Batch:
    """The windows of `data` (n,) that begin at `starts` (batch,)."""
    places = starts.to(data.device)[:, None] + torch.arange(seq_len + 1, device=data.device)
    tokens_BT1 = data[places].long()
    return Batch(tokens_BT1[:, :-1], tokens_BT1[:, 1:])


class BatchStream:
    """The endless stream of training batches.

    Every process draws the places of the whole global batch, so that all generators stay in step, and takes the
    windows of its own rows: the global batch does not depend on the number of processes.
    """

    def __init__(self, data: torch.Tensor, batch_size: int, seq_len: int, *, seed: int, rows: Rows):
        self.data = data
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.rows = rows
        self.generator = torch.Generator().manual_seed(seed)
        """The position in the stream; "shared-stream" evaluation draws from it too."""

    def batch(self) -> Batch:
        """This process's rows of the next global batch."""
        starts = draw_starts(self.data, self.batch_size, self.seq_len, self.generator)
        return windows(self.data, self.rows.of(starts), self.seq_len)


def held_out_batches(val: torch.Tensor, table: ValidationTable, stream: BatchStream, seed: int) -> Iterator[Batch]:
    """The windows of one evaluation, as `table.sampling` says, in batches like those of the training `stream`."""
    if table.sampling == "full":
        return all_windows(val, stream.batch_size, stream.seq_len, stream.rows)
    # Seeded anew each time, its own stream gives the same windows at every evaluation: the curve compares like with
    # like, and a step's value does not depend on how often there is one.
    own_stream = table.sampling == "own-stream"
    generator = torch.Generator().manual_seed(seed + 1) if own_stream else stream.generator
    return random_batches(val, stream.batch_size, stream.seq_len, table.eval_batches, generator, stream.rows)


def random_batches(
    data: torch.Tensor, batch_size: int, seq_len: int, count: int, generator: torch.Generator | None, rows: Rows
) -> Iterator[Batch]:
    """This process's rows of `count` global batches drawn with `generator`."""
    for _ in range(count):
        yield windows(data, rows.of(draw_starts(data, batch_size, seq_len, generator)), seq_len)


def all_windows(data: torch.Tensor, batch_size: int, seq_len: int, rows: Rows) -> Iterator[Batch]:
    """This process's rows of `data` cut into consecutive windows, so that each token after the first is a target once.

    The last window is shorter where seq_len does not divide n - 1; it is a batch of its own.
    """
    targets = len(data) - 1
    whole = targets - targets % seq_len
    for starts in torch.arange(0, whole, seq_len).split(batch_size):
        yield windows(data, rows.of(starts), seq_len)
    if whole < targets:
        yield windows(data, rows.of(torch.tensor([whole])), targets - whole)
