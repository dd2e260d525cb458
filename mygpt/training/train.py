"""The phases of a training run: a recipe goes in, a run directory comes out."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from pydantic import TypeAdapter

from mygpt.data.dataset import Dataset
from mygpt.errors import (
    DiskError,
    InterruptedRunError,
    MygptError,
    NonFiniteError,
    OutOfMemoryError,
    counted,
    print_note,
)
from mygpt.processes.channel import Channel, connect
from mygpt.processes.environment import (
    Launched,
    check_joined,
    choose_workers,
    is_restart,
    launched_processes,
    may_be_restarted,
)
from mygpt.processes.machine import peak_flops
from mygpt.processes.preflight import Preflight, run_preflight
from mygpt.processes.signals import stop_on_signal
from mygpt.recipe.files import METRICS_FILE
from mygpt.recipe.tables import PATH_KEYS, Recipe, TrainTable, check_recipe
from mygpt.reports.outcome import closing_lines
from mygpt.reports.recorder import Recorder, header_lines
from mygpt.runs import files
from mygpt.runs.files import REPLACED_NAME
from mygpt.runs.lock import locked
from mygpt.runs.records import Record, read_until
from mygpt.runs.replacing import PARTIAL_NAME, put_back
from mygpt.runs.run import check_output
from mygpt.runs.saver import Saver
from mygpt.runs.start import Start, find_start, write_start
from mygpt.runs.steps import step_directories, step_directory
from mygpt.training.agreement import REMEDY_AFTER_RESUMING, REMEDY_AT_START, check_agreement
from mygpt.training.gradient_sum import gradient_sum_for
from mygpt.training.loop import train_loop
from mygpt.training.parts import Parts, build_parts, open_accelerator
from mygpt.training.state import Progress

MOST_CHARACTERS = 20
"""How many of the characters that only the held-out text has are shown."""


def train(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    last_step: int | None = None,
    progress_file: TextIO | None = None,
    saved: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Train as `recipe` says, and return the run directory; a run that is there is continued.

    To be called by every process that a launcher started. Whatever can be wrong with the recipe, the corpus and the
    output is found before anything is written. With `overwrite` a run that is already there is replaced.

    With a `last_step` the run is saved after that step and ends early, as if it had been stopped. Progress goes to
    `progress_file`; None: to stderr, as notes do. `saved` is given each checkpoint; see `Saver`.

    It is meant to have its process to itself: it sets torch's threads, how memory is freed, the precision of fp32
    products, global seeds and, on CUDA, deterministic algorithms, and leaves them set. In the main thread it takes
    SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 as requests to save and stop.

    Raises:
        MygptError: anything that the user can act on.
    """
    check_recipe(recipe)
    launched = launched_processes()
    with ExitStack() as stack:
        # Outermost: when a process has failed, and the launcher ends the others, these can still say why.
        stop = stack.enter_context(stop_on_signal())
        channel = stack.enter_context(connect(launched))
        stack.enter_context(explain_out_of_memory(recipe.train))
        start, parts = prepare_run(recipe, launched, channel, stack, overwrite=overwrite)
        progress, run = Progress.at(start), Path(start.recipe.checkpoint.output)
        # A finished run stays so, even if the file of its evaluations, which early stopping counts, has been lost.
        until = start.step if start.ended_by else min(recipe.train.steps, last_step or recipe.train.steps)
        with explain_overwrite(run, overwrite=overwrite and parts.accelerator.is_main_process):
            recorder = open_recorder(start, parts, until, progress_file)
            with recorder, Saver(run, start.recipe, parts.dataset.tokenizer, saved) as saver:
                stop.graceful = True
                stopped = train_loop(parts, progress, until, recorder, saver, stop)
            parts.accelerator.wait_for_everyone()
            say_how_it_ended(start, parts, progress, recorder, stopped, is_whole=last_step is None)
        del parts  # the model must be gone before the process group ends
        return run


def prepare_run(
    recipe: Recipe, launched: Launched, channel: Channel, stack: ExitStack, *, overwrite: bool
) -> tuple[Start, Parts]:
    """All that comes before step 1: check text and processes, decide where the run starts, build its parts, make its
    directory ready, and print what will be trained. What has to be closed at the end goes on the `stack`."""
    max_workers = choose_workers(recipe.runtime.threads, launched.local_processes)
    gradient_sum = gradient_sum_for(recipe, launched.rank, launched.processes, max_workers)
    put_back_before_reading(recipe, channel, overwrite=overwrite)
    continues = not overwrite or is_restart()  # a restarted command does not replace what it has begun
    checked = run_preflight(recipe, launched, channel, gradient_sum.micro_batch_size, continues=continues)
    accumulation_steps = gradient_sum.accumulation_steps
    accelerator = stack.enter_context(open_accelerator(recipe.runtime, checked.device, accumulation_steps))
    check_joined(launched.processes, accelerator.num_processes)
    decided = None
    if accelerator.is_main_process:
        decided = stack.enter_context(decide_start(checked, overwrite=overwrite))
    start = share_start(decided, checked.info.recipe, channel)
    parts = build_parts(
        start.recipe,
        accelerator,
        checked.dataset,
        gradient_sum,
        start.checkpoint,
        checked.reports,
        init_sha256=checked.info.init_sha256,
    )
    if gradient_sum.is_exact:
        remedy = REMEDY_AFTER_RESUMING if start.checkpoint else REMEDY_AT_START
        check_agreement(parts, *parts.capture(start.step), f"before step {start.step + 1}", remedy)
    if accelerator.is_main_process:
        write_start(start)
        print_header(start, parts, checked.dataset)
    return start, parts


@contextmanager
def decide_start(preflight: Preflight, *, overwrite: bool) -> Iterator[Start]:
    """Where the run begins, for the main process, which holds the run directory meanwhile."""
    recipe = preflight.info.recipe
    run = Path(recipe.checkpoint.output)
    for text in preflight.notes:
        print_note(text)
    check_output(run, replace=overwrite or recipe.checkpoint.resume != "never")
    with locked(run), put_back_if_unsaved(run):
        put_back_killed(run, overwrite=overwrite)  # another one may have been killed meanwhile
        yield find_start(
            recipe,
            preflight.info,
            preflight.dataset.tokenizer.metadata,
            overwrite=overwrite,
            is_restart=is_restart(),
            warn=print_note,
        )


def put_back_before_reading(recipe: Recipe, channel: Channel, *, overwrite: bool) -> None:
    """Put a run back whose replacement was killed, before any process reads its run.json, which is the other run's."""
    run, is_main = Path(recipe.checkpoint.output), channel.launched.rank == 0
    if is_main and any(os.path.lexists(run / name) for name in (REPLACED_NAME, PARTIAL_NAME)):
        check_output(run, replace=overwrite or recipe.checkpoint.resume != "never")
        with locked(run):
            put_back_killed(run, overwrite=overwrite)
    channel.exchange({}, "put back")


def put_back_killed(run: Path, *, overwrite: bool) -> None:
    if put_back(run, partial_only=overwrite) and not overwrite:
        print_note(f"{run}: the run that was to be replaced is back; the new one had no checkpoint")


@contextmanager
def put_back_if_unsaved(run: Path) -> Iterator[None]:
    """When a run fails before its first checkpoint, put the run back that it was to replace.

    Not after a step that was not finite, which `mygpt replay` reads, nor before a launcher's restart.
    """
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, NonFiniteError) or may_be_restarted()):
            with suppress(DiskError):  # the next start tries again
                put_back(run)
        raise


@contextmanager
def explain_overwrite(run: Path, *, overwrite: bool) -> Iterator[None]:
    """Say in an error that promises that the same command continues: without --overwrite, if it has saved something."""
    try:
        yield
    except MygptError as error:
        if overwrite and step_directories(run):
            error.args = (str(error).replace("the same command", "the same command without --overwrite"),)
        raise


def share_start(start: Start | None, recipe: Recipe, channel: Channel) -> Start:
    """Give all processes the start that the main process has found; the others pass None, and keep their own paths.

    Through the store: if the main process fails before this, a broadcast would leave the others waiting.
    """
    whole = TypeAdapter(Start)
    shared = channel.exchange({"start": start and whole.dump_json(start).decode()}, "start")[0]["start"]
    if start:
        return start
    start = whole.validate_json(shared)
    paths = {key: value for key, value in recipe.flat().items() if key in PATH_KEYS}
    return start._replace(info=start.info.model_copy(update={"recipe": start.recipe.replace(**paths)}))


def open_recorder(start: Start, parts: Parts, until: int, progress_file: TextIO | None) -> Recorder:
    """The recorder of a run from its start until a step."""
    is_main = parts.accelerator.is_main_process
    return Recorder(
        start.recipe,
        Path(start.recipe.checkpoint.output),
        is_main=is_main,
        step=start.step,
        tokens_until=start.info.tokens_until,
        is_finished=start.ended_by is not None,
        peak_tokens_per_second=peak_tokens_per_second(parts) if is_main else None,
        last_step=until,
        progress_file=progress_file,
    )


def say_how_it_ended(
    start: Start, parts: Parts, progress: Progress, recorder: Recorder, stopped: int, *, is_whole: bool
) -> None:
    """Print what a finished run came to; `stopped` is the signal that ended the loop, or 0. Without `is_whole` the run
    was to end early.

    Raises:
        InterruptedRunError: a signal ended the run before it was finished.
    """
    recipe, run = start.recipe, Path(start.recipe.checkpoint.output)
    ended_by = start.ended_by or progress.ended_by(recipe)
    if stopped and ended_by is None:  # a run that a signal found at its last step is finished
        number = signal.Signals(stopped)
        text = f"stopped by {number.name}; saved {step_directory(run, progress.step)}, and the same command continues"
        if files.is_directory(run / REPLACED_NAME):
            text += f"; the run that is replaced stays in {run / REPLACED_NAME} until the next checkpoint"
        raise InterruptedRunError(text, exit_code=128 + number)
    if not (parts.accelerator.is_main_process and is_whole):
        return
    end = f"{run} is complete; raise --{ended_by} to train on, or --overwrite it to start again"
    print_note(f"saved {run}" if progress.step > start.step else end)
    for line in closing_lines(
        recipe,
        progress.evaluations,
        read_until(run / METRICS_FILE, Record, progress.step),
        parts.dataset.sha256,
        ended_by=ended_by,
        best=progress.best,
        last=recorder.last,
        processes=parts.accelerator.num_processes,
    ):
        print_note(line)


def peak_tokens_per_second(parts: Parts) -> float | None:
    """Tokens per second of all processes if they did nothing but the model's products at their devices' peak rate."""
    peak = peak_flops(parts.accelerator.device, parts.recipe.runtime.precision)
    per_token = parts.gpt.flops_per_token(parts.recipe.train.seq_len)
    return peak and peak * parts.accelerator.num_processes / per_token


@contextmanager
def explain_out_of_memory(table: TrainTable) -> Iterator[None]:
    """Turn running out of memory into an error that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Only CUDA has an error class for it; the CPU and mps raise a RuntimeError that says so.
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise OutOfMemoryError(
            f"out of memory with batch_size = {table.batch_size}, seq_len = {table.seq_len}; lower micro_batch_size "
            "(which leaves the batch as it is), batch_size, seq_len or the model's size"
        ) from error


def print_header(start: Start, parts: Parts, dataset: Dataset) -> None:
    """Print what will be trained: the header on stdout, and notes on stderr."""
    recipe, accelerator = start.recipe, parts.accelerator
    sizes = {"corpus": len(dataset.train) + len(dataset.val) * bool(recipe.data.val_split), "train": len(dataset.train)}
    if recipe.data.has_held_out:
        sizes["val"] = len(dataset.val)
    lines = header_lines(
        recipe,
        device=accelerator.device.type,
        sizes=sizes,
        tokenizer=dataset.tokenizer.metadata.type,
        vocab_size=dataset.tokenizer.vocab_size,
        params=parts.gpt.num_params(),
    )
    print("\n".join(lines), flush=True)
    if accelerator.num_processes > 1:
        of_weights = "; the weights are sharded over them" if accelerator.is_fsdp2 else ""
        print_note(f"{accelerator.num_processes} processes share each batch{of_weights}")
    if start.checkpoint and not start.ended_by:
        lines_from = f"the lines up to it are from {METRICS_FILE}"
        print_note(f"continuing after step {start.step} from {start.checkpoint}; {lines_from}")
    elif recipe.train.init_from and not start.ended_by:
        print_note(f"beginning with the weights of {recipe.train.init_from}")
    if not start.step and (unseen := dataset.unseen_characters()):
        shown = f"{unseen[:MOST_CHARACTERS]!r}{' and others' * (len(unseen) > MOST_CHARACTERS)}"
        verb = "occurs" if len(unseen) == 1 else "occur"
        only = f"{counted(len(unseen), 'character')} {verb} only in the held-out text"
        print_note(f"{only}, and not in the training text: {shown}")
    if not start.step and (copies := dataset.count_copies())[0]:
        text = "{:,} of the {:,} held-out documents are in the training part, too, word for word".format(*copies)
        print_note(f"{text}: the held-out loss is lower than that of unseen text")
    if not recipe.validation.val_every:
        print_note(f"without a held-out loss overfitting does not show; {recipe.data.flags_that_evaluate} measures one")
