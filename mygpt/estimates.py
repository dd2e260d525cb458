"""Estimates with their standard errors: of a mean over windows, of differences, and intervals from them.

A 95% interval is the mean and, to either side, the standard error times the 97.5% quantile of Student's t.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MAX_BATCHES = 10
"""Batches for the standard error of consecutive windows, at most."""
MIN_BATCH = 10
"""Windows in a batch, where there are enough for two: with fewer the batches themselves are correlated."""
SKEW_COST = 0.89
"""How many degrees of freedom skewness costs: 2/9 (z^2 + 3) (z^2 - 1) / (z^2 + 1) at z = 1.96. See `student_dof`."""


class Estimate(NamedTuple):
    """An estimated mean."""

    mean: float
    stderr: float | None = None
    """Standard error; None from a single window, which has no variance."""
    dof: float | None = None
    """Degrees of freedom of the standard error: of Student's t, for an interval."""

    @property
    def margin(self) -> float:
        """Half the width of the 95% interval; infinite without a standard error."""
        if self.stderr is None:
            return math.inf
        return student_quantile(self.dof or math.inf) * self.stderr

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval."""
        return self.mean - self.margin, self.mean + self.margin

    @property
    def is_beyond_doubt(self) -> bool:
        """Whether the 95% interval excludes 0; without a standard error, whether the mean is not 0."""
        return abs(self.mean) > (0 if self.stderr is None else self.margin)

    def document(self) -> dict[str, Any]:
        """For JSON: the mean and, where they are known, its error and its 95% interval."""
        if self.stderr is None:
            return {"mean": self.mean}
        return {**self._asdict(), "interval": self.interval}

    def text(self) -> str:
        """With its sign and its standard error, to two digits of the latter: "-0.0123 +- 0.0041"."""
        if not self.stderr:
            return f"{self.mean:+.4g}"
        decimals = max(0, 1 - math.floor(math.log10(self.stderr)))
        return f"{self.mean:+.{decimals}f} +- {self.stderr:.{decimals}f}"

    def scaled(self, factor: float) -> "Estimate":
        """The same in another unit, of which `factor` make one of the old; `factor` is above 0."""
        return Estimate(self.mean * factor, None if self.stderr is None else self.stderr * factor, self.dof)


def student_quantile(dof: float, probability: float = 0.975) -> float:
    """The quantile of Student's t; of the normal distribution for infinitely many degrees of freedom."""
    from scipy.special import ndtri, stdtrit  # a third of a second, and most commands need no interval

    return float(ndtri(probability) if math.isinf(dof) else stdtrit(dof, probability))


def ratio_estimate(loss_N: Floats, length_N: Floats, *, consecutive: bool) -> Estimate:
    """The mean loss per token of windows with these total losses and lengths, both (windows,).

    Lengths are in tokens, or in bytes for a loss per byte. For losses that are differences of two models' it is the
    difference of their means, and its standard error is the paired one.

    Its standard error is that of a ratio (total loss over total tokens), so that a short window counts by its length.
    Windows that were drawn at random are independent: it is the error of the loss over the text that they come from.
    `consecutive` windows are all of a text, whose loss they give without error: it is the error of that loss as one of
    a text that has the same kinds of documents, in the same mixture. Neighbours are correlated, so that it comes from
    the means of a few long batches of them, as if each batch were one window. It holds if documents come in no order
    and a batch is longer than a document. How the whole text differs from the rest of its source cannot be seen in it.
    Sources: Cochran, "Sampling Techniques" (1977), section 2.11; Ibragimov & Mueller, "t-statistic based correlation
    and heterogeneity robust inference" (Journal of Business & Economic Statistics 28, 2010).
    """
    total = math.fsum(length_N)
    mean = _sum(loss_N) / total
    if not math.isfinite(mean):
        return Estimate(mean)
    residual_B = _independent_parts(loss_N - mean * length_N, consecutive=consecutive)
    count = len(residual_B)
    if count == 1:
        return Estimate(mean)
    stderr = math.sqrt(_sum(residual_B**2) * count / (count - 1)) / total
    return Estimate(mean, stderr, count - 1 if consecutive else student_dof(residual_B))


def mean_estimate(values: Floats) -> Estimate:
    """The mean of independent numbers from a distribution that is not known to be skewed, such as that of seeds."""
    count = len(values)
    return Estimate(
        float(values.mean()), float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else None, count - 1
    )


def student_dof(residual_N: Floats) -> int:
    """Degrees of freedom with which Student's t gives a 95% interval for the mean of these independent numbers.

    Fewer than n - 1 where they are skewed, as losses are: then mean and deviation of a sample are correlated, and the
    usual interval is too narrow. The error of its coverage is known to first order in 1/n, and so is the effect of the
    degrees of freedom; the one is set against the other. The term of kurtosis is small, and left out.
    Source: Hall, "The Bootstrap and Edgeworth Expansion" (1992), section 2.6, for the expansion of Student's t.
    """
    centred = residual_N - residual_N.mean()
    variance = float((centred**2).mean())
    skewness = float((centred**3).mean()) / variance**1.5 if variance else 0.0
    return max(1, round((len(residual_N) - 1) / (1 + SKEW_COST * skewness**2)))


def batch_count(windows: int) -> int:
    """Into how many batches consecutive windows are put for their standard error.

    Half the cube root, and 3 or more where 30 windows are there: few, so that batches grow with the text and soon are
    longer than its documents, and enough for Student's t. It was found by experiment; see docs/measurements.md.
    """
    few = max(3, round(math.cbrt(windows) / 2))
    return min(windows, max(2, min(few, MAX_BATCHES, windows // MIN_BATCH)))


class CrossedEstimate(NamedTuple):
    """A mean over seeds and windows, both of which are samples."""

    total: Estimate
    """With the error of both."""
    seed_stderr: float
    """Of the mean over all seeds, on these windows."""
    window_stderr: float | None
    """Of the mean over all windows, with these seeds; None from a single window."""
    window_dof: float | None
    """Its degrees of freedom."""

    def scaled(self, factor: float) -> "CrossedEstimate":
        """The same in another unit; see `Estimate.scaled`."""
        window_stderr = None if self.window_stderr is None else self.window_stderr * factor
        return CrossedEstimate(self.total.scaled(factor), self.seed_stderr * factor, window_stderr, self.window_dof)


def crossed_estimate(change_SN: Floats, length_N: Floats, *, consecutive: bool) -> CrossedEstimate:
    """The mean change per token of the same windows under several seeds, (seeds, windows) and (windows,).

    The variance of the mean is that of the seeds' means and that of the windows' means, less what is in both: the part
    that differs from window to window in another way for each seed. It is never less than either of the two. Its
    degrees of freedom are those of the smaller sample: others that are estimated, such as Satterthwaite's, are too many
    where few seeds agree by chance.
    Source: Cameron, Gelbach & Miller, "Robust inference with multiway clustering" (Journal of Business & Economic
    Statistics 29, 2011).
    """
    seeds, total = len(change_SN), math.fsum(length_N)
    mean = _sum(change_SN.mean(0)) / total
    residual_SB = _independent_parts(change_SN - mean * length_N, consecutive=consecutive)
    parts = residual_SB.shape[1]
    of_seed_S, of_part_B = residual_SB.sum(1), residual_SB.mean(0)
    by_seed = float((of_seed_S**2).sum()) / (seeds - 1) / seeds / total**2
    if parts == 1:
        return CrossedEstimate(Estimate(mean, math.sqrt(by_seed), seeds - 1), math.sqrt(by_seed), None, None)
    by_part = float((of_part_B**2).sum()) * parts / (parts - 1) / total**2
    both_SB = residual_SB - of_part_B - of_seed_S[:, None] / parts
    by_both = float((both_SB**2).sum()) / (seeds - 1) / (parts - 1) * parts / seeds / total**2
    variance = max(by_seed, by_part, by_seed + by_part - by_both)
    total_estimate = Estimate(mean, math.sqrt(variance), min(seeds, parts) - 1)
    return CrossedEstimate(total_estimate, math.sqrt(by_seed), math.sqrt(by_part), parts - 1)


def _independent_parts(residual_N: Floats, *, consecutive: bool) -> Floats:
    """The sums over parts of the last axis that are as good as independent: windows, or batches of neighbours."""
    windows = residual_N.shape[-1]
    if not consecutive:
        return residual_N
    return np.stack([batch.sum(-1) for batch in np.array_split(residual_N, batch_count(windows), axis=-1)], axis=-1)


def difference_of_independent(a: Estimate, b: Estimate) -> Estimate:
    """b - a, of two estimates that share no windows. Source: Welch (Biometrika 34, 1947)."""
    mean = b.mean - a.mean
    if a.stderr is None or b.stderr is None:
        return Estimate(mean)
    variances = a.stderr**2, b.stderr**2
    total = sum(variances)
    shares = (value**2 / (dof or math.inf) for value, dof in zip(variances, (a.dof, b.dof), strict=True))
    weight = sum(shares)
    return Estimate(mean, math.sqrt(total), total**2 / weight if weight else math.inf)


def _sum(values: Floats) -> float:
    """The sum, rounded once, so that it does not depend on an order; nan or inf if a value is."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return float(values.sum())
