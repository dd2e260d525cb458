"""Capture and restore what a run needs beside the weights: progress, optimizer state and generator states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from accelerate import Accelerator

from mygpt.compat import full_tensor, is_sharded_tensor, shard_like
from mygpt.data.batches import BatchStream
from mygpt.errors import DamagedCheckpointError, MismatchError, MygptError
from mygpt.model.gpt import GPT
from mygpt.processes.machine import set_dropout_generator_state
from mygpt.recipe.seeds import batch_seed_after, process_dropout_seed
from mygpt.recipe.tables import Recipe
from mygpt.runs.files import MODEL_FILE, STATE_FILE
from mygpt.runs.held_out import Evaluation, count_from, count_waiting, evaluations_of, improves, last_improvement
from mygpt.runs.loading import MOMENTS, NUMBERS, read_state, read_weights
from mygpt.runs.run import RunDirectory
from mygpt.runs.saver import Tensors
from mygpt.runs.schemas import Best, End, OptimizerMetadata
from mygpt.runs.start import Start


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    best: Best | None = None
    """The evaluation with the lowest held-out loss, where the recipe keeps its checkpoint."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """So far, over the same kind of held-out windows."""
    improved: Evaluation | None = None
    """The last improvement; known only with `patience`."""
    waited: int = 0
    """How many evaluations in a row have brought no improvement; counted only with `patience`."""

    @classmethod
    def at(cls, start: Start) -> Self:
        """The progress of a run that starts there."""
        progress = cls(start.step, start.best, evaluations_of(start.evaluations))
        if start.recipe.validation.patience and progress.evaluations:
            progress.improved = last_improvement(progress.evaluations)
            counted_after = count_from(start.info.stretches, progress.evaluations)
            progress.waited = count_waiting(progress.evaluations, counted_after)
        return progress

    def observe(self, evaluation: Evaluation, recipe: Recipe) -> bool:
        """Take one more evaluation; returns whether the recipe keeps it as the best so far."""
        self.evaluations.append(evaluation)
        if recipe.validation.patience:
            # Compared with the last improvement alone: the whole list again would cost more with each evaluation.
            is_better = self.improved is None or improves(self.improved, evaluation)
            self.improved, self.waited = (evaluation, 0) if is_better else (self.improved, self.waited + 1)
        val = evaluation.loss.mean
        if not recipe.keeps_best or (self.best is not None and val >= self.best.val):
            return False
        self.best = Best(step=evaluation.step, val=val)
        return True

    def ended_by(self, recipe: Recipe) -> End | None:
        """Why the run is finished here; None: it is not."""
        if self.step == recipe.train.steps:
            return "steps"
        # So many evaluations have brought no improvement beyond doubt.
        return "patience" if 0 < recipe.validation.patience <= self.waited else None


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
    accelerator: Accelerator,
    checkpoint: Path,
    gpt: GPT,
    optimizer: torch.optim.Optimizer,
    stream: BatchStream,
    data_seed: int,
) -> tuple[int, dict[str, Any]]:
    """Put the weights and generators of a run into the state of a checkpoint.

    Returns its step, and the optimizer's state, which can be loaded once Accelerate has wrapped the optimizer.

    On another kind of device or number of processes dropout goes on with generators seeded from `data_seed`; with
    another `data_seed` or order than the checkpoint's, batches do, too.

    Raises:
        DamagedCheckpointError: the checkpoint cannot be read.
        MismatchError: it is that of another optimizer.
    """
    weights = read_weights(checkpoint / MODEL_FILE, gpt.config, gpt.vocab_size)
    tensors, metadata = read_state(checkpoint, weights)
    trained_by = metadata.optimizer.name if metadata.optimizer else "AdamW"
    if trained_by != (name := class_name(optimizer)):
        raise MismatchError(
            f"{checkpoint}: was trained with {trained_by}, and this mygpt trains with {name}; use the version that "
            "trained it, or begin a new run with its weights (--init-from)"
        )
    kinds = metadata.optimizer.kinds if metadata.optimizer else {}
    values = {
        name: tensor.item() if kinds.get(name) in NUMBERS else tensor
        for name, tensor in tensors.items()
        if name.startswith("optimizer.")
    }
    owners = (*state_prefixes(gpt).values(), *group_prefixes(optimizer))
    if stray := next((name for name in values if not name.startswith(owners)), None):
        raise DamagedCheckpointError(f"{checkpoint / STATE_FILE}: damaged: {stray} is of no parameter or group")
    gpt.load_state_dict(weights)
    name = dropout_name(accelerator.device, accelerator.process_index)
    before = RunDirectory(checkpoint.parent).recipe.train
    is_reseeded = (before.data_seed, before.order) != (data_seed, stream.order)
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
    return metadata.step, values


def dropout_name(device: torch.device, process: int) -> str:
    """The tensor that holds the state of a process's dropout generator."""
    return f"generator.{device.type}.{process}"


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """That of an optimizer, which Accelerate may have wrapped."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def state_prefixes(gpt: GPT) -> dict[torch.Tensor, str]:
    """How the names begin under which a checkpoint holds the optimizer's state of each parameter."""
    # After an evaluation FSDP2 shows the whole weights as parameters, until a state dict is taken.
    return {parameter: f"optimizer.{name}." for name, parameter in gpt.state_dict(keep_vars=True).items()}


def group_prefixes(optimizer: torch.optim.Optimizer) -> list[str]:
    """The same for what an optimizer counts in its parameter groups."""
    return [f"optimizer.group.{number}." for number in range(len(optimizer.param_groups))]


def optimizer_state(
    optimizer: torch.optim.Optimizer, gpt: GPT, built_groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The optimizer's state, as tensors and plain numbers by name, in the same order on all processes.

    It is what an optimizer keeps of each parameter, and what it has changed in its groups since they were built.

    Raises:
        MygptError: it keeps something that a checkpoint cannot hold.
    """
    prefixes = state_prefixes(gpt)
    values = {
        f"{prefixes.get(owner, 'optimizer.?.')}{name}": value
        for owner, state in optimizer.state.items()
        for name, value in state.items()
    }
    for prefix, group, built in zip(group_prefixes(optimizer), optimizer.param_groups, built_groups, strict=True):
        for name in group.keys() - {"params", "lr", "initial_lr"}:  # rates are set by the scheduler
            if isinstance(value := group[name], torch.Tensor) or value != built.get(name):
                values[prefix + name] = value
    for name, value in values.items():
        is_tensor = isinstance(value, torch.Tensor) and value.dtype in DTYPES
        if name.startswith("optimizer.?.") or not (is_tensor or type(value).__name__ in NUMBERS):
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise MygptError(
                f"{class_name(optimizer)}: keeps {name} ({kind}), which a checkpoint cannot hold; expected numbers and "
                "tensors of parameters and of groups"
            )
    return dict(sorted(values.items()))


DTYPES = {getattr(torch, name) for name in ("bool", "uint8", "int8", "int16", "int32", "int64")} | {
    getattr(torch, f"float{bits}") for bits in (16, 32, 64)
}
"""Types of tensors that a checkpoint can hold: `mygpt compare` reads them with numpy, which has no bfloat16."""


def as_tensor(value: Any) -> torch.Tensor:
    """A value of the optimizer's state as a checkpoint holds it."""
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=NUMBERS[type(value).__name__])


def describe_optimizer(
    optimizer: torch.optim.Optimizer, gpt: GPT, values: Mapping[str, Any]
) -> OptimizerMetadata | None:
    """What the metadata say of the optimizer's state; None: it is that of AdamW."""
    kinds: dict[str, Any] = {
        name: "tensor" if isinstance(value, torch.Tensor) else type(value).__name__ for name, value in values.items()
    }
    usual = {f"{prefix}{moment}": "tensor" for prefix in state_prefixes(gpt).values() for moment in MOMENTS}
    name = class_name(optimizer)
    return None if (name, kinds) == ("AdamW", usual) else OptimizerMetadata(name=name, kinds=kinds)


def load_optimizer_state(optimizer: torch.optim.Optimizer, gpt: GPT, values: Mapping[str, Any]) -> None:
    """Give the optimizer what `optimizer_state` took, on its devices, and sharded as the parameters are.

    Not by `load_state_dict`, which turns all tensors into the parameters' type.
    """

    def of(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    for parameter, prefix in state_prefixes(gpt).items():
        state, group = of(prefix), groups.get(parameter, {})
        for name, value in state.items():
            # As torch's own loading: the host counts steps, except for kernels that read them on the device.
            on_host = name == "step" and not (group.get("fused") or group.get("capturable"))
            if isinstance(value, torch.Tensor) and not on_host:
                state[name] = shard_like(value, parameter).to(parameter.device)
        if state:
            optimizer.state[parameter] = state
    for prefix, group in zip(group_prefixes(optimizer), optimizer.param_groups, strict=True):
        group |= of(prefix)
