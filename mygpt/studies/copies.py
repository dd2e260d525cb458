"""The models that the runs of a study begin with, of which it keeps copies: their own runs may go on, or be removed."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from mygpt.errors import CheckpointError, DamagedCheckpointError, MismatchError
from mygpt.recipe.tables import Recipe
from mygpt.runs.files import COPY_NAME, MEND_DISK, explain_disk_error, file_sha256, sync
from mygpt.runs.run import find_model_file
from mygpt.studies.grid import Cell

CANNOT_SAVE_COPY = "{path}: cannot be written: {reason}" + MEND_DISK
HASH_CHARACTERS = 8
"""Of each hash in the name of a copy."""


def with_copies(cells: Sequence[Cell], folder: Path, report: Callable[[str], None]) -> list[Cell]:
    """The cells, with the copy of the model that they begin with where the study has it already.

    Raises:
        DamagedCheckpointError: a copy is not what was copied.
    """
    copies: dict[str | None, str | None] = {None: None}
    for given in (cell.recipe.train.init_from for cell in cells):
        if given is None or given in copies:
            continue
        copy = next(folder.glob(f"{_name_of_copy(given)}-*.safetensors"), None)
        copies[given] = str(copy) if copy else given
        if copy:
            sha256 = file_sha256(copy)
            if not copy.stem.endswith(f"-{sha256[:HASH_CHARACTERS]}"):
                raise DamagedCheckpointError(f"{copy}: damaged; put it back, or choose another --out")
            if sha256 != _hash_of_model(given, otherwise=sha256):
                report(f"init_from: {given} is another model by now; the study goes on with {copy}")
    return [cell._replace(recipe=cell.recipe.replace(init_from=copies[cell.recipe.train.init_from])) for cell in cells]


def copy_model(recipe: Recipe, folder: Path, sha256: str | None) -> str | None:
    """The study's copy of the model that a recipe begins with, which has this hash; None: it begins with none.

    Raises:
        MismatchError: the model has changed since its hash was taken.
        DiskError: the copy cannot be written.
    """
    init_from = recipe.train.init_from
    if init_from is None or (Path(init_from).parent == folder and COPY_NAME.fullmatch(Path(init_from).name)):
        return init_from
    copy = folder / f"{_name_of_copy(init_from)}-{str(sha256)[:HASH_CHARACTERS]}.safetensors"
    if not copy.exists():
        partial = copy.with_name(f".tmp-{copy.name}")
        try:
            with explain_disk_error(CANNOT_SAVE_COPY, copy):
                shutil.copyfile(find_model_file(Path(init_from)), partial)
                if file_sha256(partial) != sha256:
                    raise MismatchError(f"init_from: {init_from} has changed meanwhile; the same command begins again")
                sync(partial)
                partial.replace(copy)
                sync(folder)
        finally:
            partial.unlink(missing_ok=True)  # it may have filled the disk
    return str(copy)


def _name_of_copy(init_from: str) -> str:
    """The beginning of the name of a copy: the end of the path that was given, and a hash of all of it."""
    path = os.path.abspath(init_from)
    name = re.sub(r"[^\w.]+", "-", "-".join(Path(path).parts[-2:]))[-60:]
    return f"init-{name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:HASH_CHARACTERS]}"


def _hash_of_model(init_from: str, *, otherwise: str) -> str:
    """The hash of the model that a path names now; `otherwise`, if it names none."""
    try:
        return file_sha256(find_model_file(Path(init_from)))
    except (CheckpointError, OSError):
        return otherwise
