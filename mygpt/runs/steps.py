"""Step directories: finding, reading, verifying and pruning the checkpoints of a run.

All that reads one raises DamagedCheckpointError for a file that is missing, or is not as it was saved, and
NewerFormatError for a file that a later version of mygpt wrote.
"""

from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mygpt.errors import CheckpointError, DamagedCheckpointError, NewerFormatError
from mygpt.runs import files
from mygpt.runs.schemas import Manifest, T, parse_table, read_table

TEMPORARY_REASONS = ("timed", "interrupted")
"""Reasons of checkpoints that are removed when their run saves the next."""


def step_directory(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


def step_directories(run: Path) -> dict[int, Path]:
    """All entries with the name of a step directory, by step, in order."""
    found = {int(match[1]): path for path in run.iterdir() if (match := files.STEP_NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def read_manifest(directory: Path, prefix: str | None = "step-") -> Manifest:
    """The manifest of a directory that is named by this prefix and its step; None: any name, and also a link to one."""
    if prefix is not None and not files.is_directory(directory):
        raise DamagedCheckpointError(f"{directory}: is a link or a file; expected a step directory of mygpt")
    path = directory / files.MANIFEST_FILE
    manifest = read_table(Manifest, path)
    if prefix is not None and directory.name != f"{prefix}{manifest.step:06d}":
        raise DamagedCheckpointError(f"{path}: is that of step {manifest.step}, not of {directory.name}")
    if set(manifest.files) != {files.MODEL_FILE, files.STATE_FILE}:
        raise DamagedCheckpointError(f"{path}: damaged: it does not list {files.MODEL_FILE} and {files.STATE_FILE}")
    return manifest


def verify_checkpoint(directory: Path, prefix: str = "step-") -> Manifest:
    """Compare every file of a checkpoint with its manifest, which is returned."""
    manifest = read_manifest(directory, prefix)
    for name in manifest.files:
        verify_file(directory / name, manifest)
    return manifest


def verify_file(file: Path, manifest: Manifest) -> None:
    """Compare size and hash of a file with its manifest."""
    entry = manifest.files[file.name]  # type: ignore[index]
    with files.explain_disk_error(files.CANNOT_READ, file):
        size = files.regular(file).stat().st_size
        if size != entry.bytes:
            raise DamagedCheckpointError(f"{file}: damaged: {size:,} bytes, expected {entry.bytes:,}")
        if files.file_sha256(file) != entry.sha256:
            raise DamagedCheckpointError(f"{file}: damaged: its sha256 is not the manifest's")


def has_manifest(file: Path) -> bool:
    """Whether a manifest beside a model file says what it must be; of a copy with another name it does not."""
    return file.name == files.MODEL_FILE and (file.parent / files.MANIFEST_FILE).exists()


def read_metadata(file: Path, kind: type[T]) -> T:
    """The metadata of a model file (ModelMetadata) or a state file (StateMetadata).

    Raises:
        CheckpointError: another program wrote it.
    """
    try:
        with safe_open(file, framework="numpy") as tensors:
            metadata = tensors.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{file}: not a file that mygpt saved, or damaged ({error})") from None
    if files.METADATA_KEY not in metadata:
        expected = f"a {files.MODEL_FILE} that `mygpt train` has written"
        raise CheckpointError(f"{file}: weights of another program, without mygpt's metadata; expected {expected}")
    return parse_table(kind, metadata[files.METADATA_KEY], file)


def point_to(run: Path, newest: int, best: int | None) -> None:
    """Write the names of these steps into `latest` and `best`; not of a `best` that is None, or not in this run."""
    files.replace_text(run / files.LATEST_FILE, f"step-{newest:06d}\n")
    # `mygpt at` makes a run that may know of a best step whose checkpoint it does not have.
    if best is not None and step_directory(run, best).is_dir():
        files.replace_text(run / files.BEST_FILE, f"step-{best:06d}\n")


def prune(run: Path, keep_last: int, newest: int, best: int | None) -> None:
    """Remove superseded checkpoints."""
    for directory in superseded(run, keep_last, newest, best):
        files.remove(directory)


def superseded(run: Path, keep_last: int, newest: int, best: int | None) -> list[Path]:
    """The checkpoints up to step `newest` that are not to be kept, without those that are damaged or hold other files.

    To be kept are the newest, the best, and the `keep_last` newest scheduled ones (0: all); without a `best` also those
    that were the best of an earlier kind of evaluation.
    """
    reasons = {}
    for step, directory in step_directories(run).items():
        with suppress(DamagedCheckpointError, NewerFormatError):
            manifest = read_manifest(directory)
            sizes = {
                entry.name: entry.lstat().st_size for entry in directory.iterdir() if entry.name != files.MANIFEST_FILE
            }
            if step <= newest and sizes == {name: entry.bytes for name, entry in manifest.files.items()}:
                reasons[step] = manifest.reason
    scheduled = [step for step, reason in reasons.items() if reason == "scheduled"]
    kept = {newest, best, *scheduled[-keep_last:]}
    if best is None:
        kept |= {step for step, reason in reasons.items() if reason == "best"}
    return [step_directory(run, step) for step in reasons.keys() - kept]
