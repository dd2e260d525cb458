"""The picture of a study."""

from pathlib import Path

from mygpt.reports.plot import COLORS, new_figure, save_figure
from mygpt.studies.analysis import mean_curve, unit_of
from mygpt.studies.results import Study


def draw(study: Study, out: Path) -> None:
    """Draw the mean held-out loss of each recipe with its deviation over seeds, and the last losses of all runs.

    `out` ends in .png, .svg or .pdf.

    Raises:
        MygptError: matplotlib is not installed, or `out` cannot be written.
    """
    unit = unit_of(study.cells)
    cells = [cell for cell in study.cells if cell.runs]
    figure = new_figure(figsize=(9, 2.6 + 0.35 * len(cells)), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    lowest, settled = [], []
    for index, cell in enumerate(cells):
        color = COLORS[index % len(COLORS)]
        steps, means, deviations = (list(column) for column in zip(*mean_curve(cell), strict=True))
        curves.plot(steps, means, color=color, label=cell.name)
        low, high = ([mean + sign * d for mean, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        curves.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
        lowest.append(min(low))
        settled += high[len(high) // 4 :]
        losses, mean = list(cell.losses(unit).values()), cell.mean(unit)
        ends.plot(losses, [index] * len(losses), "|", color=color, ms=10)
        margin = mean.margin if mean.stderr is not None else 0.0
        ends.errorbar([mean.mean], [index], xerr=[margin], color=color, marker="o", ms=4, capsize=3)
    if cells:
        space = 0.05 * (max(settled) - min(lowest)) or 0.1
        # A fresh model's loss is far above all that follows.
        curves.set_ylim(min(lowest) - space, max(settled) + space)
    curves.set(xlabel="step", ylabel="held-out loss (nats per token)")
    curves.grid(alpha=0.3)
    ends.set(xlabel=f"at the last step ({unit})", yticks=range(len(cells)), ylim=(len(cells) - 0.5, -0.5))
    ends.set_yticklabels([cell.name for cell in cells], parse_math=False)
    ends.grid(alpha=0.3, axis="x")
    ends.set_title("runs, and the mean with its 95% interval", fontsize="small")
    curves.set_title("mean of the seeds, and their deviation", fontsize="small")
    save_figure(figure, out)
