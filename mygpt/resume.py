"""Where a run begins: anew, or after a checkpoint, once what has changed since then is known. Imports no torch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.errors import CheckpointError, DamagedCheckpointError, MismatchError, RecipeError
from mygpt.recipe import TABLE_OF_KEY, CheckpointTable, Recipe, load_recipe
from mygpt.rundir import (
    MODEL_FILE,
    RECIPE_FILE,
    RUN_FILE,
    STATE_FILE,
    Resumed,
    RunInfo,
    create_run,
    read_metadata,
    read_run,
    read_state_metadata,
    record_run,
    step_directories,
    tidy,
    verify_checkpoint,
)

# Keys that say what is shown and kept, and change no number; what `steps` changes is told apart.
HARMLESS_KEYS = {*CheckpointTable.model_fields, "print_every", "log_every", "log_grad_norm", "log_val_stderr", "steps"}
# Keys on which the last bits of the numbers depend, as they do on the machine.
BITS_KEYS = {"device", "threads", "compile", "micro_batch_size"}
# Keys that shift the training batches with sampling = "shared-stream", and else change no weight.
EVALUATION_KEYS = {"val_every", "eval_batches", "sampling"}

Warn = Callable[[str], None]


class Start(NamedTuple):
    """Where a run begins."""

    checkpoint: Path | None
    """The step directory after which it continues, verified; None: it starts from the beginning."""
    step: int
    """That checkpoint's step, or 0."""
    in_place: bool
    """Whether the run directory already holds this run."""
    recipe: Recipe
    info: RunInfo
    """What recipe.toml and run.json are to say."""


def find_start(recipe: Recipe, info: RunInfo, vocab: str, *, overwrite: bool, allow_changes: bool, warn: Warn) -> Start:
    """Decide where a run of `recipe` begins, touching nothing.

    `info` describes the environment, and `vocab` is the vocabulary of the corpus. What has changed since the checkpoint
    is refused, unless with `allow_changes`; where only the last bits depend on it `warn` is told.

    Raises:
        CheckpointError: there is a run that `resume` does not allow to continue, or nothing where it points.
        RecipeError: the recipe differs from the one that the checkpoint was trained with.
        MismatchError: the architecture or the corpus does.
        DamagedCheckpointError: there are checkpoints, and none of them is whole.
    """
    resume, run = recipe.checkpoint.resume, Path(recipe.checkpoint.output)
    if (run / RUN_FILE).exists() and not overwrite:
        if not (run / RECIPE_FILE).exists() and not step_directories(run):
            return Start(None, 0, True, recipe, info)  # it was killed while it was being made
        old = recorded_recipe(run)
        if resume not in ("auto", old.checkpoint.resume):
            raise CheckpointError(
                f"output: {run} already holds a run, and resume is {resume!r}; choose another --output, replace it "
                'with --overwrite, or continue it with --resume "auto"'
            )
        source, in_place = run, True
        checkpoint = newest_checkpoint(run, warn)
        if checkpoint is None and old.checkpoint.resume not in ("auto", "never"):
            # It began after another run's checkpoint, and was killed before it had one of its own.
            recipe = _with_resume(recipe, old.checkpoint.resume)
            source, checkpoint = _find_source(Path(old.checkpoint.resume), warn)
            in_place = False
    elif resume in ("auto", "never"):
        return Start(None, 0, False, recipe, info)
    else:
        source, checkpoint = _find_source(Path(resume), warn)
        old, in_place = recorded_recipe(source), False

    before = read_run(source)
    _check_changes(source, old, before, recipe, info, allow_changes, warn)
    if checkpoint is None:
        return Start(None, 0, True, recipe, info)
    metadata = read_metadata(checkpoint / MODEL_FILE)
    step, steps = metadata.step, recipe.train.steps
    for (key, value), (_, saved) in zip(recipe.model, metadata.model, strict=True):
        if key != "dropout" and value != saved:
            raise MismatchError(f"[model] {key}: got {value}, expected {saved}, the architecture of {checkpoint}")
    if vocab != metadata.tokenizer.vocab:
        raise MismatchError(f"[data] corpus: its characters are not the vocabulary of {checkpoint}")
    if step > steps:
        raise RecipeError(
            f"[train] steps: got {steps}, expected at least {step}, to which {source} has been trained; raise --steps, "
            "or choose another --output"
        )
    changed = dict(changed_environment(before, info))
    if old.train.steps != steps:
        changed["steps"] = (old.train.steps, steps)
        if recipe.schedule.schedule != "constant":
            warn(
                f"steps {old.train.steps} -> {steps}: from step {step + 1} on, the rate is that of a "
                f"{recipe.schedule.schedule} schedule over {steps} steps; before, it fell as over {old.train.steps}: "
                f"not the run that {steps} steps from the start would be"
            )
    if not in_place:
        begun = Resumed(after_step=step, checkpoint=str(checkpoint), changed=changed)
        return Start(checkpoint, step, False, recipe, info.model_copy(update={"resumed": (begun,)}))
    # run.json says what was different when the run went on: nothing, for one that was merely killed.
    resumed = (*before.resumed, *([Resumed(after_step=step, changed=changed)] if changed else []))
    recipe = _with_resume(recipe, old.checkpoint.resume)
    return Start(checkpoint, step, True, recipe, before.model_copy(update={"resumed": resumed}))


def begin_run(start: Start) -> None:
    """Make the run directory ready: a new run's, or tidied and with what is to be recorded of its going on.

    Raises:
        DamagedCheckpointError: the disk refused it.
    """
    run = Path(start.recipe.checkpoint.output)
    if not start.in_place:
        create_run(run, start.recipe, start.info, after=start.checkpoint)
        return
    record_run(run, start.recipe, start.info)
    best = None
    if start.checkpoint is not None:
        best = read_state_metadata(start.checkpoint / STATE_FILE).best_step
    tidy(run, start.recipe.checkpoint.keep_last, start.step, best)


def _with_resume(recipe: Recipe, resume: str) -> Recipe:
    return recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"resume": resume})})


def _find_source(path: Path, warn: Warn) -> tuple[Path, Path]:
    """The run and the verified step directory that a user means by one of either."""
    if (path / RUN_FILE).exists():
        checkpoint = newest_checkpoint(path, warn)
        if checkpoint is None:
            raise CheckpointError(f"resume: {path} has no checkpoint yet")
        return path, checkpoint
    directory = path.resolve()
    if not (directory.parent / RUN_FILE).exists():
        raise CheckpointError(f'resume: got {str(path)!r}, expected "auto", "never", or a run or step directory')
    verify_checkpoint(directory)
    return path.absolute().parent, directory


def newest_checkpoint(run: Path, warn: Warn) -> Path | None:
    """The newest step directory of a run that is whole; None where there is no step directory.

    `latest` is not asked: a run killed just before it was replaced has a newer checkpoint.

    Raises:
        DamagedCheckpointError: there are step directories, and none is whole.
        NewerFormatError: a later version of mygpt wrote it: falling back would discard that.
    """
    directories = step_directories(run)
    for directory in reversed(directories):
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
    """The recipe that a run was trained with.

    Raises:
        DamagedCheckpointError: it cannot be read.
    """
    try:
        return load_recipe(run / RECIPE_FILE)
    except RecipeError as error:
        raise DamagedCheckpointError(f"{run}: its recipe cannot be read: {error}") from None


def _check_changes(
    source: Path, old: Recipe, before: RunInfo, recipe: Recipe, info: RunInfo, allow_changes: bool, warn: Warn
) -> None:
    changes = list(changed_keys(old, recipe))
    architecture = [change for change in changes if change.table == "model" and change.key != "dropout"]
    if architecture:
        raise MismatchError(
            "\n".join(f"{change}, the architecture of {source}; choose another --output" for change in architecture)
        )
    problems = [f"{c}, as {source} was trained" for c in changes if c.key not in BITS_KEYS and c.key != "corpus"]
    other_corpus = before.corpus_sha256 != info.corpus_sha256
    if other_corpus:
        problems.append(f"[data] corpus: {recipe.data.corpus} is not the text that {source} was trained on")
    if problems and not allow_changes:
        way_out = "choose another --output, --overwrite the run, or continue it with --allow-changes"
        kind = MismatchError if other_corpus else RecipeError
        raise kind("\n".join(f"{problem}; {way_out}" for problem in problems))
    for problem in problems:
        warn(problem)
    bits = [f"{c.key} {c.old} -> {c.new}" for c in changes if c.key in BITS_KEYS]
    bits += [f"{name} {was} -> {now}" for name, (was, now) in changed_environment(before, info)]
    if bits:
        warn(f"the last bits will differ from those of a run that was never interrupted: {', '.join(bits)}")


class KeyChange(NamedTuple):
    """A key with which a run was trained, and with which it would go on."""

    table: str
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"[{self.table}] {self.key}: got {self.new}, expected {self.old}"


def changed_keys(old: Recipe, new: Recipe) -> Iterator[KeyChange]:
    """The keys that differ between two recipes and can change a number."""
    harmless = HARMLESS_KEYS
    if "shared-stream" not in (old.validation.sampling, new.validation.sampling):
        harmless = harmless | EVALUATION_KEYS
    for key, table in TABLE_OF_KEY.items():
        before, now = getattr(getattr(old, table), key), getattr(getattr(new, table), key)
        if before != now and key not in harmless:
            yield KeyChange(table, key, before, now)


def changed_environment(before: RunInfo, now: RunInfo) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Name, old and new value of what the last bits depend on, where it has changed since the run last went on."""
    values = before.environment()
    for resumed in before.resumed:
        values |= {name: value for name, (_, value) in resumed.changed.items()}
    for name, value in now.environment().items():
        if name in values and values[name] != value:
            yield name, (values[name], value)
