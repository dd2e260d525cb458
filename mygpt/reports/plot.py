"""Pictures of runs, drawn from their directories."""

import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from mygpt.disk import replace_bytes
from mygpt.errors import MygptError, print_note
from mygpt.reports.curves import Axis, Curve, Floats, Points, Unit, Warn, read_curves
from mygpt.runs.files import explain_refusal, real_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS: dict[Unit, str] = {
    "nats-per-token": "loss (nats per token)",
    "bits-per-byte": "loss (bits per byte)",
    "perplexity": "perplexity",
}
COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
    *("#0000ff", "#ff1eff", "#004b1e", "#3c0fa5", "#b4d296", "#00e100", "#ff0078", "#ffb487", "#78004b", "#78690f"),
)
"""matplotlib's ten, and ten more, each as far as possible from those before it in CIELAB. Further curves have them
again, with other strokes."""
STROKES = ("-", "--", ":", "-.")
SETTLED = 0.05
"""The share of a run after which its training loss counts for the frame: a fresh model's is far above what follows."""
FAR = 4
"""What reaches so many times higher does not set the frame: than the median curve, one that diverges; than the later
half of a run, the losses of its fresh model."""
ROOM = 2.0
"""The frame may always reach this far above the lowest loss."""
MARK = "drawn by mygpt"
"""In every picture: a file without it is somebody else's."""
METADATA: dict[str, dict[str, str | None]] = {
    ".png": {"Software": MARK},
    ".svg": {"Creator": MARK, "Date": None},
    ".pdf": {"Creator": MARK, "CreationDate": None},
}
"""By the ending of a picture's file, which chooses the format."""


@contextmanager
def default_style() -> Iterator[None]:
    """Draw with matplotlib's own settings: those of the user may name fonts, programs or backends that are not there.

    Raises:
        MygptError: matplotlib is not installed, or cannot be imported.
    """
    is_new = "matplotlib" not in sys.modules
    # As a notebook sets it, it may name a module that this environment lacks; then matplotlib cannot be imported.
    backend = os.environ.pop("MPLBACKEND", None) if is_new else None
    try:
        import matplotlib
        from matplotlib import style
    except ImportError as error:
        raise MygptError(f"a picture needs {error.name or 'matplotlib'}: pip install matplotlib") from None
    except (OSError, ValueError) as error:
        reason = f"cannot be imported: {error}; see your matplotlibrc"
        raise MygptError(f"a picture needs matplotlib, which {reason}") from None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    with style.context(["default", {"svg.hashsalt": "mygpt"}]):  # no random ids
        yield


@default_style()
def plot(
    runs: Sequence[Path],
    out: Path | None = None,
    unit: Unit = "nats-per-token",
    *,
    x: Axis = "step",
    y_min: float | None = None,
    y_max: float | None = None,
    log: bool = False,
    smooth: int = 0,
    grad_norm: bool = False,
    merge_seeds: bool = True,
    warn: Warn = print_note,
) -> "Figure":
    """Draw training and held-out loss and the learning rate of `runs`, which are run directories or folders of them.

    The bars of a held-out loss are its 95% interval. Runs that differ by their seeds alone are drawn as their mean,
    with a band of their standard deviation, unless `merge_seeds` is false. Losses are against `x`, from `y_min` to
    `y_max` or over what matters, on a logarithmic scale if `log`; `smooth` averages training losses over so many steps,
    at most over a quarter of the steps so far; `grad_norm` adds the gradient's norm before clipping. `out`, if there is
    one, is the file to write: .png, .svg or .pdf; only a picture of mygpt is overwritten. In bits per byte there is the
    held-out loss alone: of training batches the bytes are not counted. What cannot be drawn is left out, and `warn`
    gets a line on it.

    Raises:
        MygptError: a value cannot be used, nothing can be drawn, matplotlib is not installed, or `out` cannot be
            written.
    """
    if not runs:
        raise MygptError("plot: expected at least one run directory")
    _check_options(unit, x, y_min, y_max, log=log, smooth=smooth)
    if out is not None:
        check_out(out)
    curves = read_curves(runs, unit, x, smooth=smooth, merge_seeds=merge_seeds, warn=warn)
    longest = max(len(curve.name) for curve in curves)
    figure = new_figure(figsize=(8 + 0.08 * max(0, longest - 20), 5.5 + 1.5 * grad_norm), layout="constrained")
    count = 2 + grad_norm
    loss_axes, *rest = figure.subplots(count, sharex=True, height_ratios=(3, *[1] * (count - 1)))
    for index, curve in enumerate(curves):
        _draw_losses(loss_axes, curve, _style(index))
        _draw(rest[-1], curve.learning_rate, _style(index))
        if grad_norm:
            _draw(rest[0], curve.grad_norm, _style(index), lw=0.8)
    if log:
        _set_log_scale(loss_axes)
    loss_axes.set(ylim=_limits(curves, y_min, y_max, log=log, warn=warn), ylabel=LABELS[unit])
    rest[-1].set(ylabel="learning rate", xlabel=x, ylim=(0, None))
    if grad_norm:
        rest[0].set(ylabel="gradient norm", yscale="log")
    for axes in (loss_axes, *rest):
        axes.grid(alpha=0.3)
    _draw_legend(figure, curves)
    if out is not None:
        save_figure(figure, out)
    return figure


def _check_options(unit: str, x: str, y_min: float | None, y_max: float | None, *, log: bool, smooth: int) -> None:
    """Check what a user gave.

    Raises:
        MygptError: a value cannot be used.
    """
    for name, choice, known in (("unit", unit, LABELS), ("x", x, get_args(Axis))):
        if choice not in known:
            raise MygptError(f"{name}: got {choice!r}, expected one of {', '.join(known)}")
    for name, value in (("y_min", y_min), ("y_max", y_max)):
        if value is not None and not (math.isfinite(value) and (value > 0 or not log)):
            raise MygptError(f"{name}: got {value}, expected a number{' above 0 on a logarithmic scale' * log}")
    if y_min is not None and y_max is not None and y_min >= y_max:
        raise MygptError(f"y_min: got {y_min:g}, expected less than y_max = {y_max:g}")
    if smooth < 0:
        raise MygptError(f"smooth: got {smooth}, expected 0 or more steps")


def check_out(out: Path) -> None:
    """Check that a picture may be written there: in a known format, and over nothing but a picture of mygpt.

    Raises:
        MygptError: it may not.
    """
    if out.suffix not in METADATA:
        *others, last = METADATA
        raise MygptError(f"{out}: got the ending {out.suffix!r}, expected {', '.join(others)} or {last}")
    try:
        is_ours = not out.exists() or MARK.encode() in out.read_bytes()
    except OSError as error:
        raise MygptError(f"{out}: cannot be written: {error.strerror}") from None
    if not is_ours:
        raise MygptError(f"{out}: exists, and has no mark of mygpt; choose another name, or remove it")


def new_figure(**keys: Any) -> "Figure":
    """A figure that a notebook shows, without the global state of pyplot."""
    from matplotlib.backend_bases import RendererBase
    from matplotlib.figure import Figure

    class Picture(Figure):
        @default_style()
        def draw(self, renderer: RendererBase) -> None:
            super().draw(renderer)  # which makes the texts of the ticks

        def _repr_png_(self) -> bytes:
            return _rendered(self, dpi=100)

    return Picture(**keys)


def drawable(name: str) -> str:
    """A name with escapes for what cannot be drawn: control characters, and characters that the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(
        letter
        if letter.isprintable() and font.get_char_index(ord(letter))
        else letter.encode("unicode_escape").decode()
        for letter in name
    )


def save_figure(figure: "Figure", out: Path) -> None:
    """Write a picture, whose ending chooses the format; the same figure gives the same file.

    Raises:
        MygptError: it cannot be written.
    """
    picture = _rendered(figure, format=out.suffix[1:], dpi=150, metadata=METADATA[out.suffix])
    with explain_refusal(out):
        replace_bytes(real_path(out), picture)


@default_style()
def _rendered(figure: "Figure", **keys: Any) -> bytes:
    """The bytes of a picture's file."""
    buffer = BytesIO()
    figure.savefig(buffer, **keys)
    return buffer.getvalue()


def _set_log_scale(axes: "Axes") -> None:
    """A logarithmic scale with plain numbers: losses span less than a power of ten."""
    from matplotlib.ticker import ScalarFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "ls": STROKES[index // len(COLORS) % len(STROKES)]}


def _draw_losses(axes: "Axes", curve: Curve, style: dict[str, Any]) -> None:
    _draw(axes, curve.raw, style, alpha=0.2, lw=0.8)
    is_smooth = len(curve.raw.x) > 0 or curve.seeds > 1
    _draw(axes, curve.training, style, alpha=0.8 if is_smooth else 0.4, lw=1.2 if is_smooth else 1)
    x, y, error = curve.held_out
    if curve.seeds > 1:
        _draw(axes, curve.held_out, style, marker="o", ms=3.5)
    elif len(x):
        axes.errorbar(x, y, yerr=error, marker="o", ms=3.5, capsize=2, **style)


def _draw(axes: "Axes", points: Points, style: dict[str, Any], **more: Any) -> None:
    """A line, and a band around it where there are errors."""
    if not len(points.x):
        return
    axes.plot(points.x, points.y, **style, **more)
    if points.error.any():
        low, high = points.y - points.error, points.y + points.error
        axes.fill_between(points.x, low, high, color=style["color"], alpha=0.2, lw=0)


def _draw_legend(figure: "Figure", curves: Sequence[Curve]) -> None:
    """Beside the axes: a colour for each recipe, and what the kinds of lines are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Line2D([], [], lw=2.5, **_style(index)) for index in range(len(curves))]
    names = [f"{curve.name} ({curve.seeds} seeds)" if curve.seeds > 1 else curve.name for curve in curves]
    labels = [drawable(name) for name in names]
    kinds = {
        "training": (any(len(curve.training.x) for curve in curves), Line2D([], [], color="gray", alpha=0.6, lw=1)),
        "held-out, 95% interval": (
            any(len(curve.held_out.x) and curve.seeds == 1 for curve in curves),
            Line2D([], [], color="gray", marker="o", ms=3.5),
        ),
        "deviation of seeds": (any(curve.seeds > 1 for curve in curves), Patch(color="gray", alpha=0.2, lw=0)),
    }
    for label, (is_there, handle) in kinds.items():
        if is_there:
            handles.append(handle)
            labels.append(label)
    legend = figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)


def _limits(
    curves: Sequence[Curve], y_min: float | None, y_max: float | None, *, log: bool, warn: Warn
) -> tuple[float, float]:
    """The lowest and the highest loss of a picture; `warn` gets a line on each curve that is above it.

    Raises:
        MygptError: what was given leaves no room.
    """
    bottom, top = _frame(curves, log=log)
    low, high = (bottom if y_min is None else y_min), (top if y_max is None else y_max)
    if low >= high and y_max is not None:
        raise MygptError(f"y_max: got {y_max:g}, expected more than {low:g}, where the picture begins")
    if low >= high:
        raise MygptError(f"y_min: got {y_min:g}, expected less than {high:g}, where the picture ends")
    for curve in curves:
        lowest = min([*curve.training.y, *curve.held_out.y][1:], default=bottom)  # the first is a fresh model's
        if y_max is None and lowest > top:
            warn(f"{curve.name}: its losses are above the picture, from {lowest:.3g} on; --y-max shows them")
    return low, high


def _frame(curves: Sequence[Curve], *, log: bool) -> tuple[float, float]:
    """From the lowest loss to the highest that matters."""
    lowest = [float(min([*curve.training.y, *curve.held_out.y])) for curve in curves]
    highest = [highest_that_matters(curve.training, curve.held_out) for curve in curves]
    bottom = min(lowest)
    span = statistics.median(top - bottom for top in highest)
    top = max(top for top in highest if top - bottom <= FAR * span)
    if log:
        margin = (top / bottom) ** 0.05 if top > bottom > 0 else 1.1
        return bottom / margin, top * margin
    margin = 0.05 * (top - bottom) or 0.1
    return bottom - margin, top + margin


def highest_that_matters(training: Points, held_out: Points) -> float:
    """The highest held-out loss, or training loss once a run has settled, without those of a fresh model."""
    losses, later = (np.concatenate([_from(points, share) for points in (training, held_out)]) for share in (0, 0.5))
    bottom = losses.min()
    limit = bottom + max(FAR * (np.quantile(later, 0.99) - bottom), ROOM)
    # The highest of a hundred noisy losses says more about the noise.
    tops = [*held_out.y, *([np.quantile(_from(training, SETTLED), 0.99)] if len(training.y) else [])]
    return float(min(max(tops), limit))


def _from(points: Points, share: float) -> Floats:
    """Its values from this share of a run on."""
    return points.y[points.x >= share * points.x[-1]] if len(points.x) else points.y
