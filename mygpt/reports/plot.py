"""Pictures of runs, drawn from their directories."""

from collections.abc import Sequence
from math import inf, isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from mygpt.errors import MygptError
from mygpt.estimates import student_quantile
from mygpt.runs.files import real_path
from mygpt.runs.records import Record, perplexity, read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Unit = Literal["nats-per-token", "bits-per-byte", "perplexity"]
LABELS: dict[Unit, str] = {
    "nats-per-token": "loss (nats per token)",
    "bits-per-byte": "loss (bits per byte)",
    "perplexity": "perplexity",
}


def plot(runs: Sequence[Path], out: Path, unit: Unit = "nats-per-token") -> None:
    """Draw training and held-out loss (with its 95% interval) and the learning rate of `runs` against the step.

    `out` ends in .png, .svg or .pdf. In bits per byte, by which runs with other tokenizers are compared, there is the
    held-out loss alone: of training batches the bytes are not counted.

    Raises:
        CheckpointError: a run has no records.
        MygptError: matplotlib is not installed, or `out` cannot be written.
    """
    names = [real_path(run).name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    records = [read_records(run) for run in runs]
    curves = [_curve(run, unit) for run in records]
    for name, curve in zip(names, curves, strict=True):
        if not (curve.training or curve.held_out):
            raise MygptError(f"{name}: has no held-out loss in {unit}; expected a run with val_every, of mygpt 0.2 on")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise MygptError(f"{out}: got the ending {out.suffix!r}, expected .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MygptError(f"plot needs {error.name}: pip install 'mygpt[report]'") from None

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    lines, labels = [], []
    for index, (name, run, curve) in enumerate(zip(names, records, curves, strict=True)):
        color = f"C{index}"
        steps = [r.step for r in run]
        training, held_out = curve.training, curve.held_out
        if training:
            lines += loss_axes.plot(*zip(*training, strict=True), color=color, alpha=0.35, lw=1)
            labels.append(f"{name}: training")
        if held_out:
            at, values, stderrs, dofs = zip(*held_out, strict=True)
            # Records of mygpt 0.1 lack the degrees of freedom: they get the normal quantile.
            errors = [student_quantile(dof or inf) * (stderr or nan) for stderr, dof in zip(stderrs, dofs, strict=True)]
            lines.append(loss_axes.errorbar(at, values, yerr=errors, color=color, marker="o", ms=3.5, capsize=2))
            labels.append(f"{name}: held-out, 95% interval")
        lr_axes.plot(steps, [r.lr for r in run], color=color)
    bottom, top = _frame(curves)
    margin = 0.05 * (top - bottom) or 0.1
    loss_axes.set(ylim=(bottom - margin, top + margin), ylabel=LABELS[unit])
    loss_axes.grid(alpha=0.3)
    for text in loss_axes.legend(lines, labels, frameon=False).get_texts():
        text.set_parse_math(False)
    lr_axes.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    lr_axes.grid(alpha=0.3)
    save_figure(figure, out)


def save_figure(figure: "Figure", out: Path) -> None:
    """Write a picture, whose ending chooses the format; the same figure gives the same file.

    Raises:
        MygptError: it cannot be written.
    """
    import matplotlib

    try:
        # No random ids and no date.
        with matplotlib.rc_context({"svg.hashsalt": "mygpt"}):
            date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(out.suffix)
            figure.savefig(out, dpi=150, metadata=date)
    except OSError as error:
        raise MygptError(f"{out}: cannot be written: {error.strerror}") from None


class _Curve(NamedTuple):
    """What is drawn of a run."""

    training: list[tuple[int, float]]
    """Step and loss."""
    held_out: list[tuple[int, float, float | None, int | None]]
    """Step, loss, its standard error, and the degrees of freedom of that."""


def _curve(records: Sequence[Record], unit: Unit) -> _Curve:
    evaluated = [r for r in records if r.val is not None]
    if unit == "bits-per-byte":
        return _Curve(
            [],
            [
                (r.step, r.val_bits_per_byte, r.val_bits_per_byte_stderr, r.val_dof)
                for r in evaluated
                if r.val_bits_per_byte is not None
            ],
        )
    training = [(r.step, r.loss) for r in records]
    held_out = [(r.step, r.val or 0.0, r.val_stderr, r.val_dof) for r in evaluated]
    if unit == "perplexity":
        training = [(step, value) for step, loss in training if isfinite(value := perplexity(loss))]
        # The error of a function is its slope times that of its argument, where both are small.
        held_out = [
            (step, value, stderr and stderr * value, dof)
            for step, val, stderr, dof in held_out
            if isfinite(value := perplexity(val))
        ]
    return _Curve(training, held_out)


def _frame(curves: Sequence[_Curve]) -> tuple[float, float]:
    """The lowest loss, and the highest held-out loss or training loss after the first twentieth of a run.

    A fresh model's loss is far above all that follows: the curve may come down from beyond the frame.
    """
    values, settled = [], []
    for training, held_out in curves:
        losses = [value for _, value, *_ in held_out]
        values += losses + [loss for _, loss in training]
        last = training[-1][0] if training else 0
        settled += losses + [loss for step, loss in training if step > last / 20]
    return min(values), max(settled)
