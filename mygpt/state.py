"""What continues a run beside the weights: taken from its parts, and put back into them."""

from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from mygpt.checkpoint import Tensors, TrainingState, optimizer_tensors, read_state, read_weights
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
    moments = optimizer_tensors(optimizer, gpt.state_dict())
    tensors = {name: full_tensor(tensor) for name, tensor in moments.items()}
    tensors["generator.stream"] = generators.stream
    if generators.dropout is None:
        return TrainingState(tensors, StateMetadata(step=step, processes=None, best=best))
    gathered = accelerator.gather(generators.dropout.to(accelerator.device)).cpu()
    for process, state in enumerate(gathered.chunk(accelerator.num_processes)):
        tensors[dropout_name(accelerator.device, process)] = state
    return TrainingState(tensors, StateMetadata(step=step, processes=accelerator.num_processes, best=best))


def full_weights(gpt: GPT) -> dict[str, torch.Tensor]:
    """The weights by name; where they are sharded every process has to call this."""
    return {name: full_tensor(weight) for name, weight in gpt.state_dict().items()}


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered from all processes if it is sharded (a DTensor)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Restored(NamedTuple):
    """What a checkpoint says beside the weights and the generators."""

    step: int
    best: Best | None
    """The best step up to then."""
    moments: Tensors
    """The optimizer's, to be loaded once it is what it will be."""


def restore(accelerator: Accelerator, checkpoint: Path, gpt: GPT, stream: BatchStream) -> Restored:
    """Put the weights and generators of a run into the state of a checkpoint.

    On another kind of device or number of processes dropout goes on with generators of its own.

    Raises:
        DamagedCheckpointError: the checkpoint cannot be read.
    """
    weights = read_weights(checkpoint / MODEL_FILE, gpt.config, gpt.vocab_size)
    tensors, metadata = read_state(checkpoint, weights)
    gpt.load_state_dict(weights)
    name = dropout_name(accelerator.device, accelerator.process_index)
    try:
        stream.generator.set_state(tensors["generator.stream"])
        if metadata.processes == accelerator.num_processes and name in tensors:
            set_dropout_generator_state(accelerator.device, tensors[name])
        else:
            torch.manual_seed(metadata.step * accelerator.num_processes + accelerator.process_index)
    except (KeyError, RuntimeError, TypeError) as error:
        raise DamagedCheckpointError(f"{checkpoint / STATE_FILE}: damaged: no generator's state: {error}") from None
    return Restored(metadata.step, metadata.best, tensors)


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
