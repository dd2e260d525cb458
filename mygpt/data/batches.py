"""A corpus as tokens: its training part, its held-out part, and the windows drawn from them."""

from typing import NamedTuple

import torch

from mygpt.recipe.seeds import held_out_seed
from mygpt.recipe.tables import ValidationTable


class Batch(NamedTuple):
    """Windows of token ids and, one position later, what follows each token; both int64 (batch, seq_len)."""

    inputs: torch.Tensor
    targets: torch.Tensor


class Rows(NamedTuple):
    """The rows of every global batch that one of `num_processes` processes takes: consecutive micro-batches of it."""

    micro_batch_size: int
    process_index: int = 0
    num_processes: int = 1

    def micro_batches(self, rows: int) -> range:
        """Which of the micro-batches of so many rows are this process's: as many as another's, or one more."""
        count = -(-rows // self.micro_batch_size)
        first, end = (count * index // self.num_processes for index in (self.process_index, self.process_index + 1))
        return range(first, end)

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's share of `rows`; the shares of all processes join to `rows`."""
        own = self.micro_batches(len(rows))
        return rows[own.start * self.micro_batch_size : own.stop * self.micro_batch_size]


class Places(NamedTuple):
    """Where windows of one length begin; (batch,)."""

    starts: torch.Tensor
    seq_len: int
    consecutive: bool = False
    """Whether each begins where the one before ends, and not at random."""


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
    # A copy that blocked would have the host wait for the steps before.
    places = starts.to(data.device, non_blocking=True)[:, None] + torch.arange(seq_len + 1, device=data.device)
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


def held_out_places(val: torch.Tensor, table: ValidationTable, stream: BatchStream) -> list[Places]:
    """The windows of one evaluation, as `table.sampling` says; random ones in batches as large as those of `stream`."""
    if table.sampling == "full":
        return all_places(val, stream.seq_len)
    # Seeded anew each time, its own stream gives the same windows at every evaluation of every run: a curve compares
    # like with like, runs can be compared window by window, and a value does not depend on how often there is one.
    own_stream = table.sampling == "own-stream"
    generator = torch.Generator().manual_seed(held_out_seed()) if own_stream else stream.generator
    return random_places(val, stream.batch_size, stream.seq_len, table.eval_batches, generator)


def random_places(
    data: torch.Tensor, batch_size: int, seq_len: int, count: int, generator: torch.Generator | None
) -> list[Places]:
    """The windows of `count` batches drawn with `generator`."""
    draws = [draw_starts(data, batch_size, seq_len, generator) for _ in range(count)]
    return [Places(torch.cat(draws), seq_len)]


def all_places(data: torch.Tensor, seq_len: int) -> list[Places]:
    """`data` cut into consecutive windows, so that each token after the first is a target once.

    The last window is shorter where seq_len does not divide n - 1.
    """
    targets = len(data) - 1
    whole = targets - targets % seq_len
    tail = torch.arange(whole, targets)[:1]
    groups = Places(torch.arange(0, whole, seq_len), seq_len, True), Places(tail, targets - whole, True)
    return [places for places in groups if len(places.starts)]
