"""Estimates with their standard errors: of a mean over windows, of differences, and intervals from them.

A 95% interval is the mean and, to either side, the standard error times the 97.5% quantile of Student's t.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MAX_BATCHES = 10
"""Batches for the standard error of consecutive windows: few, so that each is long beside the distance over which
losses are correlated, and enough for Student's t. Schmeiser finds 10 to 30 to be a good number."""
MIN_BATCH = 10
"""Windows in a batch, where there are enough for two: with fewer the batches themselves are correlated."""


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
    def is_beyond_doubt(self) -> bool:
        """Whether the 95% interval excludes 0; without a standard error, whether the mean is not 0."""
        return abs(self.mean) > (0 if self.stderr is None else self.margin)

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
    text like it. Neighbours are correlated, so that it comes from the means of up to `MAX_BATCHES` batches of them, as
    if each batch were one long window. It does not include how the whole text differs from the rest of its source.
    Sources: Cochran, "Sampling Techniques" (1977), section 2.11; Schmeiser, "Batch size effects in the analysis of
    simulation output" (Operations Research 30, 1982); Ibragimov & Mueller, "t-statistic based correlation and
    heterogeneity robust inference" (Journal of Business & Economic Statistics 28, 2010).
    """
    total = math.fsum(length_N)
    mean = _sum(loss_N) / total
    residual_N = loss_N - mean * length_N
    if consecutive:
        batches = min(len(loss_N), max(2, min(MAX_BATCHES, len(loss_N) // MIN_BATCH)))
        residual_N = np.array([batch.sum() for batch in np.array_split(residual_N, batches)])
    count = len(residual_N)
    if count == 1:
        return Estimate(mean)
    return Estimate(mean, math.sqrt(_sum(residual_N**2) * count / (count - 1)) / total, count - 1)


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
