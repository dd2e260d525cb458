"""Training a recorded run again, to see whether it still gives the same bits."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mygpt.checks.compare import TensorDifference, compare_files, compare_records
from mygpt.checks.rerun import check_inputs, describe_changes, explain_rerun, find_inputs, parts_of, train_parts
from mygpt.errors import CheckpointError
from mygpt.processes.environment import is_main_process
from mygpt.recipe.tables import TABLE_OF_KEY
from mygpt.runs.files import MODEL_FILE, STATE_FILE
from mygpt.runs.run import Run
from mygpt.runs.schemas import HASH_OF_PATH, RunInfo
from mygpt.runs.steps import verify_checkpoint


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


def verify(run: Path, steps: int | None = None, inputs: Mapping[str, str] = {}) -> Verification:
    """Train the recorded recipe of `run`, or its first `steps` steps, in a temporary directory, and compare.

    `inputs` are the paths of texts and of a model that have been moved; see `find_inputs`.

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
    parts = list(parts_of(recorded, begun_after, until, find_inputs([recorded], inputs)))
    check_inputs(recorded, parts, from_beginning=not begun_after)
    keeping_all = [part._replace(recipe=part.recipe.replace(keep_last=0)) for part in parts]
    with tempfile.TemporaryDirectory(prefix="mygpt-verify-") as folder:
        again = Run(Path(folder) / "run")
        with explain_rerun(run, "stopped before anything was compared"):
            for _ in train_parts(keeping_all, again.path, resume=str(recorded.origin or "auto")):
                pass
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


def _compare_checkpoints(a: Path, b: Path) -> list[TensorDifference]:
    return [
        difference for name in (MODEL_FILE, STATE_FILE) for difference in compare_files(a / name, b / name).differences
    ]


def _changes(info: RunInfo, now: RunInfo) -> list[str]:
    return describe_changes(info.recorded(), now.recorded()) + [
        f"{name} {old} -> {new}, in the run itself, after step {resumed.after_step}"
        for resumed in info.resumed
        if resumed.checkpoint is None  # no step of a branch was trained with the old value
        for name, (old, new) in resumed.changed.items()
        if name not in {*TABLE_OF_KEY, *HASH_OF_PATH.values()}  # the recipe and the texts were repeated
    ]
