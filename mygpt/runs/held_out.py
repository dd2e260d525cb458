"""Evaluations of the held-out loss, window by window, and what a run remembers of them.

The windows' losses are what a paired comparison needs: how a loss differs between two models varies far less from
window to window than the loss itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from mygpt.errors import DamagedCheckpointError
from mygpt.estimates import Estimate, difference_of_independent, ratio_estimate
from mygpt.runs.schemas import Evaluated, HeldOutMetadata, StateMetadata
from mygpt.runs.steps import read_metadata

LN_2 = math.log(2)
PREFIX = "held_out."
"""Of the names of tensors in a state file."""
MARK_SPACING = 1.1
"""The ratio of the steps of two marks at least: see `History.marks`."""

Array = npt.NDArray[Any]


class Windows(NamedTuple):
    """Where held-out windows are, and how long; each of the arrays (windows,)."""

    starts: Array
    """int64, the position of the first token in the held-out part."""
    tokens: Array
    """int32, targets in the window."""
    bytes: Array
    """int32, bytes of text that these stand for."""
    consecutive: bool
    """Whether each begins where the one before ends, and all together are the held-out text, which is one stretch."""
    piece_tokens: int = 0
    """If they are all of a held-out text that is made of pieces, the length of each, whose loss counts as one number;
    otherwise 0. Windows that are neither were drawn at random."""

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
        """Of what the mean loss over these windows has a standard error, for a reader."""
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
        """Total loss in bits over the bytes of the text that was predicted; None if there are none.

        It is exact though windows begin and end within a character, since every byte belongs to one token.
        """
        if not self.windows.bytes.any():
            return None
        return self._mean_per(self.windows.bytes).scaled(1 / LN_2)

    def _mean_per(self, lengths: Array) -> Estimate:
        windows = self.windows
        return ratio_estimate(windows.summed(self.losses), windows.summed(lengths), consecutive=windows.consecutive)

    def summary(self) -> Evaluated:
        return Evaluated(step=self.step, val=self.loss.mean, stderr=self.loss.stderr, dof=self.loss.dof)


@dataclass(frozen=True)
class History:
    """What a run remembers of its evaluations: enough for early stopping, and for the verdict at its end."""

    last: Evaluation
    summaries: Mapping[int, Evaluated]
    """The evaluations that are remembered, by step."""
    losses: Mapping[int, Array]
    """Their windows' losses, by step: of all if they have the same windows, else of the last alone."""
    lowest: int
    """The step of the lowest held-out loss."""
    marks: tuple[int, ...]
    """Up to two steps, the second later than the first by a tenth at least. From the first to the last evaluation is a
    tenth to a sixth of the run, or one evaluation."""
    first: int
    """The step of the first evaluation over these windows."""
    reference: int
    """The step of the last evaluation that was better than the reference before it, beyond doubt: below it by more
    than the margin of a 95% interval for their difference."""
    waited: int = 0
    """Evaluations since the reference."""

    def difference(self, before: int, after: int) -> Estimate:
        """By how much the held-out loss differs between two remembered steps, in nats; below 0: it fell.

        Over the same windows it is the paired difference, otherwise that of independent estimates.
        """
        if {before, after} <= self.losses.keys():
            windows, change = self.last.windows, self.losses[after].astype(np.float64) - self.losses[before]
            lengths = windows.summed(windows.tokens)
            return ratio_estimate(windows.summed(change), lengths, consecutive=windows.consecutive)
        return difference_of_independent(*(_estimate(self.summaries[step]) for step in (before, after)))

    def metadata(self) -> HeldOutMetadata:
        return HeldOutMetadata(
            consecutive=self.last.windows.consecutive,
            piece_tokens=self.last.windows.piece_tokens,
            evaluations=tuple(self.summaries.values()),
            lowest=self.lowest,
            marks=self.marks,
            first=self.first,
            reference=self.reference,
            waited=self.waited,
        )

    def arrays(self) -> dict[str, Array]:
        """The arrays of a state file, by name."""
        windows = self.last.windows
        return {
            f"{PREFIX}starts": windows.starts,
            f"{PREFIX}tokens": windows.tokens,
            f"{PREFIX}bytes": windows.bytes,
            **{f"{PREFIX}losses.{step}": losses for step, losses in self.losses.items()},
        }


def remember(history: History | None, evaluation: Evaluation, *, same_windows: bool) -> History:
    """The history after one more evaluation; `same_windows`: every evaluation of the run has the same."""
    step = evaluation.step
    if history is None or (same_windows and not evaluation.windows.same_as(history.last.windows)):
        return History(evaluation, {step: evaluation.summary()}, {step: evaluation.losses}, step, (step,), step, step)
    # Everything that was known, and the new evaluation; what is of no use any more is forgotten at the end.
    losses = {**(history.losses if same_windows else {}), step: evaluation.losses}
    known = replace(
        history, last=evaluation, summaries={**history.summaries, step: evaluation.summary()}, losses=losses
    )
    if evaluation.loss.mean < history.summaries[history.lowest].val:
        known = replace(known, lowest=step)
    if step >= MARK_SPACING * history.marks[-1]:
        known = replace(known, marks=(*history.marks[-1:], step))
    change = known.difference(history.reference, step)
    is_better = change.mean < 0 and change.is_beyond_doubt
    reference, waited = (step, 0) if is_better else (history.reference, history.waited + 1)
    known = replace(known, reference=reference, waited=waited)
    kept = {step, known.lowest, *known.marks, known.reference}
    return replace(
        known,
        summaries={at: summary for at, summary in known.summaries.items() if at in kept},
        losses={at: values for at, values in known.losses.items() if at in kept},
    )


def read_history(metadata: HeldOutMetadata | None, arrays: Mapping[str, Array]) -> History | None:
    """The history in a state file; None: the run had not been evaluated when it was saved.

    Raises:
        KeyError, ValueError: the arrays are not those of the metadata.
    """
    if metadata is None:
        return None
    starts, tokens, lengths = (arrays[PREFIX + name] for name in ("starts", "tokens", "bytes"))
    windows = Windows(starts, tokens, lengths, metadata.consecutive, metadata.piece_tokens)
    prefix = f"{PREFIX}losses."
    losses = {int(name.removeprefix(prefix)): array for name, array in arrays.items() if name.startswith(prefix)}
    summaries = {summary.step: summary for summary in metadata.evaluations}
    last = max(summaries)
    named = {metadata.lowest, metadata.reference, *metadata.marks}
    if any(len(array) != len(windows.starts) for array in (tokens, lengths, *losses.values())) or not (
        last in losses and {*losses, *named} <= summaries.keys() and metadata.marks
    ):
        raise ValueError("the held-out losses are not those of their windows")
    windows.summed(tokens)  # a ValueError if pieces have other numbers of windows
    evaluation = Evaluation(last, windows, losses[last])
    return History(
        evaluation,
        summaries,
        losses,
        metadata.lowest,
        metadata.marks,
        metadata.first,
        metadata.reference,
        metadata.waited,
    )


def load_history(state_file: Path) -> History | None:
    """As `read_history`, from a state file.

    Raises:
        DamagedCheckpointError: it cannot be read.
    """
    metadata = read_metadata(state_file, StateMetadata)
    try:
        with safe_open(state_file, framework="numpy") as tensors:
            names = [name for name in tensors.keys() if name.startswith(PREFIX)]  # noqa: SIM118 - it is no dict
            return read_history(metadata.held_out, {name: tensors.get_tensor(name) for name in names})
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise DamagedCheckpointError(f"{state_file}: damaged: no held-out losses: {error}") from None


class Difference(NamedTuple):
    """By how much the held-out loss of a second model differs from that of a first; below 0: it is lower."""

    nats_per_token: Estimate | None
    """None where tokens are not the same."""
    bits_per_byte: Estimate | None
    """None where no bytes were counted."""
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
    """Of the total loss of each piece in nats, (pieces,)."""
    lengths: Array
    """Of the pieces, in tokens or bytes."""
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

    There are as many pieces as the one with fewer windows has. The text is measured from its end, where both end, in
    tokens or bytes. A piece that ends within a window gets that part of its loss which it has of its length.
    """
    ends = [np.concatenate([[0], np.cumsum(getattr(e.windows, unit)[::-1], dtype=np.float64)]) for e in (a, b)]
    losses = [np.concatenate([[0], np.cumsum(e.losses[::-1], dtype=np.float64)]) for e in (a, b)]
    edges = np.linspace(0, min(end[-1] for end in ends), min(len(a.losses), len(b.losses)) + 1)
    of_a, of_b = (np.diff(np.interp(edges, end, loss)) for end, loss in zip(ends, losses, strict=True))
    return of_b - of_a, np.diff(edges)


def _estimate(summary: Evaluated) -> Estimate:
    return Estimate(summary.val, summary.stderr, summary.dof)
