"""Running a recorded run again, to see whether it still gives the same bits."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mygpt.checks.compare import Difference, compare_files, compare_records
from mygpt.data.corpus import load_corpus
from mygpt.errors import CheckpointError, InterruptedRunError, MismatchError, NonFiniteError
from mygpt.recipe.tables import TABLE_OF_KEY, Recipe
from mygpt.runs.files import MODEL_FILE, STATE_FILE
from mygpt.runs.records import read_records
from mygpt.runs.run import read_run
from mygpt.runs.schemas import RunInfo
from mygpt.runs.start import origin, recipe_at, recorded_recipe
from mygpt.runs.steps import step_directories, verify_checkpoint
from mygpt.training.train import train_until


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

    Where the run went on with another recipe this does, too. With the recorded number of threads; the number of
    processes is the launcher's. A run that began after another's checkpoint begins there again.

    Raises:
        CheckpointError: there is no run, or nothing recorded of these steps.
        MismatchError: the corpus is not the one that it was trained on.
        InterruptedRunError: a signal asked to stop.
        NonFiniteError: its numbers break.
    """
    newest, info = recorded_recipe(run), read_run(run)
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
    parts = list(parts_of(newest, info, begun_after, until))
    for part in parts:
        if load_corpus(part.recipe.data.corpus).sha256 != info.recorded_at(part.until)["corpus_sha256"]:
            raise MismatchError(f"{run}: was trained on another text than {part.recipe.data.corpus} is now")
    began = str(origin(run, info.resumed[0])) if begun_after else "auto"
    with tempfile.TemporaryDirectory(prefix="mygpt-verify-") as folder:
        output = Path(folder) / "run"
        try:
            with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as quiet:
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
                for part in parts:
                    if part is not parts[0]:
                        # That it goes on with another recipe is what it is to repeat.
                        quiet.enter_context(contextlib.redirect_stderr(nowhere))
                    keys = {"output": str(output), "keep_last": 0, "resume": began if part is parts[0] else "auto"}
                    train_until(part.recipe.replace(**keys), part.until, allow_changes=True)
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


class Part(NamedTuple):
    """Steps of a run that were trained with one recipe."""

    recipe: Recipe
    until: int
    """The last of them."""


def parts_of(newest: Recipe, info: RunInfo, first: int, until: int) -> Iterator[Part]:
    """The parts of the steps from `first` + 1 to `until`, with the number of threads that each had."""
    ends = [resumed.after_step for resumed in info.before(until) if resumed.after_step > first]
    newest_text = info.recorded_at(sys.maxsize)["corpus_sha256"]
    for end in [*ends, until]:
        recorded, recipe = info.recorded_at(end), recipe_at(end, newest, info)
        # The same text may have moved since.
        corpus = newest.data.corpus if recorded["corpus_sha256"] == newest_text else recipe.data.corpus
        yield Part(recipe.replace(threads=recorded["threads"], corpus=corpus), end)


def _compare_checkpoints(a: Path, b: Path) -> list[Difference]:
    return [
        difference for name in (MODEL_FILE, STATE_FILE) for difference in compare_files(a / name, b / name).differences
    ]


def _changes(info: RunInfo, now: RunInfo) -> list[str]:
    was, is_now = info.recorded(), now.recorded()
    changes = [f"{name} {was[name]} -> {value}" for name, value in is_now.items() if was.get(name, value) != value]
    return changes + [
        f"{name} {old} -> {new}, in the run itself, after step {resumed.after_step}"
        for resumed in info.resumed
        if resumed.checkpoint is None  # else nothing of the run was trained with the old value
        for name, (old, new) in resumed.changed.items()
        # What the recipe says has been repeated.
        if name not in {*TABLE_OF_KEY, "corpus_sha256"}
    ]
