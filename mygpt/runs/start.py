"""Where a run starts (at the beginning, or after a checkpoint of its own or another run), and making it ready."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import tomli_w

from mygpt.data.tokenizer import TokenizerMetadata
from mygpt.errors import CheckpointError, print_note
from mygpt.recipe.files import RECIPE_FILE, RUN_FILE
from mygpt.recipe.tables import HARMLESS_KEYS, NAMED_CORPORA, PATH_KEYS, Recipe
from mygpt.runs import files
from mygpt.runs.changes import (
    check_checkpoint,
    check_unchanged,
    has_same_windows,
    warn_of_branch,
    warn_of_code,
    warn_of_last_bits,
    warn_of_steps,
)
from mygpt.runs.records import LINES, EvaluationLine, read_until
from mygpt.runs.replacing import set_aside_run
from mygpt.runs.run import RunDirectory, Warn, named_checkpoint
from mygpt.runs.schemas import HASH_OF_PATH, Best, End, Origin, RunInfo, Stretch
from mygpt.runs.steps import (
    TEMPORARY_REASONS,
    point_to,
    prune,
    read_manifest,
    saved_reasons,
    step_directories,
    verify_checkpoint,
)

ANOTHER_OUTPUT = "choose another --output"


class Start(NamedTuple):
    """Where a run starts: at the beginning, after its newest checkpoint, or after its origin."""

    checkpoint: Path | None
    """The verified step directory after which it goes on; None: it starts at the beginning."""
    step: int
    """That checkpoint's step, or 0."""
    in_place: bool
    """Whether the run directory already holds this run."""
    overwrite: bool
    """Whether another run that is there is replaced."""
    info: RunInfo
    """What run.json is to hold."""
    ended_by: End | None = None
    """Why the run is finished; None: something is left to be trained."""
    best: Best | None = None
    """The best evaluation so far, if the recipe keeps its checkpoint."""
    evaluations: tuple[EvaluationLine, ...] = ()
    """The evaluations so far that are over the same held-out windows as later ones."""

    @property
    def recipe(self) -> Recipe:
        """What recipe.toml is to hold."""
        return self.info.recipe


def find_start(
    recipe: Recipe,
    info: RunInfo,
    tokenizer: TokenizerMetadata,
    *,
    overwrite: bool = False,
    is_restart: bool = False,
    warn: Warn,
) -> Start:
    """Decide where a run of `recipe` starts; only reads.

    `info` is that of a run that starts here and now, and `tokenizer` that of the corpus. A run that goes on keeps its
    recipe; changes on which only the last bits depend cost a warning. When a launcher restarts the command,
    `overwrite` spares the run that this same command has started.

    Raises:
        CheckpointError: there is a run that `resume` does not allow to continue, or nothing where it points.
        RecipeError: the run has another recipe.
        MismatchError: the run has another architecture or corpus.
        DamagedCheckpointError: no checkpoint of the run is whole.
    """
    run, recipe = RunDirectory(Path(recipe.checkpoint.output)), self_contained(recipe)
    info = info.model_copy(update={"recipe": recipe})
    overwrite = overwrite and not (is_restart and _was_started_by(run, recipe, info))
    resume = recipe.checkpoint.resume
    is_path = resume not in ("auto", "never")
    # A run gets its recipe.toml last: without it, the run was killed while it was made.
    if os.path.lexists(run.path / RECIPE_FILE) and not overwrite and (is_path or not run.has_no_steps):
        if resume not in ("auto", self_contained(run.recipe).checkpoint.resume):
            raise CheckpointError(
                f"output: {run.path} already holds a run, and resume is {resume!r}; choose another --output, replace "
                'it with --overwrite, or continue it with --resume "auto"'
            )
        checkpoint = run.newest_checkpoint(warn)
        if checkpoint is None and (origin := run.origin):
            # A branch that was killed before its first checkpoint starts again at its origin, which stays on record.
            recipe = recipe.replace(resume=run.recipe.checkpoint.resume)
            start = _branch(_resolve_origin(origin, warn), recipe, info, tokenizer, overwrite, warn)
            check_unchanged(run, 0, start.recipe, start.info)
            return start
        return _continue(run, checkpoint, recipe, info, tokenizer, warn)
    if is_path:
        return _branch(_resolve_origin(Path(resume), warn), recipe, info, tokenizer, overwrite, warn)
    # "never" is about this call: the run's own recipe continues it.
    info = info.model_copy(update={"recipe": recipe.replace(resume="auto")})
    init_from, place = recipe.train.init_from, files.real_path(run.path)
    if overwrite and init_from and place in Path(init_from).parents:
        entry = Path(init_from).relative_to(place).parts[0]
        if files.RUN_ENTRY.fullmatch(entry):
            raise CheckpointError(
                f"init_from: {init_from} is in the run that --overwrite would remove; {ANOTHER_OUTPUT}"
            )
    return Start(None, 0, False, overwrite, info)


def _continue(
    run: RunDirectory, checkpoint: Path | None, recipe: Recipe, info: RunInfo, tokenizer: TokenizerMetadata, warn: Warn
) -> Start:
    """The start of a run that goes on after its newest checkpoint, if it has one, or is finished."""
    if checkpoint is None:
        check_unchanged(run, 0, recipe, info)
        return Start(None, 0, True, False, info)
    ended_by = read_manifest(checkpoint).ended_by
    step = check_checkpoint(checkpoint, recipe, tokenizer, in_place=True, may_end=ended_by is not None)
    check_unchanged(run, step, recipe, info)
    warn_of_code(run, step, warn)
    trained_with = run.recipe_for(step)
    goes_on = recipe.train.steps != trained_with.train.steps
    if ended_by == "patience":
        goes_on = not 0 < recipe.validation.patience <= trained_with.validation.patience
    if ended_by and not goes_on:  # only keys that train nothing, and paths, can change
        values = {key: recipe.flat()[key] for key in (*HARMLESS_KEYS, *PATH_KEYS)}
        recipe, stretches = trained_with.replace(**values), run.info.stretches_until(step)
    else:
        ended_by, stretches = None, _stretches(run.info, step, info)
        warn_of_last_bits(run.info.stretch_of(step).environment, info.stretches[0].environment, recipe, warn)
        warn_of_steps(run, step, recipe, warn)
    recipe = recipe.replace(resume=run.recipe.checkpoint.resume)  # the origin stays on record
    info = run.info.model_copy(update={"recipe": recipe, "stretches": stretches})
    best = run.best_until(step) if recipe.keeps_best else None
    evaluations = tuple(read_until(run.path / files.EVALUATIONS_FILE, EvaluationLine, step))
    return Start(checkpoint, step, True, False, info, ended_by, best, evaluations)


def _branch(
    checkpoint: Path, recipe: Recipe, info: RunInfo, tokenizer: TokenizerMetadata, overwrite: bool, warn: Warn
) -> Start:
    """The start of a run whose origin is a checkpoint of another run."""
    run, output = RunDirectory(checkpoint.parent), files.real_path(Path(recipe.checkpoint.output))
    is_own = output in checkpoint.parents  # as of a fork
    if files.real_path(run.path) == output or (overwrite and is_own):
        raise CheckpointError(
            f"resume: {recipe.checkpoint.resume} is in the run that --overwrite would remove; {ANOTHER_OUTPUT}"
        )
    is_kept = is_own or run.path.name == files.ORIGIN_NAME  # as that of a fork, when it is verified
    if not is_kept and read_manifest(checkpoint).reason in TEMPORARY_REASONS:
        warn(f"resume: {checkpoint} is removed when its run saves the next checkpoint: `verify` needs it")
    step = check_checkpoint(checkpoint, recipe, tokenizer, in_place=False, may_end=False)
    seed, init_from = run.recipe.train.init_seed, run.recipe.train.init_from
    if recipe.train.init_seed != seed:
        warn(f"init_seed: stays {seed}: the weights are those of {checkpoint}")
        recipe = recipe.replace(init_seed=seed)
    if info.init_sha256 != run.info.init_sha256:
        warn(f"init_from: stays {init_from or 'nothing'}: the weights are those of {checkpoint}")
        recipe = recipe.replace(init_from=init_from)
        info = info.model_copy(update={"init_sha256": run.info.init_sha256})
    warn_of_code(run, step, warn)
    warn_of_branch(run, step, recipe, info, warn)
    warn_of_steps(run, step, recipe, warn)
    origin = Origin(
        checkpoint=str(checkpoint.relative_to(output) if is_own else checkpoint),
        manifest_sha256=files.file_sha256(checkpoint / files.MANIFEST_FILE),
        after_step=step,
        tokens=run.info.tokens_until(step),
    )
    stretches = _stretches(run.info, step, info)
    info = info.model_copy(update={"recipe": recipe, "origin": origin, "stretches": stretches})
    evaluations: tuple[EvaluationLine, ...] = ()
    if has_same_windows(run, step, recipe, info):
        evaluations = tuple(read_until(run.path / files.EVALUATIONS_FILE, EvaluationLine, step))
    return Start(checkpoint, step, False, overwrite, info, evaluations=evaluations)


def _stretches(trained: RunInfo, step: int, here: RunInfo) -> tuple[Stretch, ...]:
    """The stretches of a run that goes on after a step as `here`, or of a branch of it.

    A run that was only killed and continued records nothing. Later stretches belong to a continuation that this one
    replaces.
    """
    before, now = trained.stretch_of(step), here.stretches[0]
    if now.model_copy(update={"after_step": before.after_step}) == before:
        return trained.stretches_until(step)
    return (*trained.stretches_until(step), now.model_copy(update={"after_step": step}))


def write_start(start: Start) -> None:
    """Make the directory of a new run, or update that of a run that continues.

    Raises:
        CheckpointError: there is a run, and `overwrite` is not set.
        DiskError: the disk refused it.
    """
    run = Path(start.recipe.checkpoint.output)
    with files.explain_disk_error(files.CANNOT_WRITE, run):
        _update(run, start) if start.in_place else _create(run, start)


def _create(run: Path, start: Start) -> None:
    if step_directories(run) and not start.overwrite:
        raise CheckpointError(
            f"output: {run} holds checkpoints but no {RECIPE_FILE}; restore it, choose another --output, or "
            "--overwrite the run"
        )
    if start.overwrite and not RunDirectory(run).has_no_steps:
        set_aside_run(run)
        print_note(f"the run that is replaced stays in {run / files.REPLACED_NAME} until the first checkpoint")
    for entry in run.iterdir():
        is_kept = entry.name in (RUN_FILE, RECIPE_FILE) or bool(files.FAILED_NAME.fullmatch(entry.name))
        if entry.name == files.ORIGIN_NAME:
            is_kept = start.info.origin is not None and start.info.origin.checkpoint.startswith(files.ORIGIN_NAME)
        if files.RUN_ENTRY.fullmatch(entry.name) and not is_kept:
            files.remove(entry)
    # A directory without recipe.toml is a run that was killed while it was made.
    files.replace_text(run / RUN_FILE, start.info.to_json())
    for name in LINES:  # a branch has the records of its origin
        is_kept = name != files.EVALUATIONS_FILE or bool(start.evaluations)
        if start.checkpoint is not None and is_kept and (start.checkpoint.parent / name).is_file():
            shutil.copyfile(start.checkpoint.parent / name, run / name)
    files.replace_text(run / RECIPE_FILE, recipe_text(start.recipe))


def _update(run: Path, start: Start) -> None:
    """Record how the run continues, and finish what a killed process left half done."""
    files.replace_text(run / RUN_FILE, start.info.to_json())
    files.replace_text(run / RECIPE_FILE, recipe_text(start.recipe))
    best = start.best.step if start.best else None
    for entry in run.iterdir():
        if files.TEMPORARY_NAME.fullmatch(entry.name):
            files.remove(entry)
    if best is None:
        (run / files.BEST_FILE).unlink(missing_ok=True)
    if start.step:
        reasons = saved_reasons(run)
        if reasons.get(start.step) != "interrupted" and files.is_directory(run / files.REPLACED_NAME):
            files.remove(run / files.REPLACED_NAME)
        point_to(run, start.step, best)
        prune(run, start.recipe.checkpoint.keep_last, start.step, best, reasons)


def recipe_text(recipe: Recipe) -> str:
    """What the recipe.toml of a run holds."""
    tables = recipe.to_tables()
    del tables["checkpoint"]["output"]  # it is the directory in which the file lies, also after that is moved
    return f"# The run in this directory, which `mygpt train` on this file continues.\n\n{tomli_w.dumps(tables)}"


def self_contained(recipe: Recipe) -> Recipe:
    """The recipe with paths that do not depend on the working directory, as a run records it."""
    values = recipe.flat()
    given = {key: values[key] for key in PATH_KEYS if values[key] is not None and values[key] not in NAMED_CORPORA}
    paths = {key: os.path.realpath(path) for key, path in given.items()}
    if recipe.checkpoint.resume not in ("auto", "never"):
        with suppress(ValueError):  # a NUL character, which looking for the run will name
            paths["resume"] = os.path.realpath(recipe.checkpoint.resume)
    return recipe.replace(**paths)


def _was_started_by(run: RunDirectory, recipe: Recipe, info: RunInfo) -> bool:
    """Whether this command started the run in the same job or launch, perhaps in another environment.

    Without an id of the job, recipe and command decide. It is an error if run.json is damaged.
    """
    if not os.path.lexists(run.path / RECIPE_FILE):
        return False
    before = run.info
    # The program and what it reads may have been moved since.
    paths = {key: value for key, value in recipe.flat().items() if key in HASH_OF_PATH}
    is_same_recipe = self_contained(run.recipe).replace(**paths, output=recipe.checkpoint.output) == recipe
    is_same_launch = before.launch_id in (None, info.launch_id) and before.command[1:] == info.command[1:]
    return is_same_recipe and before.inputs == info.inputs and is_same_launch


def _resolve_origin(path: Path, warn: Warn) -> Path:
    """The whole step directory that a user names by its path, or by that of its run."""
    try:
        path = files.real_path(named_checkpoint(path))
        if files.FAILED_NAME.fullmatch(path.name):
            raise CheckpointError(f"resume: {path} is the record of a step that failed; name a step directory")
        if (path / RUN_FILE).exists():
            checkpoint = RunDirectory(path).newest_checkpoint(warn)
            if checkpoint is None:
                raise CheckpointError(f"resume: {path} has no checkpoint yet")
            return checkpoint
        is_in_run = (path.parent / RUN_FILE).exists() and path.is_dir()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"resume: got {str(path)!r}: {error}") from None
    if not is_in_run:
        raise CheckpointError(f'resume: got {str(path)!r}, expected "auto", "never", or a run or step directory')
    verify_checkpoint(path)
    return path
