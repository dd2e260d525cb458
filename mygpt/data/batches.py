"""Windows of tokens: the stream of training batches, a process's share of them, and the held-out windows."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from mygpt.recipe.seeds import epoch_seed, held_out_seed
from mygpt.recipe.tables import ValidationTable


class Batch(NamedTuple):
    """Windows of token ids, and the token that follows each of these; both int64 (batch, seq_len)."""

    inputs: torch.Tensor
    targets: torch.Tensor


class Share(NamedTuple):
    """The part of every global batch that one of `num_processes` processes computes: consecutive micro-batches."""

    micro_batch_size: int
    process_index: int = 0
    num_processes: int = 1

    def micro_batches(self, rows: int) -> range:
        """The indices of this process's micro-batches in a batch of `rows`; their numbers differ by at most one."""
        count = -(-rows // self.micro_batch_size)
        first, end = (count * index // self.num_processes for index in (self.process_index, self.process_index + 1))
        return range(first, end)

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's part of `rows`; the parts of all processes, joined in order, are `rows`."""
        own = self.micro_batches(len(rows))
        return rows[own.start * self.micro_batch_size : own.stop * self.micro_batch_size]


class WindowSet(NamedTuple):
    """Windows of one length, by the positions (windows,) of their first tokens."""

    starts: torch.Tensor
    seq_len: int
    consecutive: bool = False
    """Whether the windows follow each other through all of a text, or of each piece; otherwise they are random."""


def get_batch(data: torch.Tensor, batch_size: int, seq_len: int, generator: torch.Generator | None = None) -> Batch:
    """`batch_size` windows at random positions of `data` (n,).

    Draws once from `generator`, or from torch's global one.
    """
    return windows(data, draw_starts(data, batch_size, seq_len, generator), seq_len)


def draw_starts(
    data: torch.Tensor, batch_size: int, seq_len: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Random positions (batch_size,) at which a window of seq_len and one more token fit into `data`."""
    return torch.randint(0, len(data) - seq_len - 1, (batch_size,), generator=generator)


def windows(data: torch.Tensor, starts: torch.Tensor, seq_len: int, device: torch.device | None = None) -> Batch:
    """The windows of `data` (n,) that begin at `starts` (batch,), on `device`, or where the data is."""
    positions = _copy(starts, data.device)[:, None] + torch.arange(seq_len + 1, device=data.device)
    tokens_BT1 = data[positions].long()
    if device is not None and device.type != data.device.type:
        tokens_BT1 = _copy(tokens_BT1, device)
    return Batch(tokens_BT1[:, :-1], tokens_BT1[:, 1:])


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The CPU's `tensor` on a device. On CUDA the host does not wait for the steps that the device has yet to compute.

    Elsewhere it waits: nothing but CUDA keeps the memory that it copies from until the copy is done.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


EPOCH_BYTES = 24  # of the state of a stream in epochs, beside that of its generator


def epoch_starts(first: int, count: int, tokens: int, seq_len: int, seed: int) -> torch.Tensor:
    """Where `count` windows begin, from number `first` on, if every window of the text is taken once per epoch."""
    size = (tokens - 1) // seq_len
    numbers = torch.arange(first, first + count)
    orders = [
        _epoch_order(size, epoch_seed(seed, epoch))[numbers[numbers // size == epoch] % size]
        for epoch in range(first // size, (first + count - 1) // size + 1)
    ]
    return torch.cat(orders) * seq_len


@lru_cache(maxsize=1)  # 8 bytes a window
def _epoch_order(windows: int, seed: int) -> torch.Tensor:
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed))


@dataclass(eq=False)
class BatchStream:
    """The endless stream of training batches.

    Every process draws the starts of the whole global batch, so that all generators stay in step, and takes its own
    share of them: the global batch does not depend on the number of processes.
    """

    data: torch.Tensor
    batch_size: int
    seq_len: int
    _: KW_ONLY
    seed: int
    share: Share
    order: Literal["random", "epoch"] = "random"
    device: torch.device | None = None  # where batches go; None: where the data is
    check: Callable[[], None] | None = None  # called before each batch, to see that the data can still be read

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)  # "shared-stream" evaluation draws from it, too
        self._drawn = 0  # windows taken in the order of epochs

    def state(self) -> torch.Tensor:
        """The position in the stream, uint8 (bytes,)."""
        state = self.generator.get_state()
        if self.order == "random":
            return state
        position = torch.tensor([self.seed, self._drawn, self._windows])
        return torch.cat([state, position.view(torch.uint8)])

    def set_state(self, state: torch.Tensor) -> None:
        """Go to a position that `state` returned.

        Raises:
            RuntimeError: it is of another order, or in epochs of another text or other windows.
        """
        if self.order == "epoch":
            state, position = state[:-EPOCH_BYTES], state[-EPOCH_BYTES:]
            seed, drawn, count = position.clone().view(torch.int64).tolist()
            if count != self._windows:
                raise RuntimeError("a position in other epochs")
            self.seed, self._drawn = seed, drawn
        self.generator.set_state(state)

    @property
    def _windows(self) -> int:
        """The windows of an epoch."""
        return (len(self.data) - 1) // self.seq_len

    def reseed(self, seed: int) -> None:
        """Go on with the batches of another seed; in epochs, from the beginning of one."""
        self.seed, self._drawn = seed, 0
        self.generator.manual_seed(seed)

    def draw(self) -> torch.Tensor:
        """Where the windows of the next global batch begin, (batch_size,)."""
        if self.order == "random":
            return draw_starts(self.data, self.batch_size, self.seq_len, self.generator)
        first = self._drawn
        self._drawn += self.batch_size
        return epoch_starts(first, self.batch_size, len(self.data), self.seq_len, self.seed)

    def batch(self) -> Batch:
        """This process's share of the next global batch."""
        if self.check:
            self.check()
        return windows(self.data, self.share.of(self.draw()), self.seq_len, self.device)


def held_out_windows(
    val: torch.Tensor, table: ValidationTable, stream: BatchStream, piece_tokens: int = 0
) -> list[WindowSet]:
    """The windows of one evaluation, as `table.sampling` says; random ones in batches of the size of `stream`'s.

    If `val` is made of pieces of so many tokens, no window is in two of them.
    """
    if table.sampling == "full":
        return consecutive_windows(val, stream.seq_len, piece_tokens)
    # Seeded anew each time, so that evaluations of all runs share their windows and can be compared one by one, and a
    # value does not depend on how many evaluations went before.
    own_stream = table.sampling == "own-stream"
    generator = torch.Generator().manual_seed(held_out_seed()) if own_stream else stream.generator
    return random_windows(val, stream.batch_size, stream.seq_len, table.eval_batches, generator, piece_tokens)


def random_windows(
    data: torch.Tensor,
    batch_size: int,
    seq_len: int,
    count: int,
    generator: torch.Generator | None,
    piece_tokens: int = 0,
) -> list[WindowSet]:
    """The windows of `count` batches drawn with `generator`."""
    if piece_tokens:
        starts = piece_tokens - seq_len  # at which a window can begin in each piece
        drawn = torch.randint(0, len(data) // piece_tokens * starts, (count * batch_size,), generator=generator)
        return [WindowSet(drawn // starts * piece_tokens + drawn % starts, seq_len)]
    draws = [draw_starts(data, batch_size, seq_len, generator) for _ in range(count)]
    return [WindowSet(torch.cat(draws), seq_len)]


def consecutive_windows(data: torch.Tensor, seq_len: int, piece_tokens: int = 0) -> list[WindowSet]:
    """`data` (n,), or each piece of it, cut into consecutive windows: each token after the first is a target once.

    The last window is shorter if seq_len does not divide n - 1.
    """
    length = piece_tokens or len(data)
    pieces = torch.arange(len(data) // length)[:, None] * length
    targets = length - 1
    tail_start = targets - targets % seq_len
    whole = (pieces + torch.arange(0, tail_start, seq_len)).flatten()
    tail = (pieces + torch.arange(tail_start, targets)[:1]).flatten()
    sets = (WindowSet(whole, seq_len, consecutive=True), WindowSet(tail, targets - tail_start, consecutive=True))
    return [window_set for window_set in sets if len(window_set.starts)]
