"""metrics.jsonl, timing.jsonl and evaluations.jsonl: the records of a run, and how they are read and continued."""

import math
import os
import sys
import zlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from mygpt.errors import CheckpointError, DamagedCheckpointError, print_note
from mygpt.recipe.files import METRICS_FILE
from mygpt.recipe.tables import Table
from mygpt.runs.files import CANNOT_READ, EVALUATIONS_FILE, TIMING_FILE, explain_disk_error, set_aside


def perplexity(loss: float) -> float:
    """e to a loss in nats per token: the number of equally likely tokens that has this loss."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class StepLine(Table):
    """A line that a run adds to one of its files."""

    step: int
    """The step after which it was added."""

    def fits(self, before: Self | None) -> bool:
        """Whether this can be the line after another; None: the first line."""
        return True


class Record(StepLine):
    """One line of metrics.jsonl; a value that was not measured at this step is None."""

    loss: float
    """Mean loss of this step's global batch before its update, in nats per token."""
    lr: float
    """The learning rate of this step's update."""
    tokens: int
    """Tokens trained on so far, including this step."""
    val: float | None = None
    """Held-out loss after this step's update, in nats per token."""
    val_stderr: Annotated[float, Field(ge=0)] | None = None
    """Standard error of the held-out loss."""
    val_dof: Annotated[int, Field(ge=1)] | None = None
    """Degrees of freedom of the standard errors: a 95% interval is the error times the 97.5% quantile of Student's t to
    either side."""
    val_perplexity: float | None = None
    """e to the held-out loss."""
    val_bits_per_byte: float | None = None
    """Held-out loss in bits per byte of text, which can be compared between tokenizers."""
    val_bits_per_byte_stderr: Annotated[float, Field(ge=0)] | None = None
    """Its standard error."""
    grad_norm: float | None = None
    """Global L2 norm of this step's gradient before clipping."""


class Timing(StepLine):
    """One line of timing.jsonl: how long a recorded step took to reach, which no recipe can repeat."""

    elapsed_seconds: float
    """Since the first step began, with evaluation and saving, without the time in which the run was down."""
    tokens_per_second: float
    """Training throughput since the previous record, without evaluation and saving."""
    mfu: float | None = None
    """Model FLOPs utilisation: the share of the peak rate of the processes' devices; None where that is not known."""
    seconds_left: float | None = None
    """Until the last step, if the rest goes as fast as this process has gone so far."""


class WindowsLine(Table):
    """The held-out windows of an evaluation; see `Windows` in runs/held_out.py. Arrays are little-endian, in base64."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    starts: bytes
    """int64."""
    tokens: bytes
    """int32."""
    bytes: bytes
    """int32."""
    consecutive: bool
    piece_tokens: Annotated[int, Field(ge=0)]


class EvaluationLine(StepLine):
    """One line of evaluations.jsonl: the held-out loss of each window after a step."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    windows: WindowsLine | None = None
    """None: those of the line before."""
    losses: bytes
    """float32, little-endian, in base64: the total loss of each window, in nats."""
    crc32: int
    """Of the arrays in the order above: no record is as small as that of a flipped bit."""

    @classmethod
    def of(cls, step: int, windows: WindowsLine | None, losses: bytes) -> Self:
        return cls(step=step, windows=windows, losses=losses, crc32=cls._checksum(windows, losses))

    @staticmethod
    def _checksum(windows: WindowsLine | None, losses: bytes) -> int:
        return zlib.crc32(b"".join([windows.starts, windows.tokens, windows.bytes] if windows else []) + losses)

    @model_validator(mode="after")
    def _check(self) -> Self:
        windows, count = self.windows, len(self.losses) // 4
        lengths = [len(windows.starts) // 2, len(windows.tokens), len(windows.bytes)] if windows else []
        if self.crc32 != self._checksum(windows, self.losses) or any(length != 4 * count for length in lengths):
            raise ValueError("its losses are not as they were written")
        return self

    def fits(self, before: Self | None) -> bool:
        return self.windows is not None or (before is not None and len(before.losses) == len(self.losses))


LINES: Final[Mapping[str, Any]] = {METRICS_FILE: Record, TIMING_FILE: Timing, EVALUATIONS_FILE: EvaluationLine}
"""The files of a run to which lines are added, and what these hold."""


_Line = TypeVar("_Line", bound=StepLine)


def read_until(path: Path, kind: type[_Line], step: int, *, strict: bool = False) -> list[_Line]:
    """The records up to `step`, or up to a line that is no record. Only reads: the run may be training.

    Raises:
        DamagedCheckpointError: the file cannot be read, or, if `strict`, a whole line is no record.
    """
    with explain_disk_error(CANNOT_READ, path, DamagedCheckpointError):
        records, _, follows = _scan(path, kind, step) if path.exists() else ([], 0, "")
    if strict and follows == "damage":
        raise DamagedCheckpointError(f"{path}: damaged: line {len(records) + 1} is no record")
    return records


def read_records(run: Path) -> list[Record]:
    """The records of a run directory, without a last line that a killed run left unfinished.

    Raises:
        CheckpointError: there are none.
        DamagedCheckpointError: a line is no record, or not of a later step than the one before.
    """
    path = run / METRICS_FILE
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; expected a run directory")
    records = read_until(path, Record, sys.maxsize, strict=True)
    for number, (before, record) in enumerate(pairwise(records), 2):
        if before.step >= record.step:
            raise DamagedCheckpointError(f"{path}: damaged: line {number} is of an earlier step than the one before")
    if not records:
        raise CheckpointError(f"{path}: no step has been recorded yet")
    return records


def cut_after(path: Path, kind: type[_Line], step: int, *, is_finished: bool = False) -> list[_Line]:
    """As `read_until`, for the run itself: the file ends after these records from now on.

    The file of a run that `is_finished` is only cut if it has later records, of a continuation that was abandoned.

    Raises:
        DiskError: the disk refused it.
    """
    with explain_disk_error("{path}: cannot be continued: {reason}", path):
        if path.is_symlink() and not is_finished:
            path.unlink()  # records are appended to a file in the run directory
        if not path.exists():
            return []
        records, size, follows = _scan(path, kind, step)
        if follows == "damage" and not is_finished:  # a killed run leaves no whole line that is wrong
            aside = set_aside(path, copy=True)
            print_note(f"{path}: line {len(records) + 1} is no record; the file is kept as {aside}")
        if not is_finished or (follows == "later" and not path.is_symlink()):
            os.truncate(path, size)
    return records


def _scan(path: Path, kind: type[_Line], step: int) -> tuple[list[_Line], int, Literal["later", "damage", ""]]:
    """The records up to `step`, their bytes, and what follows: a "later" record, a whole line that is none, or ""."""
    records: list[_Line] = []
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        is_whole = line.endswith(b"\n")
        try:
            record = kind.model_validate_json(line)
        except ValidationError:
            return records, size, "damage" if is_whole else ""
        if record.step > step or not is_whole:
            return records, size, "later" if record.step > step else ""
        if not record.fits(records[-1] if records else None):
            return records, size, "damage"
        records.append(record)
        size += len(line)
    return records, size, ""
