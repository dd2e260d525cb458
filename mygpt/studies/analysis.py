"""What the runs of a study say: the loss of each recipe, and how sure a difference is.

Two things make the loss of a recipe uncertain, and both are in every error here: another seed gives another model, and
another text another loss. Recipes are run with the same seeds and, where they can be, evaluated on the same windows, so
that differences are paired both ways.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from mygpt.estimates import CrossedEstimate, Estimate, crossed_estimate, mean_estimate, student_quantile
from mygpt.runs.held_out import LN_2, Evaluation, difference, paired_changes

LEVEL = 0.05
"""At most this share of studies of equal recipes call two of them different, in the long run."""
POWER = 0.8
"""The chance of seeing a difference for which the needed seeds are counted."""
MOST_SEEDS = 1000
"""The largest number of seeds that a study names."""


class RunResult(NamedTuple):
    """What a run of a study came to."""

    evaluation: Evaluation
    """The last evaluation."""
    curve: tuple[tuple[int, float], ...]
    """Held-out loss in nats per token by step, of all evaluations."""
    path: str
    """The run directory, relative to the study."""


class VariantResult(NamedTuple):
    """What the runs of a recipe came to."""

    name: str
    runs: Mapping[int, RunResult]
    """The complete runs, by seed."""
    failures: Mapping[int, str]
    """Why each other run ended, by seed, such as a loss that is not a number."""
    tokenizer: str
    """Its tokenizer as JSON: losses per token can be compared between recipes with the same one."""

    def losses(self, unit: str) -> dict[int, float]:
        """The held-out loss at the end of each run, by seed."""
        return {seed: _loss(run.evaluation, unit).mean for seed, run in self.runs.items()}

    def mean(self, unit: str) -> Estimate:
        """The mean loss over the seeds, with its error as that of all possible seeds, on this held-out text."""
        return mean_estimate(np.array(list(self.losses(unit).values())))

    def spread(self, unit: str) -> float | None:
        """The standard deviation between seeds."""
        losses = list(self.losses(unit).values())
        return float(np.std(losses, ddof=1)) if len(losses) > 1 else None


class ComparisonResult(NamedTuple):
    """Two recipes side by side, over the seeds with which both are complete."""

    a: str
    b: str
    seeds: int
    change: Estimate | None
    """The mean loss of b less that of a; None: fewer than two seeds. Its error has both parts below."""
    seed_stderr: float | None
    """The standard error of the change because there are few seeds, on this text."""
    text_stderr: float | None
    """The standard error of the change because there are few windows, with these seeds; None: the seeds have
    different windows, so that `seed_stderr` includes it."""
    manner: str
    """How the windows are paired."""
    p: float | None
    """The chance of a difference at least as large between equal recipes."""
    corrected_p: float | None
    """`p` after Holm's correction for the number of comparisons in the study."""
    worth_steps: int | None
    """How many steps before its end the better recipe has reached the last loss of the worse; None: not measured."""
    is_bound: bool
    """Whether it had this loss at its first evaluation already: then `worth_steps` is a lower bound."""
    seeds_needed: int | None
    """More seeds with which a difference of `effect` would probably be seen; None: no number of seeds would do."""

    @property
    def is_seen(self) -> bool:
        return self.corrected_p is not None and self.corrected_p < LEVEL

    @property
    def better(self) -> str:
        return self.b if self.change is not None and self.change.mean < 0 else self.a

    @property
    def worse(self) -> str:
        return self.a if self.better == self.b else self.b

    def verdict(self, effect: float) -> str:
        """What the comparison says, in words."""
        if self.change is None or self.p is None:
            return f"{self.a} and {self.b}: not compared, since fewer than two seeds are complete with both"
        size = Estimate(abs(self.change.mean), self.change.stderr).text().lstrip("+")
        if self.is_seen:
            bound = "more than " if self.is_bound else ""
            worth = f", worth {bound}{self.worth_steps} steps" if self.worth_steps else ""
            return (
                f"{self.better} is better than {self.worse} by {size}{worth} (corrected p {_shown(self.corrected_p)})"
            )
        rest = f"more seeds would not reveal a difference of {effect:g}; more held-out windows might"
        if self.seeds_needed == 0:
            rest = f"a difference of {effect:g} would probably have been seen"
        elif self.seeds_needed is not None:
            more = f"{self.seeds_needed} more seed{'s' * (self.seeds_needed > 1)}"
            rest = f"{more} would probably reveal a difference of {effect:g}"
        return f"no difference seen between {self.a} and {self.b}: {self.change.text()}; {rest}"


def unit_of(variants: Sequence[VariantResult]) -> str:
    """The unit in which all variants can be compared."""
    tokenizers = {variant.tokenizer for variant in variants if variant.runs}
    return "nats per token" if len(tokenizers) <= 1 else "bits per byte"


def compare_variants(variants: Sequence[VariantResult], effect: float) -> list[ComparisonResult]:
    """Every pair of recipes, with p-values corrected for their number.

    `effect` is the difference that more seeds should reveal.
    """
    unit, pairs = unit_of(variants), list(combinations(variants, 2))
    level = LEVEL / max(1, len(pairs))
    results = [_compare(a, b, unit, effect, level) for a, b in pairs]
    corrected = holm([result.p for result in results])
    return [result._replace(corrected_p=p) for result, p in zip(results, corrected, strict=True)]


def holm(values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected so that one below a level is wrong in at most that share of studies, whichever are tested.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (Scandinavian Journal of Statistics, 1979).
    """
    known = sorted((value, index) for index, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, index) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        corrected[index] = largest
    return corrected


def paired_change(a: VariantResult, b: VariantResult, unit: str) -> tuple[CrossedEstimate | None, str]:
    """The mean difference b - a over common seeds, and how windows are paired; None: fewer than two common seeds.

    Where the windows of a and b cannot be paired, the error of the text is that of independent estimates. Where each
    seed has its own windows, the deviation of the seeds has the error of the text in it.
    """
    seeds, same_tokens = sorted(a.runs.keys() & b.runs.keys()), a.tokenizer == b.tokenizer
    if len(seeds) < 2:
        return None, ""
    pairs = [(a.runs[seed].evaluation, b.runs[seed].evaluation) for seed in seeds]
    of_nats = unit == "nats per token"
    scale = 1.0 if of_nats else 1 / LN_2
    if all(pair[side].windows.same_as(pairs[0][side].windows) for pair in pairs for side in (0, 1)):
        paired = [paired_changes(*pair, "tokens" if of_nats else "bytes", same_tokens=same_tokens) for pair in pairs]
        if None not in paired:
            known = [changes for changes in paired if changes]
            changes_SN = np.stack([changes.changes.astype(np.float64) for changes in known])
            lengths_N = known[0].lengths.astype(np.float64)
            crossed = crossed_estimate(changes_SN, lengths_N, consecutive=known[0].consecutive)
            return crossed.scaled(scale), f"seeds paired; windows {known[0].manner}"
        of_text = difference(
            *(_mean_evaluation([pair[side] for pair in pairs]) for side in (0, 1)), same_tokens=same_tokens
        )
        assert of_text is not None  # all recipes of a study hold out the same text
        text, manner = of_text.nats_per_token if of_nats else of_text.bits_per_byte, f"windows {of_text.manner}"
    else:
        text, manner = None, "each run has other held-out windows"
    losses_a, losses_b = a.losses(unit), b.losses(unit)
    changes = np.array([losses_b[seed] - losses_a[seed] for seed in seeds])
    of_seeds = mean_estimate(changes)
    assert of_seeds.stderr is not None
    if text is None or text.stderr is None:
        return CrossedEstimate(of_seeds, of_seeds.stderr, None, None), f"seeds paired; {manner}"
    # The sum, since what is in both cannot be told: the error is rather too large.
    stderr = math.hypot(of_seeds.stderr, text.stderr)
    total = Estimate(of_seeds.mean, stderr, min(len(seeds) - 1, text.dof or math.inf))
    return CrossedEstimate(total, of_seeds.stderr, text.stderr, text.dof), f"seeds paired; {manner}"


def _compare(a: VariantResult, b: VariantResult, unit: str, effect: float, level: float) -> ComparisonResult:
    crossed, manner = paired_change(a, b, unit)
    seeds = len(a.runs.keys() & b.runs.keys())
    if crossed is None:
        return ComparisonResult(a.name, b.name, seeds, *(None,) * 3, "", *(None,) * 3, False, None)
    change, seed_stderr, text_stderr, _ = crossed
    needed = seeds_for(effect, crossed, seeds, level)
    worth_steps, is_bound = _worth_steps(a, b) if unit == "nats per token" else (None, False)
    return ComparisonResult(
        *(a.name, b.name, seeds, change, seed_stderr, text_stderr, manner),
        p=_p_value(change),
        corrected_p=None,
        worth_steps=worth_steps,
        is_bound=is_bound,
        seeds_needed=None if needed is None else needed - seeds,
    )


def seeds_for(effect: float, crossed: CrossedEstimate, seeds: int, level: float = LEVEL) -> int | None:
    """With how many seeds a difference of `effect` is seen with a chance of `POWER`, given the errors with `seeds`.

    The answer is at least `seeds`; None: `MOST_SEEDS` are not enough, because of the error of the text.
    """
    from scipy.special import nctdtr

    # More seeds average this part out; the rest is the error of the text.
    of_seeds = crossed.seed_stderr**2
    of_text = max(0.0, (crossed.total.stderr or 0.0) ** 2 - of_seeds)

    def power(count: int) -> float:
        stderr = math.sqrt(of_seeds * seeds / count + of_text)
        if stderr == 0:
            return 1.0
        dof = min(count - 1, crossed.window_dof or math.inf)
        return 1 - float(nctdtr(dof, effect / stderr, student_quantile(dof, 1 - level / 2)))

    if power(MOST_SEEDS) < POWER:
        return None
    low, high = seeds, MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return low


def mean_curve(variant: VariantResult) -> list[tuple[int, float, float]]:
    """Step, mean and standard deviation of the held-out loss over the seeds, where all were evaluated."""
    curves = [dict(run.curve) for run in variant.runs.values()]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = {step: np.array([curve[step] for curve in curves]) for step in steps}
    return [
        (step, float(losses.mean()), float(losses.std(ddof=1)) if len(losses) > 1 else 0.0)
        for step, losses in values.items()
    ]


def _worth_steps(a: VariantResult, b: VariantResult) -> tuple[int | None, bool]:
    """How many steps before its end the better recipe's mean curve reaches the worse one's last loss; and `is_bound`.

    Between evaluations the curve is a line.
    """
    curves = [[(step, mean) for step, mean, _ in mean_curve(variant)] for variant in (a, b)]
    if not all(curves):
        return None, False
    better, worse = sorted(curves, key=lambda curve: curve[-1][1])
    target, (first, first_loss), (last, _) = worse[-1][1], better[0], better[-1]
    if first_loss <= target:
        return (last - first or None), True
    for (step, loss), (next_step, next_loss) in pairwise(better):
        if next_loss <= target < loss:
            return round(last - step - (loss - target) / (loss - next_loss) * (next_step - step)) or None, False
    return None, False


def _mean_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The mean loss of each window over several models."""
    losses = np.mean([evaluation.losses.astype(np.float64) for evaluation in evaluations], axis=0)
    return Evaluation(evaluations[0].step, evaluations[0].windows, losses)


def _loss(evaluation: Evaluation, unit: str) -> Estimate:
    if unit == "nats per token":
        return evaluation.loss
    assert evaluation.bits_per_byte is not None  # other tokenizers have bytes
    return evaluation.bits_per_byte


def _p_value(change: Estimate) -> float:
    from scipy.special import stdtr

    if not change.stderr:
        return 1.0 if change.mean == 0 else 0.0
    return float(2 * stdtr(change.dof, -abs(change.mean) / change.stderr))


def _shown(p: float | None) -> str:
    return "unknown" if p is None else "below 0.0001" if p < 1e-4 else f"{p:.2g}"
