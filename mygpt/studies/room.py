"""How many runs of a study go side by side: as many as this machine has measured room for."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from tempfile import TemporaryFile
from typing import IO, NamedTuple

import psutil

from mygpt.cores import available_cores, cgroups, core_count
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

CORE_MARK = "\0mygpt-core-{}"
"""The address of a socket that a study binds for a core that it takes; Linux frees it when the study ends."""


class Slot(NamedTuple):
    """The place of a run beside others."""

    cpus: tuple[int, ...]
    """Cores, one for each thread; empty: any."""
    gpu: str | None
    """As CUDA_VISIBLE_DEVICES names it; None: there is none."""


class Room(NamedTuple):
    """How many runs go side by side, and with how many threads each."""

    side_by_side: int
    threads: int


@contextmanager
def take_slots(room: Room) -> Iterator[list[Slot]]:
    """Places for the runs: GPUs in turn, and cores, at first those that no other study on this machine has taken."""
    cores, gpus = available_cores(), visible_gpus()
    if core_count() < len(cores):
        cores = []  # a share of the time of all of them, which may be that of other containers, too
    with ExitStack() as held:
        taken: list[int] = []
        for core in cores:
            if len(taken) < room.side_by_side * room.threads:
                mark = socket.socket(socket.AF_UNIX)
                try:
                    mark.bind(CORE_MARK.format(core))
                except OSError:  # another study has bound it
                    mark.close()
                else:
                    held.callback(mark.close)
                    taken.append(core)
        cores = [*taken, *(core for core in cores if core not in taken)]
        shares = [tuple(cores[index * room.threads : (index + 1) * room.threads]) for index in range(room.side_by_side)]
        yield [
            # Threads that had fewer cores than they are would wait for each other.
            Slot(share if len(share) == room.threads else (), gpus[index % len(gpus)] if gpus else None)
            for index, share in enumerate(shares)
        ]


def free_memory() -> int:
    """Bytes that runs may still take: of the machine, and of the containers in which they are."""
    free = [int(psutil.virtual_memory().available)]
    for folder in cgroups("memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # "max": no limit
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free.append(left + int(counters.get(cache, 0)))
    return min(free)


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
    best, best_rate = Room(1, recipe.runtime.threads or core_count()), 0.0
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
        if 2 * share > MEMORY_SHARE or 2 * memory > MEMORY_SHARE * (free_memory() + needed):
            break
    return best


def candidates(threads: int | None, most: int, *, on_gpus: bool = True) -> Iterator[Room]:
    """1, 2, 4, ... runs, which share the cores or, if there are any, the GPUs."""
    cores, gpus = core_count(), len(visible_gpus()) if on_gpus else 0
    largest = max(1, min(most, RUNS_PER_GPU * gpus if gpus else cores // (threads or 1)))
    counts = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    for count in (*counts, largest):
        yield Room(count, threads or max(1, cores // count))


def time_side_by_side(recipe: Recipe, room: Room) -> list[Measured] | None:
    """What each run measures while all of them train; None: some did not fit beside the others."""
    with take_slots(room) as slots, ExitStack() as running:
        probes = [running.enter_context(_probe(recipe, slot)) for slot in slots]
        if _next_reports(probes) is None:
            return None
        for probe in probes:
            assert probe.process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended, which the next report shows
                # Not by its buffer, which would be flushed again when it is closed.
                os.write(probe.process.stdin.fileno(), b"go\n")
        lines = _next_reports(probes)
        return None if lines is None else [Measured(*json.loads(line)) for line in lines]


class _Probe(NamedTuple):
    """A process that times a recipe."""

    process: "subprocess.Popen[str]"
    reports: IO[str]
    """What it reports: not on stdout, where a library of the user's environment may print, too."""
    output: IO[bytes]
    """What is printed."""


@contextmanager
def _probe(recipe: Recipe, slot: Slot) -> Iterator[_Probe]:
    read, write = os.pipe()
    with os.fdopen(read, encoding="utf-8") as reports, TemporaryFile() as output:
        try:
            task = Task(recipe.model_dump_json(), slot.cpus, PROBE_SECONDS, write)
            process = start_worker(task, slot, output.fileno())
        finally:
            os.close(write)
        try:
            yield _Probe(process, reports, output)
        finally:
            process.kill()
            with process:  # closes the pipe, and waits
                pass


def _next_reports(probes: Sequence[_Probe]) -> list[str] | None:
    """The next line of each; None: one of several has ended.

    Raises:
        MygptError: the only one has ended.
    """
    lines = []
    for process, reports, output in probes:
        lines.append(reports.readline())
        if not lines[-1]:
            if len(probes) > 1:
                return None
            process.wait()
            output.seek(0)
            printed = output.read().decode("utf-8", "replace")
            reason = complaint(printed) or f"a process of the study ended with {process.returncode}"
            if process.returncode < 0:
                name = signal.Signals(-process.returncode).name
                of_memory = ", as Linux does when memory is full" * (name == "SIGKILL")
                reason = f"a process of the study was killed by {name}{of_memory}; the same command continues the study"
            raise MygptError(reason, max(1, process.returncode))
    return lines


def start_worker(task: Task, slot: Slot, output: int) -> "subprocess.Popen[str]":
    """Start a process with this task; its stdin stays open, and its closing tells it that the study has ended.

    `output` is the descriptor of the file in which all goes that is printed.
    """
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": slot.gpu} if slot.gpu is not None else {})
    process = subprocess.Popen(
        [sys.executable, "-m", "mygpt.studies.worker"],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        text=True,
        encoding="utf-8",
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the study alone, which passes it on
        pass_fds=[] if task.reports is None else [task.reports],
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has been killed already, which its exit code shows
        os.write(process.stdin.fileno(), json.dumps(task).encode() + b"\n")
    return process


def complaint(printed: str) -> str:
    """Why a process has failed: the last line that mygpt printed, or the error of a traceback; "": there is none."""
    lines = printed.strip().splitlines() or [""]
    tracebacks = [number for number, line in enumerate(lines) if line.startswith("Traceback ")]
    last = lines[tracebacks[-1] + 1 :] if tracebacks else lines
    for line in reversed(last):
        if line.startswith("mygpt: "):
            return line.removeprefix("mygpt: ")
    errors = (line for line in last if line[:1].strip())  # the calls are indented
    return next(errors, lines[-1]) if tracebacks else lines[-1]
