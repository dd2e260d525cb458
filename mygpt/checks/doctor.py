"""What a launch would train on: devices, processes and their shares of the work, found and tried out."""

import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from mygpt.checks.speed import measure_speed
from mygpt.data.batches import Share
from mygpt.errors import LaunchError
from mygpt.processes.channel import connect
from mygpt.processes.environment import Launched, check_joined, launched_processes
from mygpt.processes.preflight import Preflight, run_preflight
from mygpt.recipe.tables import Recipe, check_recipe
from mygpt.training.gradient_sum import gradient_sum_for
from mygpt.training.parts import open_accelerator


def diagnose(recipe: Recipe, *, speed: bool = False) -> Iterator[tuple[str, str]]:
    """Start as `train` would, up to its first step, and say what was found, on the main process alone.

    With `speed` also which settings would be faster, which takes some 20 seconds and is for a single process. To be
    called by every process that a launcher started. Writes nothing.

    Raises:
        MygptError: what `train` would raise.
    """
    check_recipe(recipe)
    launched = launched_processes()
    if speed and launched.processes > 1:
        raise LaunchError("--speed times a single process; start it without a launcher")
    with connect(launched) as channel:
        gradient_sum = gradient_sum_for(recipe, launched.rank, launched.processes)
        preflight = run_preflight(recipe, launched, channel, gradient_sum.micro_batch_size)
        with open_accelerator(recipe.runtime, preflight.device, gradient_sum.accumulation_steps) as accelerator:
            check_joined(launched.processes, accelerator.num_processes)
            seconds = time_message(accelerator)
            if accelerator.is_main_process:
                yield from describe(recipe, launched, preflight, seconds, sharded=accelerator.is_fsdp2)
    if speed:
        yield from measure_speed(recipe, preflight.device, preflight.dataset)


def time_message(accelerator: Accelerator, rounds: int = 20) -> float:
    """Seconds in which all processes have added one number."""
    number = torch.ones(1, device=accelerator.device)
    accelerator.reduce(number, "sum").item()  # the first one connects them
    started_at = time.perf_counter()
    for _ in range(rounds):
        accelerator.reduce(number, "sum").item()
    return (time.perf_counter() - started_at) / rounds


def describe(
    recipe: Recipe, launched: Launched, preflight: Preflight, seconds: float, *, sharded: bool
) -> Iterator[tuple[str, str]]:
    """The lines of a diagnosis."""
    info, reports, table = preflight.info, preflight.reports, recipe.train
    environment = info.stretches[0].environment
    versions = ", ".join(f"{name} {environment.versions[name]}" for name in ("mygpt", "torch", "accelerate", "python"))
    yield "versions", f"{versions}"
    nodes = len({entry.node for entry in reports})
    count = f"{launched.processes} process{'es' * (launched.processes > 1)}"
    yield "launch", f"{count} on {nodes} machine{'s' * (nodes > 1)}, {_manner(recipe, launched, sharded)}"
    if launched.processes > 1:
        yield "network", f"{reports[0].backend}; adding one number takes {seconds * 1e3:.2f} ms"
    yield "precision", f"{recipe.runtime.precision}"
    everywhere = ", the same on every process" if launched.processes > 1 else ""
    yield "corpus", f"{recipe.data.corpus}, sha256 {info.corpus_sha256[:12]}{everywhere}"
    if info.held_out_sha256:
        yield "held out", f"{recipe.data.val_corpus}, sha256 {info.held_out_sha256[:12]}{everywhere}"
    if info.init_sha256:
        yield "begins with", f"{recipe.train.init_from}, sha256 {info.init_sha256[:12]}{everywhere}"
    windows = f"{table.batch_size} windows of {table.seq_len} tokens"
    yield "batch", f"{windows} a step, {environment.micro_batch_size} to a micro-batch"
    for rank, entry in enumerate(reports):
        own = len(Share(environment.micro_batch_size, rank, launched.processes).micro_batches(table.batch_size))
        threads = entry.environment["threads"]
        yield (
            f"rank {rank}",
            f"{entry.node}: {entry.device}, {threads} thread{'s' * (threads > 1)}, "
            f"{own} micro-batch{'es' * (own != 1)} a step",
        )
    for text in preflight.notes:
        yield "note", f"{text}"


def _manner(recipe: Recipe, launched: Launched, sharded: bool) -> str:
    if sharded:
        return "weights sharded over them (FSDP2)"
    if recipe.runtime.reduction == "exact":
        return "gradients summed exactly: the same bits on any number of processes"
    if launched.processes == 1:
        return "alone"
    return "data-parallel: the last bits depend on their number"
