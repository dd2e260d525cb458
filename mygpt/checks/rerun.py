"""Running steps of a recorded run again: with which ends, threads and products, and what has changed since."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.data.dataset import corpus_sha256
from mygpt.errors import CheckpointError, CorpusError, InterruptedRunError, MismatchError, NonFiniteError
from mygpt.processes.environment import choose_threads, read_launched
from mygpt.processes.machine import choose_matmul, has_matmul, resolve_device
from mygpt.recipe.tables import NAMED_CORPORA, Recipe
from mygpt.runs.files import file_sha256
from mygpt.runs.initial import find_initial
from mygpt.runs.run import RunDirectory, find_model_file
from mygpt.training.train import train


class Segment(NamedTuple):
    """Steps of a run that are trained again with one recipe."""

    recipe: Recipe
    until: int
    """The last of these steps, of which a checkpoint is saved."""


Inputs = Mapping[str, str]
"""The paths of texts and of a model that runs have read, and that have been moved since, by their recorded hashes."""


def find_inputs(runs: Sequence[RunDirectory], given: Mapping[str, str]) -> Inputs:
    """What a user has given in place of what runs have read, by the key that named it.

    Raises:
        MismatchError: it is something else than one of the runs has recorded.
        CorpusError, CheckpointError: it cannot be read.
    """
    inputs = {}
    for key, path in given.items():
        found, flag = input_sha256(key, path), f"--{key.replace('_', '-')}"
        wanted = {sha256 for run in runs if (sha256 := run.info.inputs[key])}
        if found not in wanted:
            names = " and ".join(str(run.path) for run in runs)
            expected = " or ".join(sorted(sha256[:12] for sha256 in wanted))
            problem = f"{path} has the sha256 {found[:12]}, expected {expected}, which {names} read"
            raise MismatchError(f"{flag}: {problem if wanted else f'{names} read no {key}; leave it out'}")
        inputs[found] = path if path in NAMED_CORPORA else os.path.realpath(path)
    return inputs


def input_sha256(key: str, path: str) -> str:
    """The hash of what a key names, as run.json records it."""
    return file_sha256(find_model_file(Path(path))) if key == "init_from" else corpus_sha256(path)


def last_step(run: RunDirectory) -> int:
    """The last step that a run has trained, by its records and checkpoints."""
    return max(run.info.origin_step, run.records[-1].step, *run.checkpoints)  # the first raises if there is no run


def segments_of(
    run: RunDirectory, first: int, until: int, inputs: Mapping[str, str] = {}, saving: Iterable[int] = ()
) -> list[Segment]:
    """The steps from `first` + 1 to `until`, stretch by stretch; a segment also ends with each step of `saving`."""
    ends = {stretch.after_step for stretch in run.info.stretches_until(until) if stretch.after_step > first}
    return [Segment(pinned_recipe(run, end, inputs), end) for end in sorted({*ends, *saving, until})]


def pinned_recipe(run: RunDirectory, step: int, inputs: Mapping[str, str] = {}) -> Recipe:
    """The recipe that trains a step again: with the end that was in view, with the recorded settings that would be
    chosen otherwise here, as far as this machine has them, and with the `inputs` that the run has read."""
    stretch, recipe = run.info.stretch_of(step), run.recipe_for(step)
    recorded, launched = stretch.environment, read_launched()
    pins: dict[str, Any] = {"compile": recorded.compile, "deterministic": recorded.deterministic}
    if resolve_device(recipe.runtime.device, recipe.runtime.precision).type != recorded.device:
        pins["device"] = "cpu" if recorded.device == "cpu" else "auto"
    is_exact = recipe.runtime.reduction == "exact"
    if is_exact or recorded.processes == launched.processes:
        pins["micro_batch_size"] = recorded.micro_batch_size
    runtime = recipe.replace(**pins).runtime
    device = resolve_device(runtime.device, runtime.precision)
    pinned = is_exact and device.type == "cpu"
    if choose_threads(runtime.threads, launched.local_processes, pinned=pinned) != recorded.threads:
        pins["threads"] = recorded.threads
    if not has_matmul(recorded.matmul, device):
        pins["matmul"] = "auto"
    elif choose_matmul(runtime, device) != recorded.matmul:
        pins["matmul"] = recorded.matmul
    return recipe.replace(**pins, **moved_inputs(run, inputs))


def moved_inputs(run: RunDirectory, inputs: Inputs) -> dict[str, str]:
    """Where the `inputs` are now that the run has read, by key."""
    return {key: inputs[sha256] for key, sha256 in run.info.inputs.items() if sha256 and sha256 in inputs}


def check_inputs(run: RunDirectory, recipe: Recipe, *, from_beginning: bool = False) -> None:
    """Check that the texts of a recipe are those that the run has read, and `from_beginning` the initial weights, too.

    Raises:
        MismatchError: one has changed since.
        CorpusError, CheckpointError: it cannot be read.
    """
    for key, use in (("corpus", "was trained on"), ("val_corpus", "held out")):
        path, recorded = recipe.flat()[key], run.info.inputs[key]
        way_on = f"say with --{key.replace('_', '-')} where it is now (sha256 {str(recorded)[:12]})"
        try:
            sha256 = corpus_sha256(path) if path else None
        except CorpusError as error:
            text = "the text on which it was trained" if key == "corpus" else "the text that it held out"
            raise type(error)(f"{run.path}: {text} cannot be read: {error}; {way_on}") from None
        if sha256 != recorded:
            problem = f"{use} another text than {path} is now"
            raise MismatchError(f"{run.path}: {problem}; put the text back, or {way_on}")
    if not from_beginning:
        return
    try:
        initial = find_initial(recipe, continues=False)
    except CheckpointError as error:
        weights = f"the weights that it began with (sha256 {str(run.info.init_sha256)[:12]})"
        where = "say with --init-from where they are now"
        raise CheckpointError(
            f"{run.path}: {weights} cannot be read, and step 1 needs them: {error}; {where}"
        ) from None
    if initial and initial.sha256 != run.info.init_sha256:
        raise MismatchError(f"{initial.file}: has changed since {run.path} began with its weights; put it back")


def train_segments(
    segments: Sequence[Segment],
    output: Path,
    resume: str,
    *,
    is_quiet: bool = False,
    saved: Callable[[Path], None] = lambda _: None,
) -> Iterator[int]:
    """Train the segments one after the other into the run `output`; yields the last step of each.

    The first segment begins as `resume` says: "auto" continues a run that is there. Nothing is printed but progress
    and, unless `is_quiet`, the notes of the first segment. `saved` is given each checkpoint; see `Saver`.
    """
    progress_file = sys.stderr
    for number, segment in enumerate(segments):
        recipe = segment.recipe.replace(output=str(output), resume=resume)
        with open(os.devnull, "w") as nowhere, ExitStack() as stack:
            stack.enter_context(redirect_stdout(nowhere))
            if number or is_quiet:  # later segments would warn of changes, which are the run's own
                stack.enter_context(redirect_stderr(nowhere))
            train(recipe, last_step=segment.until, progress_file=progress_file, saved=saved)
        yield segment.until
        resume = "auto"


@contextmanager
def explain_rerun(run: Path, when_stopped: str) -> Iterator[None]:
    """Name `run` in the error of a signal or of a value that is not finite."""
    try:
        yield
    except InterruptedRunError as stopped:
        raise InterruptedRunError(when_stopped, stopped.exit_code) from None
    except NonFiniteError as error:
        raise NonFiniteError(f"running {run} again failed: {str(error).split(';')[0]}") from None


def environment_changes(run: RunDirectory, again: RunDirectory, step: int) -> list[str]:
    """How the environment in which a step was made `again` differs from the recorded one; the commit, too."""
    was, now = (each.info.stretch_of(step).environment for each in (run, again))
    commits = {} if was.git_commit == now.git_commit else {"git_commit": (was.git_commit, now.git_commit)}
    return [f"{name} {old} -> {new}" for name, (old, new) in (was.changes(now) | commits).items()]
