"""What a run reports: the header, a line and a record per logged step."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from mygpt.errors import DamagedCheckpointError
from mygpt.recipe.files import METRICS_FILE
from mygpt.recipe.tables import Recipe
from mygpt.runs.files import TIMING_FILE
from mygpt.runs.records import Record, Timing, rewind


class Reporter:
    """Prints the lines, writes metrics.jsonl and timing.jsonl, draws the progress bar; silent but on the main process.

    Lines go to stdout. The bar goes to stderr, and only to a terminal. A run that continues after `step` drops the
    records after it, and prints again the lines up to it: its output is that of a run never interrupted.
    """

    def __init__(self, recipe: Recipe, run: Path, *, is_main: bool, step: int = 0):
        self._recipe = recipe
        self._is_main = is_main
        self._tokens_per_step = recipe.train.batch_size * recipe.train.seq_len
        self._files: list[tuple[Path, TextIO]] = []
        self._tokens_before = 0
        elapsed = 0.0
        if is_main:
            is_complete = step >= recipe.train.steps
            records = rewind(run / METRICS_FILE, Record, step, cut=not is_complete)
            for record in records:
                if is_printed(record.step, recipe, evaluated=record.val is not None):
                    print(step_line(record, recipe))
            last = records[-1] if records else None
            if step - (last.step if last else 0) >= recipe.train.log_every:
                told = f"its last record is of step {last.step}" if last else "it has no record"
                print(f"{run / METRICS_FILE}: {told}, and the checkpoint is of step {step}", file=sys.stderr)
            # Not 0 only after another batch size.
            self._tokens_before = last.tokens - last.step * self._tokens_per_step if last else 0
            timings = rewind(run / TIMING_FILE, Timing, step, cut=not is_complete)
            elapsed = timings[-1].elapsed_seconds if timings else 0.0
            self._files = [(path, path.open("a", encoding="utf-8")) for path in (run / METRICS_FILE, run / TIMING_FILE)]
            sys.stdout.flush()
        self._bar = tqdm(
            total=recipe.train.steps,
            initial=step,
            unit="step",
            disable=None if is_main else True,
            dynamic_ncols=True,
        )
        self._started_at = time.perf_counter() - elapsed
        self._interval = (step, time.perf_counter())
        self._paused_seconds = 0.0

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for _path, file in self._files:
            with suppress(OSError):  # what a full disk has not taken has been told when it was written
                file.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of what is done inside out of the throughput."""
        paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._paused_seconds += time.perf_counter() - paused_at

    def step_done(self) -> None:
        """Move the progress bar on."""
        self._bar.update()

    def log(
        self,
        step: int,
        *,
        printed: bool,
        loss: float,
        lr: float,
        grad_norm: float | None = None,
        val: float | None = None,
        val_stderr: float | None = None,
        val_dof: int | None = None,
    ) -> None:
        """Record a step, and print it if it is to be `printed`.

        Raises:
            DamagedCheckpointError: the disk refused the record.
        """
        now = time.perf_counter()
        last_step, last_time = self._interval
        seconds = now - last_time - self._paused_seconds
        self._interval, self._paused_seconds = (step, now), 0.0
        record = Record(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            val=val,
            val_stderr=val_stderr,
            val_dof=val_dof,
            tokens=self._tokens_before + step * self._tokens_per_step,
        )
        timing = Timing(
            step=step,
            elapsed_seconds=round(now - self._started_at, 6),
            tokens_per_second=round((step - last_step) * self._tokens_per_step / seconds, 1),
        )
        for (path, file), line in zip(self._files, (record, timing), strict=False):
            try:
                file.write(line.model_dump_json(exclude_none=True) + "\n")
                file.flush()
            except OSError as error:
                raise DamagedCheckpointError(
                    f"{path}: cannot be written: {error.strerror}; make room, and the same command continues"
                ) from None
        self._bar.set_postfix_str(f"{timing.tokens_per_second:,.0f} tokens/s", refresh=False)
        if self._is_main and printed:
            self._bar.write(step_line(record, self._recipe), file=sys.stdout)
            sys.stdout.flush()


def header_lines(recipe: Recipe, *, device: str, sizes: dict[str, int], vocab_size: int, params: int) -> Iterator[str]:
    """The lines that a run begins with. `sizes` are the characters of the corpus and of its parts."""
    schedule = recipe.schedule
    yield _header("device", device)
    yield _header("precision", recipe.runtime.precision)
    for part, size in sizes.items():
        yield _header(f"{part} chars", f"{size:,}")
    yield _header("vocab_size", vocab_size)
    yield _header("params", f"{params:,}")
    yield _header("steps", recipe.train.steps)
    yield _header("schedule", f"{schedule.schedule} (warmup={schedule.warmup})")
    yield _header("max_grad_norm", recipe.train.max_grad_norm)


def step_line(record: Record, recipe: Recipe) -> str:
    """The printed form of a record."""
    line = f"step {record.step:5d}: loss = {record.loss:.4f}"
    if record.val is not None:
        line += f"  val = {record.val:.4f}"
        if recipe.validation.log_val_stderr and record.val_stderr is not None:
            line += f" +- {record.val_stderr:.4f}"
    if recipe.schedule.schedule != "constant":
        line += f"  lr = {record.lr:.2e}"
    if recipe.train.log_grad_norm and record.grad_norm is not None:
        line += f"  grad_norm = {record.grad_norm:.4f}"
    return line


def is_printed(step: int, recipe: Recipe, *, evaluated: bool) -> bool:
    """Whether a step has a printed line."""
    return evaluated or step == 1 or due(step, recipe.train.print_every, recipe.train.steps)


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every `every` steps (0: never), and at the `last` one, is to be done at 1-based `step`."""
    return every > 0 and (step % every == 0 or step == last)


def _header(label: str, value: Any) -> str:
    return f"{label + ':':<14}{value}"
