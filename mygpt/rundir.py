"""Run directories: where things are in them, how one is made, tidied and locked, and how a checkpoint in one is found.

A run directory holds the resolved recipe, run.json, metrics.jsonl, timing.jsonl, one directory `step-NNNNNN` per
checkpoint, `latest` and `best`, which name one of these, and `.lock`. A step directory has its name only once it is
whole: it is written as `.tmp-step-NNNNNN`, and removed as `.tmp-old-NNNNNN`. Imports no torch.
"""

import errno
import fcntl
import hashlib
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import tomli_w
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from mygpt.errors import CheckpointError, DamagedCheckpointError, NewerFormatError
from mygpt.metadata import M, Manifest, ModelMetadata, RunInfo, StateMetadata, parse_metadata
from mygpt.recipe import METRICS_FILE, NAMED_CORPORA, RECIPE_FILE, RUN_FILE, Recipe, with_keys

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
MANIFEST_FILE = "manifest.json"
TIMING_FILE = "timing.jsonl"
LATEST_FILE = "latest"
BEST_FILE = "best"
LOCK_FILE = ".lock"

METADATA_KEY = "mygpt"
"""The only key: safetensors writes two or more in random order, and the file's bytes should be repeatable."""

STEP_NAME = re.compile(r"step-(\d{6,})")
FAILED_NAME = re.compile(r"failed-step-(\d{6,})")
TEMPORARY_NAME = re.compile(r"\.tmp-(step-\d{6,}|failed-step-\d{6,}|old-.*|[a-z]+(\.[a-z]+)?)")

# What a run writes into its directory; replacing a run removes nothing else.
RUN_ENTRY = re.compile(
    rf"recipe\.toml|run\.json|metrics\.jsonl|timing\.jsonl|latest|best"
    rf"|{STEP_NAME.pattern}|{FAILED_NAME.pattern}|{TEMPORARY_NAME.pattern}"
)


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


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Make the run directory where there is none, and keep other processes from writing to it.

    The kernel releases the lock when the process ends, however that ends. It is on a file that is open for writing: on
    NFS a lock on a directory holds for one machine only, and a file must be writable for a lock that holds for all.

    Raises:
        CheckpointError: another process trains into it.
        DamagedCheckpointError: the disk refused it.
    """
    is_new = not run.exists()
    try:
        descriptor = _lock(run)
    except BlockingIOError:
        raise CheckpointError(
            f"output: another process is training into {run}; wait for it, or choose another --output"
        ) from None
    except OSError as error:
        raise DamagedCheckpointError(f"output: {run}: cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        # A run that failed before it wrote anything leaves nothing.
        with suppress(OSError):
            if [entry.name for entry in run.iterdir()] == [LOCK_FILE]:
                (run / LOCK_FILE).unlink()
                if is_new:
                    run.rmdir()
        os.close(descriptor)


def _lock(run: Path) -> int:
    """The descriptor of the lock file of `run`, locked if the disk has locks.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the disk refused the directory or the file.
    """
    file = run / LOCK_FILE
    while True:
        if not run.exists():
            run.mkdir(parents=True, exist_ok=True)
            sync(run.parent)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # a run that ended meanwhile has removed its directory
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            print(f"{run}: cannot be locked ({error.strerror}): see that no two runs write there", file=sys.stderr)
            return descriptor
        # The process that held it may have removed the file since it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.lstat()):
                return descriptor
        os.close(descriptor)


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
    return with_keys(recipe, **paths)


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


# ---- step directories


def step_directory(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


def step_directories(run: Path) -> list[tuple[int, Path]]:
    """Step and path of what has the name of a step directory, from the earliest step to the newest."""
    return sorted((int(match[1]), path) for path in run.iterdir() if (match := STEP_NAME.fullmatch(path.name)))


def read_manifest(directory: Path, prefix: str | None = "step-") -> Manifest:
    """The manifest of a step directory, whose name is that prefix and the step; None: any name, also of a link.

    Raises:
        DamagedCheckpointError: it is no step directory, or its manifest cannot be read.
        NewerFormatError: a later version of mygpt wrote it.
    """
    if prefix is not None and (directory.is_symlink() or not directory.is_dir()):
        raise DamagedCheckpointError(f"{directory}: is a link or a file; expected a step directory of mygpt")
    path = directory / MANIFEST_FILE
    try:
        text = _regular(path).read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    manifest = parse_metadata(Manifest, text, path)
    if prefix is not None and directory.name != f"{prefix}{manifest.step:06d}":
        raise DamagedCheckpointError(f"{path}: is that of step {manifest.step}, not of {directory.name}")
    if set(manifest.files) != {MODEL_FILE, STATE_FILE}:
        raise DamagedCheckpointError(f"{path}: damaged: it does not list {MODEL_FILE} and {STATE_FILE}")
    return manifest


def verify_checkpoint(directory: Path, prefix: str = "step-") -> Manifest:
    """Hold every file of a step directory against its manifest.

    Raises:
        DamagedCheckpointError: a file is missing, or not the one that was saved.
        NewerFormatError: a later version of mygpt wrote it.
    """
    manifest = read_manifest(directory, prefix)
    for name in manifest.files:
        verify_file(directory / name, manifest)
    return manifest


def verify_file(file: Path, manifest: Manifest) -> None:
    """Hold a file against what the manifest says of it.

    Raises:
        DamagedCheckpointError: it is missing, or not the one that was saved.
    """
    entry = manifest.files[file.name]  # type: ignore[index]
    try:
        size = _regular(file).stat().st_size
        if size != entry.bytes:
            raise DamagedCheckpointError(f"{file}: damaged: {size:,} bytes, expected {entry.bytes:,}")
        if file_sha256(file) != entry.sha256:
            raise DamagedCheckpointError(f"{file}: damaged: its sha256 is not the manifest's")
    except OSError as error:
        raise DamagedCheckpointError(f"{file}: cannot be read: {error.strerror}") from None


def file_sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


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


def read_metadata(file: Path) -> ModelMetadata:
    """The metadata that mygpt wrote into a model file.

    Raises:
        DamagedCheckpointError: it is not such a file.
        NewerFormatError: a later version of mygpt wrote it.
    """
    return _read_metadata(file, ModelMetadata)


def read_state_metadata(file: Path) -> StateMetadata:
    """The metadata that mygpt wrote into a state file; raises as `read_metadata` does."""
    return _read_metadata(file, StateMetadata)


def _read_metadata(file: Path, kind: type[M]) -> M:
    try:
        with safe_open(file, framework="numpy") as tensors:
            text = (tensors.metadata() or {})[METADATA_KEY]
    except (OSError, SafetensorError, KeyError) as error:
        raise DamagedCheckpointError(f"{file}: not a file that mygpt saved, or damaged ({error})") from None
    return parse_metadata(kind, text, file)


# ---- keeping a run tidy


def publish(partial: Path, target: Path) -> None:
    """Give a complete, synced temporary directory its name.

    Whatever is in its place, which resuming has found to be damaged, is set aside under another name, and not deleted.
    """
    if os.path.lexists(target):
        set_aside(target)
    partial.rename(target)
    sync(target.parent)


def set_aside(path: Path, *, copy: bool = False) -> Path:
    """Keep what is damaged, or a copy of it, under a name that no run uses; returns that path."""
    names = (path.with_name(f"damaged-{path.name}-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    shutil.copyfile(path, aside) if copy else path.rename(aside)
    return aside


def point_to(run: Path, newest: int, best: int | None) -> None:
    """Have `latest`, and `best` where there is one, name their steps."""
    replace_text(run / LATEST_FILE, f"step-{newest:06d}\n")
    if best is not None:
        replace_text(run / BEST_FILE, f"step-{best:06d}\n")


def prune(run: Path, keep_last: int, newest: int, best: int | None) -> None:
    """Remove the checkpoints up to step `newest` that are no longer to be kept, and that are whole and ours.

    Kept are the newest, the best, and of the scheduled ones the `keep_last` newest, or all where that is 0. While there
    is no `best`, what was the best under another way to evaluate is kept, too.
    """
    manifests = {}
    for _, directory in step_directories(run):
        with suppress(DamagedCheckpointError, NewerFormatError):
            manifest = read_manifest(directory)
            sizes = {entry.name: entry.lstat().st_size for entry in directory.iterdir() if entry.name != MANIFEST_FILE}
            if sizes == {name: entry.bytes for name, entry in manifest.files.items()} and manifest.step <= newest:
                manifests[manifest.step] = manifest
    scheduled = [step for step, manifest in sorted(manifests.items()) if manifest.reason == "scheduled"]
    kept = {newest, best, *scheduled[-keep_last:]}
    if best is None:
        kept |= {step for step, manifest in manifests.items() if manifest.reason == "best"}
    for step in manifests.keys() - kept:
        remove(step_directory(run, step))


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


def remove(entry: Path) -> None:
    """Remove a file, a link or a directory of ours; a directory loses its name first, so that no part of it counts."""
    if entry.is_dir() and not entry.is_symlink():
        doomed = entry.with_name(f".tmp-old-{entry.name.removeprefix('.tmp-')}")
        if entry != doomed:
            while os.path.lexists(doomed):
                doomed = doomed.with_name(f"{doomed.name}-again")
            entry.rename(doomed)
        entry = doomed
    _delete(entry)


def _delete(entry: Path) -> None:
    # rmtree follows no links. What it cannot remove yet, as where a network disk has a file open, is swept later.
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink()


# ---- files


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one, on the disk when this returns."""
    content = text.encode()
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    partial = path.with_name(f".tmp-{path.name}")
    partial.unlink(missing_ok=True)  # a leftover could be a link
    partial.write_bytes(content)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the system write a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _regular(file: Path) -> Path:
    """The path itself, which must not be a link, a directory or a device."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise OSError(errno.EINVAL, "not a regular file")
    return file


@contextmanager
def _naming_disk(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DamagedCheckpointError(f"output: {error.filename or run}: cannot be written: {error.strerror}") from None
