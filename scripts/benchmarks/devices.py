"""Time per training step on several processes of this machine, with fast and with exact sums.

    python scripts/benchmarks/devices.py recipes/default.toml [--processes 1 2 4] [--any-recipe-flag]

Launches the processes itself, each number of them in turn, `--rounds` times. In each launch three kinds of steps take
turns, a block each: fast sums, exact sums, and steps on the same share of the batch without communication. Read the
ratios. One process gets all cores; several, and a second launch of one, get a thread each. On Linux it also counts the
bytes sent over the loopback interface, which nothing else should use meanwhile.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mygpt.data.dataset import Dataset, load_dataset
from mygpt.model.gpt import GPT
from mygpt.processes.environment import choose_workers, launched_processes
from mygpt.processes.machine import resolve_device, set_up
from mygpt.recipe.flags import parse_recipe
from mygpt.recipe.tables import Recipe
from mygpt.training.gradient_sum import ExactSum, FastSum, Prepared
from mygpt.training.parts import build_parts, open_accelerator
from mygpt.training.step import train_step

WAYS = ("alone", "fast", "exact")
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


@dataclass(frozen=True)
class Options:
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    launches = [(1, cores), *((count, 1) for count in options.processes)]
    results: dict[tuple[int, int], list[dict[str, list[float]]]] = {launch: [] for launch in launches}
    for _ in range(options.rounds):
        for processes, threads in launches:
            command = [
                "torchrun",
                "--nproc-per-node",
                str(processes),
                __file__,
                *sys.argv[1:],
                "--threads",
                str(threads),
            ]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[processes, threads].append(json.loads(output.splitlines()[-1]))
    print(
        "processes threads   alone ms    fast ms   exact ms fast/alone exact/fast fast/first   kB sent, fast and exact"
    )
    first = [statistics.median(launch["fast"]) for launch in results[launches[0]]]
    for (processes, threads), rounds in results.items():
        cells = [f"{processes:>9} {threads:>7}"]
        cells += [f"{statistics.median(t for launch in rounds for t in launch[way]) * 1e3:>10.2f}" for way in WAYS]
        for way, base in (("fast", "alone"), ("exact", "fast")):
            pairs = (pair for launch in rounds for pair in zip(launch[way], launch[base], strict=True))
            cells.append(f"{statistics.median(a / b for a, b in pairs):>10.3f}")
        to_first = (statistics.median(launch["fast"]) / f for launch, f in zip(rounds, first, strict=True))
        cells.append(f"{statistics.median(to_first):>10.3f}")
        for way in ("fast", "exact"):
            cells.append(f"{statistics.median(n for launch in rounds for n in launch[f'{way} bytes']) / 1e3:>10,.0f}")
        print(" ".join(cells))


def work(recipe: Recipe, options: Options) -> None:
    """What each of the processes does; the first prints the seconds and bytes per step of each turn as JSON."""
    launched = launched_processes()
    device = resolve_device(recipe.runtime.device, recipe.runtime.precision, launched.local_processes)
    set_up(recipe.runtime, device, launched.local_processes)
    dataset = load_dataset(recipe.data, recipe.train.seq_len).to(device)
    with open_accelerator(recipe.runtime, device, 1) as accelerator:
        steps = {way: stepper(recipe, accelerator, dataset, way) for way in WAYS}
        measured: dict[str, list[float]] = {f"{way}{what}": [] for way in steps for what in ("", " bytes")}
        for turn in range(options.turns + 1):
            for way, step in steps.items():
                accelerator.wait_for_everyone()
                sent, started_at = bytes_sent(), time.perf_counter()
                for _ in range(options.steps_per_turn):
                    step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                accelerator.wait_for_everyone()
                if turn:  # the first one warms up
                    measured[way].append((time.perf_counter() - started_at) / options.steps_per_turn)
                    measured[f"{way} bytes"].append((bytes_sent() - sent) / options.steps_per_turn)
        if accelerator.is_main_process:
            print(json.dumps(measured))


class AloneSum(FastSum):
    """Sums the gradients of this process alone: nothing is sent."""

    def prepare(self, accelerator: Accelerator, gpt: GPT, optimizer: Optimizer, scheduler: LambdaLR) -> Prepared:
        return accelerator.prepare_model(gpt, evaluation_mode=True), *accelerator.prepare(optimizer, scheduler)


def stepper(recipe: Recipe, accelerator: Accelerator, dataset: Dataset, way: str) -> Callable[[], None]:
    """A function that makes a training step, with a new model."""
    kind = {"alone": AloneSum, "fast": FastSum, "exact": ExactSum}[way]
    gradient_sum = kind(recipe.train, accelerator.process_index, accelerator.num_processes)
    if way == "exact":
        workers = choose_workers(torch.get_num_threads(), launched_processes().local_processes)
        gradient_sum = ExactSum(recipe.train, accelerator.process_index, accelerator.num_processes, workers)
    parts, progress = build_parts(recipe, accelerator, dataset, gradient_sum)

    def step() -> None:
        accelerator.gradient_accumulation_steps = gradient_sum.accumulation_steps
        progress.step += 1
        train_step(parts, parts.stream.batch(), progress.step)
        parts.scheduler.step()

    return step


def bytes_sent() -> int:
    return int(LOOPBACK.read_text()) if LOOPBACK.exists() else 0


if __name__ == "__main__":
    main()
