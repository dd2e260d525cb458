"""Run directories: where things are in them, how one is made, and how a checkpoint in one is found.

A run directory holds the resolved recipe, run.json, metrics.jsonl, one directory `step-NNNNNN` per saved step and
`latest`, the name of the newest. Imports no torch.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open

from mygpt.errors import CheckpointError, DamagedCheckpointError
from mygpt.recipe import ModelTable, Recipe, Table

MODEL_FILE = "model.safetensors"
RECIPE_FILE = "recipe.toml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
LATEST_FILE = "latest"

METADATA_KEY = "mygpt"
"""The only key: safetensors writes two or more in random order, and the file's bytes should be repeatable."""

STEP_NAME = re.compile(r"step-\d{6,}")

# What a run writes into its directory; replacing a run removes nothing else.
RUN_ENTRY = re.compile(rf"recipe\.toml|run\.json|metrics\.jsonl|latest|(\.tmp-)?({STEP_NAME.pattern}|latest)")


class TokenizerMetadata(Table):
    """What a tokenizer is made again from."""

    type: Literal["char"] = "char"
    vocab: Annotated[str, Field(min_length=1)]


class ModelMetadata(Table):
    """What a model file says of itself, beside its weights."""

    format: Literal[1] = 1
    model: ModelTable
    step: Annotated[int, Field(ge=0)]
    """The optimizer step after which it was saved."""
    tokenizer: TokenizerMetadata

    def to_json(self) -> str:
        """Canonical: the same metadata is always the same text."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))


def check_output(run: Path, overwrite: bool) -> None:
    """See that a run may be written to `run`, without touching the disk.

    Raises:
        CheckpointError: there is a run and `overwrite` is not set, or there is something that is not a run.
    """
    try:
        entries = [entry.name for entry in run.iterdir()]
        parent = run
    except FileNotFoundError:
        entries = []
        parent = next(path for path in run.absolute().parents if path.exists())
        if not parent.is_dir():
            raise CheckpointError(f"output: {parent} is a file; choose another --output") from None
        if any(len(os.fsencode(name)) > 255 for name in run.parts):
            raise CheckpointError(
                f"output: {run}: {os.strerror(errno.ENAMETOOLONG)}; choose another --output"
            ) from None
    except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"output: {str(run)!r}: {reason}; choose another --output") from None
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"output: {parent}: no permission to write there; choose another --output")
    if entries and RUN_FILE not in entries:
        raise CheckpointError(
            f"output: {run} is not empty and not a run (it holds {entries[0]!r}); choose another --output"
        )
    if entries and not overwrite:
        raise CheckpointError(
            f"output: {run} already holds a run; choose another --output, or replace it with --overwrite"
        )


def create_run(run: Path, recipe: Recipe, info: Mapping[str, Any]) -> None:
    """Make the run directory, removing the run that is there, with its recipe.toml and run.json.

    Raises:
        DamagedCheckpointError: the disk refused it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        # run.json marks the directory as a run: the last to go and the first to come.
        for entry in sorted(run.iterdir(), key=lambda entry: entry.name == RUN_FILE):
            if RUN_ENTRY.fullmatch(entry.name):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        (run / RUN_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        (run / RECIPE_FILE).write_text(recipe.to_toml(), encoding="utf-8")
    except OSError as error:
        raise DamagedCheckpointError(f"output: {run}: cannot be written: {error.strerror}") from None


def find_model_file(path: Path) -> Path:
    """The model file that a user means by a file, a step directory or a run directory (its newest step).

    Raises:
        CheckpointError: there is none.
        DamagedCheckpointError: `latest` does not name a step of this run.
    """
    try:
        if path.is_file():
            return path
        if (path / MODEL_FILE).is_file():
            return path / MODEL_FILE
        name = (path / LATEST_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        what = "has no checkpoint" if path.is_dir() else "no such run, step directory or model file"
        raise CheckpointError(f"{path}: {what}; expected what `mygpt train` has written") from None
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r}: not a path: {error}") from None
    # `latest` is text from a file: only a step's plain name may choose a path.
    file = path / name / MODEL_FILE
    if not STEP_NAME.fullmatch(name) or not file.is_file():
        raise DamagedCheckpointError(
            f"{path / LATEST_FILE}: got {name!r}, which is not a checkpoint of this run; name a step directory instead"
        )
    return file


def read_metadata(file: Path) -> ModelMetadata:
    """The metadata that mygpt wrote into a model file.

    Raises:
        DamagedCheckpointError: it is not such a file.
    """
    try:
        with safe_open(file, framework="numpy") as tensors:
            text = (tensors.metadata() or {})[METADATA_KEY]
    except (OSError, SafetensorError, KeyError) as error:
        raise DamagedCheckpointError(f"{file}: not a model that mygpt saved, or damaged ({error})") from None
    try:
        return ModelMetadata.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise DamagedCheckpointError(
            f"{file}: damaged, or of another version of mygpt: metadata {where}: {problem['msg']}"
        ) from None
