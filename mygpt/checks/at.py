"""A recorded run as it was after any of its steps, bit for bit; and forks of it, which go on from there otherwise."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.checks.compare import compare_records, compare_steps
from mygpt.checks.rerun import (
    Segment,
    check_inputs,
    environment_changes,
    explain_rerun,
    find_inputs,
    input_sha256,
    last_step,
    moved_inputs,
    pinned_recipe,
    segments_of,
    train_segments,
)
from mygpt.errors import CheckpointError, DamagedCheckpointError, LaunchError, MismatchError, RecipeError, print_note
from mygpt.processes.channel import connect
from mygpt.processes.environment import is_main_process, launched_processes
from mygpt.recipe.files import RECIPE_FILE, RUN_FILE
from mygpt.recipe.names import named_after
from mygpt.recipe.tables import HARMLESS_KEYS, Recipe
from mygpt.runs import files
from mygpt.runs.changes import MAY_CHANGE, check_checkpoint, differing_keys
from mygpt.runs.copying import copy_until, publish_run
from mygpt.runs.initial import Initial, open_dataset
from mygpt.runs.lock import locked
from mygpt.runs.records import Record
from mygpt.runs.run import RunDirectory, Warn, check_output, named_checkpoint
from mygpt.runs.schemas import HASH_OF_PATH, Manifest, ModelMetadata, Recreated
from mygpt.runs.start import recipe_text
from mygpt.runs.steps import read_manifest, read_metadata, step_directories, step_directory, verify_checkpoint
from mygpt.training.train import train


class Recreation(NamedTuple):
    """How a step of a run has been made again."""

    first: int
    """The step of the checkpoint from which it began; 0: the run's beginning."""
    records: int
    """Records of the run that were compared with those made again."""
    checkpoints: int
    """Checkpoints of the run that were compared with those made again."""
    changes: list[str]
    """What has changed on the machine since the step was trained, if steps were trained again."""


class Route(NamedTuple):
    """How a step is to be made again."""

    checkpoint: Path | None
    """The step directory to begin with; None: the run's beginning, or the checkpoint after which a branch began."""
    first: int
    """The step of `checkpoint`, or after which the run or branch began."""
    segments: list[Segment]
    """What to train from there. Each segment ends with a checkpoint that can be compared, or with a stretch."""
    recipe: Recipe
    """The recipe of the run, with the end that it had in view, and with the inputs that have been moved."""


def recreate(
    run: Path,
    step: int,
    out: Path,
    inputs: Mapping[str, str] = {},
    *,
    start: Path | None = None,
    from_beginning: bool = False,
    check: bool = True,
    keep_all: bool = True,
) -> Recreation:
    """Make `out` the run directory of `run` as it was after a step, with the bytes that its files had then.

    It begins with the nearest whole checkpoint at or before the step, or with the step directory `start`, of this run
    or of what `recreate` made of it; `from_beginning` uses no checkpoint. With `check`, all that the run has recorded
    of the steps that are trained again must come out the same. `run` is only read, and `out` appears when it is whole.
    `inputs` are the paths of texts and of a model that have been moved; see `find_inputs`. Unless `keep_all`, it has no
    checkpoint but that of the step.
    Every process of a launch has to call this.

    Raises:
        CheckpointError: there is no such run or step, or something at `out`.
        LaunchError: the run was trained by another number of processes, and its bits depend on it.
        MismatchError: the text has changed; or this machine does not repeat the run.
        DamagedCheckpointError, DiskError: a file cannot be read, or written.
        InterruptedRunError: a signal asked to stop.
    """
    recorded, is_main = RunDirectory(run), is_main_process()
    moved = find_inputs([recorded], inputs)
    plan = plan_recreation(recorded, step, start, moved, from_beginning=from_beginning, warn=print_note)
    if not is_main:
        for _ in train_segments(plan.segments, out, resume="auto"):
            pass
        return Recreation(plan.first, 0, 0, [])
    check_free(run, out)
    with workplace(workplace_of(out)) as folder:
        again = folder / "run"
        resume = "auto"
        if plan.checkpoint:
            copy_until(plan.checkpoint, again)
        else:
            resume = str(recorded.origin or "auto")
        compared = 0
        with explain_rerun(run, f"stopped before step {step} of {run} was made again; nothing is kept"):
            # Its notes speak of the place where it works; what has changed on the machine is returned.
            for until in train_segments(plan.segments, again, resume, is_quiet=True):
                compared += check and compare_with_recorded(recorded, plan.first, until, again)
                if not keep_all:
                    keep_one(again, until)
        made = RunDirectory(again)
        recreated = Recreated(run=str(files.real_path(run)), after_step=step)
        info = made.info.model_copy(update={"recipe": plan.recipe, "recreated": recreated})
        files.replace_text(again / RUN_FILE, info.to_json())
        files.replace_text(again / RECIPE_FILE, recipe_text(plan.recipe))
        records = len(records_between(recorded, plan.first, step)) if check else 0
        changes = environment_changes(recorded, made, step) if plan.segments else []
        check_free(run, out)
        publish_run(again, out)
    return Recreation(plan.first, records, compared, changes)


def keep_one(run: Path, step: int) -> None:
    """Remove all checkpoints of a run but that of a step."""
    for other, directory in step_directories(run).items():
        if other != step:
            files.remove(directory)
    best = run / files.BEST_FILE
    if best.exists() and best.read_text().strip() != step_directory(run, step).name:
        best.unlink()


def plan_recreation(
    run: RunDirectory,
    step: int,
    start: Path | None = None,
    inputs: Mapping[str, str] = {},
    *,
    from_beginning: bool = False,
    warn: Warn,
) -> Route:
    """Where to begin, and what to train from there; reads the run, and raises as `recreate` does."""
    check_step(run, step)
    origin_step, checkpoint = run.info.origin_step, None
    if start is not None:
        checkpoint = files.real_path(named_checkpoint(start))
        if not origin_step < verify_checkpoint(checkpoint).step <= step:
            raise CheckpointError(f"{start}: expected a checkpoint of a step from {origin_step + 1} to {step}")
        other = RunDirectory(checkpoint.parent)
        changed = {key for key, _ in differing_keys(run.recipe, other.recipe)} - MAY_CHANGE
        if changed or other.info.inputs != run.info.inputs:
            raise CheckpointError(
                f"{start}: is of another recipe or text than {run.path}; expected one of its checkpoints"
            )
    elif not from_beginning:
        checkpoint = nearest_checkpoint(run, origin_step, step, warn)
    first = read_manifest(checkpoint).step if checkpoint else origin_step
    if checkpoint is None and (origin := run.origin):
        verify_checkpoint(origin)
    recipe, segments = run.recipe_for(step).replace(**moved_inputs(run, inputs)), []
    if first < step:
        between = {other: directory for other, directory in run.checkpoints.items() if first < other < step}
        saving = [other for other, directory in between.items() if recorded_manifest(directory)]
        segments = segments_of(run, first, step, inputs, saving)
        check_inputs(run, segments[-1].recipe, from_beginning=not first)
        check_processes(run, segments)
    return Route(checkpoint, first, segments, recipe)


def check_step(run: RunDirectory, step: int) -> None:
    """Check that a run has trained a step itself.

    Raises:
        CheckpointError: it has not.
    """
    origin, origin_step, last = run.info.origin, run.info.origin_step, last_step(run)
    if not origin_step < step <= last:
        before = f"; its steps up to {origin_step} are those of the run of {origin.checkpoint}" if origin else ""
        raise CheckpointError(
            f"{run.path}: got step {step}, expected one from {origin_step + 1} to {last}, the last that it has "
            f"trained{before}"
        )


def check_goes_on(run: RunDirectory, step: int, recipe: Recipe) -> None:
    """Check that training has something left to do after a step of the run with this recipe.

    Raises:
        RecipeError: early stopping would end it there again.
    """
    manifest = recorded_manifest(step_directory(run.path, step))
    if manifest is None or manifest.ended_by != "patience":
        return
    was = run.info.stretch_of(step).patience
    if 0 < recipe.validation.patience <= was:
        raise RecipeError(
            f"[validation] patience: got {recipe.validation.patience}, with which {run.path} ended after step {step}; "
            f"give --patience 0, or one above {was}, or fork it after an earlier step"
        )


def nearest_checkpoint(run: RunDirectory, origin_step: int, step: int, warn: Warn) -> Path | None:
    """The newest whole checkpoint of the run itself at or before a step; None: there is none."""
    for other, directory in reversed(run.checkpoints.items()):
        if origin_step < other <= step:
            try:
                verify_checkpoint(directory)
            except DamagedCheckpointError as error:
                warn(f"{error}; an earlier checkpoint is used")
            else:
                return directory
    return None


def check_processes(run: RunDirectory, segments: list[Segment]) -> None:
    """Check that as many processes as trained these segments will train them again, where the bits depend on it."""
    processes = launched_processes().processes
    for segment in segments:
        recorded = run.info.stretch_of(segment.until).environment.processes
        if run.recipe.runtime.reduction == "fast" and recorded != processes:
            raise LaunchError(
                f"{run.path}: step {segment.until} was trained by {recorded} processes, on whose number the "
                f"last bits depend; here are {processes}: start as many, with accelerate launch -m mygpt"
            )


def recorded_manifest(directory: Path) -> Manifest | None:
    """The manifest of a step directory, whose files may be damaged; None: it cannot be read."""
    try:
        return read_manifest(directory)
    except CheckpointError:
        return None


def compare_with_recorded(run: RunDirectory, first: int, step: int, again: Path) -> bool:
    """Compare the steps after `first`, made again up to a step, with what the run has recorded of them.

    Returns whether it has recorded a checkpoint of the last of them, damaged or not.

    Raises:
        MismatchError: they differ.
    """
    difference = ""
    if records := records_between(run, first, step):
        difference = compare_records(records, RunDirectory(again).records).difference
    manifest = recorded_manifest(step_directory(run.path, step))
    if not difference and manifest:
        difference = compare_with_manifest(run, manifest, step_directory(again, step))
    if difference:
        changes = ", ".join(environment_changes(run, RunDirectory(again), step))
        since = f"changed since: {changes}" if changes else "nothing that run.json records has changed since"
        if not run.info.stretch_of(step).environment.deterministic:
            since = "the run had deterministic = false, so that its last bits are never the same"
        raise MismatchError(f"{run.path}: cannot be repeated here: {difference}; {since}", exit_code=1)
    return manifest is not None


def compare_with_manifest(run: RunDirectory, manifest: Manifest, again: Path) -> str:
    """How a step directory that was made again differs from the recorded one; "": it does not."""
    recorded = step_directory(run.path, manifest.step)
    entries = recorded_manifest(again)
    if entries and entries.files == manifest.files:
        return ""
    try:
        verify_checkpoint(recorded)
    except DamagedCheckpointError:
        return f"step {manifest.step}: its sha256 is not that of {recorded}"
    for tensor in compare_steps(recorded, again):
        return f"step {manifest.step}: {tensor.name} differs from {recorded}: {tensor.text}"
    return f"step {manifest.step}: the metadata of {recorded} differ"


def records_between(run: RunDirectory, first: int, step: int) -> list[Record]:
    return [record for record in run.records if first < record.step <= step]


def check_free(run: Path, out: Path) -> None:
    """Check that there is nothing at `out`, that something can be written there, and that it is not in the run."""
    if os.path.lexists(out):
        raise CheckpointError(f"output: {out} is there already; choose another one, or remove it")
    check_output(out, replace=False)
    if len(os.fsencode(workplace_of(out).name)) > 255:
        raise CheckpointError(f"output: {out}: its name is too long; choose a shorter one")
    if files.real_path(out).is_relative_to(files.real_path(run)):
        raise CheckpointError(f"output: {out} is in {run}, which stays as it is; choose another one")


def workplace_of(out: Path) -> Path:
    """The folder in which a run is made that becomes `out`."""
    return out.with_name(f".tmp-at-{out.name}")


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """An empty hidden folder, which is gone afterwards; what a killed process left in it is removed."""
    with locked(folder):
        for entry in folder.iterdir():
            if entry.name != files.LOCK_FILE:
                files.remove(entry)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def fork(run: Path, step: int, recipe: Recipe, output: Path) -> Path:
    """Train on from the state of `run` after a step with another recipe, into the run directory `output`.

    `recipe` is that of the run, but for the keys in which the fork is to differ. Threads, `matmul` and text are those
    of the run, unless they are among these. A fork that is there is continued. It is a branch of what `recreate` makes
    in the folder `origin` in it, so that it needs the run no more.
    Every process of a launch has to call this.

    Raises:
        MygptError: as `recreate` and `train` do; also if `output` is something else than this fork.
    """
    recorded, launched = RunDirectory(run), launched_processes()
    pinned = pinned_recipe(recorded, step + 1)
    was, wanted = recorded.recipe_for(step + 1).flat(), recipe.flat()
    pins = {key: pinned.flat()[key] for key in ("threads", "matmul", *HASH_OF_PATH) if wanted[key] == was[key]}
    recipe = recipe.replace(output=str(output), **pins)
    with connect(launched) as channel:
        moved = same_inputs(recorded, was, wanted)
        if wanted["init_from"] != was["init_from"] and "init_from" not in moved:
            raise RecipeError("--init-from: a fork begins with the weights of its run; leave it out")
        own = {"origin": find_fork(recorded, step, recipe, output, moved) if is_main_process() else ""}
        origin = channel.exchange(own, "fork")[0]["origin"]
    if not origin:
        origin = str(files.real_path(step_directory(output / files.ORIGIN_NAME, step)))
        with locked(output) if is_main_process() else nullcontext():
            recreate(run, step, output / files.ORIGIN_NAME, moved, keep_all=False)
    return train(recipe.replace(resume=origin))


def find_fork(run: RunDirectory, step: int, recipe: Recipe, output: Path, moved: Mapping[str, str]) -> str:
    """The checkpoint that is the origin of the fork in `output`; "": there is none, and there can be one."""
    check_step(run, step)
    if recipe.train.steps <= step:
        raise RecipeError(f"[train] steps: got {recipe.train.steps}, expected more than {step}; raise --steps")
    origin, wanted = output / files.ORIGIN_NAME, Recreated(run=str(files.real_path(run.path)), after_step=step)
    if os.path.lexists(origin / RUN_FILE) and RunDirectory(origin).info.recreated == wanted:
        if os.path.lexists(output / RUN_FILE):  # the fork may have been moved since
            return RunDirectory(output).recipe.checkpoint.resume
        return str(files.real_path(step_directory(origin, step)))
    if os.path.lexists(output) and not RunDirectory(output).has_no_steps:
        raise CheckpointError(
            f"output: {output} is there already, and no fork of {run.path} after step {step}; choose another --output"
        )
    check_free(run.path, origin)
    check_goes_on(run, step, recipe)
    plan = plan_recreation(run, step, inputs=find_inputs([run], moved), warn=lambda _: None)
    data, was = recipe.data, plan.recipe.data
    if (data.corpus, data.val_corpus) == (was.corpus, was.val_corpus):  # the fork does not differ in its text
        check_inputs(run, plan.recipe)
    check_model(run, recipe, plan)
    return ""


def check_model(run: RunDirectory, recipe: Recipe, plan: Route) -> None:
    """Check that the weights of the run fit the recipe's architecture and tokenizer, if a checkpoint can tell."""
    checkpoint = plan.checkpoint or nearest_checkpoint(run, 0, sys.maxsize, warn=lambda _: None)
    if checkpoint is None:
        return
    if recipe.model == plan.recipe.model and recipe.data == plan.recipe.data:
        return
    initial, init_from = None, recipe.train.init_from
    if init_from:  # its weights are not needed any more, and its tokenizer is that of the checkpoint
        file = checkpoint / files.MODEL_FILE
        initial = Initial(init_from, file, read_metadata(file, ModelMetadata), "")
    tokenizer = open_dataset(recipe, initial).tokenizer.metadata
    long_enough = recipe.replace(steps=max(recipe.train.steps, read_manifest(checkpoint).step))
    check_checkpoint(checkpoint, long_enough, tokenizer, in_place=False, may_end=True)


def same_inputs(run: RunDirectory, was: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    """The paths, by key, that differ from those that were read, and at which there is the same."""
    given = {key: wanted[key] for key in HASH_OF_PATH if wanted[key] not in (None, was[key])}
    return {key: path for key, path in given.items() if input_sha256(key, path) == run.info.inputs[key]}


def fork_name(run: Path, step: int, base: Recipe, recipe: Recipe, given: Set[str]) -> str:
    """The name of a fork's directory: the run's, the step, and those of the `given` keys that change numbers."""
    moved = same_inputs(RunDirectory(run), base.flat(), recipe.flat())
    keys = given - HARMLESS_KEYS - {"init_seed"} - moved.keys()  # the initial weights are not drawn again
    return named_after(f"{files.real_path(run).name}-at-{step}", base.flat(), recipe.flat(), keys)
