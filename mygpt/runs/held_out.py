"""Evaluations of the held-out loss, window by window: how a run keeps them, and how two of them are compared.

The windows' losses are what a paired comparison needs: how a loss differs between two models varies far less from
window to window than the loss itself.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mygpt.estimates import Estimate, difference_of_independent, ratio_estimate
from mygpt.runs.files import EVALUATIONS_FILE
from mygpt.runs.records import EvaluationLine, WindowsLine, read_until
from mygpt.runs.schemas import Stretch

LN_2 = math.log(2)

Array = npt.NDArray[Any]


class Windows(NamedTuple):
    """Where held-out windows are, and how long they are.

    Consecutive windows, and those of pieces, are all of the held-out text; other windows were drawn at random.
    """

    starts: Array
    """int64 (windows,), the position of each window's first token in the held-out part."""
    tokens: Array
    """int32 (windows,), the targets in each window."""
    bytes: Array
    """int32 (windows,), the bytes of text for which these targets stand."""
    consecutive: bool
    """Whether each window begins where the one before ends."""
    piece_tokens: int = 0
    """The length of each piece of a held-out text that is made of pieces, whose losses count as one number; or 0."""

    def same_as(self, other: "Windows") -> bool:
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.tokens, other.tokens)

    def summed(self, values: Array) -> Array:
        """Values of the windows, (..., windows), as float64, summed over those of a piece if there are pieces."""
        values = values.astype(np.float64)
        if not self.piece_tokens:
            return values
        order = np.argsort(self.starts // self.piece_tokens, kind="stable")
        pieces = int(self.starts.max()) // self.piece_tokens + 1
        by_piece: Array = values[..., order].reshape(*values.shape[:-1], pieces, -1)
        return np.asarray(by_piece.sum(-1))

    @property
    def population(self) -> str:
        """The text, for a reader, for whose mean loss the standard error holds."""
        if self.piece_tokens:
            return "unseen passages of this text"
        return "text like the held-out part" if self.consecutive else "this held-out text"


@dataclass(frozen=True)
class Evaluation:
    """The held-out loss after a step."""

    step: int
    windows: Windows
    losses: Array
    """float32 (windows,): the total loss of each, in nats."""

    @cached_property
    def loss(self) -> Estimate:
        """Mean loss per token, in nats."""
        return self._mean_per(self.windows.tokens)

    @cached_property
    def bits_per_byte(self) -> Estimate | None:
        """Total loss in bits over the bytes of the text that was predicted; None: no bytes were counted.

        It is exact though windows begin and end within a character, since every byte belongs to one token.
        """
        if not self.windows.bytes.any():
            return None
        return self._mean_per(self.windows.bytes).scaled(1 / LN_2)

    def _mean_per(self, lengths: Array) -> Estimate:
        windows = self.windows
        return ratio_estimate(windows.summed(self.losses), windows.summed(lengths), consecutive=windows.consecutive)


def evaluation_line(evaluation: Evaluation, before: Evaluation | None) -> EvaluationLine:
    """An evaluation as evaluations.jsonl has it after the one `before`."""
    windows = evaluation.windows
    if before and windows.same_as(before.windows):
        return EvaluationLine.of(evaluation.step, None, evaluation.losses.tobytes())
    line = WindowsLine(
        starts=windows.starts.astype(np.int64).tobytes(),
        tokens=windows.tokens.astype(np.int32).tobytes(),
        bytes=windows.bytes.astype(np.int32).tobytes(),
        consecutive=windows.consecutive,
        piece_tokens=windows.piece_tokens,
    )
    return EvaluationLine.of(evaluation.step, line, evaluation.losses.tobytes())


def evaluations_of(lines: Iterable[EvaluationLine]) -> list[Evaluation]:
    """The evaluations that lines of an evaluations.jsonl hold, as `read_until` has read them."""
    found: list[Evaluation] = []
    for line in lines:
        if line.windows:
            starts, tokens, lengths = line.windows.starts, line.windows.tokens, line.windows.bytes
            arrays = (np.frombuffer(starts, "<i8"), np.frombuffer(tokens, "<i4"), np.frombuffer(lengths, "<i4"))
            windows = Windows(*arrays, line.windows.consecutive, line.windows.piece_tokens)
        else:
            windows = found[-1].windows
        found.append(Evaluation(line.step, windows, np.frombuffer(line.losses, "<f4")))
    return found


def read_evaluations(run: Path, step: int) -> list[Evaluation]:
    """The evaluations of a run up to a step. Only reads: the run may be training.

    Raises:
        DamagedCheckpointError: a line is not as it was written.
    """
    return evaluations_of(read_until(run / EVALUATIONS_FILE, EvaluationLine, step, strict=True))


def change_between(before: Evaluation, after: Evaluation) -> Estimate:
    """By how much the held-out loss of a run changed, in nats per token: paired where the windows are the same."""
    if before.windows.same_as(after.windows):
        changes = paired_changes(before, after, "tokens", same_tokens=True)
        assert changes is not None
        return ratio_estimate(changes.changes, changes.lengths, consecutive=changes.consecutive)
    return difference_of_independent(before.loss, after.loss)


def improves(before: Evaluation, after: Evaluation) -> bool:
    """Whether the loss fell beyond doubt: by more than the margin of a 95% interval for the difference."""
    change = change_between(before, after)
    return change.mean < 0 and change.is_beyond_doubt


def last_improvement(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The last evaluation that improves on the improvement before it. The first evaluation is an improvement."""
    improved, *others = evaluations
    for evaluation in others:
        if improves(improved, evaluation):
            improved = evaluation
    return improved


def count_waiting(evaluations: Sequence[Evaluation], counted_after: int) -> int:
    """How many evaluations after the step `counted_after` have brought no improvement in a row."""
    improved = last_improvement(evaluations).step if evaluations else 0
    return sum(evaluation.step > max(improved, counted_after) for evaluation in evaluations)


def count_from(stretches: Sequence[Stretch], evaluations: Sequence[Evaluation]) -> int:
    """The step after which early stopping counts evaluations.

    This is the step at which early stopping was turned on, or at which less patience would have ended the run at once.
    """
    counted_after = 0
    for before, now in pairwise(stretches):
        known = [evaluation for evaluation in evaluations if evaluation.step <= now.after_step]
        if now.patience and (not before.patience or count_waiting(known, counted_after) >= now.patience):
            counted_after = now.after_step
    return counted_after


class Difference(NamedTuple):
    """By how much the held-out loss of a second model differs from that of a first; below 0: it is lower."""

    nats_per_token: Estimate | None
    """None: the two have other tokens."""
    bits_per_byte: Estimate | None
    """None: no bytes were counted."""
    manner: str
    """How the two were compared, for a reader."""


def difference(a: Evaluation, b: Evaluation, *, same_tokens: bool, same_text: bool = True) -> Difference | None:
    """The difference b - a of two models' losses over held-out parts of one corpus.

    Paired where `paired_changes` pairs, otherwise that of independent estimates, whose error is larger. `same_tokens`:
    both have the same tokenizer. `same_text`: both held out the same part; if not, they are compared over the end of
    the corpus that is in both, where both took all of it. None: they cannot be compared.
    """
    kinds = {"same_tokens": same_tokens, "same_text": same_text}
    of_tokens, of_bytes = (paired_changes(a, b, unit, **kinds) for unit in ("tokens", "bytes"))
    known = of_tokens or of_bytes
    if known is None:
        if not same_text:
            return None
        pairs = [(a.loss, b.loss) if same_tokens else (None, None), (a.bits_per_byte, b.bits_per_byte)]
        nats, bits = (difference_of_independent(x, y) if x and y else None for x, y in pairs)
        return Difference(nats, bits, "not paired, since their windows are not the same")
    nats, bits = (
        pairs and ratio_estimate(pairs.changes, pairs.lengths, consecutive=pairs.consecutive)
        for pairs in (of_tokens, of_bytes)
    )
    return Difference(nats, bits and bits.scaled(1 / LN_2), known.manner)


class PairedChanges(NamedTuple):
    """By how much the losses of two models differ on the same pieces of text."""

    changes: Array
    """float64 (pieces,), the change of the total loss of each piece, in nats."""
    lengths: Array
    """float64 (pieces,), the length of each piece, in tokens or bytes."""
    consecutive: bool
    manner: str
    """What the pieces are, for a reader."""


def paired_changes(
    a: Evaluation, b: Evaluation, unit: Literal["tokens", "bytes"], *, same_tokens: bool, same_text: bool = True
) -> PairedChanges | None:
    """The changes b - a of held-out losses over pieces of text that both models were evaluated on; see `difference`.

    Window by window where the windows are the same. If both took all of the text, but in other windows or tokens,
    piece by piece: see `_common_pieces`. None: they cannot be paired, or there are no such lengths.
    """
    consecutive = a.windows.consecutive and b.windows.consecutive
    if not getattr(a.windows, unit).any() or (unit == "tokens" and not same_tokens):
        return None
    same_pieces = a.windows.piece_tokens == b.windows.piece_tokens > 0
    if same_tokens and same_text and (same_pieces or a.windows.same_as(b.windows)):
        changes = b.windows.summed(b.losses) - a.windows.summed(a.losses)
        manner = f"paired over {len(changes):,} {'pieces' if same_pieces else 'windows'}"
        return PairedChanges(changes, a.windows.summed(getattr(a.windows, unit)), consecutive, manner)
    if not consecutive:
        return None
    changes, lengths = _common_pieces(a, b, unit)
    return PairedChanges(changes, lengths, consecutive, f"paired over {len(changes):,} pieces of what both held out")


def _common_pieces(a: Evaluation, b: Evaluation, unit: Literal["tokens", "bytes"]) -> tuple[Array, Array]:
    """The difference of the losses b - a, in nats, and the lengths of pieces of the text that both took.

    There are as many pieces as the smaller number of windows. Positions count from the end of the text, where both end,
    in tokens or bytes. A piece that covers a part of a window gets the same part of the window's loss.
    """
    ends = [np.concatenate([[0], np.cumsum(getattr(e.windows, unit)[::-1], dtype=np.float64)]) for e in (a, b)]
    losses = [np.concatenate([[0], np.cumsum(e.losses[::-1], dtype=np.float64)]) for e in (a, b)]
    edges = np.linspace(0, min(end[-1] for end in ends), min(len(a.losses), len(b.losses)) + 1)
    of_a, of_b = (np.diff(np.interp(edges, end, loss)) for end, loss in zip(ends, losses, strict=True))
    return of_b - of_a, np.diff(edges)
