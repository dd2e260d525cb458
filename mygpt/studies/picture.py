"""The picture of a study."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mygpt.estimates import Estimate
from mygpt.reports.curves import Points
from mygpt.reports.plot import COLORS, default_style, drawable, highest_that_matters, new_figure, save_figure
from mygpt.studies.analysis import VariantResult, mean_curve, unit_of
from mygpt.studies.results import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@default_style()
def draw(study: Study, out: Path) -> "Figure":
    """Draw the mean held-out loss of each recipe, the last losses of its runs, and how far it is from the best.

    The recipes are sorted by their loss, as in the table. `out` ends in .png, .svg or .pdf.

    Raises:
        MygptError: matplotlib is not installed, or `out` cannot be written.
    """
    unit = unit_of(study.variants)
    variants = sorted(
        (variant for variant in study.variants if variant.runs), key=lambda variant: variant.mean(unit).mean
    )
    width = 11 + 0.08 * max([0, *(len(variant.name) - 12 for variant in variants)])
    figure = new_figure(figsize=(width, 2.8 + 0.4 * len(variants)), layout="constrained")
    count = 3 if len(variants) > 1 else 2
    curves, ends, *others = figure.subplots(1, count, width_ratios=(4, 3, 3)[:count])
    _draw_curves(curves, variants)
    for row, variant in enumerate(variants):
        color, losses = _color(row), list(variant.losses(unit).values())
        ends.plot(losses, [row + 0.16] * len(losses), "o", color=color, ms=5, alpha=0.4, mew=0)
        _draw_estimate(ends, row - 0.16, variant.mean(unit), color)
        if row and (change := _change(study, variants[0].name, variant.name)):
            _draw_estimate(others[0], row, change, color)
    for axes in (ends, *others):
        axes.set(yticks=range(len(variants)), ylim=(max(1, len(variants)) - 0.5, -0.5))
        axes.grid(alpha=0.3, axis="x")
    ends.set(xlabel=f"held-out loss ({unit})")
    ends.set_yticklabels([drawable(variant.name) for variant in variants], parse_math=False)
    ends.set_title("each run at its last step,\nand their mean with its 95% interval", fontsize="small")
    for differences in others:
        differences.axvline(0, color="gray", lw=0.8)
        differences.set(xlabel=f"difference ({unit})", yticklabels=[])
        differences.set_title(
            "difference from the best recipe,\npaired by seed, with its 95% interval", fontsize="small"
        )
    save_figure(figure, out)
    return figure


def _draw_curves(axes: "Axes", variants: list[VariantResult]) -> None:
    lowest, highest = [], []
    for index, variant in enumerate(variants):
        x, mean, deviation = np.array(mean_curve(variant)).T
        axes.plot(x, mean, color=_color(index), marker="o", ms=2.5)
        axes.fill_between(x, mean - deviation, mean + deviation, color=_color(index), alpha=0.2, lw=0)
        lowest.append(min(mean - deviation))
        empty = np.array([])
        highest.append(highest_that_matters(Points(empty, empty, empty), Points(x, mean + deviation, deviation)))
    if variants:
        space = 0.05 * (max(highest) - min(lowest)) or 0.1
        axes.set_ylim(min(lowest) - space, max(highest) + space)
    axes.set(xlabel="step", ylabel="held-out loss (nats per token)")
    axes.set_title("mean of the seeds,\nand their deviation", fontsize="small")
    axes.grid(alpha=0.3)


def _draw_estimate(axes: "Axes", y: float, estimate: Estimate, color: str) -> None:
    margin = [] if estimate.stderr is None else [estimate.margin]
    axes.errorbar([estimate.mean], [y], xerr=margin or None, color=color, marker="D", ms=4, capsize=3)


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _change(study: Study, best: str, other: str) -> Estimate | None:
    """The mean loss of another recipe less that of the best, paired; None: they are not compared."""
    for result in study.comparisons:
        if {result.a, result.b} == {best, other} and result.change:
            return result.change if result.b == other else result.change._replace(mean=-result.change.mean)
    return None
