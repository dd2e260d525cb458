"""Record each step once: in the run's files, and for its reader on the console."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from mygpt.errors import DiskError, print_note
from mygpt.recipe.files import METRICS_FILE
from mygpt.recipe.tables import Recipe
from mygpt.runs.files import CANNOT_WRITE, EVALUATIONS_FILE, TIMING_FILE, explain_disk_error, sync
from mygpt.runs.records import LINES, EvaluationLine, Record, Timing, cut_after

PROGRESS_SECONDS = 30.0
"""Time between two lines on the progress of a run that has no progress bar."""


class Recorder:
    """Makes the records of a run: in its files, on stdout and on the progress bar, all by the main process alone.

    The bar is on `progress_file`, which is stderr, if that is a terminal; else a thread prints a line there every
    `PROGRESS_SECONDS`. They are about the steps up to `last_step`, which is the recipe's unless it is given; with a
    `progress_file` of its own the run is part of other work, and its bar goes when it is done.

    A run that continues after `step` drops the later records, and prints the lines up to `step` again, so that its
    output is that of a run never interrupted. The records of a run that `is_finished` are left as they are.
    `tokens_until` gives the tokens on which the steps up to one are trained: a branch may have other batches than its
    origin.
    `peak_tokens_per_second` is what the devices could do at most, if it is known.

    Raises:
        DiskError: the disk refused the files.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        *,
        is_main: bool = True,
        step: int = 0,
        tokens_until: Callable[[int], int] | None = None,
        is_finished: bool = False,
        peak_tokens_per_second: float | None = None,
        last_step: int | None = None,
        progress_file: TextIO | None = None,
    ):
        self._recipe, self._first_step, self._peak = recipe, step, peak_tokens_per_second
        self._step, self._last_step = step, last_step or recipe.train.steps
        self._progress_file = progress_file or sys.stderr
        self._tokens_per_step = recipe.train.batch_size * recipe.train.seq_len
        self._tokens_until = tokens_until or (lambda step: step * self._tokens_per_step)
        self.last: tuple[Record, Timing] | None = None
        """The newest record of this process."""
        self._files: dict[str, TextIO] = {}
        self._run, self._is_main = run, is_main
        elapsed = 0.0
        if is_main:
            records = cut_after(run / METRICS_FILE, Record, step, is_finished=is_finished)
            timings = cut_after(run / TIMING_FILE, Timing, step, is_finished=is_finished)
            evaluations = cut_after(run / EVALUATIONS_FILE, EvaluationLine, step, is_finished=is_finished)
            for record in records:
                if is_printed(record.step, recipe, evaluated=record.val is not None):
                    print(step_line(record, recipe))
            sys.stdout.flush()
            last = records[-1] if records else None
            if step - (last.step if last else 0) >= recipe.train.log_every:
                end = f"its last record is of step {last.step}" if last else "it has no record"
                print_note(f"{run / METRICS_FILE}: {end}, and the checkpoint is of step {step}")
            evaluated = [record.step for record in records if record.val is not None]
            if recipe.validation.patience and len(evaluations) < len(evaluated):
                print_note(f"{run / EVALUATIONS_FILE}: has {len(evaluations)} of {len(evaluated)} evaluations")
            elapsed = timings[-1].elapsed_seconds if timings else 0.0
            with explain_disk_error(CANNOT_WRITE, run):
                names = LINES if recipe.validation.val_every else (METRICS_FILE, TIMING_FILE)
                self._files = {name: (run / name).open("a", encoding="utf-8") for name in names}
                sync(run)  # or a power failure may leave a checkpoint without its records
        disable = None if is_main else True  # None: unless `progress_file` is a terminal
        options = {"unit": "step", "dynamic_ncols": True, "leave": progress_file is None, "file": self._progress_file}
        self._bar = tqdm(total=self._last_step, initial=step, disable=disable, **options)
        self._elapsed_before, self._started_at = elapsed, time.perf_counter()
        self._interval = (step, self._started_at)
        self._paused_seconds = 0.0
        self._ended = threading.Event()
        if is_main and self._bar.disable and not is_finished:
            threading.Thread(target=self._print_progress, name="progress", daemon=True).start()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._bar.close()
        for file in self._files.values():
            with suppress(OSError):  # a full disk, which `record` has reported
                file.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the throughput."""
        paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._paused_seconds += time.perf_counter() - paused_at

    def step_done(self) -> None:
        """Count a step, for the progress bar or lines."""
        self._step += 1
        self._bar.update()

    def record(self, step: int, *, printed: bool, evaluation: EvaluationLine | None = None, **values: Any) -> None:
        """Record a step, and print it if `printed`. `values` are fields of `Record`.

        Raises:
            DiskError: the disk refused the record.
        """
        now = time.perf_counter()
        last_step, last_time = self._interval
        seconds = now - last_time - self._paused_seconds
        self._interval, self._paused_seconds = (step, now), 0.0
        record = Record(step=step, tokens=self._tokens_until(step), **values)
        tokens_per_second = (step - last_step) * self._tokens_per_step / seconds
        seconds_per_step = (now - self._started_at) / (step - self._first_step)
        timing = Timing(
            step=step,
            elapsed_seconds=round(self._elapsed_before + now - self._started_at, 6),
            tokens_per_second=round(tokens_per_second, 1),
            mfu=round(tokens_per_second / self._peak, 4) if self._peak else None,
            seconds_left=round((self._recipe.train.steps - step) * seconds_per_step, 1),
        )
        self.last = record, timing
        if self._is_main:
            lines = {EVALUATIONS_FILE: evaluation, METRICS_FILE: record, TIMING_FILE: timing}
            for name, line in lines.items():
                if line:
                    self._write(name, line)
            self._show(record, timing, printed)

    def _print_progress(self) -> None:
        """Print lines on stderr until the run ends, also while a step or an evaluation takes long."""
        before, printed_at = self._step, self._started_at
        while not self._ended.wait(PROGRESS_SECONDS):
            step, now = self._step, time.perf_counter()
            rate = (step - before) * self._tokens_per_step / (now - printed_at)
            line = f"at step {step:,} of {self._last_step:,}: {rate:,.0f} tokens/s"
            if done := step - self._first_step:
                left = (now - self._started_at) / done * (self._last_step - step)
                line += f", {tqdm.format_interval(left)} left"
            with suppress(OSError, ValueError):  # stderr is closed, or its reader has gone
                print(line, file=self._progress_file, flush=True)
            before, printed_at = step, now

    def _write(self, name: str, line: Record | Timing | EvaluationLine) -> None:
        try:
            self._files[name].write(line.model_dump_json(exclude_none=True) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise DiskError(
                f"{self._run / name}: cannot be written: {error.strerror}; make room, and the same command continues"
            ) from None

    def _show(self, record: Record, timing: Timing, printed: bool) -> None:
        share = f", {timing.mfu:.0%} of peak" if timing.mfu else ""
        self._bar.set_postfix_str(f"{timing.tokens_per_second:,.0f} tokens/s{share}", refresh=False)
        if printed:
            self._bar.write(step_line(record, self._recipe), file=sys.stdout)
            sys.stdout.flush()


def header_lines(
    recipe: Recipe, *, device: str, sizes: dict[str, int], tokenizer: str, vocab_size: int, params: int
) -> Iterator[str]:
    """The lines that a run begins with. `sizes` are the numbers of tokens of the corpus and of its parts."""
    schedule, unit = recipe.schedule, "chars" if tokenizer == "char" else "tokens"
    values = {
        "device": device,
        "precision": recipe.runtime.precision,
        **{f"{part} {unit}": f"{size:,}" for part, size in sizes.items()},
        "vocab_size": vocab_size,
        "params": f"{params:,}",
        "steps": recipe.train.steps,
        "schedule": f"{schedule.schedule} (warmup={schedule.warmup})",
        "max_grad_norm": recipe.train.max_grad_norm,
    }
    width = 14 if unit == "chars" else 15
    return (f"{label + ':':<{width}}{value}" for label, value in values.items())


def step_line(record: Record, recipe: Recipe) -> str:
    """The printed form of a record."""
    line = f"step {record.step:5d}: loss = {record.loss:.4f}"
    if record.val is not None:
        line += f"  val = {record.val:.4f}"
        if recipe.validation.log_val_stderr and record.val_stderr is not None:
            line += f" +- {record.val_stderr:.4f}"
        line += _in_other_units(record, recipe)
    if recipe.schedule.schedule != "constant":
        line += f"  lr = {record.lr:.2e}"
    if recipe.train.log_grad_norm and record.grad_norm is not None:
        line += f"  grad_norm = {record.grad_norm:.4f}"
    return line


def _in_other_units(record: Record, recipe: Recipe) -> str:
    validation, text = recipe.validation, ""
    if validation.log_bits_per_byte and record.val_bits_per_byte is not None:
        text += f"  bits_per_byte = {record.val_bits_per_byte:.4f}"
        if validation.log_val_stderr and record.val_bits_per_byte_stderr is not None:
            text += f" +- {record.val_bits_per_byte_stderr:.4f}"
    if validation.log_perplexity and record.val_perplexity is not None:
        text += f"  perplexity = {record.val_perplexity:.2f}"
    return text


def is_printed(step: int, recipe: Recipe, *, evaluated: bool) -> bool:
    """Whether the console prints the record of a step."""
    return evaluated or step == 1 or falls_on(step, recipe.train.print_every, recipe.train.steps)


def falls_on(step: int, every: int, last: int) -> bool:
    """Whether 1-based `step` is a multiple of `every` or the `last` one; never if `every` is 0."""
    return every > 0 and (step % every == 0 or step == last)
