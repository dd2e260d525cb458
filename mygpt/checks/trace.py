"""Every value that one training step of a recorded run computes, in order; `mygpt bisect` compares those of two runs.

As a command, `python -m mygpt.checks.trace RUN STEP CHECKPOINT NAME OUT [KEY=PATH ...]`, it writes a `Trace` to OUT as
JSON. If NAME is not empty, it writes the value of this name to OUT.safetensors. An empty CHECKPOINT is the beginning of
the run. KEY=PATH is where a text or model is now that the run has read.
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mygpt.checks.hooks import watch
from mygpt.checks.rerun import check_inputs, find_inputs, pinned_recipe
from mygpt.data.batches import Batch
from mygpt.errors import MygptError, print_note
from mygpt.processes.environment import no_launcher
from mygpt.processes.machine import choose_matmul, describe_environment, resolve_device, set_up
from mygpt.recipe.tables import Table
from mygpt.runs.initial import open_dataset
from mygpt.runs.run import RunDirectory
from mygpt.training.gradient_sum import LossAndOutOfRange, gradient_sum_for
from mygpt.training.loop import train_step
from mygpt.training.parts import Parts, build_parts, open_accelerator
from mygpt.training.state import as_tensor


class Trace(Table):
    """The values of a step, without their numbers."""

    values: list[tuple[str, str]]
    """The name of each, and a digest of its type, shape and bits, in the order in which they are computed."""
    loss: float
    """The mean loss."""
    environment: dict[str, Any]
    """Versions, processor and settings with which they were computed."""


BEFORE = ", before the step"
"""Ends the names of the weights with which the step begins."""


class Values:
    """Collects the values of a step, and keeps the one that is named `wanted`."""

    def __init__(self, wanted: str = ""):
        self.digests: list[tuple[str, str]] = []
        self.kept: torch.Tensor | None = None
        self.suffix = ""
        """Ends the names of the values of a micro-batch, if there are several."""
        self._wanted, self._times = wanted, dict[str, int]()

    def see(self, name: str, value: torch.Tensor) -> None:
        name += self.suffix
        times = self._times[name] = self._times.get(name, 0) + 1
        if times > 1:  # as the logits of each of several chunks
            name += f", time {times}"
        value = value.detach().cpu().contiguous()
        bits = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        self.digests.append((name, hashlib.sha256(f"{value.dtype} {list(value.shape)} ".encode() + bits).hexdigest()))
        if name == self._wanted:
            self.kept = value.float() if value.dtype == torch.bfloat16 else value.clone()


def trace_step(
    run: RunDirectory, step: int, checkpoint: Path | None, wanted: str = "", inputs: Mapping[str, str] = {}
) -> tuple[Trace, torch.Tensor | None]:
    """Compute one step of a run from the state in `checkpoint`, a step directory; None: from the run's beginning.

    Returns its values and the value of the name `wanted`, if there is one. It uses one process, and neither compiles
    nor recomputes.

    Raises:
        MygptError: the run or its text cannot be read.
    """
    recipe = pinned_recipe(run, step, inputs)
    check_inputs(run, recipe, from_beginning=checkpoint is None)
    recipe = recipe.replace(compile=False, activation_checkpointing=False)
    device = resolve_device(recipe.runtime.device, recipe.runtime.precision)
    settings = set_up(recipe.runtime, device)
    gradient_sum, values = gradient_sum_for(recipe), Values(wanted)
    dataset = open_dataset(recipe)
    with no_launcher(), open_accelerator(recipe.runtime, device, gradient_sum.accumulation_steps) as accelerator:
        parts = build_parts(recipe, accelerator, dataset, gradient_sum, checkpoint, init_sha256=run.info.init_sha256)
        for name, weight in parts.gpt.state_dict().items():
            values.see(name + BEFORE, weight)
        batch = parts.stream.batch()
        loss = see_step(parts, batch, step, values)
    environment = {**describe_environment(device), "threads": settings.threads}
    del environment["git_commit"]
    environment |= {"matmul": choose_matmul(recipe.runtime, device), **environment.pop("versions")}
    return Trace(values=values.digests, loss=loss, environment=environment), values.kept


def see_step(parts: Parts, batch: Batch, step: int, values: Values) -> float:
    """Compute a step while `values` sees what it computes; returns the mean loss."""
    see, gradient_sum, micro_batches = values.see, parts.gradient_sum, iter(range(1, sys.maxsize))
    see("tokens", batch.inputs)
    see("the tokens that follow", batch.targets)

    def start_micro_batch(*_: Any) -> None:
        number = next(micro_batches)
        values.suffix = f" (micro-batch {number})" if gradient_sum.micro_batches > 1 else ""

    parts.gpt.register_forward_pre_hook(start_micro_batch)
    watch(parts.gpt, see)
    backward = gradient_sum.backward

    def see_sum(*arguments: Any) -> LossAndOutOfRange:
        loss, out_of_range = backward(*arguments)
        values.suffix = ""
        see("mean loss", loss)
        for name, parameter in parts.gpt.named_parameters():
            if parameter.grad is not None:
                see(f"gradient of {name}", parameter.grad)
        return loss, out_of_range

    gradient_sum.backward = see_sum  # type: ignore[method-assign,assignment]
    learning_rate = torch.tensor(parts.learning_rate, dtype=torch.float64)
    update = train_step(parts, batch, step)
    see("gradient norm", update.grad_norm)
    see("learning rate", learning_rate)
    for parameter_name, parameter in parts.gpt.named_parameters():
        moments = parts.optimizer.state.get(parameter, {})
        for moment, value in sorted(moments.items()):
            see(f"{moment} of {parameter_name}, updated", as_tensor(value))
        see(f"{parameter_name}, updated", parameter)
    return update.loss.item()


def main(arguments: list[str]) -> None:
    """The command; prints an error as `mygpt` does."""
    path, step, checkpoint, wanted, out, *given = arguments
    try:
        run = RunDirectory(Path(path))
        inputs = find_inputs([run], dict(item.split("=", 1) for item in given))
        trace, kept = trace_step(run, int(step), Path(checkpoint) if checkpoint else None, wanted, inputs)
    except MygptError as error:
        print_note(f"mygpt: {error}")
        sys.exit(error.exit_code)
    Path(out).write_text(trace.model_dump_json(), encoding="utf-8")
    if kept is not None:
        save_file({wanted: kept}, f"{out}.safetensors")


if __name__ == "__main__":
    # As in `mygpt`: kernels that mps lacks run on the CPU.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    main(sys.argv[1:])
