"""Where a run begins: anew, or after a checkpoint, once what has changed since then is known. Imports no torch."""

import os
from pathlib import Path
from typing import NamedTuple

from mygpt.errors import CheckpointError, DamagedCheckpointError, MismatchError, RecipeError
from mygpt.recipe.files import RECIPE_FILE, RUN_FILE, load_recipe
from mygpt.recipe.tables import TABLE_OF_KEY, Recipe
from mygpt.runs.changes import HARMLESS_KEYS, Source, Warn, check_changes, check_checkpoint, tell_steps, window_names
from mygpt.runs.files import FAILED_NAME, MANIFEST_FILE, STATE_FILE, file_sha256
from mygpt.runs.run import create_run, has_no_steps, read_run, record_run, self_contained, tidy
from mygpt.runs.schemas import Resumed, RunInfo
from mygpt.runs.steps import read_manifest, read_state_metadata, step_directories, verify_checkpoint


class Start(NamedTuple):
    """Where a run begins."""

    checkpoint: Path | None
    """The step directory after which it continues, verified; None: it starts from the beginning."""
    step: int
    """That checkpoint's step, or 0."""
    in_place: bool
    """Whether the run directory already holds this run."""
    overwrite: bool
    """Whether it may hold another, to be removed."""
    recipe: Recipe
    info: RunInfo
    """What recipe.toml and run.json are to say."""
    keeps_best: bool = False
    """Whether the checkpoint's best evaluation is of this run, and over the same held-out windows as those to come."""


def find_start(
    recipe: Recipe,
    info: RunInfo,
    vocab: str,
    *,
    overwrite: bool = False,
    is_restart: bool = False,
    allow_changes: bool = False,
    warn: Warn,
) -> Start:
    """Decide where a run of `recipe` begins, touching nothing.

    `info` describes the environment, and `vocab` is the vocabulary of the corpus. What has changed since the checkpoint
    is refused, unless with `allow_changes`; where only the last bits depend on it `warn` is told. On a restart by a
    launcher `overwrite` spares the run that this same command has begun.

    Raises:
        CheckpointError: there is a run that `resume` does not allow to continue, or nothing where it points.
        RecipeError: the recipe differs from the one that the checkpoint was trained with.
        MismatchError: the architecture or the corpus does.
        DamagedCheckpointError: there are checkpoints, and none of them is whole.
    """
    run, recipe = Path(recipe.checkpoint.output), self_contained(recipe)
    info = info.model_copy(update={"recipe": recipe})
    overwrite = overwrite and not (is_restart and _is_run_of(run, recipe, info))
    source = _find_source(run, recipe.checkpoint.resume, overwrite, warn)
    if source is None:
        return Start(None, 0, False, overwrite, recipe, info)
    in_place, checkpoint = source.in_place, source.checkpoint
    if not in_place and source.run.resolve() == run.resolve():
        raise CheckpointError(
            f"resume: {recipe.checkpoint.resume} is in the run that --overwrite would remove; choose another --output"
        )
    before = read_run(source.run)
    newest = recorded_recipe(source.run)
    # A step is judged by what it was trained with: the run may have gone on with another recipe since.
    trained_with = recipe_of_checkpoint(checkpoint, newest, before) if checkpoint else newest
    is_over = checkpoint is not None and is_finished(checkpoint, newest)
    step = check_checkpoint(source, recipe, vocab, may_end=in_place and is_over)
    is_complete = in_place and is_over and recipe.train.steps == trained_with.train.steps
    if recipe.train.init_seed != trained_with.train.init_seed and checkpoint and allow_changes:
        warn(f"init_seed: stays {trained_with.train.init_seed}: the weights are those of {checkpoint}")
        recipe = recipe.replace(init_seed=trained_with.train.init_seed)
    changed = check_changes(
        source,
        trained_with,
        before.recorded_at(step),
        recipe,
        info,
        allow_changes,
        (lambda _: None) if is_complete else warn,
    )
    if checkpoint is None:
        return Start(None, 0, True, False, recipe, info)
    if is_complete:
        # Nothing is trained any more: the recipe stays, but for what is shown and kept.
        values = {key: value for key, value in recipe.flat().items() if key in HARMLESS_KEYS}
        if "corpus_sha256" not in changed:
            values["corpus"] = recipe.data.corpus  # where the text is now
        recipe = trained_with.replace(**values | {"resume": newest.checkpoint.resume})
        info = before.model_copy(update={"recipe": recipe, "resumed": before.before(step)})
        return Start(checkpoint, step, True, False, recipe, info, keeps_best=True)
    keeps_best = in_place and not window_names(trained_with, recipe) & changed.keys()
    is_old_stream = recipe.validation.sampling == "own-stream" and read_manifest(checkpoint).format == 1
    if is_old_stream and recipe.validation.val_every:
        keeps_best = False
        warn(
            "the held-out windows of own-stream are not those of mygpt 0.1: losses before and after differ by that, too"
        )
    if in_place and not keeps_best and read_state_metadata(checkpoint / STATE_FILE).best:
        warn("`best` begins again, since the held-out windows are others: the next evaluation is the first of them")
    if trained_with.train.steps != recipe.train.steps:
        changed["steps"] = (trained_with.train.steps, recipe.train.steps)
        tell_steps(trained_with, recipe, step, warn)
    if not in_place:
        begun = Resumed(
            after_step=step,
            checkpoint=str(checkpoint),
            manifest_sha256=file_sha256(checkpoint / MANIFEST_FILE),
            changed=changed,
            recipe=trained_with,
        )
        info = info.model_copy(update={"recipe": recipe, "resumed": (begun,)})
        return Start(checkpoint, step, False, overwrite, recipe, info)
    # Where the run began stays on record.
    recipe = recipe.replace(resume=newest.checkpoint.resume)
    # run.json records what changed; a run that was only killed and continued records nothing. Entries after a later
    # step belong to a continuation that this one replaces.
    resumed = before.before(step)
    if changed:
        resumed += (Resumed(after_step=step, changed=changed, recipe=trained_with),)
    info = before.model_copy(update={"recipe": recipe, "resumed": resumed})
    return Start(checkpoint, step, True, False, recipe, info, keeps_best)


def begin_run(start: Start) -> None:
    """Make the run directory ready: a new run's, or tidied and with what is to be recorded of its going on.

    Raises:
        CheckpointError: a run has come to be there.
        DamagedCheckpointError: the disk refused it.
    """
    run = Path(start.recipe.checkpoint.output)
    if not start.in_place:
        create_run(run, start.recipe, start.info, overwrite=start.overwrite, after=start.checkpoint)
        return
    record_run(run, start.recipe, start.info)
    best = read_state_metadata(start.checkpoint / STATE_FILE).best_step if start.checkpoint else None
    tidy(run, start.recipe.checkpoint.keep_last, start.step, best if start.keeps_best else None)


def _is_run_of(run: Path, recipe: Recipe, info: RunInfo) -> bool:
    """Whether the run is the one that this command began, perhaps in another environment.

    Raises:
        DamagedCheckpointError: there is a run that cannot be read, so that it cannot be said whose it is.
    """
    if not os.path.lexists(run / RECIPE_FILE):
        return False
    before = read_run(run)
    # The program may have another path by now, and so may the text.
    paths = {"output": recipe.checkpoint.output, "corpus": recipe.data.corpus}
    recorded = self_contained(recorded_recipe(run)).replace(**paths)
    same_text = before.recorded()["corpus_sha256"] == info.corpus_sha256
    return recorded == recipe and same_text and before.command[1:] == info.command[1:]


def _find_source(run: Path, resume: str, overwrite: bool, warn: Warn) -> Source | None:
    """The run itself where it is to be continued, or the one that `resume` names; None: start from the beginning."""
    # recipe.toml is the last that a new run gets: without it there is a run that was killed while it was made.
    if os.path.lexists(run / RECIPE_FILE) and not overwrite and not (resume in ("auto", "never") and has_no_steps(run)):
        old = self_contained(recorded_recipe(run))
        if resume not in ("auto", old.checkpoint.resume):
            raise CheckpointError(
                f"output: {run} already holds a run, and resume is {resume!r}; choose another --output, replace it "
                'with --overwrite, or continue it with --resume "auto"'
            )
        source = Source(run, newest_checkpoint(run, warn), True)
        begun = read_run(run).resumed
        if source.checkpoint is None and begun and begun[0].checkpoint:
            # It began after another run's checkpoint, and was killed before it had one of its own.
            return _named_source(origin(run, begun[0]), warn)
        return source
    return None if resume in ("auto", "never") else _named_source(Path(resume), warn)


def origin(run: Path, begun: Resumed) -> Path:
    """The step directory of another run after which `run` began.

    Raises:
        MismatchError: it is gone, or is another now.
    """
    path = Path(begun.checkpoint or "")
    try:
        found = file_sha256(path / MANIFEST_FILE)
    except (OSError, ValueError):
        found = None
    if found != begun.manifest_sha256:
        raise MismatchError(
            f"{path}: the checkpoint after which {run} began is {'another now' if found else 'gone'}; put it back, or "
            "begin again with --overwrite and the --resume of where it is now"
        )
    return path


def _named_source(path: Path, warn: Warn) -> Source:
    """The run and the checkpoint that a user means by the path of either."""
    try:
        path = path.resolve()
        if FAILED_NAME.fullmatch(path.name):
            raise CheckpointError(f"resume: {path} is the record of a step that failed; name a step directory")
        if (path / RUN_FILE).exists():
            checkpoint = newest_checkpoint(path, warn)
            if checkpoint is None:
                raise CheckpointError(f"resume: {path} has no checkpoint yet")
            return Source(path, checkpoint, False)
        is_in_run = (path.parent / RUN_FILE).exists() and path.is_dir()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"resume: got {str(path)!r}: {error}") from None
    if not is_in_run:
        raise CheckpointError(f'resume: got {str(path)!r}, expected "auto", "never", or a run or step directory')
    verify_checkpoint(path)
    return Source(path.parent, path, False)


def newest_checkpoint(run: Path, warn: Warn) -> Path | None:
    """The newest step directory of a run that is whole; None where there is no step directory.

    `latest` is not asked: a run killed just before it was replaced has a newer checkpoint.

    Raises:
        DamagedCheckpointError: there are step directories, and none is whole.
        NewerFormatError: a later version of mygpt wrote it: falling back would discard that.
    """
    directories = step_directories(run)
    for _, directory in reversed(directories):
        try:
            verify_checkpoint(directory)
        except DamagedCheckpointError as error:
            warn(f"{error}; falling back to the checkpoint before it")
        else:
            return directory
    if directories:
        raise DamagedCheckpointError(
            f"{run}: none of its {len(directories)} checkpoints is whole; restore one, choose another --output, or "
            "start again with --overwrite"
        )
    return None


def recorded_recipe(run: Path) -> Recipe:
    """The newest recipe of a run.

    Raises:
        CheckpointError: there is no run.
        DamagedCheckpointError: it cannot be read.
    """
    if not os.path.lexists(run / RUN_FILE):
        raise CheckpointError(f"{run}: no such run; expected a directory that `mygpt train` has written")
    if (recipe := read_run(run).recipe) is not None:
        return recipe.replace(output=str(run))
    try:
        return load_recipe(run / RECIPE_FILE)
    except RecipeError as error:
        raise DamagedCheckpointError(
            f"{run}: its recipe cannot be read, so that it cannot be continued: {error}; mend it, choose another "
            "--output, or --overwrite the run"
        ) from None


def recipe_of_checkpoint(checkpoint: Path, newest: Recipe, info: RunInfo) -> Recipe:
    """The recipe with which a step was trained, of a run that is recorded as `newest` and `info`."""
    manifest = read_manifest(checkpoint)
    if manifest.recipe is None:
        return recipe_at(manifest.step, newest, info)
    corpus = recipe_at(manifest.step, newest, info).data.corpus
    paths = {"corpus": corpus, "output": newest.checkpoint.output, "resume": newest.checkpoint.resume}
    return manifest.recipe.replace(**paths)


def recipe_at(step: int, newest: Recipe, info: RunInfo) -> Recipe:
    """The recipe with which a run trained `step`: the one that it had when it next went on, or its newest."""
    later = [resumed for resumed in info.history if resumed.after_step >= step]
    if later and later[0].recipe is not None:
        return later[0].recipe
    # mygpt 0.1 recorded what was changed only.
    keys = {name: was for resumed in reversed(later) for name, (was, _) in resumed.changed.items()}
    return newest.replace(**{name: was for name, was in keys.items() if name in TABLE_OF_KEY})


def is_finished(checkpoint: Path, newest: Recipe) -> bool:
    """Whether the run ended with this checkpoint; in format 1, whether it is the last step of its `newest` recipe."""
    manifest = read_manifest(checkpoint)
    return manifest.step == newest.train.steps if manifest.finished is None else manifest.finished
