"""Training a recorded run again, to see whether it still gives the same bits."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mygpt.checks.at import check_step
from mygpt.checks.compare import TensorDifference, compare_records, compare_steps
from mygpt.checks.rerun import (
    check_inputs,
    environment_changes,
    explain_rerun,
    find_inputs,
    last_step,
    segments_of,
    train_segments,
)
from mygpt.errors import CheckpointError
from mygpt.processes.environment import is_main_process
from mygpt.runs.run import RunDirectory
from mygpt.runs.steps import read_manifest, verify_checkpoint


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
    """Differences in versions, processor or threads, between then and now."""
    is_repeatable: bool = True
    """Whether the run used only kernels that give the same bits every time."""

    @property
    def identical(self) -> bool:
        return not (self.difference or self.tensors)


def verify(run: Path, steps: int | None = None, inputs: Mapping[str, str] = {}) -> Verification:
    """Train the recorded recipe of `run`, or its first `steps` steps, in a temporary directory, and compare.

    `inputs` are the paths of texts and of a model that have been moved; see `find_inputs`.

    Uses the recorded threads and `matmul`, stretch by stretch; the number of processes is the launcher's. A branch
    begins after the same checkpoint again.

    Raises:
        CheckpointError: there is no run, it has not trained so many steps, or nothing is recorded of them.
        MismatchError: the corpus has changed since.
        InterruptedRunError: a signal asked to stop.
        NonFiniteError: a loss or gradient is not finite.
    """
    recorded = RunDirectory(run)
    origin_step = recorded.info.origin_step
    records, checkpoints = recorded.records, recorded.checkpoints
    if steps is not None:
        check_step(recorded, steps)
    until = steps or last_step(recorded)
    checkpoints = {step: directory for step, directory in checkpoints.items() if origin_step < step <= until}
    records = [record for record in records if origin_step < record.step <= until]
    if not records and not checkpoints:
        raise CheckpointError(
            f"{run}: nothing is recorded of its steps from {origin_step + 1} to {until}; raise --steps"
        )
    for directory in checkpoints.values():
        verify_checkpoint(directory)
    # Where the newest save_every does not save: an earlier one did, or the step was the best.
    every = recorded.recipe.checkpoint.save_every
    saving = [step for step in checkpoints if not every or step % every]
    segments = segments_of(recorded, origin_step, until, find_inputs([recorded], inputs), saving)
    check_inputs(recorded, segments[-1].recipe, from_beginning=not origin_step)
    # Each checkpoint is compared when it is made: a long run again would fill the disk.
    keeping_one = [segment._replace(recipe=segment.recipe.replace(keep_last=1)) for segment in segments]
    compared: dict[int, list[TensorDifference]] = {}

    def compare(made: Path) -> None:
        if recorded_one := checkpoints.get(step := read_manifest(made).step):
            compared[step] = [] if any(compared.values()) else compare_steps(recorded_one, made)

    with tempfile.TemporaryDirectory(prefix="mygpt-verify-") as folder:
        again = RunDirectory(Path(folder) / "run")
        with explain_rerun(run, "stopped before anything was compared"):
            for _ in train_segments(keeping_one, again.path, resume=str(recorded.origin or "auto"), saved=compare):
                pass
        if not is_main_process():
            return Verification(until, 0, 0, "", None, [], [])
        step, tensors = next(((step, tensors) for step, tensors in compared.items() if tensors), (None, []))
        difference = compare_records(records, again.records)
        assert tensors or difference.difference or compared.keys() == checkpoints.keys()
        changes = [change for segment in segments for change in environment_changes(recorded, again, segment.until)]
        changes = list(dict.fromkeys(changes))
        repeatable = all(recorded.info.stretch_of(segment.until).environment.deterministic for segment in segments)
        counts = difference.steps, len(compared)
        return Verification(until, *counts, difference.difference, step, tensors, changes, repeatable)
