"""Pictures of runs, drawn from their directories."""

from collections.abc import Sequence
from math import inf, nan
from pathlib import Path

from mygpt.errors import MygptError
from mygpt.runs.files import real_path
from mygpt.runs.records import Record, read_records


def plot(runs: Sequence[Path], out: Path) -> None:
    """Draw training and held-out loss (with its 95% interval) and the learning rate of `runs` against the step.

    `out` ends in .png, .svg or .pdf.

    Raises:
        CheckpointError: a run has no records.
        MygptError: matplotlib or scipy is not installed, or `out` cannot be written.
    """
    names = [real_path(run).name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    records = [read_records(run) for run in runs]
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise MygptError(f"{out}: got the ending {out.suffix!r}, expected .png, .svg or .pdf")
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from scipy.stats import t as student
    except ImportError as error:
        raise MygptError(f"plot needs {error.name}: pip install 'mygpt[report]'") from None

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    lines, labels = [], []
    for index, (name, run) in enumerate(zip(names, records, strict=True)):
        color = f"C{index}"
        steps = [r.step for r in run]
        lines += loss_axes.plot(steps, [r.loss for r in run], color=color, alpha=0.35, lw=1)
        labels.append(f"{name}: training")
        held_out = [r for r in run if r.val is not None]
        if held_out:
            # Records of mygpt 0.1 lack the degrees of freedom: they get the normal quantile.
            errors = [student.ppf(0.975, r.val_dof or inf) * (r.val_stderr or nan) for r in held_out]
            at, values = [r.step for r in held_out], [r.val for r in held_out]
            bars = loss_axes.errorbar(at, values, yerr=errors, color=color, marker="o", ms=3.5, capsize=2)
            lines.append(bars)
            labels.append(f"{name}: held-out, 95% interval")
        lr_axes.plot(steps, [r.lr for r in run], color=color)
    # A fresh model's loss is far above all that follows: let the curve come down from beyond the frame.
    frames = [_frame(run) for run in records]
    bottom, top = min(frame[0] for frame in frames), max(frame[1] for frame in frames)
    margin = 0.05 * (top - bottom) or 0.1
    loss_axes.set(ylim=(bottom - margin, top + margin), ylabel="loss (nats per token)")
    loss_axes.grid(alpha=0.3)
    for text in loss_axes.legend(lines, labels, frameon=False).get_texts():
        text.set_parse_math(False)
    lr_axes.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    lr_axes.grid(alpha=0.3)
    try:
        # The same run gives the same file: no random ids and no date.
        with matplotlib.rc_context({"svg.hashsalt": "mygpt"}):
            date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(out.suffix)
            figure.savefig(out, dpi=150, metadata=date)
    except OSError as error:
        raise MygptError(f"{out}: cannot be written: {error.strerror}") from None


def _frame(records: Sequence[Record]) -> tuple[float, float]:
    """The lowest loss, and the highest held-out loss or training loss after the first twentieth of the run."""
    held_out = [r.val for r in records if r.val is not None]
    settled = [r.loss for r in records if r.step > records[-1].step / 20] or [records[-1].loss]
    return min([r.loss for r in records] + held_out), max(settled + held_out)
