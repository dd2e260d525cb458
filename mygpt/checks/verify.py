"""Training a recorded run again, to see whether it still gives the same bits."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from mygpt.checks.compare import TensorDifference, compare_files, compare_records
from mygpt.data.dataset import corpus_sha256
from mygpt.errors import CheckpointError, InterruptedRunError, MismatchError, NonFiniteError
from mygpt.processes.environment import is_main_process
from mygpt.processes.machine import has_matmul, resolve_device
from mygpt.recipe.tables import TABLE_OF_KEY, Recipe
from mygpt.runs.files import MODEL_FILE, STATE_FILE
from mygpt.runs.run import Run
from mygpt.runs.schemas import RunInfo
from mygpt.runs.steps import verify_checkpoint
from mygpt.training.train import train_until


class Verification(NamedTuple):
    """The outcome of training a run again, up to step `until`."""

    until: int
    records: int
    """Records that were compared."""
    checkpoints: int
    """Checkpoints that were compared."""
    difference: str
    """The first record that differs; "": none."""
    step: int | None
    """The step of the first checkpoint that differs."""
    tensors: list[TensorDifference]
    """The tensors that differ in that checkpoint."""
    changes: list[str]
    """Differences in versions, processor or threads, between then and now or within the run."""
    is_repeatable: bool = True
    """Whether the run used only kernels that give the same bits every time."""

    @property
    def identical(self) -> bool:
        return not (self.difference or self.tensors)


def verify(run: Path, steps: int | None = None) -> Verification:
    """Train the recorded recipe of `run`, or its first `steps` steps, in a temporary directory, and compare.

    Uses the recorded threads and `matmul`; the number of processes is the launcher's. Where the run continued with
    another recipe, so does this; a branch begins after the same checkpoint again.

    Raises:
        CheckpointError: there is no run, or nothing recorded of these steps.
        MismatchError: the corpus has changed since.
        InterruptedRunError: a signal asked to stop.
        NonFiniteError: a loss or gradient is not finite.
    """
    recorded = Run(run)
    begun_after = recorded.info.origin.after_step if recorded.info.origin else 0
    records, checkpoints = recorded.records, recorded.checkpoints
    last = max(records[-1].step, *checkpoints, begun_after)
    until = min(steps or last, last)
    checkpoints = {step: directory for step, directory in checkpoints.items() if begun_after < step <= until}
    records = [record for record in records if begun_after < record.step <= until]
    if not records and not checkpoints:
        raise CheckpointError(
            f"{run}: nothing is recorded of its steps from {begun_after + 1} to {until}; raise --steps"
        )
    for directory in checkpoints.values():
        verify_checkpoint(directory)
    parts = list(parts_of(recorded, begun_after, until))
    for part in parts:
        if corpus_sha256(part.recipe.data.corpus) != recorded.info.recorded_at(part.until)["corpus_sha256"]:
            raise MismatchError(f"{run}: was trained on another text than {part.recipe.data.corpus} is now")
    with tempfile.TemporaryDirectory(prefix="mygpt-verify-") as folder:
        again = Run(Path(folder) / "run")
        try:
            _train_parts(parts, again.path, resume=str(recorded.origin or "auto"))
        except InterruptedRunError as stopped:
            raise InterruptedRunError("stopped before anything was compared", stopped.exit_code) from None
        except NonFiniteError as error:
            raise NonFiniteError(f"running {run} again broke: {str(error).split(';')[0]}") from None
        if not is_main_process():
            return Verification(until, 0, 0, "", None, [], [])
        trained = again.checkpoints
        common = [step for step in checkpoints if step in trained]
        compared_in_order = ((step, _compare_checkpoints(checkpoints[step], trained[step])) for step in common)
        step, tensors = next(((step, tensors) for step, tensors in compared_in_order if tensors), (None, []))
        compared = compare_records(records, again.records)
        changes = _changes(recorded.info, again.info)
        counts, repeatable = (compared.steps, len(common)), recorded.info.deterministic
        return Verification(until, *counts, compared.difference, step, tensors, changes, repeatable)


class Part(NamedTuple):
    """Steps of a run that were trained with one recipe."""

    recipe: Recipe
    until: int
    """The last of them."""


def parts_of(run: Run, first: int, until: int) -> Iterator[Part]:
    """The parts of the steps from `first` + 1 to `until`, with the threads and, if possible here, `matmul` of each."""
    ends = [resumed.after_step for resumed in run.info.before(until) if resumed.after_step > first]
    newest_text = run.info.recorded_at(sys.maxsize)["corpus_sha256"]
    for end in [*ends, until]:
        recorded, recipe = run.info.recorded_at(end), run.recipe_at(end)
        # The same text may have been moved since.
        corpus = run.recipe.data.corpus if recorded["corpus_sha256"] == newest_text else recipe.data.corpus
        device = resolve_device(recipe.runtime.device, recipe.runtime.precision)
        matmul = recorded["matmul"] if has_matmul(recorded["matmul"], device) else "auto"
        yield Part(recipe.replace(threads=recorded["threads"], matmul=matmul, corpus=corpus), end)


def _train_parts(parts: list[Part], output: Path, resume: str) -> None:
    """Train all parts one after the other, without printing, into a run that keeps every checkpoint."""
    with open(os.devnull, "w") as nowhere, ExitStack() as stack:
        stack.enter_context(redirect_stdout(nowhere))
        for part in parts:
            recipe = part.recipe.replace(output=str(output), keep_last=0, resume=resume)
            train_until(recipe, part.until, allow_changes=True)
            # Later parts would warn of changes, which are the run's own.
            stack.enter_context(redirect_stderr(nowhere))
            resume = "auto"


def _compare_checkpoints(a: Path, b: Path) -> list[TensorDifference]:
    return [
        difference for name in (MODEL_FILE, STATE_FILE) for difference in compare_files(a / name, b / name).differences
    ]


def _changes(info: RunInfo, now: RunInfo) -> list[str]:
    was = info.recorded()
    changes = [f"{name} {was[name]} -> {new}" for name, new in now.recorded().items() if was.get(name, new) != new]
    return changes + [
        f"{name} {old} -> {new}, in the run itself, after step {resumed.after_step}"
        for resumed in info.resumed
        if resumed.checkpoint is None  # no step of a branch was trained with the old value
        for name, (old, new) in resumed.changed.items()
        if name not in {*TABLE_OF_KEY, "corpus_sha256"}  # the recipe and the text were repeated
    ]
