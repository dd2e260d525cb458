"""Running a recorded run again, to see whether it still gives the same bits."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from mygpt.compare import Difference, compare_files, first_difference
from mygpt.corpus import load_corpus
from mygpt.errors import CheckpointError, InterruptedRunError, MismatchError
from mygpt.loop import train
from mygpt.metrics import read_records
from mygpt.recipe import Recipe
from mygpt.resume import changed_environment, recorded_recipe
from mygpt.rundir import MODEL_FILE, STATE_FILE, read_run, step_directories, verify_checkpoint


class Verification(NamedTuple):
    """What running again has shown, up to step `until`."""

    until: int
    records: int
    """Records that were compared."""
    checkpoints: int
    """Checkpoints that were compared."""
    record: str
    """The first record that differs; "": none."""
    step: int | None
    """The step of the first checkpoint that differs."""
    tensors: list[Difference]
    """What differs in that checkpoint."""
    changes: list[str]
    """What is different in versions, processor or threads since the run was made."""

    @property
    def identical(self) -> bool:
        return not (self.record or self.tensors)


def verify(run: Path, steps: int | None = None) -> Verification:
    """Run the recorded recipe of `run`, or its first `steps` steps, in a temporary directory, and compare.

    With the recorded number of threads; the number of processes is the launcher's.

    Raises:
        CheckpointError: there is no run, or nothing recorded of these steps.
        MismatchError: the corpus is not the one that it was trained on.
        InterruptedRunError: a signal asked to stop.
    """
    recipe, info = recorded_recipe(run), read_run(run)
    if load_corpus(recipe.data.corpus).sha256 != info.corpus_sha256:
        raise MismatchError(f"{run}: was trained on another text than {recipe.data.corpus} is now")
    checkpoints = {verify_checkpoint(directory).step: directory for directory in step_directories(run)}
    records = read_records(run)
    last = max(records[-1].step, *checkpoints) if checkpoints else records[-1].step
    until = min(steps or last, last)
    checkpoints = {step: directory for step, directory in checkpoints.items() if step <= until}
    records = [record for record in records if record.step <= until]
    if not records and not checkpoints:
        raise CheckpointError(f"{run}: nothing is recorded of its first {until} steps; raise --steps")
    with tempfile.TemporaryDirectory(prefix="mygpt-verify-") as folder:
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                again = train(_again(recipe, Path(folder) / "run", info.threads), until=until)
        except InterruptedRunError as stopped:
            raise InterruptedRunError("stopped before anything was compared", stopped.exit_code) from None
        if os.environ.get("RANK", "0") != "0":
            return Verification(until, 0, 0, "", None, [], [])
        changes = [f"{name} {was} -> {now}" for name, (was, now) in changed_environment(info, read_run(again))]
        changes += [
            f"the run went on after step {resumed.after_step} with {name} {was} -> {now}"
            for resumed in info.resumed
            for name, (was, now) in resumed.changed.items()
        ]
        step, tensors, compared = None, [], 0
        for directory in step_directories(again):
            theirs = checkpoints.get(int(directory.name.removeprefix("step-")))
            if theirs is not None:
                compared += 1
                tensors = _compare_checkpoints(theirs, directory)
                if tensors:
                    step = int(directory.name.removeprefix("step-"))
                    break
        return Verification(
            until, len(records), compared, first_difference(records, read_records(again)), step, tensors, changes
        )


def _again(recipe: Recipe, output: Path, threads: int) -> Recipe:
    """The recipe with what it resolved to, and everything kept."""
    runtime = recipe.runtime.model_copy(update={"threads": threads})
    checkpoint = recipe.checkpoint.model_copy(update={"output": str(output), "keep_last": 0})
    return recipe.model_copy(update={"runtime": runtime, "checkpoint": checkpoint})


def _compare_checkpoints(a: Path, b: Path) -> list[Difference]:
    return [
        difference for name in (MODEL_FILE, STATE_FILE) for difference in compare_files(a / name, b / name).differences
    ]
