"""What continues a run beside the weights: taken from its parts, and put back into them."""

from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from mygpt.checkpoint import (
    TrainingState,
    load_optimizer_tensors,
    optimizer_tensors,
    read_state,
    read_weights,
)
from mygpt.data import BatchStream
from mygpt.errors import DamagedCheckpointError
from mygpt.metadata import Best, StateMetadata
from mygpt.model import GPT
from mygpt.rundir import MODEL_FILE, STATE_FILE
from mygpt.runtime import dropout_generator_state, set_dropout_generator_state


class GeneratorStates(NamedTuple):
    """Where the batch stream and this process's dropout stand; uint8, 1-d."""

    stream: torch.Tensor
    dropout: torch.Tensor | None
    """None with reduction = "exact": dropout is seeded for each micro-batch."""


def generator_states(device: torch.device, stream: BatchStream, *, exact: bool = False) -> GeneratorStates:
    return GeneratorStates(stream.generator.get_state(), None if exact else dropout_generator_state(device))


def set_generator_states(device: torch.device, stream: BatchStream, states: GeneratorStates) -> None:
    stream.generator.set_state(states.stream)
    if states.dropout is not None:
        set_dropout_generator_state(device, states.dropout)


def training_state(
    accelerator: Accelerator,
    gpt: GPT,
    optimizer: torch.optim.Optimizer,
    generators: GeneratorStates,
    step: int,
    best: Best | None,
) -> TrainingState:
    """The state after `step`, with the dropout generators of all processes, each of which has to call this.

    With reduction = "exact" there are none, and nothing in it depends on the number of processes.
    """
    tensors = optimizer_tensors(optimizer, [name for name, _ in gpt.named_parameters()])
    tensors["generator.stream"] = generators.stream
    if generators.dropout is None:
        return TrainingState(tensors, StateMetadata(step=step, processes=None, best=best))
    gathered = accelerator.gather(generators.dropout.to(accelerator.device)).cpu()
    for process, state in enumerate(gathered.chunk(accelerator.num_processes)):
        tensors[dropout_name(accelerator.device, process)] = state
    return TrainingState(tensors, StateMetadata(step=step, processes=accelerator.num_processes, best=best))


def restore(
    accelerator: Accelerator, checkpoint: Path, gpt: GPT, optimizer: torch.optim.Optimizer, stream: BatchStream
) -> tuple[int, Best | None]:
    """Put the parts of a run into the state of a checkpoint; returns its step, and the best step up to then.

    On another kind of device or number of processes dropout goes on with generators of its own.

    Raises:
        DamagedCheckpointError: the checkpoint cannot be read.
    """
    weights = read_weights(checkpoint / MODEL_FILE, gpt.config, gpt.vocab_size)
    tensors, metadata = read_state(checkpoint, weights)
    gpt.load_state_dict(weights)
    load_optimizer_tensors(optimizer, [name for name, _ in gpt.named_parameters()], tensors)
    name = dropout_name(accelerator.device, accelerator.process_index)
    try:
        stream.generator.set_state(tensors["generator.stream"])
        if metadata.processes == accelerator.num_processes and name in tensors:
            set_dropout_generator_state(accelerator.device, tensors[name])
        else:
            torch.manual_seed(metadata.step * accelerator.num_processes + accelerator.process_index)
    except (KeyError, RuntimeError, TypeError) as error:
        raise DamagedCheckpointError(f"{checkpoint / STATE_FILE}: damaged: no generator's state: {error}") from None
    return metadata.step, metadata.best


def dropout_name(device: torch.device, process: int) -> str:
    """The tensor that holds the state of a process's dropout generator."""
    return f"generator.{device.type}.{process}"


def shared_path(accelerator: Accelerator, path: Path | None) -> Path | None:
    """The main process's `path`, told to all processes; None: none."""
    if accelerator.num_processes == 1:
        return path
    text = str(path or "").encode()
    buffer = torch.zeros(PATH_BYTES, dtype=torch.uint8)
    buffer[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    told = bytes(broadcast(buffer.to(accelerator.device)).tolist()).rstrip(b"\0")
    return Path(told.decode()) if told else None


PATH_BYTES = 4096
"""The longest path that Linux takes."""
