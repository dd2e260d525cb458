"""The curves of runs that a picture shows: found, read, smoothed, and put together by recipe."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mygpt.errors import CheckpointError, MygptError
from mygpt.estimates import student_quantile
from mygpt.recipe.files import METRICS_FILE, RUN_FILE
from mygpt.recipe.tables import HARMLESS_KEYS, PATH_KEYS, SEED_KEYS
from mygpt.runs.files import TIMING_FILE, real_path
from mygpt.runs.records import Record, Timing, perplexity, read_records, read_until
from mygpt.runs.run import RunDirectory

Unit = Literal["nats-per-token", "bits-per-byte", "perplexity"]
Axis = Literal["step", "tokens", "minutes"]
Warn = Callable[[str], None]
Floats = npt.NDArray[np.float64]

DEEPEST = 4
"""Folders in folders in which runs are looked for."""
IGNORED_KEYS = HARMLESS_KEYS | SEED_KEYS | {"threads", *PATH_KEYS}
"""Keys in which runs of one recipe may differ: seeds, what is shown and kept, and paths, of which the hashes count."""


class Points(NamedTuple):
    """Values of one quantity, by rising x."""

    x: Floats
    y: Floats
    error: Floats
    """To either side: of one run half the 95% interval, of several their standard deviation; 0: none."""


class Curve(NamedTuple):
    """What is drawn of a recipe, from one run or from several seeds."""

    name: str
    seeds: int
    """Runs."""
    training: Points
    raw: Points
    """The training loss before smoothing; of several runs, nothing."""
    held_out: Points
    learning_rate: Points
    grad_norm: Points


class _Loaded(NamedTuple):
    """A run as it was read."""

    path: Path
    recipe: str
    """Equal for equal recipes on equal texts."""
    seeds: tuple[int, ...]
    records: list[Record]
    x_of: Mapping[int, float]
    """By step."""


def read_curves(
    paths: Sequence[Path], unit: Unit, axis: Axis, *, smooth: int = 0, merge_seeds: bool = True, warn: Warn
) -> list[Curve]:
    """The curves of the runs at `paths`, which are run directories or folders of them, one for each recipe.

    With `smooth`, training losses are means over so many steps up to each, at most over a quarter of the steps so far.
    With `merge_seeds`, runs whose recipes differ by their seeds alone make one curve, in which each seed counts once;
    else each run makes one. A path without a run, and a run that cannot be drawn, are left out, and `warn` gets a line
    on each.

    Raises:
        CheckpointError: nothing is left.
    """
    loaded: list[_Loaded] = []
    problems: list[str] = []
    for path in _find_runs(paths, problems.append):
        try:
            loaded.append(_load(path, unit, axis, alone=not merge_seeds))
        except MygptError as error:
            problems.append(str(error))
    if not loaded:
        raise CheckpointError("\n".join(problems))
    for problem in problems:
        warn(f"{problem}; left out")
    groups: dict[str, list[_Loaded]] = {}
    for run in _one_of_each_seed(loaded, warn):
        groups.setdefault(run.recipe, []).append(run)
    for group in groups.values():
        first, last = (end(group, key=lambda run: run.records[-1].step) for end in (min, max))
        if len(group) > 1 and first.records[-1].step < last.records[-1].step:
            ends = f"{first.path} ends with step {first.records[-1].step}, and so does the mean over its seeds"
            warn(f"{ends}; --no-merge-seeds draws all steps")
    names = _names([[run.path for run in group] for group in groups.values()])
    return [_curve(name, group, unit, smooth) for name, group in zip(names, groups.values(), strict=True)]


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _one_of_each_seed(runs: Sequence[_Loaded], warn: Warn) -> list[_Loaded]:
    """The longest run of each recipe and seed: a copy of a run is no other seed."""
    of_seed: dict[tuple[str, tuple[int, ...]], list[_Loaded]] = {}
    for run in runs:
        of_seed.setdefault((run.recipe, run.seeds), []).append(run)
    longest = [max(same, key=lambda run: run.records[-1].step) for same in of_seed.values()]
    copies = [
        f"{_listed([str(run.path) for run in same if run is not kept])} of {kept.path}"
        for kept, same in zip(longest, of_seed.values(), strict=True)
        if len(same) > 1
    ]
    if copies:
        warn(f"recipe and seeds are the same: left out {', '.join(copies)}; --no-merge-seeds draws each run")
    return longest


def _find_runs(paths: Sequence[Path], warn: Warn) -> Iterator[Path]:
    """The runs at these paths and in these folders, each once."""
    seen = set()
    for path in paths:
        found = list(_runs_in(path, DEEPEST)) if path.is_dir() else []
        if not found:
            problem = "no run in it" if path.is_dir() else "no such run"
            if os.path.lexists(path.parent / RUN_FILE):
                problem = f"not a run, but in one; expected the run, {path.parent}"
            warn(f"{path}: {problem}")
        for run in found:
            if (real := real_path(run)) not in seen:
                seen.add(real)
                yield run


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if os.path.lexists(folder / RUN_FILE) or os.path.lexists(folder / METRICS_FILE):
        yield folder
    elif depth:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _runs_in(entry, depth - 1)


def _load(path: Path, unit: Unit, axis: Axis, *, alone: bool) -> _Loaded:
    """Read a run.

    Raises:
        CheckpointError: it has no records, or not what is to be drawn.
    """
    records = read_records(path)
    if unit == "bits-per-byte" and all(record.val_bits_per_byte is None for record in records):
        raise CheckpointError(f"{path}: has no held-out loss in {unit}, which takes val_every and mygpt 0.2")
    x_of: dict[int, float] = {record.step: record.tokens if axis == "tokens" else record.step for record in records}
    if axis == "minutes":
        timings = read_until(path / TIMING_FILE, Timing, records[-1].step)
        x_of = {timing.step: timing.elapsed_seconds / 60 for timing in timings}
        if not x_of:
            raise CheckpointError(f"{path}: has no {TIMING_FILE}, which says how long its steps took")
    records = [record for record in records if record.step in x_of]
    return _Loaded(path, *((str(path), ()) if alone else _recipe_of(path)), records, x_of)


def _recipe_of(path: Path) -> tuple[str, tuple[int, ...]]:
    """A text that is equal for runs whose recipes differ by their seeds alone, and these seeds."""
    try:
        info, flat = RunDirectory(path).info, RunDirectory(path).recipe.flat()
    except CheckpointError:  # its records can be drawn all the same
        return str(path), ()
    keys = {key: value for key, value in flat.items() if key not in IGNORED_KEYS}
    text = json.dumps([keys, info.corpus_sha256, info.held_out_sha256, info.init_sha256], sort_keys=True)
    return text, tuple(flat[key] for key in sorted(SEED_KEYS))


def _names(groups: Sequence[Sequence[Path]]) -> list[str]:
    """A name for each group of runs: short, or with its folders where another has the same short name."""
    named = [_name(paths, [path for group in groups if group is not paths for path in group]) for paths in groups]
    shorts = [short for short, _ in named]
    return [long if shorts.count(short) > 1 else short for short, long in named]


def _name(paths: Sequence[Path], others: Sequence[Path]) -> tuple[str, str]:
    """A short and a long name for some runs: those of the only one, or of a folder in which are all of them, and none
    of the `others`."""
    first, *more = paths
    if not more:
        return real_path(first).name, str(first)
    folder = real_path(first).parent
    has_all = all(real_path(path).parent == folder for path in more)
    if has_all and not any(folder in real_path(other).parents for other in others):
        return folder.name, str(folder)
    return f"{real_path(first).name} and other seeds", f"{first} and other seeds"


def _curve(name: str, runs: Sequence[_Loaded], unit: Unit, smooth: int) -> Curve:
    losses = [_training(run, unit) for run in runs]
    smoothed = [_smoothed(values, smooth) for values in losses] if smooth > 1 else losses
    held_out = [_held_out(run, unit) for run in runs]
    errors = [{step: error for step, (_, error) in values.items()} for values in held_out]
    values = [{step: value for step, (value, _) in values.items()} for values in held_out]
    norms = [{r.step: r.grad_norm for r in run.records if r.grad_norm is not None} for run in runs]
    return Curve(
        name,
        len(runs),
        _points(runs, smoothed),
        _points(runs, losses if smooth > 1 and len(runs) == 1 else [{}] * len(runs)),
        _points(runs, values, errors),
        _points(runs, [{r.step: r.lr for r in run.records} for run in runs]),
        _points(runs, norms),
    )


def _points(
    runs: Sequence[_Loaded], values: Sequence[Mapping[int, float]], errors: Sequence[Mapping[int, float]] | None = None
) -> Points:
    """The mean over runs at the steps that all have, with their deviation; of one run its values, with its errors."""
    steps = sorted(set.intersection(*(set(of_run) for of_run in values)))
    x = np.array([[run.x_of[step] for step in steps] for run in runs], dtype=np.float64).mean(0)
    y = np.array([[of_run[step] for step in steps] for of_run in values], dtype=np.float64)
    error = np.zeros(len(steps))
    if len(runs) > 1:
        error = y.std(0, ddof=1)
    elif errors:
        error = np.array([errors[0][step] for step in steps], dtype=np.float64)
    return Points(x, y.mean(0), error)


def _training(run: _Loaded, unit: Unit) -> dict[int, float]:
    if unit == "bits-per-byte":
        return {}  # bytes of training batches are not counted
    losses = {record.step: record.loss for record in run.records}
    if unit == "nats-per-token":
        return losses
    return {step: value for step, loss in losses.items() if math.isfinite(value := perplexity(loss))}


def _smoothed(losses: Mapping[int, float], steps: int) -> dict[int, float]:
    """The mean of the losses of the last `steps` steps up to each, at most of the last quarter of the steps so far."""
    at, values = np.array(list(losses)), np.array(list(losses.values()))
    before = np.concatenate([[0.0], np.cumsum(values)])
    # The losses of a fresh model, far above all that follow, would stay in the mean for as many steps.
    first = np.searchsorted(at, np.maximum(at - steps, at * 3 // 4), side="right")
    last = np.arange(1, len(at) + 1)
    return dict(zip(losses, ((before[last] - before[first]) / (last - first)).tolist(), strict=True))


def _held_out(run: _Loaded, unit: Unit) -> dict[int, tuple[float, float]]:
    """By step the held-out loss, and half its 95% interval; 0 where that is not known."""
    found = {}
    for record in run.records:
        value, stderr = record.val, record.val_stderr
        if unit == "bits-per-byte":
            value, stderr = record.val_bits_per_byte, record.val_bits_per_byte_stderr
        elif unit == "perplexity" and value is not None:
            # The error of a function is its slope times that of its argument, where both are small.
            value = perplexity(value)
            stderr = stderr and stderr * value
        if value is not None and math.isfinite(value):
            margin = student_quantile(record.val_dof or math.inf) * stderr if stderr else 0.0
            found[record.step] = value, margin
    return found
