"""Run directories: where things are in them, how one is made, tidied and locked, and how a checkpoint in one is found.

A run directory holds the resolved recipe, run.json, metrics.jsonl, timing.jsonl, one directory `step-NNNNNN` per
checkpoint, `latest` and `best`, which name one of these, and `.lock`. A step directory has its name only once it is
whole: it is written as `.tmp-step-NNNNNN`, and removed as `.tmp-old-NNNNNN`. Imports no torch.
"""

from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mygpt.errors import DamagedCheckpointError, NewerFormatError
from mygpt.runs.files import (
    BEST_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    METADATA_KEY,
    MODEL_FILE,
    STATE_FILE,
    STEP_NAME,
    _regular,
    file_sha256,
    remove,
    replace_text,
)
from mygpt.runs.schemas import M, Manifest, ModelMetadata, StateMetadata, parse_metadata

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
