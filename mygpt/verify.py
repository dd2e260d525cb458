"""Running a recorded run again, to see whether it still gives the same bits."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from mygpt.compare import Difference, compare_files, compare_records
from mygpt.corpus import load_corpus
from mygpt.errors import CheckpointError, InterruptedRunError, MismatchError, NonFiniteError
from mygpt.loop import train
from mygpt.metadata import RunInfo
from mygpt.metrics import read_records
from mygpt.recipe import Recipe
from mygpt.resume import origin, recorded_recipe
from mygpt.rundir import MODEL_FILE, STATE_FILE, read_run, step_directories, verify_checkpoint


class Verification(NamedTuple):
    """What running again has shown, up to step `until`."""

    until: int
    records: int
    """Records that were compared."""
    checkpoints: int
    """Checkpoints that were compared."""
    difference: str
    """The first record that differs; "": none."""
    step: int | None
    """The step of the first checkpoint that differs."""
    tensors: list[Difference]
    """What differs in that checkpoint."""
    changes: list[str]
    """What is different in versions, processor or threads since the run was made, or became so on its way."""

    @property
    def identical(self) -> bool:
        return not (self.difference or self.tensors)


def verify(run: Path, steps: int | None = None) -> Verification:
    """Run the recorded recipe of `run`, or its first `steps` steps, in a temporary directory, and compare.

    With the recorded number of threads; the number of processes is the launcher's. A run that began after another's
    checkpoint begins there again.

    Raises:
        CheckpointError: there is no run, or nothing recorded of these steps.
        MismatchError: the corpus is not the one that it was trained on.
        InterruptedRunError: a signal asked to stop.
        NonFiniteError: its numbers break.
    """
    recipe, info = recorded_recipe(run), read_run(run)
    corpus = load_corpus(recipe.data.corpus).sha256
    if corpus != info.corpus_sha256:
        changed = corpus == info.effective("corpus_sha256")["corpus_sha256"]
        raise MismatchError(
            f"{run}: went on with another text than it began with, so that its recipe does not repeat it"
            if changed
            else f"{run}: was trained on another text than {recipe.data.corpus} is now"
        )
    begun_after = info.resumed[0].after_step if info.resumed and info.resumed[0].checkpoint else 0
    records = read_records(run)
    checkpoints = dict(step_directories(run))
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
    with tempfile.TemporaryDirectory(prefix="mygpt-verify-") as folder:
        output = Path(folder) / "run"
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                train(_again(run, recipe, info, output), allow_changes=True, until=until)
        except InterruptedRunError as stopped:
            raise InterruptedRunError("stopped before anything was compared", stopped.exit_code) from None
        except NonFiniteError as broken:
            raise NonFiniteError(f"running {run} again broke: {str(broken).split(';')[0]}") from None
        if os.environ.get("RANK", "0") != "0":
            return Verification(until, 0, 0, "", None, [], [])
        again = dict(step_directories(output))
        common = sorted(checkpoints.keys() & again.keys())
        compared_in_order = ((step, _compare_checkpoints(checkpoints[step], again[step])) for step in common)
        step, tensors = next(((step, tensors) for step, tensors in compared_in_order if tensors), (None, []))
        compared = compare_records(records, read_records(output))
        return Verification(
            until, compared.steps, len(common), compared.difference, step, tensors, _changes(info, read_run(output))
        )


def _again(run: Path, recipe: Recipe, info: RunInfo, output: Path) -> Recipe:
    """The recipe with the number of threads that it had, from where it began, and with every checkpoint kept."""
    began = str(origin(run, info.resumed[0])) if info.resumed and info.resumed[0].checkpoint else "auto"
    runtime = recipe.runtime.model_copy(update={"threads": info.threads})
    keys = {"output": str(output), "keep_last": 0, "resume": began}
    return recipe.model_copy(update={"runtime": runtime, "checkpoint": recipe.checkpoint.model_copy(update=keys)})


def _compare_checkpoints(a: Path, b: Path) -> list[Difference]:
    return [
        difference for name in (MODEL_FILE, STATE_FILE) for difference in compare_files(a / name, b / name).differences
    ]


def _changes(info: RunInfo, now: RunInfo) -> list[str]:
    was, is_now = info.environment(), now.environment()
    changes = [f"{name} {was[name]} -> {value}" for name, value in is_now.items() if was.get(name, value) != value]
    return changes + [
        f"{name} {old} -> {new}, in the run itself, after step {resumed.after_step}"
        for resumed in info.resumed
        for name, (old, new) in resumed.changed.items()
    ]
