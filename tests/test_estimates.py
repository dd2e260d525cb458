"""The formulas of estimates and of their errors, against sums that are written out."""

import itertools
import math

import numpy as np
import pytest

from mygpt.estimates import (
    CrossedEstimate,
    Estimate,
    batch_count,
    crossed_estimate,
    difference_of_independent,
    mean_estimate,
    ratio_estimate,
    student_dof,
    student_quantile,
)

LENGTHS = np.array([3.0, 1.0, 4.0, 2.0, 5.0])
CHANGES = np.array([[1.0, -2.0, 0.5, 3.0, 4.0], [0.0, 1.5, 2.5, -1.0, 2.0], [2.0, 0.5, -3.0, 1.0, 7.0]])


def crossed(residuals, total):
    """The two errors and the error of both, from the products of all pairs with a seed or a window in common.

    Each sum has the factor of a sample's variance: n / (n - 1) for seeds, for windows, and for both.
    """
    seeds, windows = len(residuals), len(residuals[0])
    cells = list(itertools.product(range(seeds), range(windows)))
    pairs = [(residuals[s][w] * residuals[t][v], s == t, w == v) for s, w in cells for t, v in cells]
    unit, by_seed, by_window = (seeds * total) ** 2, seeds / (seeds - 1), windows / (windows - 1)
    seed = sum(product for product, same_seed, _ in pairs if same_seed) * by_seed / unit
    window = sum(product for product, _, same_window in pairs if same_window) * by_window / unit
    both = sum(product for product, *same in pairs if all(same)) - sum(
        sum(residuals[s][w] for s in range(seeds)) ** 2 / seeds for w in range(windows)
    )
    both -= sum(sum(row) ** 2 / windows for row in residuals)
    return math.sqrt(seed), math.sqrt(window), seed, window, both * by_seed * by_window / unit


@pytest.mark.parametrize(
    "changes",
    [CHANGES, CHANGES[:, ::-1] * [[1], [-2], [1]], CHANGES * 0.1 + LENGTHS, CHANGES - CHANGES.mean(0)],
    ids=["more than either", "opposite seeds", "windows alone", "seeds alone"],
)
def test_crossed_estimate_is_the_published_formula(changes):
    """The variance over seeds, and over windows, less what is in both, and never less than either of the two."""
    mean = changes.mean(0).sum() / 15
    seed_stderr, window_stderr, seed, window, both = crossed((changes - mean * LENGTHS).tolist(), 15)
    found = crossed_estimate(changes, LENGTHS, consecutive=False)
    assert found.total.mean == pytest.approx(mean)
    assert found[1:] == pytest.approx((seed_stderr, window_stderr, 4))
    assert found.total[1:] == pytest.approx((math.sqrt(max(seed, window, seed + window - both)), 2))


def test_crossed_estimate_of_neighbours_takes_batches_of_them():
    """Forty consecutive windows count as the three parts that `batch_count` gives; one window has no error."""
    changes, lengths = np.sin(np.arange(80.0)).reshape(2, 40), np.ones(40)
    parts = [range(14), range(14, 27), range(27, 40)]
    mean = changes.mean()
    residuals = [[sum(row[n] - mean for n in part) for part in parts] for row in changes]
    found = crossed_estimate(changes, lengths, consecutive=True)
    assert found[1:] == pytest.approx((*crossed(residuals, 40)[:2], 2))
    single = crossed_estimate(changes[:, :1], lengths[:1], consecutive=False)
    error = abs(changes[0, 0] - changes[1, 0]) / 2
    assert single == (pytest.approx((changes[:, 0].mean(), error, 1)), pytest.approx(error), None, None)


def test_ratio_estimate_is_the_published_formula():
    """For random windows: the deviation of loss - mean * length, over the root of their number and the mean length."""
    loss = CHANGES[2]
    residuals = loss - 0.5 * LENGTHS  # 7.5 / 15
    stderr = math.sqrt(sum(residuals**2) / 4 / 5) / 3
    assert ratio_estimate(loss, LENGTHS, consecutive=False) == pytest.approx((0.5, stderr, student_dof(residuals)))
    assert ratio_estimate(loss[:1], LENGTHS[:1], consecutive=False) == (2 / 3, None, None)
    halves = [sum(residuals[:3]), sum(residuals[3:])]
    stderr = math.sqrt((halves[0] ** 2 + halves[1] ** 2) * 2) / 15
    assert ratio_estimate(loss, LENGTHS, consecutive=True) == pytest.approx((0.5, stderr, 1))
    assert math.isnan(ratio_estimate(loss * math.nan, LENGTHS, consecutive=False).mean)
    with np.errstate(invalid="ignore"):
        assert math.isnan(ratio_estimate(np.array([math.inf, -math.inf]), LENGTHS[:2], consecutive=False).mean)
    skewed, ones = np.arange(40.0) ** 6, np.ones(40)
    dof = [ratio_estimate(skewed, ones, consecutive=consecutive).dof for consecutive in (True, False)]
    assert dof == [2, student_dof(skewed - skewed.mean())]
    assert dof[1] < 20


def test_batches_of_consecutive_windows():
    """Half the cube root of their number, from 3 to 10; of less than 30 windows two, and never more than windows."""
    counts = {windows: batch_count(windows) for windows in (1, 2, 19, 20, 29, 30, 39, 342, 345, 1000, 10**4, 10**6)}
    assert counts == dict(zip(counts, (1, 2, 2, 2, 2, 3, 3, 3, 4, 5, 10, 10), strict=True))


def test_skewness_costs_degrees_of_freedom():
    """n - 1 without it; 0.89 times its square is added to 1 below; one at least is left."""
    assert student_dof(np.array([1.0, 2.0, 3.0, 5.0, 6.0, 7.0])) == 5
    assert student_dof(np.full(4, 2.0)) == 3
    values = np.array([0.0] * 6 + [1.0] * 2)  # a share of 1/4 has the skewness 2 / sqrt(3)
    assert student_dof(values) == round(7 / (1 + 0.89 * 4 / 3))
    assert student_dof(np.repeat(values, 10)) == round(79 / (1 + 0.89 * 4 / 3))
    assert student_dof(np.array([0.0] * 99 + [1.0])) == 1


def test_mean_and_difference_of_independent_estimates():
    """The error of a mean is the sample's deviation over the root of n; of a difference, as Welch has it."""
    assert mean_estimate(np.array([1.0, 2.0, 6.0])) == pytest.approx((3, math.sqrt(7 / 3), 2))
    assert mean_estimate(np.array([1.0, 3.0])) == pytest.approx((2, 1, 1))
    assert mean_estimate(np.array([1.0])) == (1, None, 0)
    a, b = Estimate(1.0, 0.3, 4), Estimate(3.0, 0.4, 9)
    found = difference_of_independent(a, b)
    assert found == pytest.approx((2, 0.5, 0.25**2 / (0.09**2 / 4 + 0.16**2 / 9)))
    assert difference_of_independent(a, Estimate(3.0)) == difference_of_independent(Estimate(1.0), b) == Estimate(2)
    assert difference_of_independent(a._replace(dof=None), b._replace(dof=None)).dof == math.inf


def test_intervals_and_words_of_an_estimate():
    """The 95% interval is Student's; an estimate is beyond doubt if it excludes 0. The error has two digits."""
    assert student_quantile(math.inf) == pytest.approx(1.959964, abs=1e-6)
    assert student_quantile(2) == pytest.approx(4.302653, abs=1e-6)
    assert student_quantile(2, 0.8) == pytest.approx(1.060660, abs=1e-6)
    estimate = Estimate(-0.5, 0.1, 2)
    low, high = -0.5 - 0.4302653, -0.5 + 0.4302653
    assert estimate.interval == pytest.approx((low, high))
    assert estimate.is_beyond_doubt
    assert not Estimate(0.43, 0.1, 2).is_beyond_doubt
    assert Estimate(0.19, 0.1).interval == pytest.approx((-0.0059964, 0.3859964))
    assert [Estimate(mean).is_beyond_doubt for mean in (0.5, -0.5, 0.0)] == [True, True, False]
    assert Estimate(0.5).interval == (-math.inf, math.inf)
    document = estimate.document()
    assert document.pop("interval") == pytest.approx((low, high))
    assert document == {"mean": -0.5, "stderr": 0.1, "dof": 2}
    assert Estimate(0.5).document() == {"mean": 0.5}
    texts = {Estimate(0.01234, 0.0041): "+0.0123 +- 0.0041", Estimate(-123.4, 25.0): "-123 +- 25", Estimate(2.0): "+2"}
    assert [found.text() for found in texts] == list(texts.values())
    assert (Estimate(1.0, 0.0).text(), Estimate(12.34, 1.5).text()) == ("+1", "+12.3 +- 1.5")


def test_estimate_in_another_unit():
    """Means and errors have the factor; degrees of freedom stay."""
    assert Estimate(3.0, 0.5, 7).scaled(2) == (6, 1, 7)
    assert Estimate(3.0).scaled(2) == (6, None, None)
    assert CrossedEstimate(Estimate(3.0, 0.5, 7), 0.25, 0.125, 9).scaled(2) == ((6, 1, 7), 0.5, 0.25, 9)
    assert CrossedEstimate(Estimate(3.0), 0.25, None, None).scaled(2) == ((6, None, None), 0.5, None, None)
