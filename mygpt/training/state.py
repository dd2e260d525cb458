"""Capture and restore what a run needs beside the weights: progress, optimizer state and generator states."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from mygpt.compat import full_tensor, is_sharded_tensor, shard_like
from mygpt.data.batches import BatchStream
from mygpt.errors import DamagedCheckpointError
from mygpt.model.gpt import GPT
from mygpt.processes.machine import set_dropout_generator_state
from mygpt.recipe.seeds import batch_seed_after, process_dropout_seed
from mygpt.recipe.tables import Recipe, TrainTable
from mygpt.runs.files import MODEL_FILE, STATE_FILE
from mygpt.runs.held_out import PREFIX, Evaluation, History, read_history, remember
from mygpt.runs.loading import MOMENTS, read_state, read_weights
from mygpt.runs.saver import Tensors
from mygpt.runs.schemas import Best, End, StateMetadata
from mygpt.runs.steps import read_manifest


@dataclass
class Progress:
    """How far a run has come; saved and restored as a whole."""

    step: int = 0
    """Optimizer steps done."""
    best: Best | None = None
    """The evaluation with the lowest held-out loss, where the recipe keeps its checkpoint."""
    history: History | None = None
    """What is remembered of evaluations; None: there was none."""

    def observe(self, evaluation: Evaluation, recipe: Recipe) -> bool:
        """Take the evaluation after `step`; returns whether the recipe keeps it as the best so far."""
        same_windows = recipe.validation.sampling != "shared-stream"
        self.history = remember(self.history, evaluation, same_windows=same_windows)
        val = evaluation.loss.mean
        if not recipe.keeps_best or (self.best is not None and val >= self.best.val):
            return False
        self.best = Best(step=self.step, val=val)
        return True

    def has_stopped_early(self, recipe: Recipe) -> bool:
        """Whether `patience` evaluations have brought no improvement beyond doubt."""
        patience = recipe.validation.patience
        return patience > 0 and self.history is not None and self.history.waited >= patience

    def end(self, recipe: Recipe) -> End | None:
        """Why the run ends here; None: it does not."""
        if self.step == recipe.train.steps:
            return "steps"
        return "patience" if self.has_stopped_early(recipe) else None

    def metadata(self, processes: int | None) -> StateMetadata:
        """For a state file with the dropout generators of so many processes."""
        held_out = self.history.metadata() if self.history else None
        return StateMetadata(step=self.step, processes=processes, best=self.best, held_out=held_out)

    def tensors(self) -> Tensors:
        """For a state file."""
        arrays = self.history.arrays() if self.history else {}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class GeneratorStates(NamedTuple):
    """Where the batch stream and this process's dropout stand; uint8, 1-d."""

    stream: torch.Tensor
    dropout: torch.Tensor | None
    """None where dropout is seeded for each micro-batch."""


def gather(accelerator: Accelerator, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors; of those that are sharded the main process gets all, on the CPU, and the others nothing.

    One after the other, since a device may not have room for them all. Every process has to call this.
    """
    whole = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if not is_sharded_tensor(tensor):
            whole[name] = full
        elif accelerator.is_main_process:
            whole[name] = full.cpu()
    return whole


def restore(
    accelerator: Accelerator, checkpoint: Path, gpt: GPT, stream: BatchStream, data_seed: int
) -> tuple[Progress, Tensors]:
    """Put the weights and generators of a run into the state of a checkpoint.

    Returns its progress, and the optimizer's moments, which can be loaded once Accelerate has wrapped the optimizer.

    On another kind of device or number of processes dropout goes on with generators seeded from `data_seed`; with
    another `data_seed` or order than the checkpoint's, batches do, too.

    Raises:
        DamagedCheckpointError: the checkpoint cannot be read.
    """
    weights = read_weights(checkpoint / MODEL_FILE, gpt.config, gpt.vocab_size)
    tensors, metadata = read_state(checkpoint, weights)
    gpt.load_state_dict(weights)
    name = dropout_name(accelerator.device, accelerator.process_index)
    trained_with = read_manifest(checkpoint).recipe
    before = trained_with.train if trained_with else TrainTable()
    is_reseeded = (trained_with is not None and before.data_seed != data_seed) or before.order != stream.order
    try:
        if is_reseeded:
            stream.reseed(batch_seed_after(data_seed, metadata.step))
        else:
            try:
                stream.set_state(tensors["generator.stream"])
            except RuntimeError:
                if stream.order == "random":
                    raise
                is_reseeded = True  # epochs of another text, or of other windows
                stream.reseed(batch_seed_after(data_seed, metadata.step))
        if metadata.processes == accelerator.num_processes and name in tensors and not is_reseeded:
            set_dropout_generator_state(accelerator.device, tensors[name])
        else:
            torch.manual_seed(process_dropout_seed(data_seed, accelerator.process_index, metadata.step))
    except (KeyError, RuntimeError, TypeError) as error:
        raise DamagedCheckpointError(f"{checkpoint / STATE_FILE}: damaged: no generator's state: {error}") from None
    try:
        history = read_history(metadata.held_out, {k: v.numpy() for k, v in tensors.items() if k.startswith(PREFIX)})
    except (KeyError, ValueError) as error:
        raise DamagedCheckpointError(f"{checkpoint / STATE_FILE}: damaged: no held-out losses: {error}") from None
    return Progress(metadata.step, metadata.best, history), tensors


def dropout_name(device: torch.device, process: int) -> str:
    """The tensor that holds the state of a process's dropout generator."""
    return f"generator.{device.type}.{process}"


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The optimizer's moments by the names of its parameters, which are given in its order."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return {
        f"optimizer.{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in zip(names, parameters, strict=True)
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: Tensors) -> None:
    """Give the optimizer the moments that `optimizer_tensors` took, each sharded as its parameter is."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    states = {
        index: {moment: shard_like(tensors[f"optimizer.{name}.{moment}"], parameter) for moment in MOMENTS}
        for index, (name, parameter) in enumerate(zip(names, parameters, strict=True))
    }
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
