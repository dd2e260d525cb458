"""The weights of another model that a run begins with (the key `init_from`), and the texts that fit its tokenizer."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mygpt.data.build import tokenizer_from
from mygpt.data.dataset import Dataset, load_dataset
from mygpt.errors import CheckpointError, RecipeError, TokenizerError
from mygpt.recipe.tables import Recipe
from mygpt.runs.files import MANIFEST_FILE, file_sha256
from mygpt.runs.run import Run, find_model_file
from mygpt.runs.schemas import ModelMetadata
from mygpt.runs.steps import read_manifest, read_metadata, verify_file

FREE_MODEL_KEYS = {"dropout", "init"}
"""Keys of [model] in which a run may differ from the model that it begins with."""


class Initial(NamedTuple):
    """A model file that a run begins with."""

    file: Path
    metadata: ModelMetadata
    sha256: str
    """Of the file; where that is gone, as the run has recorded it."""


def find_initial(recipe: Recipe) -> Initial | None:
    """The model that a run of the recipe begins, or began, with; None: with random weights.

    A run that is there, or the one that `resume` names, needs it no more: if it is gone, the newest checkpoint of that
    run stands in for it.

    Raises:
        CheckpointError: there is none.
        DamagedCheckpointError: it is not as it was saved.
        RecipeError: it has another architecture than the recipe.
    """
    if recipe.train.init_from is None:
        return None
    try:
        file = find_model_file(Path(recipe.train.init_from))
    except CheckpointError as error:
        for path in (Path(recipe.checkpoint.output), Path(recipe.checkpoint.resume)):
            with suppress(CheckpointError):
                file = find_model_file(path)
                if sha256 := Run(file.parent.parent).info.init_sha256:
                    return Initial(file, read_metadata(file, ModelMetadata), sha256)
        raise type(error)(f"init_from: {error}") from None
    if (file.parent / MANIFEST_FILE).exists():
        verify_file(file, read_manifest(file.parent, prefix=None))
    metadata = read_metadata(file, ModelMetadata)
    other = [
        f"--{key.replace('_', '-')} {saved}"
        for (key, value), (_, saved) in zip(recipe.model, metadata.model, strict=True)
        if key not in FREE_MODEL_KEYS and value != saved
    ]
    if other:
        raise RecipeError(f"init_from: {recipe.train.init_from} has another architecture; set {' '.join(other)}")
    return Initial(file, metadata, file_sha256(file))


def open_dataset(recipe: Recipe, initial: Initial | None = None, *, verify: bool = True) -> Dataset:
    """The texts of a recipe, with the tokenizer of the model that it begins with; see `load_dataset`.

    `initial` is what `find_initial` finds, if that is known.

    Raises:
        MygptError: as `load_dataset` and `find_initial`.
    """
    initial = initial or find_initial(recipe)
    tokenizer = tokenizer_from(initial.metadata.tokenizer) if initial else None
    try:
        return load_dataset(recipe.data, recipe.train.seq_len, verify=verify, tokenizer=tokenizer)
    except TokenizerError as error:
        if initial is None:
            raise
        raise TokenizerError(f"{error} of {initial.file}; give a text that this model can write") from None
