"""What a complete run came to: a verdict on its held-out loss, and how close it came to what its recipe expects."""

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from mygpt.estimates import Estimate, Floats, difference_of_independent, mean_estimate, student_quantile
from mygpt.recipe.tables import DataTable, ExpectedTable, Recipe
from mygpt.runs.held_out import Evaluation, change_between, last_improvement
from mygpt.runs.records import Record, Timing
from mygpt.runs.schemas import Best, End

FALSE_ALARMS = 0.01
"""At most this share of the runs that differ from the expected ones by their seed alone are called not normal."""
MARK_SPACING = 1.1
"""The step of each mark is at least so many times that of the mark before it: see `_begin_of_end`."""
AROUND = 100
"""A training loss is averaged over so many steps, since that of one step is the loss of a single batch."""
FEWEST_RECORDS = 10
"""So many of these steps have to be recorded for a training loss that can be compared with other runs."""


def verdict_line(
    evaluations: Sequence[Evaluation], records: Sequence[Record], data: DataTable, *, ended_by: End | None = None
) -> str:
    """Whether the held-out loss was still falling at the end of a run, flat, or rising, and the evidence.

    A change counts if the 95% interval of the difference excludes 0. Its error is that of the held-out windows, paired
    where they are the same, and of how a model moves from evaluation to evaluation. It is a statement on the text that
    the windows stand for, and on this run: another seed may end otherwise. Where early stopping finished the run, it
    is about what came after the last improvement.
    """
    if not evaluations:
        return f"verdict: none, because no held-out loss was measured; {data.flags_that_evaluate} measures it"
    last, lowest = evaluations[-1].step, _lowest(evaluations).step
    first = _begin_of_end([evaluation.step for evaluation in evaluations])
    if ended_by == "patience":
        first = max(first, last_improvement(evaluations).step)
    if first == last:
        return f"verdict: none, because the held-out loss was measured only once, after step {last}; lower val_every"
    rise = _rise(evaluations)
    if rise and rise.mean > 0 and rise.is_beyond_doubt:
        in_training = difference_of_independent(*(training_loss(records, step) for step in (lowest, last)))
        if in_training.mean > 0 and in_training.is_beyond_doubt:
            both = f"held-out loss {rise.text()} by step {last}, and the training loss rises, too"
            return f"verdict: getting worse since step {lowest}: {both}"
        return f"verdict: overfitting since step {lowest}: held-out loss {rise.text()} by step {last}"
    change = _change_at_end(evaluations, first)
    if change.mean < 0 and change.is_beyond_doubt:
        rate = change.scaled(100 / (last - first))
        return f"verdict: still improving: held-out loss {rate.text()} per 100 steps from step {first} to {last}"
    if change.is_beyond_doubt:
        return f"verdict: rising from step {first} to {last}: held-out loss {change.text()}; it is not known since when"
    return f"verdict: flat from step {first} to {last}: held-out loss {change.text()}"


def _lowest(evaluations: Sequence[Evaluation]) -> Evaluation:
    return min(evaluations, key=lambda evaluation: evaluation.loss.mean)


def _begin_of_end(steps: Sequence[int]) -> int:
    """The step of an evaluation from which to the last is a tenth to a sixth of the run, or one evaluation."""
    before, mark = steps[0], steps[0]
    for step in steps:
        if step >= MARK_SPACING * mark:
            before, mark = mark, step
    return before


def _rise(evaluations: Sequence[Evaluation]) -> Estimate | None:
    """By how much the held-out loss is above its lowest at the end; None: the lowest is too near to the end to tell.

    From enough evaluations it is the mean of the last ones less that of those around the lowest. The lowest itself is
    left out then: it was chosen for being low.
    """
    values, lowest = np.array([evaluation.loss.mean for evaluation in evaluations]), _lowest(evaluations)
    count, at = len(values), evaluations.index(lowest)
    several = max(3, count // 10) if count >= 7 else 1
    if at >= count - several:
        return None
    near = [at]
    if several > 1:
        others = (index for index in range(count - several) if index != at)
        near = sorted(others, key=lambda index: abs(index - at))[:several]
    mean = float(values[-several:].mean() - values[near].mean())
    # The median, since the place at which a curve turns is no noise; that of a squared normal number is 0.455.
    noise = float(np.median(_second_differences(values) ** 2)) / 0.455 / 6 if count > 2 else 0.0
    paired = change_between(lowest, evaluations[-1])
    dof = min(paired.dof or math.inf, max(1, count - 2))
    return Estimate(mean, math.sqrt((paired.stderr or 0) ** 2 + noise * (1 / several + 1 / len(near))), dof)


def _change_at_end(evaluations: Sequence[Evaluation], first: int) -> Estimate:
    """By how much the held-out loss changed from step `first` to the end: means of some evaluations up to each."""
    values = np.array([evaluation.loss.mean for evaluation in evaluations])
    at = [evaluation.step for evaluation in evaluations].index(first)
    several = max(1, min(at + 1, (len(values) - 1 - at) // 2))
    mean = float(values[-several:].mean() - values[at + 1 - several : at + 1].mean())
    noise = 0.0
    if len(values) > 2:
        # A loss that falls ever more slowly has positive second differences: only noise makes negative ones, and half
        # of what it makes.
        noise = float(np.mean(np.minimum(_second_differences(values), 0) ** 2)) * 2 / 6
    paired = change_between(evaluations[at], evaluations[-1])
    return Estimate(mean, math.sqrt((paired.stderr or 0) ** 2 + noise * 2 / several), paired.dof)


def _second_differences(values: Floats) -> Floats:
    """Of the later part of a curve, in which it bends less. Independent noise of variance v gives them 6 v."""
    return np.diff(values[len(values) // 3 :] if len(values) >= 6 else values, 2)


def closing_lines(
    recipe: Recipe,
    evaluations: Sequence[Evaluation],
    records: Sequence[Record],
    corpus_sha256: str,
    *,
    ended_by: End | None,
    best: Best | None,
    last: tuple[Record, Timing] | None,
    processes: int,
) -> Iterator[str]:
    """What a complete run came to. `last` is its last record, if it was made just now."""
    if evaluations and ended_by == "patience":
        yield early_end_line(evaluations, recipe.validation.patience, best)
    yield verdict_line(evaluations, records, recipe.data, ended_by=ended_by)
    for line, _ in place_lines(recipe.expected, records, corpus_sha256):
        yield line
    if last:
        yield from outcome_lines(recipe.expected, *last, processes)


def early_end_line(evaluations: Sequence[Evaluation], patience: int, best: Best | None) -> str:
    """Why early stopping ended a run, and which checkpoint is the best."""
    waited_for = f"the last {patience} held-out losses are" if patience > 1 else "the last held-out loss is"
    rest = f"; `best` is step {best.step}, with a held-out loss of {best.val:.4f}" if best else ""
    return (
        f"ended early, after step {evaluations[-1].step}: {waited_for} not lower beyond doubt than "
        f"that of step {last_improvement(evaluations).step}{rest}"
    )


def training_loss(records: Sequence[Record], step: int) -> Estimate:
    """The mean training loss of the records of the last `AROUND` steps up to a step, or of the last two at least."""
    known = [record for record in records if record.step <= step]
    near = [record.loss for record in known if record.step > step - AROUND]
    losses = np.array(near if len(near) > 1 else [record.loss for record in known[-2:]])
    return mean_estimate(losses)


class Place(NamedTuple):
    """Where a loss of a run is beside those of other seeds."""

    step: int
    value: float
    mean: float
    """Over the other seeds."""
    margin: float
    """How far a run may be from it."""

    @property
    def is_within(self) -> bool:
        return abs(self.value - self.mean) <= self.margin


def places(expected: ExpectedTable, records: Sequence[Record]) -> Iterator[tuple[str, list[Place]]]:
    """For each kind of loss that the recipe expects, its name and where the run is at each step that both have.

    The margins are those of prediction intervals for one more run, by Student's t. A run that differs from the others
    by its seed alone is outside of any of them in `FALSE_ALARMS` of cases at most.
    """
    kinds = (("held-out loss", expected.expected_val), ("training loss", expected.expected_loss))
    rows = sum(len(known or ()) for _, known in kinds)
    for name, known in kinds:
        if not known:
            continue
        seeds = expected.expected_seeds or 2
        factor = student_quantile(seeds - 1, 1 - FALSE_ALARMS / rows / 2) * math.sqrt(1 + 1 / seeds)
        by_step = {record.step: record for record in records}
        found = []
        for step, mean, deviation in known:
            value = by_step[step].val if step in by_step else None
            if name == "training loss":
                enough = sum(step - AROUND < other <= step for other in by_step) >= FEWEST_RECORDS
                value = training_loss(records, step).mean if step in by_step and enough else None
            if value is not None:
                found.append(Place(step, value, mean, factor * deviation))
        yield name, found


def place_lines(expected: ExpectedTable, records: Sequence[Record], corpus_sha256: str) -> Iterator[tuple[str, bool]]:
    """For each kind of loss that the recipe expects, a line, and whether the run is as expected."""
    if not (expected.expected_val or expected.expected_loss):
        return
    if expected.expected_text and not corpus_sha256.startswith(expected.expected_text):
        yield "expected: not compared, because the losses that the recipe expects are those of another text", True
        return
    for name, found in places(expected, records):
        if not found:
            yield (
                f"expected: {name}: not compared, because it was measured at none of the recipe's steps",
                True,
            )
            continue
        last, outside = found[-1], [place for place in found if not place.is_within]
        low, high = last.mean - last.margin, last.mean + last.margin
        range_ = f"99% of runs with another seed are between {low:.4f} and {high:.4f}"
        shown = f"{last.value:.4f} at step {last.step}; {range_}"
        if not outside:
            yield f"expected: {name} is normal: {shown}", True
        elif last.is_within:
            steps = ", ".join(str(place.step) for place in outside)
            yield f"expected: {name} is normal at the end: {shown}; it was outside at step {steps}", False
        else:
            since = [place.step for place in takewhile(lambda place: not place.is_within, reversed(found))][-1]
            yield f"expected: {name} is NOT normal since step {since}: {shown}", False


def outcome_lines(expected: ExpectedTable, record: Record, timing: Timing, processes: int = 1) -> Iterator[str]:
    """A line for each expectation, given the run's last record and timing. The time is that of a single process."""
    if expected.expected_minutes is not None and processes == 1:
        minutes = timing.elapsed_seconds / 60
        shown, ratio = (float(f"{number:.2g}") for number in (minutes, minutes / expected.expected_minutes))
        wanted = f"the {expected.expected_minutes:g} minutes that the recipe expects"
        yield f"time: {shown:g} minutes, {ratio:g} times {wanted}"
    if expected.expected_bits_per_byte is not None:
        low, high = expected.expected_bits_per_byte
        value, range_ = record.val_bits_per_byte, f"the recipe expects between {low:.2f} and {high:.2f} bits per byte"
        if value is None:
            yield f"held-out loss: not measured; {range_}"
            return
        where = "lower than expected" if value < low else "higher than expected" if value > high else "as expected"
        yield f"held-out loss: {value:.2f}, {where}; {range_}"
