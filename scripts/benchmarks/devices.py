"""Time per training step on several processes of this machine, with fast and with exact sums.

    python scripts/benchmarks/devices.py recipes/default.toml [--processes 1 2 4] [--any-recipe-flag]

Launches the processes itself, each number of them in turn, `--rounds` times: once with fast sums, which take turns with
steps on the same share of the batch without communication, and once with exact sums. Threads are those that `mygpt
train` would set. Read the ratios.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mygpt.data.dataset import Dataset, load_dataset
from mygpt.model.gpt import GPT
from mygpt.processes.environment import choose_threads, choose_workers, launched_processes
from mygpt.processes.machine import resolve_device, set_up
from mygpt.recipe.flags import RecipeOptions, parse_recipe
from mygpt.recipe.tables import Recipe
from mygpt.training.gradient_sum import FastSum, Prepared, gradient_sum_for
from mygpt.training.loop import train_step
from mygpt.training.parts import build_parts, open_accelerator

WAYS = {"fast": ("alone", "fast"), "exact": ("exact",)}
"""By the recipe's `reduction`, what takes turns in a launch."""


class Options(RecipeOptions):
    processes: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes to launch."""
    rounds: int = 3
    """Launches of each."""
    turns: int = 5
    """Turns of each way to sum in one launch."""
    steps_per_turn: int = 40
    """Steps in one turn."""


def main() -> None:
    recipe, options = parse_recipe(sys.argv[1:], "devices.py", Options)
    if "WORLD_SIZE" in os.environ:
        work(recipe, options)
        return
    results: dict[int, list[dict[str, float]]] = {processes: [] for processes in options.processes}
    for _ in range(options.rounds):
        for processes, launches in results.items():
            outputs = [launch(recipe, processes, way) for way in WAYS]
            measured = [json.loads(output.splitlines()[-1]) for output in outputs]
            launches.append({way: statistics.median(turns) for ways in measured for way, turns in ways.items()})
    print("processes   alone ms    fast ms   exact ms   fast/alone   exact/fast   fast/first")
    for processes, launches in results.items():
        first = results[options.processes[0]]
        cells = [f"{statistics.median(launch[way] for launch in launches) * 1e3:>10.2f}" for way in first[0]]
        for way, base, other in (("fast", "alone", launches), ("exact", "fast", launches), ("fast", "fast", first)):
            ratios = (own[way] / others[base] for own, others in zip(launches, other, strict=True))
            cells.append(f"{statistics.median(ratios):>12.3f}")
        print(f"{processes:>9} {' '.join(cells)}")


def launch(recipe: Recipe, processes: int, reduction: str) -> str:
    """What the processes print. They find their threads where torch looks for them, as with `mygpt train`."""
    threads = choose_threads(recipe.runtime.threads, processes, pinned=reduction == "exact")
    command = ["torchrun", "--nproc-per-node", str(processes), __file__, *sys.argv[1:], "--reduction", reduction]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def work(recipe: Recipe, options: Options) -> None:
    """What each of the processes does; the first prints the seconds per step of each turn as JSON."""
    launched = launched_processes()
    device = resolve_device(recipe.runtime.device, recipe.runtime.precision, launched.local_processes)
    set_up(recipe.runtime, device, launched.local_processes)
    dataset = load_dataset(recipe.data, recipe.train.seq_len).to(device)
    with open_accelerator(recipe.runtime, device, 1) as accelerator:
        steps = {way: stepper(recipe, accelerator, dataset, way) for way in WAYS[recipe.runtime.reduction]}
        measured: dict[str, list[float]] = {way: [] for way in steps}
        for turn in range(options.turns + 1):
            for way, step in steps.items():
                accelerator.wait_for_everyone()
                started_at = time.perf_counter()
                for _ in range(options.steps_per_turn):
                    step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                accelerator.wait_for_everyone()
                if turn:  # the first one warms up
                    measured[way].append((time.perf_counter() - started_at) / options.steps_per_turn)
        if accelerator.is_main_process:
            print(json.dumps(measured))


class AloneSum(FastSum):
    """Sums the gradients of this process alone: nothing is sent."""

    def prepare(self, accelerator: Accelerator, gpt: GPT, optimizer: Optimizer, scheduler: LambdaLR) -> Prepared:
        return accelerator.prepare_model(gpt, evaluation_mode=True), *accelerator.prepare(optimizer, scheduler)


def stepper(recipe: Recipe, accelerator: Accelerator, dataset: Dataset, way: str) -> Callable[[], None]:
    """A function that makes a training step, with a new model."""
    launched = launched_processes()
    max_workers = choose_workers(recipe.runtime.threads, launched.local_processes)
    gradient_sum = gradient_sum_for(recipe, launched.rank, launched.processes, max_workers)
    if way == "alone":
        gradient_sum = AloneSum(recipe.train, launched.rank, launched.processes)
    parts, steps = build_parts(recipe, accelerator, dataset, gradient_sum), itertools.count(1)

    def step() -> None:
        accelerator.gradient_accumulation_steps = gradient_sum.accumulation_steps
        train_step(parts, parts.stream.batch(), next(steps))
        parts.scheduler.step()

    return step


if __name__ == "__main__":
    main()
