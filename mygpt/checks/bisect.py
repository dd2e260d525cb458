"""The first step, and in it the first value, at which two runs differ, or one run in two environments."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mygpt.checks.compare import TensorDifference, compare_files, compare_steps
from mygpt.checks.rerun import find_inputs, input_sha256, last_step
from mygpt.checks.trace import BEFORE, Trace
from mygpt.errors import CheckpointError, DamagedCheckpointError, InterruptedRunError, LaunchError, MygptError
from mygpt.processes.environment import no_launcher, read_launched
from mygpt.processes.signals import stop_on_signal
from mygpt.recipe.tables import HARMLESS_KEYS, PATH_KEYS
from mygpt.runs.files import real_path, remove
from mygpt.runs.run import RunDirectory
from mygpt.runs.schemas import read_table
from mygpt.runs.steps import read_manifest, step_directory, verify_checkpoint

Note = Callable[[str], None]


class Bisection(NamedTuple):
    """Where two runs differ first."""

    step: int | None
    """The first step after which they differ; 0: they begin with other weights; None: they are identical."""
    until: int
    """The last step that both have trained."""
    value: str
    """The name of the first value in that step that differs; "": they are identical."""
    difference: TensorDifference | None
    """By how much; None: one of the two does not compute this value."""
    recipes: list[str]
    """The keys and texts in which the recipes of that step differ; of step `until`, if the runs are identical."""
    environments: list[str]
    """How the versions, processors and settings that computed the step differ."""
    reruns: int
    """How often a run was trained again."""
    steps: int
    """How many steps these reruns trained together."""


@dataclass
class Side:
    """One of the two runs, and where the states after its steps are at hand."""

    name: str
    """Its name on the command line: a or b."""
    run: RunDirectory
    python: str | None
    """The Python that trains its steps again; None: this one."""
    folder: Path
    """The folder for states that are made again."""
    is_recorded: bool
    """Whether the run's own checkpoints and records are used: not if both sides are the same run."""
    origin_step: int
    """The step after which the run begins: 0, unless it is a branch."""
    last: int
    """The last step that it has trained."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Where texts and models are now that the run has read, by the key that named them."""
    made: dict[int, Path] = field(default_factory=dict)
    """Step directories that have been made again, by step."""
    reruns: int = 0
    steps: int = 0
    """How often, and how many, steps have been trained again."""


def bisect(
    a: Path,
    b: Path,
    python_a: str | None = None,
    python_b: str | None = None,
    note: Note = lambda _: None,
    inputs: Mapping[str, str] = {},
) -> Bisection:
    """Find the first step at which two runs differ, and the first value in it.

    Checkpoints and records narrow the search; then states are made again at steps that halve what is left, by the
    Python of each side. If `a` and `b` are the same run, each side is trained from its beginning. `note` gets a line
    for each step at which states are compared. `inputs` are the paths of moved texts and models; see `find_inputs`.

    Raises:
        CheckpointError: there is no such run, or they have no step in common.
        LaunchError: a launcher has started this.
        MygptError: a Python cannot be run, or a run cannot be repeated with it.
        InterruptedRunError: a signal asked to stop.
    """
    for name, python in (("a", python_a), ("b", python_b)):
        if python == "":
            raise MygptError(f"--python-{name}: got nothing, expected the path of a Python")
    if read_launched().processes > 1:
        raise LaunchError("bisect trains on one process at a time; start it without a launcher")
    is_same_run = real_path(a) == real_path(b)
    if is_same_run and python_a == python_b:
        raise CheckpointError(f"{a} and {b} are the same run; give the Python of another environment with --python-b")
    try:
        with stop_on_signal(), tempfile.TemporaryDirectory(prefix="mygpt-bisect-") as folder:
            sides = (
                open_side("a", a, python_a, Path(folder), is_recorded=not is_same_run),
                open_side("b", b, python_b, Path(folder), is_recorded=not is_same_run),
            )
            find_inputs([side.run for side in sides], inputs)
            for side in sides:
                hashes = side.run.info.inputs
                side.inputs = {key: path for key, path in inputs.items() if input_sha256(key, path) == hashes[key]}
            return search(*sides, note)
    except SystemExit as stopped:  # by a signal, which also ends the process that makes a step again
        message = "stopped before the first difference was found; the runs are as they were"
        raise InterruptedRunError(message, stopped.code) from None  # type: ignore[arg-type]


def open_side(name: str, path: Path, python: str | None, folder: Path, *, is_recorded: bool) -> Side:
    run = RunDirectory(path)
    last = last_step(run)
    processes = run.info.stretch_of(last).environment.processes
    if processes > 1 and run.recipe.runtime.reduction == "fast":
        raise LaunchError(
            f"{path}: was trained by {processes} processes with fast sums, whose last bits one process "
            'does not repeat; bisect runs with reduction = "exact", or of one process'
        )
    return Side(name, run, python, folder, is_recorded, run.info.origin_step, last)


def search(a: Side, b: Side, note: Note) -> Bisection:
    """Narrow the first differing step down until it is known; then look into it."""
    first, last = max(a.origin_step, b.origin_step), min(a.last, b.last)
    if first >= last:
        raise CheckpointError(f"{a.run.path} and {b.run.path} have no step in common")
    # After `low` they are known to be the same, and after `high` to differ.
    low, high, likely = recorded_bounds(a, b, first, last) if a.is_recorded else (first, None, None)
    note(f"recorded: the same up to step {low}" + (f", different at step {high}" if high else ""))
    if low == first and first and not is_same_state(*states(a, b, first)):
        return describe_state(a, b, first, last)  # before the steps that both have
    if low == last:
        return outcome(a, b, None, last)

    def is_same(step: int) -> bool:
        for side in (a, b):
            forget(side, low, high)
        same = is_same_state(*states(a, b, step))
        note(f"step {step}: {'the same' if same else 'different'}")
        return same

    looked_into = None
    if likely and is_same(likely):
        low = likely
    else:
        high = likely or high
        looked_into = low + 1  # one step costs little, and most differences show at once
        if found := look_into(a, b, looked_into, last):
            return found
    width = 2
    while high is None:
        if low == last:
            return outcome(a, b, None, last)
        probe = min(low + width, last)
        if is_same(probe):
            low, width = probe, 2 * width
        else:
            high = probe
    while high - low > 1:
        middle = (low + high) // 2
        if is_same(middle):
            low = middle
        else:
            high = middle
    if high != looked_into and (found := look_into(a, b, high, last)):
        return found
    # The step computes the same values. An evaluation after it may have drawn others; or what is recorded of it cannot
    # be repeated here, which making it again finds out.
    for side in (a, b):
        if high not in side.made:
            make_again(side, high)
    return describe_state(a, b, high, last)


def outcome(
    a: Side,
    b: Side,
    step: int | None,
    until: int,
    value: str = "",
    difference: TensorDifference | None = None,
    environments: Sequence[str] = (),
) -> Bisection:
    """The fields of a `Bisection`, with those that follow from the two sides."""
    recipes = recipe_differences(a, b, until if step is None else step)
    reruns, steps = a.reruns + b.reruns, a.steps + b.steps
    return Bisection(step, until, value, difference, recipes, [*environments], reruns, steps)


def recorded_bounds(a: Side, b: Side, first: int, last: int) -> tuple[int, int | None, int | None]:
    """What the checkpoints and records of both runs say of the first step at which they differ: low, high, likely.

    low: the last step of which both have equal checkpoints, or after which both begin.
    high: the first step at which checkpoints or records differ; None: there is none. Since few steps are recorded, the
    difference may be earlier.
    likely: a step after `low` after which the runs are probably still the same, since equal losses were computed from
    it; None: there is none.
    """
    low, high = first, None
    for step in sorted(a.run.checkpoints.keys() & b.run.checkpoints.keys()):
        if first < step <= last and all(is_whole(side.run.checkpoints[step]) for side in (a, b)):
            if not is_same_state(a.run.checkpoints[step], b.run.checkpoints[step]):
                high = step
                break
            low = step
    others, likely = {record.step: record for record in b.run.records}, None
    for record in a.run.records:
        if (other := others.get(record.step)) and low < record.step < (high or last + 1):
            pairs = ((record.loss, other.loss), (record.lr, other.lr), (record.grad_norm, other.grad_norm))
            if any(x != y and None not in (x, y) for x, y in pairs):
                high = record.step  # the loss of a step is computed before its update: after it they differ
                break
            likely = record.step - 1
    if likely is not None and high is None:
        likely = last
    return low, high, likely if likely and likely > low else None


def states(a: Side, b: Side, step: int) -> tuple[Path, Path]:
    """The step directories of both runs after a step, made again where they are not at hand."""
    return state_after(a, step), state_after(b, step)


def state_after(side: Side, step: int) -> Path:
    """The step directory after a step, recorded or made again."""
    return known_state(side, step) or make_again(side, step)


def make_again(side: Side, step: int) -> Path:
    """Have `mygpt at` make a step again, from the nearest state that is at hand."""
    start, out = nearest_state(side, step), side.folder / f"{side.name}-{step}"
    arguments = ["at", str(side.run.path), str(step), "--out", str(out), "--no-keep-all"]
    arguments += ["--start", str(start)] if start else ["--from-beginning"]
    if not side.is_recorded:
        arguments.append("--no-check")
    for key, path in side.inputs.items():
        arguments += [f"--{key.replace('_', '-')}", path]
    call(side, "mygpt", arguments, makes=out)
    side.reruns += 1
    side.steps += step - (read_manifest(start).step if start else side.origin_step)
    side.made[step] = step_directory(out, step)
    return side.made[step]


def forget(side: Side, low: int, high: int | None) -> None:
    """Remove the states that were made again of steps outside the bounds: they fill the disk, and are of no use."""
    for step in [step for step in side.made if not low <= step <= (high or step)]:
        remove(side.made.pop(step).parent)


def known_state(side: Side, step: int) -> Path | None:
    """The step directory after a step, if it is at hand; also the one after which a branch begins."""
    if step in side.made:
        return side.made[step]
    if step == side.origin_step:
        return side.run.origin
    recorded = side.run.checkpoints.get(step) if side.is_recorded else None
    return recorded if recorded and is_whole(recorded) else None


def nearest_state(side: Side, step: int) -> Path | None:
    """The newest step directory before a step that is at hand; None: the run's beginning is nearer."""
    for other in range(step - 1, side.origin_step, -1):
        if known := known_state(side, other):
            return known
    return None


def is_whole(directory: Path) -> bool:
    try:
        verify_checkpoint(directory)
    except DamagedCheckpointError:
        return False
    return True


def is_same_state(a: Path, b: Path) -> bool:
    """Whether the tensors of two step directories are the same."""
    return not state_differences(a, b)


def state_differences(a: Path, b: Path) -> list[TensorDifference]:
    """The tensors of two step directories that differ.

    A generator that only one of them has does not count: runs on several processes, and those with exact sums, keep
    others.
    """
    return [
        difference
        for difference in compare_steps(a, b)
        if not (difference.name.startswith("generator.") and difference.text.startswith("only in"))
    ]


def look_into(a: Side, b: Side, step: int, last: int) -> Bisection | None:
    """Compute one step of both runs, and find the first value that differs; None: all values are the same.

    The runs have the same state before this step.
    """
    traces = [trace(side, step) for side in (a, b)]
    values_a, values_b = (dict(traced.values) for traced in traces)
    pairs = zip(*(traced.values for traced in traces), strict=False)
    names = next(((value[0], other[0]) for value, other in pairs if value != other), None)
    if names is None:
        return None
    # Where one computes more than the other, that is what differs.
    name = next((name for name in names if (name in values_a) != (name in values_b)), names[0])
    difference = None
    if name in values_a and name in values_b:
        for side in (a, b):
            trace(side, step, name)
        kept_a, kept_b = (trace_file(side, step).with_suffix(".json.safetensors") for side in (a, b))
        difference = next(iter(compare_files(kept_a, kept_b).differences), None)
    environments = differences_between(*(traced.environment for traced in traces))
    found = step
    if name.endswith(BEFORE):
        name, found = name.removesuffix(BEFORE), step - 1
    else:
        for side, traced in zip((a, b), traces, strict=True):
            check_loss(side, step, traced)
    return outcome(a, b, found, last, name, difference, environments)


def describe_state(a: Side, b: Side, step: int, last: int) -> Bisection:
    """The first tensor that differs after a step, in the order of their names."""
    difference = next(iter(state_differences(*states(a, b, step))), None)
    if difference is None:
        raise MygptError(f"the records of step {step} differ, and what is computed here does not", exit_code=1)
    return outcome(a, b, step, last, difference.name, difference)


def trace(side: Side, step: int, name: str = "") -> Trace:
    """Compute one step of a run with its Python; with a name, the value of this name is kept in a file."""
    before = state_after(side, step - 1) if step - 1 > side.origin_step else side.run.origin
    arguments = [str(side.run.path), str(step), str(before or ""), name, str(trace_file(side, step))]
    arguments += [f"{key}={path}" for key, path in side.inputs.items()]
    call(side, "mygpt.checks.trace", arguments, makes=trace_file(side, step))
    return read_table(Trace, trace_file(side, step))


def trace_file(side: Side, step: int) -> Path:
    return side.folder / f"trace-{side.name}-{step}.json"


def check_loss(side: Side, step: int, traced: Trace) -> None:
    """Compare the loss of a step that was computed here with the recorded one.

    Raises:
        MygptError: they differ.
    """
    recorded = next((record for record in side.run.records if record.step == step), None)
    environment = side.run.info.stretch_of(step).environment
    if side.is_recorded and recorded and not environment.compile and recorded.loss != traced.loss:
        was = environment.values()
        changes = ", ".join(
            f"{name} {was[name]} -> {now}" for name, now in traced.environment.items() if was.get(name, now) != now
        )
        since = f"changed since: {changes}" if changes else "nothing that run.json records has changed since"
        problem = f"the loss of step {step} was {recorded.loss}, and is {traced.loss} here; {since}"
        raise MygptError(f"{side.run.path} cannot be repeated here: {problem}; {advice(side)}", exit_code=1)


def advice(side: Side) -> str:
    return f"give the Python of the environment that trained it with --python-{side.name}"


def call(side: Side, module: str, arguments: list[str], *, makes: Path) -> None:
    """Run a module of mygpt in a new process, with the Python of this side; `makes` is the path that it writes.

    Raises:
        MygptError: it fails; with its message.
    """
    with no_launcher():
        environment = dict(os.environ)
    if side.python is None:  # the same mygpt as this, even if it is not installed
        paths = [str(Path(__file__).parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    # Not the mygpt of a checkout in which the command is given, but the one of that Python.
    command = [side.python or sys.executable, "-P", "-m", module, *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise MygptError(f"--python-{side.name}: {side.python}: cannot be run: {error.strerror}") from None
    if not done.returncode:
        if not makes.exists():
            raise MygptError(f"--python-{side.name}: {side.python}: expected a Python; it does not run mygpt")
        return
    lines = done.stderr.splitlines() or [f"--python-{side.name}: ended with {done.returncode}, without a message"]
    problem = next((line.removeprefix("mygpt: ") for line in lines if line.startswith("mygpt: ")), lines[-1])
    with_python = f" (from {side.python})" if side.python else ""
    hint = f"; {advice(side)}" if done.returncode == 1 and side.is_recorded else ""
    raise MygptError(f"{problem}{hint}{with_python}", exit_code=2 if done.returncode == 2 else 1)


def recipe_differences(a: Side, b: Side, step: int) -> list[str]:
    """The keys in which the recipes that trained a step differ, with their values, and whether the texts do."""
    recipes = ({k: v for k, v in side.run.recipe_for(step).flat().items() if k not in PATH_KEYS} for side in (a, b))
    lines = [line for line in differences_between(*recipes) if line.split()[0] not in HARMLESS_KEYS]
    was, now = (side.run.info.inputs for side in (a, b))
    return lines + [f"{key}: another one" for key, sha256 in was.items() if sha256 != now[key]]


def differences_between(a: dict[str, object], b: dict[str, object]) -> list[str]:
    return [f"{name} {a.get(name)} against {b.get(name)}" for name in {**a, **b} if a.get(name) != b.get(name)]
