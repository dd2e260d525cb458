"""The weights of another model that a run begins with (the key `init_from`), and the texts that fit its tokenizer."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mygpt.data.build import tokenizer_from
from mygpt.data.dataset import Dataset, load_dataset
from mygpt.errors import CheckpointError, RecipeError, TokenizerError
from mygpt.recipe.files import RUN_FILE
from mygpt.recipe.tables import Recipe
from mygpt.runs.files import BEST_FILE, LATEST_FILE, MODEL_FILE, STEP_NAME, file_sha256
from mygpt.runs.run import RunDirectory, find_model_file, named_checkpoint
from mygpt.runs.schemas import Manifest, ModelMetadata
from mygpt.runs.steps import TEMPORARY_REASONS, manifest_of, read_manifest, read_metadata, verify_file

FREE_MODEL_KEYS = {"dropout", "init"}
"""Keys of [model] in which a run may differ from the model that it begins with."""


class Initial(NamedTuple):
    """A model file that a run begins with."""

    path: str
    """As the run records it: the file, or its step directory."""
    file: Path
    """Where metadata and tokenizer are read."""
    metadata: ModelMetadata
    sha256: str
    """Of the weights that the run began with."""
    note: str = ""
    """What the user should know of it."""


def find_initial(recipe: Recipe, *, continues: bool = True) -> Initial | None:
    """The model that a run of the recipe begins, or began, with; None: its weights are random.

    A run that is there, if it `continues`, and a branch keep the model that run.json records, even if the run that
    `init_from` names has newer checkpoints by now, or is gone: their own newest checkpoint has the same tokenizer.

    Raises:
        CheckpointError: `init_from` names no model.
        DamagedCheckpointError: the model is not as it was saved.
        RecipeError: the model has another architecture than the recipe.
    """
    init_from = recipe.train.init_from
    if init_from is None:
        return None
    recorded = _recorded_initial(recipe) if continues else None
    if recorded and (_may_name(init_from, recorded.path) or not os.path.lexists(init_from)):
        return recorded._replace(note=_note_on_path(init_from, recorded.path))
    try:
        file = find_model_file(Path(init_from))
    except CheckpointError as error:
        raise type(error)(f"init_from: {error}") from None
    if manifest := manifest_of(file):
        verify_file(file, manifest)
    metadata = read_metadata(file, ModelMetadata)
    other = [
        f"--{key.replace('_', '-')} {saved}"
        for (key, value), (_, saved) in zip(recipe.model, metadata.model, strict=True)
        if key not in FREE_MODEL_KEYS and value != saved
    ]
    if other:
        raise RecipeError(f"init_from: {init_from} has another architecture; set {' '.join(other)}")
    path = os.path.realpath(file if file == Path(init_from) else file.parent)
    note = ""
    if manifest and _is_removable(file.parent, manifest):
        note = f"init_from: {path} may be removed when its run goes on, and `verify` needs it; a copy of it stays"
    return Initial(path, file, metadata, file_sha256(file), note)


def _is_removable(directory: Path, manifest: Manifest) -> bool:
    """Whether this is a step directory of a run that is not finished, and that may remove it."""
    run = RunDirectory(directory.parent)
    if not (STEP_NAME.fullmatch(directory.name) and (run.path / RUN_FILE).exists()):
        return False
    with suppress(CheckpointError):
        if read_manifest(run.checkpoints[max(run.checkpoints)]).ended_by:
            return False
        return manifest.reason in (*TEMPORARY_REASONS, "best") or run.recipe.checkpoint.keep_last > 0
    return True  # the run cannot be read


def _recorded_initial(recipe: Recipe) -> Initial | None:
    """The model that the run in `output`, or that at `resume`, records that it began with; None: it records none."""
    resume = recipe.checkpoint.resume
    for path in (recipe.checkpoint.output, *([] if resume in ("auto", "never") else [resume])):
        with suppress(CheckpointError):
            named = named_checkpoint(Path(path))
            run = RunDirectory(named if (named / RUN_FILE).exists() else named.parent)
            init_from, sha256 = run.recipe.train.init_from, run.info.init_sha256
            if init_from is None or sha256 is None:
                continue
            for step in reversed([*run.checkpoints.values()] if named == run.path else [named]):
                with suppress(CheckpointError):
                    return Initial(
                        init_from, step / MODEL_FILE, read_metadata(step / MODEL_FILE, ModelMetadata), sha256
                    )
            file = find_model_file(Path(init_from))  # the run has no checkpoint yet
            if file_sha256(file) == sha256:
                return Initial(init_from, file, read_metadata(file, ModelMetadata), sha256)
    return None


def _may_name(given: str, recorded: str) -> bool:
    """Whether a path names the recorded checkpoint, or the newest or best one of its run, which may be another now."""
    real = os.path.realpath(given)
    run = os.path.dirname(recorded)
    return real in (recorded, run, *(os.path.join(run, name) for name in (BEST_FILE, LATEST_FILE)))


def _note_on_path(given: str, recorded: str) -> str:
    """A line for the user if a name does not stand for the recorded model any more; "": it does."""
    try:
        file = find_model_file(Path(given))
    except CheckpointError:
        return f"init_from: {given} is not there; what began with {recorded} goes on"
    if recorded in (names := (os.path.realpath(file.parent), os.path.realpath(file))):
        return ""
    return f"init_from: {given} is {names[0]} by now; what began with {recorded} goes on"


def open_dataset(
    recipe: Recipe, initial: Initial | None = None, *, verify: bool = True, only_held_out: bool = False
) -> Dataset:
    """The texts of a recipe, with the tokenizer of the model that it begins with; see `load_dataset`.

    `initial` is what `find_initial` finds, if that is known.

    Raises:
        MygptError: as `load_dataset` and `find_initial`.
    """
    initial = initial or find_initial(recipe)
    tokenizer = tokenizer_from(initial.metadata.tokenizer) if initial else None
    try:
        return load_dataset(
            recipe.data, recipe.train.seq_len, verify=verify, tokenizer=tokenizer, only_held_out=only_held_out
        )
    except TokenizerError as error:
        if initial is None:
            raise
        raise TokenizerError(f"{error} of {initial.file}; give a text that this model can write") from None
