"""How many runs of a study go side by side: as many as this machine has measured room for."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import psutil

from mygpt.errors import MygptError
from mygpt.recipe.tables import Recipe
from mygpt.studies.worker import Measured, Task

WORTH_ADDING = 1.05
"""More runs side by side are worth it if all together are faster by this."""
MEMORY_SHARE = 0.8
"""Of the memory that is free: evaluations and other programs need some, too."""


PROBE_SECONDS = 3.0
"""For which a recipe is timed, alone and beside others."""


RUNS_PER_GPU = 4
"""Most runs that share a GPU."""


class Slot(NamedTuple):
    """The place of a run beside others."""

    cpus: tuple[int, ...]
    gpu: str | None
    """As CUDA_VISIBLE_DEVICES names it; None: there is none."""


class Room(NamedTuple):
    """How many runs go side by side, and with how many threads each."""

    side_by_side: int
    threads: int

    def slots(self) -> list[Slot]:
        """Their places: cores and GPUs in turn."""
        cores, gpus = available_cores(), visible_gpus()
        return [
            Slot(
                tuple(cores[index * self.threads : (index + 1) * self.threads]),
                gpus[index % len(gpus)] if gpus else None,
            )
            for index in range(self.side_by_side)
        ]


def available_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would show to a process."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return listed.split()
    return []


def measure_room(recipe: Recipe, most: int, report: Callable[[str], None]) -> Room:
    """Time this recipe alone and side by side with itself, up to `most` times, and choose what is fastest in all.

    Raises:
        MygptError: the recipe cannot be trained here.
    """
    best, best_rate = Room(1, recipe.runtime.threads or len(available_cores())), 0.0
    for room in candidates(recipe.runtime.threads, most, on_gpus=recipe.runtime.device in ("auto", "cuda")):
        measured = time_side_by_side(recipe.replace(threads=room.threads), room)
        if measured is None:
            report(f"{room.side_by_side} runs side by side: do not fit")
            break
        rate = sum(1 / run.seconds for run in measured)
        memory = sum(run.memory for run in measured)
        each = f"{room.threads} thread{'s' * (room.threads > 1)} each"
        report(f"{room.side_by_side} side by side, {each}: {rate:.3g} steps/s in all, {memory / 2**20:,.0f} MiB")
        share = sum(run.device_share for run in measured) / max(1, len(visible_gpus()))
        if rate < WORTH_ADDING * best_rate or (best_rate and share > MEMORY_SHARE):
            break
        best, best_rate = room, rate
        needed = memory / room.side_by_side
        if 2 * share > MEMORY_SHARE or 2 * memory > MEMORY_SHARE * (psutil.virtual_memory().available + needed):
            break
    return best


def candidates(threads: int | None, most: int, *, on_gpus: bool = True) -> Iterator[Room]:
    """1, 2, 4, ... runs, which share the cores or, if there are any, the GPUs."""
    cores, gpus = len(available_cores()), len(visible_gpus()) if on_gpus else 0
    largest = max(1, min(most, RUNS_PER_GPU * gpus if gpus else cores // (threads or 1)))
    counts = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    for count in (*counts, largest):
        yield Room(count, threads or max(1, cores // count))


def time_side_by_side(recipe: Recipe, room: Room) -> list[Measured] | None:
    """What each run measures while all of them train; None: some did not fit beside the others."""
    probes = [
        start_worker(Task("probe", recipe.model_dump_json(), slot.cpus, PROBE_SECONDS), slot) for slot in room.slots()
    ]
    try:
        for process in probes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                if room.side_by_side > 1:
                    return None
                raise MygptError(_complaint(process))
        _tell(probes)
        lines = [process.stdout.readline() for process in probes if process.stdout]
        if not all(lines):
            if room.side_by_side > 1:
                return None
            raise MygptError(_complaint(probes[0]))
        return [Measured(*json.loads(line)) for line in lines]
    finally:
        for process in probes:
            process.kill()
            with process:  # closes the pipes, and waits
                pass


def start_worker(
    task: Task, slot: Slot, stderr: int = subprocess.PIPE, stdout: int = subprocess.PIPE
) -> "subprocess.Popen[str]":
    """Start a process with this task; its stdin stays open, and its closing tells it that the study has ended."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": slot.gpu} if slot.gpu is not None else {})
    process = subprocess.Popen(
        [sys.executable, "-m", "mygpt.studies.worker"],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        text=True,
        encoding="utf-8",
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the study alone, which passes it on
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    return process


def _tell(probes: "Sequence[subprocess.Popen[str]]") -> None:
    for process in probes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def _complaint(process: "subprocess.Popen[str]") -> str:
    """The last line of what a process that has failed says."""
    errors = process.stderr.read() if process.stderr else ""
    process.wait()
    lines = errors.strip().splitlines() or [f"a process of the study ended with {process.returncode}"]
    return lines[-1].removeprefix("mygpt: ")
