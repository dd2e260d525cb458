"""What a launch would train on: devices, processes and their shares of the work, found and tried out."""

import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from mygpt.data.batches import Share
from mygpt.processes.channel import peers_of
from mygpt.processes.environment import Launched, check_processes, launched_processes
from mygpt.processes.preflight import Setup, set_up
from mygpt.recipe.tables import Recipe, check_recipe
from mygpt.training.train import accelerator_for


def diagnose(recipe: Recipe) -> list[str]:
    """Start as `train` would, up to its first step, and say what was found; [] but on the main process.

    To be called by every process that a launcher started. Writes nothing.

    Raises:
        MygptError: what `train` would raise.
    """
    check_recipe(recipe)
    launched = launched_processes()
    with peers_of(launched) as peers:
        setup = set_up(recipe, launched, peers)
        with accelerator_for(recipe.runtime, setup.device, 1) as accelerator:
            check_processes(launched.processes, accelerator.num_processes)
            seconds = time_message(accelerator)
            if not accelerator.is_main_process:
                return []
            return list(describe(recipe, launched, setup, seconds, sharded=accelerator.is_fsdp2))


def time_message(accelerator: Accelerator, rounds: int = 20) -> float:
    """Seconds in which all processes have added one number."""
    number = torch.ones(1, device=accelerator.device)
    accelerator.reduce(number, "sum").item()  # the first one connects them
    started_at = time.perf_counter()
    for _ in range(rounds):
        accelerator.reduce(number, "sum").item()
    return (time.perf_counter() - started_at) / rounds


def describe(recipe: Recipe, launched: Launched, setup: Setup, seconds: float, *, sharded: bool) -> Iterator[str]:
    """The lines of a diagnosis."""
    info, facts, table = setup.info, setup.facts, recipe.train
    versions = ", ".join(f"{name} {info.versions[name]}" for name in ("mygpt", "torch", "accelerate", "python"))
    yield f"versions:     {versions}"
    nodes = len({entry.node for entry in facts})
    count = f"{launched.processes} process{'es' * (launched.processes > 1)}"
    yield f"launch:       {count} on {nodes} machine{'s' * (nodes > 1)}, {_manner(recipe, launched, sharded)}"
    if launched.processes > 1:
        yield f"network:      {facts[0].backend}; adding one number takes {seconds * 1e3:.2f} ms"
    yield f"precision:    {recipe.runtime.precision}"
    everywhere = ", the same on every process" if launched.processes > 1 else ""
    yield f"corpus:       {recipe.data.corpus}, sha256 {info.corpus_sha256[:12]}{everywhere}"
    windows = f"{table.batch_size} windows of {table.seq_len} tokens"
    yield f"batch:        {windows} a step, {info.micro_batch_size} to a micro-batch"
    for rank, entry in enumerate(facts):
        own = len(Share(info.micro_batch_size, rank, launched.processes).micro_batches(table.batch_size))
        threads = entry.environment["threads"]
        yield (
            f"rank {rank:<9}{entry.node}: {entry.device}, {threads} thread{'s' * (threads > 1)}, "
            f"{own} micro-batch{'es' * (own != 1)} a step"
        )
    for text in setup.notes:
        yield f"note:         {text}"


def _manner(recipe: Recipe, launched: Launched, sharded: bool) -> str:
    if sharded:
        return "weights sharded over them (FSDP2)"
    if recipe.runtime.reduction == "exact":
        return "gradients summed exactly: the same bits on any number of processes"
    if launched.processes == 1:
        return "alone"
    return "data-parallel (DDP): the last bits depend on their number"
