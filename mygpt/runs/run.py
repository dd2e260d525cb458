"""A run directory: reading what it holds (class `RunDirectory`), and checking that a run may be written there."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mygpt.errors import CheckpointError, DamagedCheckpointError, MismatchError
from mygpt.recipe.files import METRICS_FILE, RECIPE_FILE, RUN_FILE
from mygpt.recipe.tables import Recipe
from mygpt.runs import files
from mygpt.runs.records import LINES, Record, read_records, read_until
from mygpt.runs.schemas import Best, RunInfo, read_table
from mygpt.runs.steps import manifest_of, read_manifest, step_directories, verify_checkpoint

Warn = Callable[[str], None]


@dataclass(frozen=True)
class RunDirectory:
    """A run directory, to be read. run.json and the recipe are read once, when they are first needed.

    Raises CheckpointError if there is no run, DamagedCheckpointError for a file that cannot be read, and
    FormatError for a file that another version of mygpt wrote.
    """

    path: Path

    def __fspath__(self) -> str:
        """Whatever takes the path of a run takes the run."""
        return str(self.path)

    def check_exists(self) -> None:
        """Raise CheckpointError if there is no run."""
        if os.path.lexists(self.path / RUN_FILE):
            return
        if self.path.exists() and os.path.lexists(self.path.parent / RUN_FILE):
            raise CheckpointError(f"{self.path}: not a run, but in one; expected the run, {self.path.parent}")
        raise CheckpointError(f"{self.path}: no such run; expected a directory that `mygpt train` has written")

    @cached_property
    def info(self) -> RunInfo:
        """run.json."""
        self.check_exists()
        return read_table(RunInfo, self.path / RUN_FILE)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, with the newest end."""
        return self.info.recipe.replace(output=str(self.path))

    @property
    def records(self) -> list[Record]:
        """The records in metrics.jsonl; it is an error if there are none."""
        return read_records(self.path)

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The step directories, by step, in order; they may be damaged."""
        return step_directories(self.path)

    @property
    def best(self) -> Path | None:
        """The step directory with the lowest held-out loss; None: there is no file `best`."""
        return self.pointed_by(files.BEST_FILE) if (self.path / files.BEST_FILE).exists() else None

    @property
    def latest(self) -> Path | None:
        """The step directory that was saved last; None: there is no file `latest`."""
        return self.pointed_by(files.LATEST_FILE) if (self.path / files.LATEST_FILE).exists() else None

    @property
    def is_finished(self) -> bool:
        """Whether the run has nothing left to do after its newest whole checkpoint; a signal finishes no run."""
        self.check_exists()
        newest = self.newest_checkpoint()
        return newest is not None and read_manifest(newest).ended_by is not None

    @property
    def has_no_steps(self) -> bool:
        """Whether the run was killed before its first step, so that replacing it loses nothing."""
        return all(
            entry.name in (RUN_FILE, RECIPE_FILE) or (entry.name in LINES and entry.stat().st_size == 0)
            for entry in _entries(self.path)
        )

    @property
    def origin(self) -> Path | None:
        """The step directory of another run after which this one began, or None; MismatchError if it has changed."""
        if (origin := self.info.origin) is None:
            return None
        path = self.path / origin.checkpoint
        try:
            found = files.file_sha256(path / files.MANIFEST_FILE)
        except (OSError, ValueError):
            found = None
        if found != origin.manifest_sha256:
            raise MismatchError(
                f"{path}: the checkpoint after which {self.path} began is {'another now' if found else 'gone'}; put it "
                "back, or begin again with --overwrite and the --resume of where it is now",
                exit_code=1,
            )
        return path

    def newest_checkpoint(self, warn: Warn = lambda _: None) -> Path | None:
        """The newest whole step directory; None: there are no step directories.

        `latest` is not read: if the run was killed just before `latest` was replaced, there is a newer checkpoint.
        Another format is an error, since falling back would discard that checkpoint.
        """
        directories = self.checkpoints.values()
        for directory in reversed(directories):
            try:
                verify_checkpoint(directory)
            except DamagedCheckpointError as error:
                is_first = directory == next(iter(directories))
                warn(f"{error}{'' if is_first else '; falling back to the checkpoint before it'}")
            else:
                return directory
        if directories:
            replaced = self.path / files.REPLACED_NAME
            kept = f"; the run that it replaces is {replaced}" if replaced.is_dir() else ""
            raise DamagedCheckpointError(
                f"{self.path}: none of its {len(directories)} checkpoints is whole; restore one, choose another "
                f"--output, or start again with --overwrite{kept}"
            )
        return None

    def recipe_for(self, step: int) -> Recipe:
        """The recipe with the end that the run had in view when it trained a step."""
        stretch = self.info.stretch_of(step)
        return self.recipe.replace(steps=stretch.steps, patience=stretch.patience)

    def best_until(self, step: int) -> Best | None:
        """The evaluation up to a step with the lowest held-out loss, of those whose checkpoint is there."""
        records, checkpoints = read_until(self.path / METRICS_FILE, Record, step), self.checkpoints
        evaluated = [
            Best(step=record.step, val=record.val)
            for record in records
            if record.val is not None and record.step in checkpoints
        ]
        return min(evaluated, key=lambda best: best.val, default=None)

    def pointed_by(self, pointer: str) -> Path:
        """The step directory that the file `latest` or `best` names; OSError if there is no such file."""
        # This is text from a file: only the plain name of a step may choose a path.
        name = (self.path / pointer).read_text(encoding="utf-8", errors="replace").strip()
        directory = self.path / name
        if (
            files.STEP_NAME.fullmatch(name)
            and files.is_directory(directory)
            and (directory / files.MODEL_FILE).is_file()
        ):
            return directory
        raise DamagedCheckpointError(
            f"{self.path / pointer}: got {name!r}, which is not a checkpoint of this run; name a step directory instead"
        )


def step_named(run: RunDirectory, step: str) -> int:
    """The number of a step that is given by it, or as "best" or "latest".

    Raises:
        CheckpointError: it is neither, or the run has no such checkpoint.
    """
    if step in (files.BEST_FILE, files.LATEST_FILE):
        return read_manifest(named_checkpoint(run.path / step)).step
    if not (step.isdecimal() and 0 < len(step) < 10 and int(step)):
        raise CheckpointError(f'STEP: got {step!r}, expected a number from 1 up, "best" or "latest"')
    return int(step)


def named_checkpoint(path: Path) -> Path:
    """The step directory that RUN/best or RUN/latest names; any other path stands for itself.

    Raises:
        CheckpointError: the run has no such checkpoint.
        DamagedCheckpointError: the file names no step of this run.
    """
    if path.name not in (files.BEST_FILE, files.LATEST_FILE) or not os.path.lexists(path.parent / RUN_FILE):
        return path
    if not path.exists():
        reason = "has no checkpoint yet"
        if path.name == files.BEST_FILE:
            reason = "keeps no best checkpoint: it has save_best = false, or no held-out loss yet"
        raise CheckpointError(f"{path}: {path.parent} {reason}")
    return RunDirectory(path.parent).pointed_by(path.name)


def find_model_file(path: Path) -> Path:
    """The model file of a run directory (its newest step) or of a step directory; a file stands for itself.

    Raises:
        CheckpointError: there is none.
        DamagedCheckpointError: `latest` or `best` names no step of this run.
    """
    try:
        path = named_checkpoint(path)
        if path.is_file():
            if path.suffix != ".safetensors" and not _is_safetensors(path):
                raise CheckpointError(f"{path}: not a model; expected a run, a step directory or a model.safetensors")
            if path.name == files.STATE_FILE:
                raise CheckpointError(f"{path}: the optimizer's state, not a model; expected {files.MODEL_FILE}")
            return path
        if (path / files.MODEL_FILE).is_file():
            return path / files.MODEL_FILE
        if (path / files.MANIFEST_FILE).is_file():
            raise DamagedCheckpointError(
                f"{path / files.MODEL_FILE}: is missing; resuming falls back to the step before"
            )
        return RunDirectory(path).pointed_by(files.LATEST_FILE) / files.MODEL_FILE
    except OSError:
        problem = "has no checkpoint" if path.is_dir() else "no such run, step directory or model file"
        if (path / files.REPLACED_NAME).is_dir():
            problem = f"has no checkpoint yet, and the run that it replaces is {path / files.REPLACED_NAME}"
        if path.is_dir() and step_directories(path):
            problem = f"has checkpoints, but no file `{files.LATEST_FILE}` that names the newest; name a step directory"
        raise CheckpointError(f"{path}: {problem}; expected what `mygpt train` has written") from None
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r}: not a path: {error}") from None


def run_of(file: Path) -> RunDirectory | None:
    """The run in which a model file is a checkpoint's; None: it is in none."""
    return RunDirectory(file.parent.parent) if (file.parent.parent / RUN_FILE).exists() and manifest_of(file) else None


def _is_safetensors(path: Path) -> bool:
    """Whether a file has the beginning of one in that format: 8 bytes, and then a JSON object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def check_output(run: Path, replace: bool) -> None:
    """Check that a run may be written to `run`, without touching the disk; `replace`: there may be one already.

    Raises:
        CheckpointError: it may not.
    """
    if problem := _output_problem(run, replace):
        raise CheckpointError(f"output: {problem}")


def _output_problem(run: Path, replace: bool) -> str:
    entries: list[str] = []
    existing = run
    try:
        # A run that was killed before it had its first file holds only temporary ones.
        entries = [entry.name for entry in _entries(run)]
    except FileNotFoundError:
        existing = next(path for path in run.absolute().parents if path.exists())
        if not existing.is_dir():
            return f"{existing} is a file; choose another --output"
        if any(len(os.fsencode(name)) > 255 for name in run.parts):
            return f"{run}: {os.strerror(errno.ENAMETOOLONG)}; choose another --output"
        if run.is_symlink():
            return f"{run} is a link to nothing; choose another --output"
    except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
        return f"{str(run)!r}: {getattr(error, 'strerror', None) or error}; choose another --output"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing}: cannot be written to; choose another --output"
    if RUN_FILE not in entries and METRICS_FILE in entries:
        return f"{run} holds a run without its {RUN_FILE}; restore it, or choose another --output"
    if entries and RUN_FILE not in entries:
        return f"{run} is not empty and not a run (it holds {entries[0]!r}); choose another --output"
    if entries and not replace and not RunDirectory(run).has_no_steps:
        return f"{run} already holds a run; choose another --output, or replace it with --overwrite"
    return ""


def _entries(run: Path) -> list[Path]:
    """The entries of a directory, without a lock, the origin of a fork, and the temporary files of a process."""
    return [
        entry
        for entry in run.iterdir()
        if entry.name not in (files.LOCK_FILE, files.ORIGIN_NAME) and not files.TEMPORARY_NAME.fullmatch(entry.name)
    ]
