"""The training run: a recipe goes in, a run directory comes out."""

import gc
import math
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from mygpt.compat import INIT_METHOD
from mygpt.data.batches import Batch, BatchStream, Share, WindowSet, held_out_windows
from mygpt.data.dataset import Dataset
from mygpt.errors import (
    DamagedCheckpointError,
    InterruptedRunError,
    LaunchError,
    NonFiniteError,
    OutOfMemoryError,
)
from mygpt.model.gpt import GPT
from mygpt.processes.channel import PROCESS_TIMEOUT, peers_of
from mygpt.processes.environment import check_processes, is_restart, is_sharded, launched_processes
from mygpt.processes.preflight import Facts, set_up
from mygpt.processes.signals import StopRequest, stop_on_signal
from mygpt.recipe.files import METRICS_FILE
from mygpt.recipe.seeds import micro_batch_dropout_seed, process_dropout_seed
from mygpt.recipe.tables import Recipe, RuntimeTable, TrainTable, check_recipe
from mygpt.reports.recorder import Reporter, due, header_lines, is_printed
from mygpt.runs.lock import locked
from mygpt.runs.run import check_output
from mygpt.runs.saver import Saver, Tensors, TrainingState
from mygpt.runs.schemas import Best, Reason
from mygpt.runs.start import Start, begin_run, find_start
from mygpt.runs.steps import step_directory
from mygpt.training.agreement import REMEDY_AFTER_RESUMING, REMEDY_AT_START, REMEDY_WHEN_SAVING, check_agreement
from mygpt.training.evaluate import held_out_loss
from mygpt.training.failed_step import record_failure
from mygpt.training.gradient_sum import RANGE, ExactSum
from mygpt.training.optim import build_optimizer, build_scheduler, update_unless
from mygpt.training.state import (
    GeneratorStates,
    full_tensor,
    gathered,
    generator_states,
    load_optimizer_tensors,
    restore,
    set_generator_states,
    training_state,
)


def train(recipe: Recipe, *, overwrite: bool = False, allow_changes: bool = False, until: int | None = None) -> Path:
    """Train as `recipe` says, and return the run directory; a run that is there is continued.

    To be called by every process that a launcher started. Whatever can be wrong with the recipe, the corpus and the
    output is found before anything is written. With `overwrite` a run that is already there is replaced; with
    `allow_changes` one is continued though its recipe or corpus has changed. `until` ends it early, after that step.

    It is meant to have its process to itself: it sets torch's threads, global seeds and, on CUDA, deterministic
    algorithms, and leaves them set. In the main thread it takes SIGTERM and SIGINT as requests to save and stop.

    Raises:
        MygptError: anything that the user can act on.
    """
    check_recipe(recipe)
    launched = launched_processes()
    with ExitStack() as stack:
        # Outermost: when a process has failed, and the launcher ends the others, these can still say why.
        stop = stack.enter_context(stop_on_signal())
        peers = stack.enter_context(peers_of(launched))
        stack.enter_context(naming_memory(recipe.train))
        device, dataset, info, facts, notes = set_up(recipe, launched, peers)
        exact = recipe.runtime.reduction == "exact"
        # An exact sum is divided once, at its end.
        micro_batches = 1 if exact else recipe.train.batch_size // info.processes // info.micro_batch_size
        accelerator = stack.enter_context(accelerator_for(recipe.runtime, device, micro_batches))
        check_processes(launched.processes, accelerator.num_processes)
        start = Start(None, 0, False, overwrite, recipe, info)
        if accelerator.is_main_process:
            for text in notes:
                _note(text)
            run = Path(recipe.checkpoint.output)
            check_output(run, replace=overwrite or recipe.checkpoint.resume != "never")
            stack.enter_context(locked(run))
            start = find_start(
                recipe,
                info,
                dataset.tokenizer.vocab,
                overwrite=overwrite,
                is_restart=is_restart(),
                allow_changes=allow_changes,
                warn=_note,
            )
        # Told as mistakes are, and not by a broadcast, in which the others would wait for one who has found a mistake.
        own = {"checkpoint": str(start.checkpoint or ""), "keeps_best": start.keeps_best}
        told = peers.exchange(own, "start")[0]
        checkpoint = Path(told["checkpoint"]) if told["checkpoint"] else None
        start = start._replace(checkpoint=checkpoint, keeps_best=told["keeps_best"])
        return _train(accelerator, start, dataset, info.micro_batch_size, facts, until, stop)


def _train(
    accelerator: Accelerator,
    start: Start,
    dataset: Dataset,
    micro_batch_size: int,
    facts: list[Facts],
    until: int | None,
    stop: StopRequest,
) -> Path:
    """The main job: build the parts, then step, evaluate, report, save."""
    recipe, is_main = start.recipe, accelerator.is_main_process
    steps, run = recipe.train.steps, Path(recipe.checkpoint.output)
    torch.manual_seed(recipe.train.init_seed)
    gpt = GPT(recipe.model, dataset.tokenizer.vocab_size).to(accelerator.device)
    gpt.activation_checkpointing = recipe.runtime.activation_checkpointing
    optimizer = build_optimizer(gpt, recipe.optimizer)
    dataset = dataset.to(accelerator.device)
    exact = recipe.runtime.reduction == "exact"
    rows = Share(micro_batch_size, accelerator.process_index, accelerator.num_processes)
    stream = BatchStream(
        dataset.train, recipe.train.batch_size, recipe.train.seq_len, seed=recipe.train.data_seed, share=rows
    )
    step, best, moments = 0, None, None
    checkpoint = start.checkpoint
    if checkpoint:
        step, best, moments = restore(accelerator, checkpoint, gpt, stream, recipe.train.data_seed)
        best = best if start.keeps_best else None
    else:
        # Only dropout draws from the global generator, and each process's rows need masks of their own.
        torch.manual_seed(process_dropout_seed(recipe.train.data_seed, accelerator.process_index))
    scheduler = build_scheduler(optimizer, recipe.schedule, recipe.optimizer.lr, steps, steps_done=step)
    if recipe.runtime.compile:
        gpt.compile()
    # `gpt` stays the bare module, whose weights have their plain names whatever `model` wraps around it.
    model, optimizer, scheduler = prepare(accelerator, gpt, optimizer, scheduler, exact=exact)
    if moments:
        load_optimizer_tensors(optimizer, gpt.state_dict(), moments)
    if checkpoint and isinstance(model, DistributedDataParallel):
        settle_buckets(accelerator, model, optimizer, stream, micro_batch_size)
    if exact:
        now = generator_states(accelerator.device, stream, exact=True)
        state = training_state(accelerator, gpt, optimizer, now, step, best)
        held = [*gpt.state_dict().values(), *state.tensors.values()]
        remedy = REMEDY_AFTER_RESUMING if checkpoint else REMEDY_AT_START
        check_agreement(accelerator, held, facts, when=f"before step {step + 1}", remedy=remedy)

    if is_main:
        begin_run(start)
        _introduce(start, accelerator, dataset, gpt)
    stopped = False
    # Steps whose numbers the host has not read yet, each with the generators' states before it.
    unread: list[tuple[GeneratorStates, Update]] = []
    next_reading, read_at = step + 1, time.perf_counter()
    with (
        Reporter(recipe, run, is_main=is_main, step=step) as reporter,
        Saver(run, recipe, dataset.tokenizer, dataset.sha256) as saver,
    ):
        stop.heeded = True
        while step < min(steps, until or steps) and not stopped:
            step += 1
            before = generator_states(accelerator.device, stream, exact=exact)
            lr = float(scheduler.get_last_lr()[0])
            update = train_step(
                accelerator,
                model,
                optimizer,
                stream.batch(),
                micro_batch_size=micro_batch_size,
                max_grad_norm=recipe.train.max_grad_norm,
                exact=exact_step(recipe, rows, step) if exact else None,
            )
            unread.append((before, update))
            scheduler.step()
            reporter.step_done()

            evaluated = due(step, recipe.validation.val_every, steps)
            scheduled = due(step, recipe.checkpoint.save_every or steps, steps)
            printed = is_printed(step, recipe, evaluated=evaluated)
            recorded = printed or scheduled or due(step, recipe.train.log_every, steps)
            stop_alone = accelerator.num_processes == 1 and stop.pending()
            if not (recorded or step in (until, next_reading) or stop_alone):
                continue

            reading = read_updates(accelerator, [update for _, update in unread], stop.pending(), read_at)
            if (index := reading.first_broken) is not None:
                saver.wait()
                before, measured = unread[index][0], reading.steps[index]
                state = training_state(accelerator, gpt, optimizer, before, step - len(unread) + index, best)
                weights = gathered(accelerator, gpt.state_dict())
                raise broken_step(accelerator, recipe, weights, state, dataset, micro_batch_size, measured)
            unread, stopped, measured = [], reading.stop, reading.steps[-1]
            improved = False
            if recorded:
                values: dict[str, Any] = {"loss": measured.loss, "grad_norm": measured.grad_norm, "lr": lr}
                if evaluated:
                    with reporter.paused():
                        places = held_out_windows(dataset.val, recipe.validation, stream)
                        values |= evaluate(accelerator, model, dataset.val, places, micro_batch_size, step)
                    if recipe.checkpoint.save_best and (best is None or values["val"] < best.val):
                        improved, best = True, Best(step=step, val=values["val"])
                reporter.log(step, printed=printed, **values)
            if scheduled or improved or stopped or step == until:
                with reporter.paused():
                    reason: Reason = "scheduled" if scheduled else "best" if improved else "interrupted"
                    now = generator_states(accelerator.device, stream, exact=exact)
                    state = training_state(accelerator, gpt, optimizer, now, step, best)
                    weights = gathered(accelerator, gpt.state_dict())
                    if exact:
                        held = [*weights.values(), *state.tensors.values()]
                        check_agreement(accelerator, held, facts, when=f"step {step}", remedy=REMEDY_WHEN_SAVING)
                    if is_main:
                        saver.save(weights, state, reason)
            saver.check()
            read_at, next_reading = time.perf_counter(), step + max(1, int(PATIENCE / reading.seconds_per_step))
        saver.wait()
    accelerator.wait_for_everyone()
    if stopped and step < steps:  # a run that a signal found at its last step is complete
        number = signal.Signals(stop.signal or signal.SIGTERM)
        raise InterruptedRunError(
            f"stopped by {number.name}; saved {step_directory(run, step)}, and the same command continues",
            exit_code=128 + number,
        )
    if is_main and until is None:
        _note(
            f"saved {run}"
            if step > start.step
            else f"{run} is complete; raise --steps to train on, or --overwrite it to start again"
        )
    return run


PATIENCE = 1.0
"""Seconds of training after which a signal to another process, or a number that broke, is noticed at the latest."""


class Update(NamedTuple):
    """What one optimizer step measured: scalars on the device, which the host reads when it needs them."""

    loss: torch.Tensor
    """Mean loss before the update, of this process's share of the global batch or, summed exactly, of all of it."""
    grad_norm: torch.Tensor
    """Global L2 norm of the global batch's gradient, before clipping."""
    out_of_range: torch.Tensor
    """Micro-batches that an exact sum could not hold."""


class ExactStep(NamedTuple):
    """What this process has to know of a step to sum its gradients exactly."""

    micro_batches: int
    """Of the global batch."""
    dropout_seeds: tuple[int, ...]
    """Of this process's micro-batches."""


def train_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    micro_batch_size: int,
    max_grad_norm: float = 0.0,
    exact: ExactStep | None = None,
) -> Update:
    """One optimizer step on this process's rows of the global batch.

    The rows go through the model `micro_batch_size` at a time; gradients are averaged over these and over processes,
    and clipped to a global L2 norm of `max_grad_norm` (0: not clipped). Once a loss or norm is not finite nothing is
    updated any more; the host does not wait to know.
    """
    splits = (rows.split(micro_batch_size) for rows in batch)
    pieces = [Batch(*pair) for pair in zip(*splits, strict=True)] if len(batch.inputs) else []
    if exact is None:
        loss = average(accelerator, model, pieces)
        out_of_range = torch.zeros_like(loss)
    else:
        loss, out_of_range = exact_average(accelerator, model, pieces, exact)
    if max_grad_norm:
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    else:
        grad_norm = get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    grad_norm = full_tensor(grad_norm)
    update_unless(optimizer, ~torch.isfinite(grad_norm) | (out_of_range > 0))
    optimizer.zero_grad()
    return Update(loss, grad_norm, out_of_range)


def average(accelerator: Accelerator, model: torch.nn.Module, pieces: Iterable[Batch]) -> torch.Tensor:
    """Give the model the gradient averaged over micro-batches and processes; returns this process's mean loss."""
    losses = []
    for inputs, targets in pieces:
        # On all but the last micro-batch this keeps the processes from averaging their gradients.
        with accelerator.accumulate(model):
            loss = model(inputs, targets)
            losses.append(loss.detach())
            # An infinite loss can have a finite gradient: times 1, which is exact, or times nan, for all to see.
            accelerator.backward(loss * (losses[-1] * 0 + 1))
    return torch.stack(losses).mean()


def exact_average(
    accelerator: Accelerator, model: torch.nn.Module, pieces: Sequence[Batch], exact: ExactStep
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the model the gradient averaged over micro-batches and processes, the same bits on any number of these.

    Returns the mean loss of them all, and how many micro-batches were out of range.
    """
    total = ExactSum(model.parameters(), exact.micro_batches)
    for (inputs, targets), seed in zip(pieces, exact.dropout_seeds, strict=True):
        torch.manual_seed(seed)
        loss = model(inputs, targets)
        accelerator.backward(loss)
        total.add(loss.detach())
    return total.mean_over(accelerator.reduce if accelerator.num_processes > 1 else None)


def exact_step(recipe: Recipe, rows: Share, step: int) -> ExactStep:
    """This process's part in the exact sum of a step."""
    table = recipe.train
    seeds = (micro_batch_dropout_seed(table.data_seed, step, index) for index in rows.micro_batches(table.batch_size))
    return ExactStep(table.batch_size // rows.micro_batch_size, tuple(seeds))


class Measured(NamedTuple):
    """An `Update` as the host has read it; the same on all processes."""

    loss: float
    """Mean loss of the global batch."""
    grad_norm: float
    out_of_range: float

    @property
    def is_sound(self) -> bool:
        """Whether the loss and the norm are numbers; if not, there was no update."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm) and not self.out_of_range


class Reading(NamedTuple):
    """What the host has read of the steps since it last looked; the same on all processes."""

    steps: list[Measured]
    stop: bool
    """Whether some process was asked to stop."""
    seconds_per_step: float

    @property
    def first_broken(self) -> int | None:
        """Which of `steps` was the first whose numbers broke, from which on nothing was updated; None: none."""
        return next((index for index, measured in enumerate(self.steps) if not measured.is_sound), None)


def read_updates(accelerator: Accelerator, updates: Sequence[Update], stop: bool, read_at: float) -> Reading:
    """Wait for the device and read what `updates` measured, averaged over the processes, in one message.

    `read_at` is when the last reading was done with, by `time.perf_counter`.
    """
    own = torch.stack([value for update in updates for value in update])
    own[-1].item()  # so that the time is that of the steps, not of asking for them
    seconds = (time.perf_counter() - read_at) / len(updates)
    own = torch.cat([own, own.new_tensor([stop, seconds])])
    shared = accelerator.gather(own) if accelerator.num_processes > 1 else own
    # Correctly rounded, so that a mean does not depend on the order, and that of equal values is the value.
    columns = zip(*shared.view(accelerator.num_processes, -1).tolist(), strict=True)
    *values, stop_mean, seconds_mean = (mean(column) for column in columns)
    steps = [Measured(*three) for three in zip(values[::3], values[1::3], values[2::3], strict=True)]
    return Reading(steps, stop_mean > 0, seconds_mean)


def mean(values: Sequence[float]) -> float:
    """The mean, rounded once; not a number if one of them is none, or if they are infinite both ways."""
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):
        return math.nan


def broken_step(
    accelerator: Accelerator,
    recipe: Recipe,
    weights: Tensors,
    state: TrainingState,
    dataset: Dataset,
    micro_batch_size: int,
    measured: Measured,
) -> NonFiniteError:
    """Keep a step whose numbers broke, with the `state` before it, for `mygpt replay`; returns the error to raise."""
    run, step = Path(recipe.checkpoint.output), state.metadata.step + 1
    problem = f"the loss is {measured.loss}, the gradient norm {measured.grad_norm}"
    if measured.out_of_range:
        count = recipe.train.batch_size // micro_batch_size
        problem = (
            f"{measured.out_of_range:.0f} of {count} micro-batches have a loss or gradients that are no numbers, or "
            f"beyond the {RANGE / count:,.0f} that an exact sum holds"
        )
    look = f"`mygpt replay {run}` looks into it"
    cure = f'{CURE}; or, if they are numbers, use reduction = "fast"' if measured.out_of_range else CURE
    if accelerator.is_main_process:
        try:
            record_failure(run, problem, weights, state, dataset, recipe, micro_batch_size, accelerator.device.type)
        except DamagedCheckpointError as error:
            look = f"no record of it: {error}"
    accelerator.wait_for_everyone()
    return NonFiniteError(f"step {step}: {problem}; not updated: {look}; {cure}")


def settle_buckets(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: BatchStream,
    micro_batch_size: int,
) -> None:
    """Have DDP sort its gradients as it does after the first step of a run.

    It sorts them anew after its first backward pass, and the sums of three or more processes depend on how they are
    sorted: without this the first step of a continued run would not be that of a run never interrupted.
    """
    before = generator_states(accelerator.device, stream)
    inputs, targets = (rows[:micro_batch_size] for rows in stream.batch())
    accelerator.backward(model(inputs, targets))
    optimizer.zero_grad()
    set_generator_states(accelerator.device, stream, before)


def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    data: torch.Tensor,
    places: Iterable[WindowSet],
    micro_batch_size: int,
    step: int,
) -> dict[str, Any]:
    """The held-out loss over the windows at `places`, and its standard error, as a record has them.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    val, stderr, dof = held_out_loss(model, data, places, micro_batch_size, accelerator)
    if not math.isfinite(val):
        raise NonFiniteError(f"step {step}: the held-out loss is {val}; {CURE}")
    return {"val": val, "val_stderr": stderr, "val_dof": dof}


def prepare(
    accelerator: Accelerator, gpt: GPT, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, *, exact: bool
) -> tuple[torch.nn.Module, torch.optim.Optimizer, LambdaLR]:
    """Have Accelerate wrap the parts of a run."""
    if exact:
        # As for evaluation: precision, and nothing that would sum gradients by itself.
        return accelerator.prepare_model(gpt, evaluation_mode=True), *accelerator.prepare(optimizer, scheduler)
    if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
        # Accelerate would have FSDP cast weights, gradients and the loss itself: this is what it does elsewhere.
        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        gpt.forward = autocast(gpt.forward)  # type: ignore[method-assign]
    return accelerator.prepare(gpt, optimizer, scheduler)


CURE = "lower lr, or add warmup and clipping (max_grad_norm) where there is none"


@contextmanager
def naming_memory(table: TrainTable) -> Iterator[None]:
    """Turn running out of memory into an error that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Only CUDA has an error of its own for it: the CPU's and mps's say so in a RuntimeError's text.
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise OutOfMemoryError(
            f"out of memory with batch_size = {table.batch_size}, seq_len = {table.seq_len}; lower micro_batch_size "
            "(which leaves the batch as it is), batch_size, seq_len or the model's size"
        ) from error


@contextmanager
def accelerator_for(table: RuntimeTable, device: torch.device, micro_batches: int) -> Iterator[Accelerator]:
    """An Accelerator that heeds the recipe alone: what the environment or a user's own configuration asks for in
    precision, accumulation or compilation would otherwise change the numbers.

    Raises:
        LaunchError: the process has an Accelerator already, whose settings would win over the recipe's.
    """
    if AcceleratorState._shared_state:
        raise LaunchError("this process already has an Accelerator, whose settings would win; train in another process")
    accelerator = Accelerator(
        fsdp_plugin=sharding_plugin() if is_sharded() else None,
        cpu=device.type == "cpu",
        # The model is moved before its optimizer is built; having prepare() look into that imports DTensor, 0.4 s.
        device_placement=False,
        mixed_precision="bf16" if table.precision == "bf16" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=micro_batches, sync_with_dataloader=False),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        kwargs_handlers=[InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=PROCESS_TIMEOUT)],
        # A prepared scheduler would else step once per process; the loop steps it once per optimizer step.
        step_scheduler_with_optimizer=False,
    )
    orderly = accelerator.num_processes == 1
    try:
        if is_sharded() and not accelerator.is_fsdp2:
            raise LaunchError("the launch configuration asks for FSDP, and Accelerate did not take it up")
        yield accelerator
        orderly = True
    except InterruptedRunError:
        orderly = True  # all processes stop together
        raise
    finally:
        # While others are in a collective, leaving the group, or waiting for the device, can hang with NCCL: a process
        # that fails tells them first, and its end is the end of the group.
        if orderly:
            # Leaving the process group while models are alive aborts some two-process runs at exit.
            accelerator.free_memory()
            gc.collect()
            accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def sharding_plugin() -> FullyShardedDataParallelPlugin:
    """FSDP2 in which each block is sharded, and gathered for the time in which it is computed.

    Precision and activation checkpointing are the recipe's: see `prepare` and `GPT`. Accelerate's own checkpointing
    draws other dropout in the second forward pass than in the first.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_offload=False,
        activation_checkpointing=False,
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=MixedPrecisionPolicy(),
        state_dict_type="SHARDED_STATE_DICT",
    )


def _introduce(start: Start, accelerator: Accelerator, dataset: Dataset, model: GPT) -> None:
    recipe = start.recipe
    sizes = {"corpus": len(dataset.train) + len(dataset.val), "train": len(dataset.train)}
    if recipe.data.val_split:
        sizes["val"] = len(dataset.val)
    lines = header_lines(
        recipe,
        device=accelerator.device.type,
        sizes=sizes,
        vocab_size=dataset.tokenizer.vocab_size,
        params=model.num_params(),
    )
    print("\n".join(lines), flush=True)
    if accelerator.num_processes > 1:
        of_weights = "; the weights are sharded over them" if accelerator.is_fsdp2 else ""
        _note(f"{accelerator.num_processes} processes share each batch{of_weights}")
    if start.checkpoint and start.step < recipe.train.steps:
        _note(f"continuing after step {start.step} from {start.checkpoint}; the lines up to it are from {METRICS_FILE}")
    if not recipe.validation.val_every:
        _note("no held-out loss: overfitting will not show; --val-split 0.1 --val-every 500 shows it")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
