"""Where a run begins: anew, or after a checkpoint, once what has changed since then is known. Imports no torch."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.errors import CheckpointError, DamagedCheckpointError, MismatchError, RecipeError
from mygpt.metadata import Resumed, RunInfo
from mygpt.recipe import TABLE_OF_KEY, CheckpointTable, Recipe, load_recipe
from mygpt.rundir import (
    FAILED_NAME,
    MANIFEST_FILE,
    MODEL_FILE,
    RECIPE_FILE,
    RUN_FILE,
    STATE_FILE,
    create_run,
    file_sha256,
    read_metadata,
    read_run,
    read_state_metadata,
    record_run,
    step_directories,
    tidy,
    verify_checkpoint,
)

# Keys that say what is shown and kept, and change no number; what `steps` changes is told apart.
HARMLESS_KEYS = {
    *CheckpointTable.model_fields,
    *("print_every", "log_every", "log_grad_norm", "log_val_stderr", "activation_checkpointing", "steps"),
}
# Keys whose meaning on this machine, or whose content, run.json has: that is what is compared.
RESOLVED_KEYS = {"device", "threads", "micro_batch_size", "compile", "reduction", "corpus"}
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
    overwrite: bool
    """Whether it may hold another, to be removed."""
    recipe: Recipe
    info: RunInfo
    """What recipe.toml and run.json are to say."""


class _Source(NamedTuple):
    """The run from which one continues, and after which of its checkpoints; None: it has none yet."""

    run: Path
    checkpoint: Path | None
    in_place: bool
    """Whether it is the run itself that goes on."""


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
    run = Path(recipe.checkpoint.output)
    overwrite = overwrite and not (is_restart and _is_run_of(run, recipe, info))
    source = _find_source(run, recipe.checkpoint.resume, overwrite, warn)
    if source is None:
        return Start(None, 0, False, overwrite, recipe, info)
    in_place = source.in_place
    if not in_place and source.run.resolve() == run.resolve():
        raise CheckpointError(
            f"resume: {recipe.checkpoint.resume} is in the run that --overwrite would remove; choose another --output"
        )
    old, before = recorded_recipe(source.run), read_run(source.run)
    step = _check_checkpoint(source, recipe, vocab, in_place)
    complete = in_place and step == recipe.train.steps == old.train.steps
    changed = _check_changes(
        source.run, old, before, recipe, info, allow_changes, (lambda _: None) if complete else warn
    )
    if source.checkpoint is None:
        return Start(None, 0, True, overwrite, recipe, info)
    if old.train.steps != recipe.train.steps:
        changed["steps"] = (old.train.steps, recipe.train.steps)
        _tell_steps(old, recipe, step, warn)
    if not in_place:
        begun = Resumed(
            after_step=step,
            checkpoint=str(source.checkpoint),
            manifest_sha256=file_sha256(source.checkpoint / MANIFEST_FILE),
            changed=changed,
        )
        return Start(source.checkpoint, step, False, overwrite, recipe, info.model_copy(update={"resumed": (begun,)}))
    # run.json says what was different when the run went on; a run that was killed and continued says nothing.
    resumed = (*before.resumed, *([Resumed(after_step=step, changed=changed)] if changed and not complete else []))
    # Where the run began stays on record.
    checkpoint_table = recipe.checkpoint.model_copy(update={"resume": old.checkpoint.resume})
    recipe = recipe.model_copy(update={"checkpoint": checkpoint_table})
    return Start(source.checkpoint, step, True, False, recipe, before.model_copy(update={"resumed": resumed}))


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
    steps = start.recipe.train.steps
    if start.step < steps or recorded_recipe(run).train.steps != steps:
        record_run(run, start.recipe, start.info)
    best = None
    if start.checkpoint is not None:
        best = read_state_metadata(start.checkpoint / STATE_FILE).best_step
    tidy(run, start.recipe.checkpoint.keep_last, start.step, best)


def _is_run_of(run: Path, recipe: Recipe, info: RunInfo) -> bool:
    try:
        before = read_run(run)
        return recorded_recipe(run) == recipe and before.model_copy(update={"resumed": ()}) == info
    except CheckpointError:
        return False


def _find_source(run: Path, resume: str, overwrite: bool, warn: Warn) -> _Source | None:
    """The run itself where it is to be continued, or the one that `resume` names; None: start from the beginning."""
    # recipe.toml is the last that a new run gets: without it there is a run that was killed while it was made.
    if os.path.lexists(run / RECIPE_FILE) and not overwrite:
        old = recorded_recipe(run)
        if resume not in ("auto", old.checkpoint.resume):
            raise CheckpointError(
                f"output: {run} already holds a run, and resume is {resume!r}; choose another --output, replace it "
                'with --overwrite, or continue it with --resume "auto"'
            )
        source = _Source(run, newest_checkpoint(run, warn), True)
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
        raise MismatchError(f"{path}: the checkpoint after which {run} began is {'another now' if found else 'gone'}")
    return path


def _named_source(path: Path, warn: Warn) -> _Source:
    """The run and the checkpoint that a user means by the path of either."""
    try:
        path = path.resolve()
        if FAILED_NAME.fullmatch(path.name):
            raise CheckpointError(f"resume: {path} is the record of a step that failed; name a step directory")
        if (path / RUN_FILE).exists():
            checkpoint = newest_checkpoint(path, warn)
            if checkpoint is None:
                raise CheckpointError(f"resume: {path} has no checkpoint yet")
            return _Source(path, checkpoint, False)
        is_in_run = (path.parent / RUN_FILE).exists() and path.is_dir()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"resume: got {str(path)!r}: {error}") from None
    if not is_in_run:
        raise CheckpointError(f'resume: got {str(path)!r}, expected "auto", "never", or a run or step directory')
    verify_checkpoint(path)
    return _Source(path.parent, path, False)


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
    """The recipe that a run was trained with.

    Raises:
        CheckpointError: there is no run.
        DamagedCheckpointError: it cannot be read.
    """
    if not os.path.lexists(run / RUN_FILE):
        raise CheckpointError(f"{run}: no such run; expected a directory that `mygpt train` has written")
    try:
        return load_recipe(run / RECIPE_FILE)
    except RecipeError as error:
        raise DamagedCheckpointError(
            f"{run}: its recipe cannot be read, so that it cannot be continued: {error}; mend it, choose another "
            "--output, or --overwrite the run"
        ) from None


def _check_checkpoint(source: _Source, recipe: Recipe, vocab: str, in_place: bool) -> int:
    """See that the checkpoint fits the recipe and the vocabulary; returns its step."""
    if source.checkpoint is None:
        return 0
    metadata = read_metadata(source.checkpoint / MODEL_FILE)
    problems = [
        f"[model] {key}: got {value}, expected {saved}, as in {source.checkpoint}; choose another --output"
        for (key, value), (_, saved) in zip(recipe.model, metadata.model, strict=True)
        if key != "dropout" and value != saved
    ]
    if vocab != metadata.tokenizer.vocab:
        problems.append(
            f"[data] corpus: its characters are not the vocabulary of {source.checkpoint}; choose another --output"
        )
    if problems:
        raise MismatchError("\n".join(problems))
    step, steps = metadata.step, recipe.train.steps
    if step > steps or (step == steps and not in_place):
        more_than = "at least" if in_place else "more than"
        raise RecipeError(
            f"[train] steps: got {steps}, expected {more_than} {step}, the step of {source.checkpoint}; raise --steps, "
            "or choose another --output"
        )
    return step


def _check_changes(
    run: Path, old: Recipe, before: RunInfo, recipe: Recipe, info: RunInfo, allow_changes: bool, warn: Warn
) -> dict[str, tuple[Any, Any]]:
    """Refuse, or tell, what has changed since `run` was trained; returns old and new values by name."""
    keys = dict(changed_keys(old, recipe))
    problems = [
        f"[{TABLE_OF_KEY[key]}] {key}: got {new}, expected {was}, as {run} was trained"
        for key, (was, new) in keys.items()
    ]
    content = dict(_changed(before.effective("corpus_sha256"), {"corpus_sha256": info.corpus_sha256}))
    if content:
        problems.append(f"[data] corpus: {recipe.data.corpus} is not the text that {run} was trained on")
    if problems and not allow_changes:
        way_out = "choose another --output, --overwrite the run, or continue it with --allow-changes"
        kind = MismatchError if content else RecipeError
        raise kind("\n".join(f"{problem}; {way_out}" for problem in problems))
    for problem in problems:
        warn(problem)
    environment = dict(_changed(before.effective(*info.environment()), info.environment()))
    # Exact sums do not depend on who computed what.
    exact = before.effective("reduction")["reduction"] == info.reduction == "exact"
    inexact = {name: change for name, change in environment.items() if name != "processes" or not exact}
    if inexact:
        told = ", ".join(f"{name} {was} -> {now}" for name, (was, now) in inexact.items())
        warn(f"the last bits may differ from those of a run that was never interrupted: {told}")
        if recipe.model.dropout and {"processes", "reduction", "device"} & inexact.keys():
            warn("and dropout, whose masks belong to a process or a micro-batch, drops other activations from here on")
    return keys | content | environment


def changed_keys(old: Recipe, new: Recipe) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The keys that differ between two recipes and change more than the last bits, with old and new value."""
    harmless = HARMLESS_KEYS | RESOLVED_KEYS
    validations = (old.validation, new.validation)
    if all(table.sampling != "shared-stream" or not table.val_every for table in validations):
        harmless |= EVALUATION_KEYS
    for key, table in TABLE_OF_KEY.items():
        was, now = getattr(getattr(old, table), key), getattr(getattr(new, table), key)
        if was != now and key not in harmless:
            yield key, (was, now)


def _changed(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name, value in now.items():
        if name in before and before[name] != value:
            yield name, (before[name], value)


def _tell_steps(old: Recipe, recipe: Recipe, step: int, warn: Warn) -> None:
    """Say where going on to another number of steps is not what a run of that many from the start would be."""
    was, now, validation = old.train.steps, recipe.train.steps, old.validation
    if recipe.schedule.schedule != "constant":
        warn(
            f"steps {was} -> {now}: from step {step + 1} on, the rate is that of a {recipe.schedule.schedule} schedule "
            f"over {now} steps; before, it fell as over {was}: not the run that {now} steps from the start would be"
        )
    elif step == was and validation.val_every and was % validation.val_every and validation.sampling == "shared-stream":
        warn(
            f"steps {was} -> {now}: the held-out loss at step {was}, then the last, drew from the stream of training "
            f"batches: those that follow are not those of a run of {now} steps from the start"
        )
