"""Run directories: where things are in them, how one is made, tidied and locked, and how a checkpoint in one is found.

A run directory holds the resolved recipe, run.json, metrics.jsonl, timing.jsonl, one directory `step-NNNNNN` per
checkpoint, `latest` and `best`, which name one of these, and `.lock`. A step directory has its name only once it is
whole: it is written as `.tmp-step-NNNNNN`, and removed as `.tmp-old-NNNNNN`. Imports no torch.
"""

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import tomli_w
from pydantic import ValidationError

from mygpt.errors import CheckpointError, DamagedCheckpointError
from mygpt.recipe.files import METRICS_FILE, RECIPE_FILE, RUN_FILE
from mygpt.recipe.tables import NAMED_CORPORA, Recipe
from mygpt.runs.files import (
    BEST_FILE,
    FAILED_NAME,
    LATEST_FILE,
    LOCK_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    RUN_ENTRY,
    STEP_NAME,
    TEMPORARY_NAME,
    TIMING_FILE,
    _delete,
    _naming_disk,
    _regular,
    remove,
    replace_text,
)
from mygpt.runs.schemas import RunInfo
from mygpt.runs.steps import point_to, prune, step_directories

# ---- making a run


def check_output(run: Path, replace: bool) -> None:
    """See that a run may be written to `run`, without touching the disk; with `replace` one may be there already.

    Raises:
        CheckpointError: there is a run and `replace` is not set, or there is something that is not a run.
    """
    try:
        # A run killed before it had its first file has only temporaries.
        entries = [entry.name for entry in run.iterdir() if not _is_transient(entry.name)]
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
        if run.is_symlink():
            raise CheckpointError(f"output: {run} is a link to nothing; choose another --output") from None
    except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"output: {str(run)!r}: {reason}; choose another --output") from None
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"output: {parent}: cannot be written to; choose another --output")
    if RUN_FILE not in entries and METRICS_FILE in entries:
        raise CheckpointError(
            f"output: {run} holds a run without its {RUN_FILE}; restore it, or choose another --output"
        )
    if entries and RUN_FILE not in entries:
        raise CheckpointError(
            f"output: {run} is not empty and not a run (it holds {entries[0]!r}); choose another --output"
        )
    if entries and not replace and not has_no_steps(run):
        raise CheckpointError(
            f"output: {run} already holds a run; choose another --output, or replace it with --overwrite"
        )


def _is_transient(name: str) -> bool:
    """Whether an entry of a run directory is no part of the run: its lock, or a temporary file of a process."""
    return name == LOCK_FILE or TEMPORARY_NAME.fullmatch(name) is not None


def has_no_steps(run: Path) -> bool:
    """Whether a run was killed before its first step, so that replacing it loses nothing."""
    return all(
        entry.name in (RUN_FILE, RECIPE_FILE)
        or (entry.name in (METRICS_FILE, TIMING_FILE) and entry.stat().st_size == 0)
        for entry in run.iterdir()
        if not _is_transient(entry.name)
    )


def create_run(run: Path, recipe: Recipe, info: RunInfo, *, overwrite: bool, after: Path | None = None) -> None:
    """Write recipe.toml and run.json of a new run; with `overwrite`, in place of the run that is in the directory.

    One that goes on `after` a checkpoint of another run begins with that run's records.

    Raises:
        CheckpointError: there is a run, and `overwrite` is not set.
        DamagedCheckpointError: the disk refused it.
    """
    with _naming_disk(run):
        if not overwrite and step_directories(run):
            raise CheckpointError(
                f"output: {run} holds checkpoints but no {RECIPE_FILE}; restore it, choose another --output, or "
                "--overwrite the run"
            )
        # In an order in which a kill leaves the old run with fewer checkpoints, or the new one without its steps: both
        # run.json, which marks the directory as a run, and recipe.toml, which may be what the command names, are
        # replaced and never missing. A new directory gets recipe.toml last.
        for _, directory in reversed(step_directories(run)):
            remove(directory)
        for entry in run.iterdir():
            kept = entry.name in (RUN_FILE, RECIPE_FILE) or (not overwrite and FAILED_NAME.fullmatch(entry.name))
            if RUN_ENTRY.fullmatch(entry.name) and not kept:
                remove(entry)
        replace_text(run / RUN_FILE, info.to_json())
        for name in (METRICS_FILE, TIMING_FILE):
            if after is not None and (after.parent / name).is_file():
                shutil.copyfile(after.parent / name, run / name)
        replace_text(run / RECIPE_FILE, _run_recipe(recipe))


def record_run(run: Path, recipe: Recipe, info: RunInfo) -> None:
    """Write run.json and recipe.toml, each whole or not at all; a file that says the same already is left as it is.

    Raises:
        DamagedCheckpointError: the disk refused it.
    """
    with _naming_disk(run):
        replace_text(run / RUN_FILE, info.to_json())
        replace_text(run / RECIPE_FILE, _run_recipe(recipe))


def _run_recipe(recipe: Recipe) -> str:
    """What recipe.toml says: all but `output`, which is the directory in which it lies, wherever that is moved."""
    tables = recipe.model_dump(exclude_none=True, exclude={"checkpoint": {"output"}})
    return f"# The run in this directory, which `mygpt train` on this file continues.\n\n{tomli_w.dumps(tables)}"


def self_contained(recipe: Recipe) -> Recipe:
    """The recipe as a run records it: its paths do not depend on the working directory."""
    paths = {}
    if recipe.data.corpus not in NAMED_CORPORA:
        paths["corpus"] = os.path.realpath(recipe.data.corpus)
    if recipe.checkpoint.resume not in ("auto", "never"):
        with suppress(ValueError):  # a NUL character, which looking for the run will name
            paths["resume"] = os.path.realpath(recipe.checkpoint.resume)
    return recipe.replace(**paths)


def read_run(run: Path) -> RunInfo:
    """What run.json says.

    Raises:
        DamagedCheckpointError: it cannot be read.
    """
    path = run / RUN_FILE
    try:
        return RunInfo.model_validate_json(_regular(path).read_bytes())
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise DamagedCheckpointError(
            f"{path}: damaged: {'.'.join(map(str, problem['loc'])) or 'content'}: {problem['msg']}"
        ) from None


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
        if (path / MANIFEST_FILE).is_file():
            raise DamagedCheckpointError(f"{path / MODEL_FILE}: is missing; resuming falls back to the step before")
        name = (path / LATEST_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        what = "has no checkpoint" if path.is_dir() else "no such run, step directory or model file"
        if path.is_dir() and step_directories(path):
            what = f"has checkpoints, but no file `{LATEST_FILE}` that names the newest; name a step directory"
        raise CheckpointError(f"{path}: {what}; expected what `mygpt train` has written") from None
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r}: not a path: {error}") from None
    # `latest` is text from a file: only a step's plain name may choose a path, and a link could lead anywhere.
    file = path / name / MODEL_FILE
    if not STEP_NAME.fullmatch(name) or (path / name).is_symlink() or not file.is_file():
        raise DamagedCheckpointError(
            f"{path / LATEST_FILE}: got {name!r}, which is not a checkpoint of this run; name a step directory instead"
        )
    return file


def tidy(run: Path, keep_last: int, newest: int, best: int | None) -> None:
    """Finish what killed processes have left half done: a file half-written or half-removed, `latest`, pruning.

    Raises:
        DamagedCheckpointError: the disk refused it.
    """
    with _naming_disk(run):
        for entry in run.iterdir():
            if TEMPORARY_NAME.fullmatch(entry.name):
                _delete(entry)
        if best is None:
            (run / BEST_FILE).unlink(missing_ok=True)
        if newest:
            point_to(run, newest, best)
            prune(run, keep_last, newest, best)
