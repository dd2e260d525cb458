"""What a complete run came to: a verdict on its held-out loss, and how close it came to what its recipe expects."""

from collections.abc import Iterator, Sequence

import numpy as np

from mygpt.estimates import Estimate, difference_of_independent, ratio_estimate
from mygpt.recipe.tables import ExpectedTable
from mygpt.runs.held_out import History
from mygpt.runs.records import Record, Timing

AROUND = 10
"""Records whose training losses are averaged, since one is that of a single batch."""


def verdict_line(history: History | None, records: Sequence[Record]) -> str:
    """Whether the held-out loss was still falling at the end of a run, flat, or rising, and the evidence.

    A change counts if the 95% interval of the difference excludes 0. It is a statement on the text that the held-out
    windows stand for, and on this run: another seed may end otherwise.
    """
    if history is None:
        return "verdict: none without a held-out loss; --val-split 0.1 --val-every 500 measures it"
    last, lowest, first = history.last.step, history.lowest, history.marks[0]
    rise = history.difference(lowest, last)
    if lowest < last and rise.is_beyond_doubt:
        in_training = difference_of_independent(*(_training_loss(records, step) for step in (lowest, last)))
        if in_training.mean > 0 and in_training.is_beyond_doubt:
            both = f"held-out loss {rise.text()} by step {last}, and the training loss rises, too"
            return f"verdict: getting worse since step {lowest}: {both}"
        return f"verdict: overfitting since step {lowest}: held-out loss {rise.text()} by step {last}"
    if first == last:
        return f"verdict: none from a single evaluation, after step {last}; lower val_every"
    change = history.difference(first, last)
    if change.mean < 0 and change.is_beyond_doubt:
        rate = change.scaled(100 / (last - first))
        return f"verdict: still improving: held-out loss {rate.text()} per 100 steps from step {first} to {last}"
    return f"verdict: flat from step {first} to {last}: held-out loss {change.text()}"


def early_end_line(history: History, patience: int) -> str:
    """Why early stopping ended a run."""
    last, lowest, reference = history.last, history.lowest, history.reference
    rest = f"the lowest held-out loss, {history.summaries[lowest].val:.4f}, is that of step {lowest} (`best`)"
    return (
        f"ended early, after step {last.step}: {patience} evaluations without an improvement beyond doubt over step "
        f"{reference}; {rest}"
    )


def _training_loss(records: Sequence[Record], step: int) -> Estimate:
    """The mean training loss of the last records up to a step."""
    losses = np.array([record.loss for record in records if record.step <= step][-AROUND:])
    return ratio_estimate(losses, np.ones(len(losses)), consecutive=False)


def outcome_lines(expected: ExpectedTable, record: Record, timing: Timing, processes: int = 1) -> Iterator[str]:
    """A line for each expectation, given the run's last record and timing. The time is that of a single process."""
    if expected.expected_minutes is not None and processes == 1:
        minutes = timing.elapsed_seconds / 60
        share = minutes / expected.expected_minutes
        yield f"time: {minutes:.2g} minutes, {share:.2f} of the {expected.expected_minutes:g} that the recipe expects"
    if expected.expected_bits_per_byte is not None:
        low, high = expected.expected_bits_per_byte
        value, name = record.val_bits_per_byte, "held-out loss"
        if value is None:
            yield f"{name}: not measured; the recipe expects {low:.2f} to {high:.2f} bits per byte"
            return
        distance = max(low - value, value - high)
        where = f"{distance:.2f} {'below' if value < low else 'above'}" if distance > 0 else "within"
        yield f"{name}: {value:.2f} bits per byte, {where} the {low:.2f} to {high:.2f} that the recipe expects"
