"""Running steps of a recorded run again: with which recipes, threads and products, and what has changed since."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.data.dataset import corpus_sha256
from mygpt.errors import CorpusError, InterruptedRunError, MismatchError, NonFiniteError
from mygpt.processes.environment import choose_threads, read_launched
from mygpt.processes.machine import choose_matmul, has_matmul, resolve_device
from mygpt.recipe.tables import Recipe
from mygpt.runs.run import Run
from mygpt.training.train import train_until


class Part(NamedTuple):
    """Steps of a run that were trained with one recipe."""

    recipe: Recipe
    until: int
    """The last of them."""


def parts_of(run: Run, first: int, until: int) -> Iterator[Part]:
    """The parts of the steps from `first` + 1 to `until`, with the threads and, if possible here, `matmul` of each."""
    ends = [resumed.after_step for resumed in run.info.before(until) if resumed.after_step > first]
    for end in [*ends, until]:
        yield Part(pinned_recipe(run, run.recipe_at(end), end), end)


def pinned_recipe(run: Run, recipe: Recipe, step: int) -> Recipe:
    """The recipe that trained a step, with the threads and `matmul` that were used, if it would choose others here."""
    recorded, runtime = run.info.recorded_at(step), recipe.runtime
    device = resolve_device(runtime.device, runtime.precision)
    pins: dict[str, Any] = {}
    if recorded["corpus_sha256"] == run.info.recorded_at(sys.maxsize)["corpus_sha256"]:
        pins["corpus"] = run.recipe.data.corpus  # the same text may have been moved since
    is_one = runtime.reduction == "exact" and device.type == "cpu"
    if choose_threads(runtime.threads, read_launched().local_processes, pinned=is_one) != recorded["threads"]:
        pins["threads"] = recorded["threads"]
    if not has_matmul(recorded["matmul"], device):
        pins["matmul"] = "auto"
    elif choose_matmul(runtime, device) != recorded["matmul"]:
        pins["matmul"] = recorded["matmul"]
    return recipe.replace(**pins)


def check_text(run: Run, parts: Sequence[Part]) -> None:
    """Check that the text of each part is the one that its steps were trained on.

    Raises:
        MismatchError: the text has changed since.
        CorpusError: it cannot be read.
    """
    for part in parts:
        try:
            sha256 = corpus_sha256(part.recipe.data.corpus)
        except CorpusError as error:
            raise type(error)(f"{run.path}: the text on which it was trained cannot be read: {error}") from None
        if sha256 != run.info.recorded_at(part.until)["corpus_sha256"]:
            raise MismatchError(
                f"{run.path}: was trained on another text than {part.recipe.data.corpus} is now; put the text back",
                exit_code=2,
            )


def train_parts(parts: Sequence[Part], output: Path, resume: str, *, is_quiet: bool = False) -> Iterator[int]:
    """Train the parts one after the other into the run `output`, without printing; yields the last step of each.

    The first part begins as `resume` says: "auto" continues a run that is there. Its notes are printed, unless
    `is_quiet`.
    """
    for number, part in enumerate(parts):
        recipe = part.recipe.replace(output=str(output), resume=resume)
        with open(os.devnull, "w") as nowhere, ExitStack() as stack:
            stack.enter_context(redirect_stdout(nowhere))
            if number or is_quiet:  # later parts would warn of changes, which are the run's own
                stack.enter_context(redirect_stderr(nowhere))
            train_until(recipe, part.until, allow_changes=True)
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
        raise NonFiniteError(f"running {run} again broke: {str(error).split(';')[0]}") from None


def describe_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed between two machines, as `RunInfo.recorded` describes them."""
    return [f"{name} {was[name]} -> {new}" for name, new in now.items() if was.get(name, new) != new]
