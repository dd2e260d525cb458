"""Pictures of runs, drawn from their directories."""

from collections.abc import Sequence
from pathlib import Path

from mygpt.errors import CheckpointError, MygptError
from mygpt.metrics import Record, read_records


def plot(runs: Sequence[Path], out: Path) -> None:
    """Draw training and held-out loss (with its standard error) and the learning rate of `runs` against the step.

    `out` ends in .png, .svg or .pdf.

    Raises:
        CheckpointError: a run has no records.
        MygptError: matplotlib is not installed, or `out` cannot be written.
    """
    records = {run.resolve().name: read_records(run) for run in runs}
    if len(records) < len(runs):
        raise CheckpointError("two of the runs have the same name; rename one so that the legend can tell them apart")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise MygptError(f"{out}: got the ending {out.suffix!r}, expected .png, .svg or .pdf")
    try:
        import matplotlib
    except ImportError:
        raise MygptError("plot needs matplotlib: pip install 'mygpt[report]'") from None
    matplotlib.use("agg")
    # The same run gives the same file: no random ids and no date.
    matplotlib.rcParams["svg.hashsalt"] = "mygpt"
    from matplotlib import pyplot

    figure, (loss_axes, lr_axes) = pyplot.subplots(
        2, sharex=True, figsize=(8, 5.5), height_ratios=(3, 1), layout="constrained"
    )
    for index, (name, run) in enumerate(records.items()):
        color = f"C{index}"
        loss_axes.plot(
            [r.step for r in run], [r.loss for r in run], color=color, alpha=0.35, lw=1, label=f"{name}: training"
        )
        held_out = [(r.step, r.val, r.val_stderr) for r in run if r.val is not None]
        if held_out:
            steps, values, errors = zip(*held_out, strict=True)
            loss_axes.errorbar(
                steps, values, yerr=errors, color=color, marker="o", ms=3.5, capsize=2, label=f"{name}: held-out"
            )
        lr_axes.plot([r.step for r in run], [r.lr for r in run], color=color)
    # A fresh model's loss is far above all that follows: let the curve come down from beyond the frame.
    frames = [_frame(run) for run in records.values()]
    bottom, top = min(frame[0] for frame in frames), max(frame[1] for frame in frames)
    loss_axes.set(ylim=(bottom - 0.05 * (top - bottom), top), ylabel="loss (nats per token)")
    loss_axes.grid(alpha=0.3)
    loss_axes.legend(frameon=False)
    lr_axes.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    lr_axes.grid(alpha=0.3)
    try:
        figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)
    except OSError as error:
        raise MygptError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def _frame(records: Sequence[Record]) -> tuple[float, float]:
    """The lowest loss, and the highest held-out loss or training loss after the first twentieth of the run."""
    held_out = [r.val for r in records if r.val is not None]
    settled = [r.loss for r in records if r.step > records[-1].step / 20] or [records[-1].loss]
    return min([r.loss for r in records] + held_out), max(settled + held_out)
