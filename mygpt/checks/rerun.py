"""Running steps of a recorded run again: with which recipes, threads and products, and what has changed since."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.data.dataset import corpus_sha256
from mygpt.errors import CheckpointError, CorpusError, InterruptedRunError, MismatchError, NonFiniteError
from mygpt.processes.environment import choose_threads, read_launched
from mygpt.processes.machine import choose_matmul, has_matmul, resolve_device
from mygpt.recipe.tables import NAMED_CORPORA, Recipe
from mygpt.runs.files import COPY_NAME, file_sha256, real_path
from mygpt.runs.initial import find_initial
from mygpt.runs.run import Run, find_model_file
from mygpt.runs.schemas import HASH_OF_PATH
from mygpt.training.train import train_until


class Part(NamedTuple):
    """Steps of a run that were trained with one recipe."""

    recipe: Recipe
    until: int
    """The last of them."""


Inputs = Mapping[str, str]
"""The paths of texts and of a model that runs have read, and that have been moved since, by their recorded hashes."""


def find_inputs(runs: Sequence[Run], given: Mapping[str, str]) -> Inputs:
    """What a user has given in place of what runs have read, by the key that named it.

    Raises:
        MismatchError: it is something else than one of the runs has recorded.
        CorpusError, CheckpointError: it cannot be read.
    """
    inputs = {}
    for key, path in given.items():
        found, flag = input_sha256(key, path), f"--{key.replace('_', '-')}"
        if not any(found in recorded_hashes(run, key) for run in runs):
            wanted = {str(sha256)[:12] for run in runs for sha256 in recorded_hashes(run, key)}
            names = " and ".join(str(run.path) for run in runs)
            problem = f"{path} has the sha256 {found[:12]}, expected {' or '.join(sorted(wanted))}, which {names} read"
            raise MismatchError(f"{flag}: {problem if wanted else f'{names} read no {key}; leave it out'}")
        inputs[found] = path if path in NAMED_CORPORA else os.path.realpath(path)
    return inputs


def input_sha256(key: str, path: str) -> str:
    """The hash of what a key names, as run.json records it."""
    return file_sha256(find_model_file(Path(path))) if key == "init_from" else corpus_sha256(path)


def recorded_hashes(run: Run, key: str) -> set[str]:
    """The hashes of all that this key of the run has named."""
    steps = (*(resumed.after_step for resumed in run.info.history), sys.maxsize)
    return {run.info.recorded_at(step)[HASH_OF_PATH[key]] for step in steps} - {None}


def parts_of(run: Run, first: int, until: int, inputs: Mapping[str, str] = {}) -> Iterator[Part]:
    """The parts of the steps from `first` + 1 to `until`, with the threads and, if possible here, `matmul` of each."""
    ends = [resumed.after_step for resumed in run.info.before(until) if resumed.after_step > first]
    for end in [*ends, until]:
        yield Part(pinned_recipe(run, run.recipe_at(end), end, inputs), end)


def pinned_recipe(run: Run, recipe: Recipe, step: int, inputs: Mapping[str, str] = {}) -> Recipe:
    """The recipe that trained a step, with the threads and `matmul` that were used, if it would choose others here, and
    with the `inputs` that this step has read."""
    recorded, runtime = run.info.recorded_at(step), recipe.runtime
    device = resolve_device(runtime.device, runtime.precision)
    pins: dict[str, Any] = {}
    now = run.info.recorded_at(sys.maxsize)
    for key, name in HASH_OF_PATH.items():
        if recorded[name] == now[name]:
            pins[key] = run.recipe.flat()[key]  # it may have been moved since
    if (init_from := recipe.train.init_from) and not os.path.lexists(init_from):
        copy = real_path(run.path).parents[1] / os.path.basename(init_from)  # that of a study, which has been moved
        pins |= {"init_from": str(copy)} if COPY_NAME.fullmatch(copy.name) and copy.exists() else {}
    pins |= {key: inputs[recorded[name]] for key, name in HASH_OF_PATH.items() if recorded[name] in inputs}
    is_one = runtime.reduction == "exact" and device.type == "cpu"
    if choose_threads(runtime.threads, read_launched().local_processes, pinned=is_one) != recorded["threads"]:
        pins["threads"] = recorded["threads"]
    if not has_matmul(recorded["matmul"], device):
        pins["matmul"] = "auto"
    elif choose_matmul(runtime, device) != recorded["matmul"]:
        pins["matmul"] = recorded["matmul"]
    return recipe.replace(**pins)


def check_inputs(run: Run, parts: Sequence[Part], *, from_beginning: bool = False) -> None:
    """Check that the texts of each part are those of its steps, and `from_beginning` the initial weights, too.

    Raises:
        MismatchError: one has changed since.
        CorpusError, CheckpointError: it cannot be read.
    """
    for number, part in enumerate(parts):
        data, recorded = part.recipe.data, run.info.recorded_at(part.until)
        for path, name, use in (
            (data.corpus, "corpus_sha256", "was trained on"),
            (data.val_corpus, "held_out_sha256", "held out"),
        ):
            flag = "--corpus" if name == "corpus_sha256" else "--val-corpus"
            way_on = f"say with {flag} where it is now (sha256 {str(recorded[name])[:12]})"
            try:
                sha256 = corpus_sha256(path) if path else None
            except CorpusError as error:
                text = "the text on which it was trained" if path == data.corpus else "the text that it held out"
                raise type(error)(f"{run.path}: {text} cannot be read: {error}; {way_on}") from None
            if sha256 != recorded[name]:
                problem = f"{use} another text than {path} is now"
                raise MismatchError(f"{run.path}: {problem}; put the text back, or {way_on}")
        try:
            initial = find_initial(part.recipe, continues=False) if from_beginning and not number else None
        except CheckpointError as error:
            weights = f"the weights that it began with (sha256 {str(recorded['init_sha256'])[:12]})"
            where = "say with --init-from where they are now"
            raise CheckpointError(
                f"{run.path}: {weights} cannot be read, and step 1 needs them: {error}; {where}"
            ) from None
        if initial and initial.sha256 != recorded["init_sha256"]:
            raise MismatchError(f"{initial.file}: has changed since {run.path} began with its weights; put it back")


def train_parts(
    parts: Sequence[Part],
    output: Path,
    resume: str,
    *,
    is_quiet: bool = False,
    saved: Callable[[Path], None] = lambda _: None,
) -> Iterator[int]:
    """Train the parts one after the other into the run `output`; yields the last step of each.

    The first part begins as `resume` says: "auto" continues a run that is there. Nothing is printed but progress and,
    unless `is_quiet`, the notes of the first part. `saved` is given each checkpoint; see `Saver`.
    """
    talk = sys.stderr
    for number, part in enumerate(parts):
        recipe = part.recipe.replace(output=str(output), resume=resume)
        with open(os.devnull, "w") as nowhere, ExitStack() as stack:
            stack.enter_context(redirect_stdout(nowhere))
            if number or is_quiet:  # later parts would warn of changes, which are the run's own
                stack.enter_context(redirect_stderr(nowhere))
            train_until(recipe, part.until, allow_changes=True, talk=talk, saved=saved)
        yield part.until
        resume = "auto"


@contextmanager
def explain_rerun(run: Path, when_stopped: str) -> Iterator[None]:
    """Say of a signal, or a value that is not finite, that it came while `run` was run again."""
    try:
        yield
    except InterruptedRunError as stopped:
        raise InterruptedRunError(when_stopped, stopped.exit_code) from None
    except NonFiniteError as error:
        raise NonFiniteError(f"running {run} again failed: {str(error).split(';')[0]}") from None


def describe_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed between two machines, as `RunInfo.recorded` describes them."""
    return [f"{name} {was[name]} -> {new}" for name, new in now.items() if was.get(name, new) != new]
