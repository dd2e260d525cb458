"""The training run: a recipe goes in, a run directory comes out."""

import gc
import math
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin
from torch.nn.utils import get_total_norm

from mygpt.checkpoint import save_checkpoint
from mygpt.data import Batch, BatchStream, Dataset, Rows, held_out_batches, load_dataset
from mygpt.errors import LaunchError, NonFiniteError, OutOfMemoryError, RecipeError
from mygpt.evaluate import held_out_loss
from mygpt.metrics import Reporter, due, header_lines
from mygpt.model import GPT
from mygpt.optim import build_optimizer, build_scheduler
from mygpt.recipe import Recipe, RuntimeTable, TrainTable, check_recipe
from mygpt.rundir import check_output, create_run
from mygpt.runtime import (
    check_processes,
    describe_environment,
    launched_processes,
    make_deterministic,
    resolve_device,
    set_threads,
)


def train(recipe: Recipe, *, overwrite: bool = False) -> Path:
    """Train as `recipe` says, and return the run directory.

    To be called by every process that a launcher started. Whatever can be wrong with the recipe, the corpus and the
    output is found before anything is written. With `overwrite` a run that is already there is replaced.

    It is meant to have its process to itself: it sets torch's threads, global seeds and, on CUDA, deterministic
    algorithms, and leaves them set.

    Raises:
        MygptError: anything that the user can act on.
    """
    check_recipe(recipe)
    processes, local_processes = launched_processes()
    micro_batch_size = per_process_micro_batch(recipe.train, processes)
    device = resolve_device(recipe.runtime.device, recipe.runtime.precision, local_processes)
    dataset = load_dataset(recipe.data, recipe.train.seq_len)
    threads = set_threads(recipe.runtime.threads, local_processes)
    make_deterministic(device)
    micro_batches = recipe.train.batch_size // processes // micro_batch_size
    with accelerator_for(recipe.runtime, device, micro_batches) as accelerator:
        check_processes(processes, accelerator.num_processes)
        info = {"threads": threads, "processes": processes, "corpus_sha256": dataset.sha256}
        with naming_memory(recipe.train):
            return _train(recipe, accelerator, dataset, info, micro_batch_size, overwrite)


def _train(
    recipe: Recipe,
    accelerator: Accelerator,
    dataset: Dataset,
    info: dict[str, Any],
    micro_batch_size: int,
    overwrite: bool,
) -> Path:
    """The main job: build the parts, then step, evaluate, report, save."""
    steps, run = recipe.train.steps, Path(recipe.checkpoint.output)
    if accelerator.is_main_process:
        check_output(run, overwrite)
    torch.manual_seed(recipe.train.init_seed)
    gpt = GPT(recipe.model, dataset.tokenizer.vocab_size).to(accelerator.device)
    optimizer = build_optimizer(gpt, recipe.optimizer)
    scheduler = build_scheduler(optimizer, recipe.schedule, recipe.optimizer.lr, steps)
    if recipe.runtime.compile:
        gpt.compile()
    # `gpt` stays the bare module, whose weights have their plain names whatever `model` wraps around it.
    model, optimizer, scheduler = accelerator.prepare(gpt, optimizer, scheduler)

    dataset = dataset.to(accelerator.device)
    rows = Rows(accelerator.process_index, accelerator.num_processes)
    stream = BatchStream(
        dataset.train, recipe.train.batch_size, recipe.train.seq_len, seed=recipe.train.data_seed, rows=rows
    )
    # Only dropout draws from the global generator, and each process's rows need masks of their own.
    torch.manual_seed(recipe.train.data_seed + accelerator.process_index)

    if accelerator.is_main_process:
        create_run(run, recipe, describe_environment(accelerator.device) | info)
        _introduce(recipe, accelerator, dataset, gpt)
    with Reporter(recipe, run, is_main=accelerator.is_main_process) as reporter:
        for step in range(1, steps + 1):
            lr = scheduler.get_last_lr()[0]
            update = train_step(
                accelerator,
                model,
                optimizer,
                stream.batch(),
                micro_batch_size=micro_batch_size,
                max_grad_norm=recipe.train.max_grad_norm,
                log_grad_norm=recipe.train.log_grad_norm,
            )
            scheduler.step()
            reporter.step_done()

            evaluated = due(step, recipe.validation.val_every, steps)
            saved = due(step, recipe.checkpoint.save_every or steps, steps)
            printed = evaluated or step == 1 or due(step, recipe.train.print_every, steps)
            if printed or saved or due(step, recipe.train.log_every, steps):
                values = {"lr": lr, **read_update(accelerator, update, step)}
                if evaluated:
                    with reporter.paused():
                        batches = held_out_batches(dataset.val, recipe.validation, stream, recipe.train.data_seed)
                        values |= evaluate(accelerator, model, batches, micro_batch_size, step)
                reporter.log(step, printed=printed, **values)
            if saved:
                with reporter.paused():
                    if accelerator.is_main_process:
                        save_checkpoint(run, gpt.state_dict(), recipe.model, dataset.tokenizer, step)
                    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"saved {run}", file=sys.stderr)
    return run


class Update(NamedTuple):
    """What one optimizer step measured on this process, still on its device."""

    loss: torch.Tensor
    """Mean loss of the process's rows before the update."""
    grad_norm: torch.Tensor | None
    """Global L2 norm of the gradient of the whole batch, before clipping; None where it was not needed."""


def train_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    micro_batch_size: int,
    max_grad_norm: float = 0.0,
    log_grad_norm: bool = False,
) -> Update:
    """One optimizer step on this process's rows of the global batch.

    The rows go through the model `micro_batch_size` at a time; gradients are averaged over these and over processes,
    and clipped to a global L2 norm of `max_grad_norm` (0: not clipped). Nothing here waits for the device.
    """
    losses = []
    for inputs, targets in zip(*(rows.split(micro_batch_size) for rows in batch), strict=True):
        # On all but the last micro-batch this keeps the processes from averaging their gradients.
        with accelerator.accumulate(model):
            loss = model(inputs, targets)
            accelerator.backward(loss)
        losses.append(loss.detach())
    grad_norm = None
    if max_grad_norm:
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    elif log_grad_norm:
        grad_norm = get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.step()
    optimizer.zero_grad()
    return Update(torch.stack(losses).mean(), grad_norm)


def read_update(accelerator: Accelerator, update: Update, step: int) -> dict[str, Any]:
    """The update's numbers, the loss as the mean over all processes; waits for the device.

    Raises:
        NonFiniteError: one of them is not finite.
    """
    loss = update.loss
    if accelerator.num_processes > 1:
        loss = accelerator.reduce(loss, "mean")
    values = {"loss": finite(loss.item(), "loss", step)}
    if update.grad_norm is not None:
        values["grad_norm"] = finite(update.grad_norm.item(), "gradient norm", step)
    return values


def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, batches: Iterable[Batch], micro_batch_size: int, step: int
) -> dict[str, Any]:
    """The held-out loss over the batches of all processes, and its standard error, as a record has them.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    mean, stderr = held_out_loss(model, batches, micro_batch_size, accelerator)
    return {"val": finite(mean, "held-out loss", step), "val_stderr": stderr}


def finite(value: float, what: str, step: int) -> float:
    """`value`, which must be a number.

    Raises:
        NonFiniteError: it is infinite or not a number.
    """
    if not math.isfinite(value):
        raise NonFiniteError(
            f"step {step}: the {what} is {value}; lower lr, add warmup, or clip with max_grad_norm = 1.0"
        )
    return value


def per_process_micro_batch(table: TrainTable, processes: int) -> int:
    """The windows of one forward pass on one of `processes`.

    Raises:
        RecipeError: the batch cannot be divided so.
    """
    if table.batch_size % processes:
        raise RecipeError(f"batch_size: got {table.batch_size}, expected a multiple of the {processes} processes")
    rows = table.batch_size // processes
    size = table.micro_batch_size or rows
    if rows % size:
        raise RecipeError(
            f"micro_batch_size: got {size}, expected a divisor of the {rows} windows that each of the {processes} "
            f"processes has of batch_size = {table.batch_size}"
        )
    return size


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
        cpu=device.type == "cpu",
        # The model is moved before its optimizer is built; having prepare() look into that imports DTensor, 0.4 s.
        device_placement=False,
        mixed_precision="bf16" if table.precision == "bf16" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=micro_batches, sync_with_dataloader=False),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        # A prepared scheduler would else step once per process; the loop steps it once per optimizer step.
        step_scheduler_with_optimizer=False,
    )
    try:
        yield accelerator
    finally:
        # Leaving the process group while models are alive aborts some two-process runs at exit.
        accelerator.free_memory()
        gc.collect()
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def _introduce(recipe: Recipe, accelerator: Accelerator, dataset: Dataset, model: GPT) -> None:
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
        print(f"{accelerator.num_processes} processes share each batch", file=sys.stderr)
    if not recipe.validation.val_every:
        print("no held-out loss: overfitting will not show; --val-split 0.1 --val-every 500 shows it", file=sys.stderr)
