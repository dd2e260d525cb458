"""Step directories: finding, reading, verifying and pruning the checkpoints of a run.

All that reads one raises DamagedCheckpointError for a file that is missing, or is not as it was saved, and
FormatError for a file that another version of mygpt wrote.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mygpt.errors import CheckpointError, DamagedCheckpointError, FormatError
from mygpt.runs import files
from mygpt.runs.schemas import Manifest, Reason, T, parse_table, read_table

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


def manifest_of(file: Path) -> Manifest | None:
    """The manifest beside a file, if it is one of the files that it names; None: it is not, or there is none."""
    if not (file.parent / files.MANIFEST_FILE).exists():
        return None
    manifest = read_manifest(file.parent, prefix=None)
    return manifest if file.name in manifest.files else None


def verify_checkpoint(directory: Path, prefix: str = "step-") -> Manifest:
    """Compare every file of a checkpoint with its manifest, which is returned."""
    manifest = read_manifest(directory, prefix)
    for name in manifest.files:
        verify_file(directory / name, manifest)
    return manifest


def verify_file(file: Path, manifest: Manifest) -> None:
    """Compare size and hash of a file with the manifest that names it."""
    entry = manifest.files[file.name]  # type: ignore[index]
    with files.explain_disk_error(files.CANNOT_READ, file, DamagedCheckpointError):
        size = files.regular(file).stat().st_size
        if size != entry.bytes:
            raise DamagedCheckpointError(f"{file}: damaged: {size:,} bytes, expected {entry.bytes:,}")
        if files.file_sha256(file) != entry.sha256:
            raise DamagedCheckpointError(f"{file}: damaged: its sha256 is not the manifest's")


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


def saved_reasons(run: Path) -> dict[int, Reason]:
    """Why each checkpoint was saved, by its step, without entries that are damaged or hold other files."""
    found = {step: _saved_reason(directory) for step, directory in step_directories(run).items()}
    return {step: reason for step, reason in found.items() if reason}


def _saved_reason(directory: Path) -> Reason | None:
    with suppress(DamagedCheckpointError, FormatError):
        manifest = read_manifest(directory)
        sizes = {
            entry.name: entry.lstat().st_size for entry in directory.iterdir() if entry.name != files.MANIFEST_FILE
        }
        if sizes == {name: entry.bytes for name, entry in manifest.files.items()}:
            return manifest.reason
    return None


def superseded(reasons: Mapping[int, Reason], keep_last: int, newest: int, best: int | None) -> set[int]:
    """The steps up to `newest` whose checkpoints can be removed, of those with these reasons.

    The newest, the best, and the `keep_last` newest scheduled ones (0: all) stay; without a `best`, as after
    save_best = false, also all that were saved as the best.
    """
    steps = sorted(step for step in reasons if step <= newest)
    scheduled = [step for step in steps if reasons[step] == "scheduled"]
    kept = {newest, best, *scheduled[-keep_last:]}
    if best is None:
        kept |= {step for step in steps if reasons[step] == "best"}
    return {*steps} - kept


def prune(run: Path, keep_last: int, newest: int, best: int | None, reasons: dict[int, Reason]) -> None:
    """Remove superseded checkpoints. `reasons` are what `saved_reasons` found; removed steps are taken out of them."""
    for step in superseded(reasons, keep_last, newest, best):
        if _saved_reason(step_directory(run, step)):  # it may have changed since it was listed
            files.remove(step_directory(run, step))
        del reasons[step]
