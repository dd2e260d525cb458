"""Keep a step whose loss or gradient is not finite, so that `mygpt replay` can look into it."""

import os
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from mygpt.errors import DiskError, NonFiniteError
from mygpt.processes.machine import choose_matmul
from mygpt.recipe.tables import Count, Table
from mygpt.runs.files import remove
from mygpt.runs.saver import Tensors, TrainingState, model_metadata, write_checkpoint
from mygpt.runs.schemas import Manifest
from mygpt.training.gradient_sum import RANGE
from mygpt.training.parts import Parts
from mygpt.training.pending import Reading

BATCH_FILE = "batch.json"
REMEDY = "lower lr, or add warmup and clipping (max_grad_norm) where there is none"


class FailedStep(Table):
    """batch.json: the step, and the windows that it was computed from."""

    step: int
    problem: str
    starts: Annotated[tuple[int, ...], Field(min_length=1)]
    """Where the windows begin in the training part of the corpus, in tokens."""
    windows: Annotated[tuple[str, ...], Field(min_length=1)]
    """Their text: that of seq_len tokens, and of the one after."""
    tokens: Annotated[tuple[tuple[Annotated[int, Field(ge=0)], ...], ...], Field(min_length=1)]
    """The ids of these tokens."""
    micro_batch_size: Count
    processes: Count
    """Each computed its share of the windows, and drew dropout from its own generator."""
    dropout_seeds: tuple[int, ...]
    """One per micro-batch with reduction = "exact", which uses them in place of these generators."""
    device: str
    precision: Literal["fp32", "bf16"]
    threads: Annotated[int, Field(ge=1, le=1024)]
    """CPU threads of the process that wrote this."""
    matmul: Literal["blas", "onednn"]
    loss_chunk: Annotated[int, Field(ge=0)]
    compile: bool
    activation_checkpointing: bool


def report_failed_step(parts: Parts, failed: Reading) -> NonFiniteError:
    """Keep the failed step with the state before it in the run directory; returns the error to raise.

    Every process has to call this.
    """
    run = Path(parts.recipe.checkpoint.output)
    weights, state = parts.capture(failed.step - 1, failed.generators)
    numbers = failed.loss, failed.grad_norm, failed.out_of_range
    problem, remedy = describe_problem(*numbers, parts.gradient_sum.micro_batches), REMEDY
    if failed.out_of_range:
        remedy += '; or, if they are numbers, use reduction = "fast"'
    look = f"`mygpt replay {run}` looks into it"
    if parts.accelerator.is_main_process:
        try:
            _write(run, parts, problem, weights, state)
        except DiskError as error:
            look = f"no record of it: {error}"
    parts.accelerator.wait_for_everyone()
    return NonFiniteError(f"step {failed.step}: {problem}; not updated: {look}; {remedy}")


def describe_problem(loss: float, grad_norm: float, out_of_range: float, micro_batches: int) -> str:
    """What was not finite, or did not fit into an exact sum over so many micro-batches."""
    if out_of_range:
        return (
            f"{out_of_range:.0f} of {micro_batches} micro-batches have a loss or gradients that are no "
            f"numbers, or beyond the {RANGE / micro_batches:,.0f} that an exact sum holds"
        )
    return f"the loss is {loss}, the gradient norm {grad_norm}"


def _write(run: Path, parts: Parts, problem: str, weights: Tensors, state: TrainingState) -> None:
    """Write `run`/failed-step-NNNNNN: the checkpoint before the step, and batch.json.

    Raises:
        DiskError: the disk refused it.
    """
    recipe, dataset, gradient_sum = parts.recipe, parts.dataset, parts.gradient_sum
    table, runtime, step = recipe.train, recipe.runtime, state.metadata.step + 1
    parts.stream.set_state(state.tensors["generator.stream"])  # the run ends here
    starts = parts.stream.draw().tolist()
    tokens = [dataset.train[at : at + table.seq_len + 1].tolist() for at in starts]
    failed = FailedStep(
        step=step,
        problem=problem,
        starts=tuple(starts),
        windows=tuple(map(dataset.tokenizer.decode, tokens)),
        tokens=tuple(map(tuple, tokens)),
        micro_batch_size=gradient_sum.micro_batch_size,
        processes=state.metadata.processes or 1,
        dropout_seeds=gradient_sum.dropout_seeds(step, range(gradient_sum.micro_batches)),
        device=parts.accelerator.device.type,
        precision=runtime.precision,
        threads=torch.get_num_threads(),
        matmul=choose_matmul(runtime, parts.accelerator.device),
        loss_chunk=runtime.loss_chunk,
        compile=runtime.compile,
        activation_checkpointing=runtime.activation_checkpointing,
    )
    target = run / f"failed-step-{step:06d}"
    if os.path.lexists(target):
        remove(target)
    manifest = Manifest(step=step, reason="failed", files={})
    write_checkpoint(
        target,
        {name: weight.cpu() for name, weight in weights.items()},
        model_metadata(recipe.model, dataset.tokenizer, step - 1),
        TrainingState({name: tensor.cpu().contiguous() for name, tensor in state.tensors.items()}, state.metadata),
        manifest,
        {BATCH_FILE: failed.model_dump_json(indent=2) + "\n"},
    )
