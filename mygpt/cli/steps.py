"""The commands that make any step of a run again: `mygpt at`, `fork` and `bisect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mygpt.cli.command import InputOptions, command, errors_reach_all_processes, print_json
from mygpt.cli.train import announce_threads
from mygpt.errors import MygptError, counted, print_note
from mygpt.processes.environment import is_main_process
from mygpt.recipe.flags import Positional, SeedOptions, parse_changes
from mygpt.recipe.tables import SEED_KEYS, Recipe
from mygpt.runs.run import RunDirectory, step_named

if TYPE_CHECKING:
    from mygpt.checks.compare import TensorDifference


class AtOptions(InputOptions):
    run: Annotated[Path, Positional("RUN")]
    """A run directory."""
    step: Annotated[str, Positional("STEP")]
    """Any step that the run has trained, counted from 1, or "best" or "latest", its best or newest checkpoint."""
    out: Path
    """The run directory to make; there must be nothing yet."""
    start: Path | None = None
    """The step directory to begin with, of this run or of what `mygpt at` made of it; absent: the nearest whole one."""
    from_beginning: bool = False
    """Train all steps again, though there are checkpoints."""
    check: bool = True
    """Compare what is trained again with what the run has recorded of it."""
    keep_all: bool = True
    """Keep the checkpoints before STEP, too, as the run did."""


@command
def at(options: AtOptions) -> None:
    """Make a run again as it was after any of its steps, bit for bit."""
    with errors_reach_all_processes():
        step = step_named(RunDirectory(options.run), options.step)
        announce_recorded_threads(options.run, step)
        from mygpt.checks.at import recreate

        keys = options.model_dump(include={"start", "from_beginning", "check", "keep_all"})
        made = recreate(options.run, step, options.out, options.inputs, **keys)
    if not is_main_process():
        return
    count = step - made.first
    if options.as_json:
        facts = {"run": options.run, "step": step, "out": options.out, "trained_steps": count}
        print_json({**facts, **made._asdict()})
        return
    how = f"trained {counted(count, 'step')} from step {made.first}" if count else "copied its checkpoint"
    print(f"{options.out} is {options.run} after step {step}: {how}")
    if made.records or made.checkpoints:
        same = f"{counted(made.records, 'record')}, {counted(made.checkpoints, 'checkpoint')}"
        print(f"identical to what was recorded: {same}")
    for change in made.changes:
        print(f"changed since: {change}")


class ForkOptions(SeedOptions):
    fork_of: Annotated[Path, Positional("RUN")]
    """A run directory."""
    after: Annotated[str, Positional("STEP")]
    """The step after which the fork begins; or "best" or "latest", the run's best or newest checkpoint."""


def fork(arguments: list[str]) -> None:
    """Train on from any step of a run, with other values of some keys."""
    with errors_reach_all_processes():
        recipe, options, given = parse_changes(arguments, "mygpt fork", ForkOptions, load_base)
        run, step = options.fork_of, step_named(RunDirectory(options.fork_of), options.after)
        base = load_base(options)
        if recipe.checkpoint.resume != base.checkpoint.resume:
            raise MygptError("--resume: a fork begins after a step of its run; leave it out")
        announce_recorded_threads(run, step + 1, recipe)
        from mygpt.checks.at import fork as train_fork
        from mygpt.checks.at import fork_name

        output = Path(recipe.checkpoint.output)
        if "output" not in given:
            output = run.parent / fork_name(run, step, base, recipe, given | SEED_KEYS)
        train_fork(run, step, recipe, output)


class BisectOptions(InputOptions):
    a: Annotated[Path, Positional("A")]
    """A run directory."""
    b: Annotated[Path, Positional("B")]
    """Another; or the same, with another Python."""
    python_a: str | None = None
    """The Python that trains steps of A again, of an environment that has mygpt; absent: this one."""
    python_b: str | None = None
    """The same for B."""


@command
def bisect(options: BisectOptions) -> int:
    """Find the first step, and in it the first value, at which two runs differ."""
    from mygpt.checks.bisect import bisect

    found = bisect(options.a, options.b, options.python_a, options.python_b, print_note, options.inputs)
    if options.as_json:
        difference = found.difference and found.difference._asdict()
        print_json({"identical": found.step is None, **found._asdict(), "difference": difference})
        return int(found.step is not None)
    if found.step is None:
        print(f"identical up to step {found.until}, the last that both have trained")
    elif found.step == 0:
        print(f"different from step 0: the initial weights of {found.value}{describe(found.difference)}")
    else:
        print(
            f"different: the first step that differs is step {found.step}, in {found.value}{describe(found.difference)}"
        )
    for line in found.recipes:
        print(f"recipes differ: {line}")
    for line in found.environments:
        print(f"environments differ: {line}")
    print(f"trained again: {found.reruns} times, {found.steps} steps together")
    return int(found.step is not None)


MAX_ULP = 10**6
"""From here on, a distance in units in the last place says nothing more than the absolute one."""


def describe(difference: "TensorDifference | None") -> str:
    """How many values differ, and by how much."""
    if difference is None:
        return ", which only one of them has"
    text = f": {difference.text}"
    if difference.max_abs is not None:
        text += f" values, by at most {difference.max_abs:.3e}"
    if difference.max_ulp is not None and difference.max_ulp < MAX_ULP:
        text += f" ({difference.max_ulp:,} units in the last place)"
    return text


def load_base(options: ForkOptions) -> Recipe:
    """The recipe of the run of which this is a fork, as it trained the step after that of the fork."""
    run = RunDirectory(options.fork_of)
    return run.recipe_for(step_named(run, options.after) + 1)


def announce_recorded_threads(run: Path, step: int, recipe: Recipe | None = None) -> None:
    """Set the threads that trained a step, or those of a `recipe` that has others, where torch finds them."""
    recorded = RunDirectory(run)
    base = recorded.recipe
    recipe = recipe or base
    if recipe.runtime.threads == base.runtime.threads:
        recipe = recipe.replace(threads=recorded.info.stretch_of(step).environment.threads)
    announce_threads(recipe)
