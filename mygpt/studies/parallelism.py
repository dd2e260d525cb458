"""How many runs of a study go side by side: measured on this machine; and the cores and GPU of each run."""

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
from mygpt.errors import MygptError, counted
from mygpt.recipe.tables import Recipe
from mygpt.studies.worker import Measured, Task

WORTH_ADDING = 1.05
"""More runs side by side must be this many times as fast, all together."""
MEMORY_SHARE = 0.8
"""Runs may use this share of the free memory: evaluations and other programs need some, too."""
PROBE_SECONDS = 3.0
"""How long a recipe is timed, alone and beside others."""
MAX_RUNS_PER_GPU = 4
CORE_MARK = "\0mygpt-core-{}"
"""The address of a socket that a study binds for a core that it takes; Linux frees it when the study ends."""


class Resources(NamedTuple):
    """Where one of several runs computes."""

    cpus: tuple[int, ...]
    """Its cores, one for each thread; empty: any."""
    gpu: str | None
    """Its GPU, as CUDA_VISIBLE_DEVICES names it; None: there is none."""


class Parallelism(NamedTuple):
    """How many runs go side by side, and with how many threads each."""

    side_by_side: int
    threads: int


@contextmanager
def reserve_resources(parallelism: Parallelism) -> Iterator[list[Resources]]:
    """Resources for each run: GPUs in turn, and cores, first those that no other study on this machine has taken."""
    count, threads = parallelism
    cores, gpus, taken = available_cores(), visible_gpus(), list[int]()
    if core_count() < len(cores):
        cores = []  # a share of the time of all of them, which may be that of other containers, too
    with ExitStack() as held:
        for core in cores:
            if len(taken) < count * threads:
                mark = socket.socket(socket.AF_UNIX)
                try:
                    mark.bind(CORE_MARK.format(core))
                except OSError:  # another study has bound it
                    mark.close()
                else:
                    held.callback(mark.close)
                    taken.append(core)
        cores = [*taken, *(core for core in cores if core not in taken)]
        shares = [tuple(cores[index * threads : (index + 1) * threads]) for index in range(count)]
        yield [
            # Threads that had fewer cores than they are would wait for each other.
            Resources(share if len(share) == threads else (), gpus[index % len(gpus)] if gpus else None)
            for index, share in enumerate(shares)
        ]


def free_memory() -> int:
    """Bytes of memory that runs may still take, of the machine and of the containers in which they are."""
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


def measure_parallelism(recipe: Recipe, most: int, report: Callable[[str], None]) -> Parallelism:
    """Time this recipe alone and side by side with itself, up to `most` times, and choose what is fastest in all.

    Raises:
        MygptError: the recipe cannot be trained here.
    """
    best, best_rate = Parallelism(1, recipe.runtime.threads or core_count()), 0.0
    for tried in candidates(recipe.runtime.threads, most, on_gpus=recipe.runtime.device in ("auto", "cuda")):
        measured = time_side_by_side(recipe.replace(threads=tried.threads), tried)
        if measured is None:
            report(f"{tried.side_by_side} runs side by side: do not fit")
            break
        rate = sum(1 / run.seconds for run in measured)
        memory = sum(run.memory for run in measured)
        each = f"{counted(tried.threads, 'thread')} each"
        report(f"{tried.side_by_side} side by side, {each}: {rate:.3g} steps/s in all, {memory / 2**20:,.0f} MiB")
        share = sum(run.device_share for run in measured) / max(1, len(visible_gpus()))
        if rate < WORTH_ADDING * best_rate or (best_rate and share > MEMORY_SHARE):
            break
        best, best_rate = tried, rate
        needed = memory / tried.side_by_side
        if 2 * share > MEMORY_SHARE or 2 * memory > MEMORY_SHARE * (free_memory() + needed):
            break
    return best


def candidates(threads: int | None, most: int, *, on_gpus: bool = True) -> Iterator[Parallelism]:
    """1, 2, 4, ... runs, which share the GPUs or, without any, the cores."""
    cores, gpus = core_count(), len(visible_gpus()) if on_gpus else 0
    largest = max(1, min(most, MAX_RUNS_PER_GPU * gpus if gpus else cores // (threads or 1)))
    counts = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    for count in (*counts, largest):
        yield Parallelism(count, threads or max(1, cores // count))


def time_side_by_side(recipe: Recipe, parallelism: Parallelism) -> list[Measured] | None:
    """What each probe measures while all of them train; None: they do not fit into memory together."""
    with reserve_resources(parallelism) as reserved, ExitStack() as running:
        probes = [running.enter_context(_probe(recipe, resources)) for resources in reserved]
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
    """Its reports, which do not come by stdout, since libraries may print there, too."""
    output: IO[bytes]
    """What it and its libraries print."""


@contextmanager
def _probe(recipe: Recipe, resources: Resources) -> Iterator[_Probe]:
    read, write = os.pipe()
    with os.fdopen(read, encoding="utf-8") as reports, TemporaryFile() as output:
        try:
            task = Task(recipe.model_dump_json(), resources.cpus, PROBE_SECONDS, write)
            process = start_worker(task, resources, output.fileno())
        finally:
            os.close(write)
        try:
            yield _Probe(process, reports, output)
        finally:
            process.kill()
            with process:  # closes the pipe, and waits
                pass


def _next_reports(probes: Sequence[_Probe]) -> list[str] | None:
    """The next line that each probe reports; None: one of several has ended.

    Raises:
        MygptError: the only probe has ended.
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


def start_worker(task: Task, resources: Resources, output: int) -> "subprocess.Popen[str]":
    """Start a process with this task; it prints to the descriptor `output`.

    Its stdin stays open: when it closes, the process knows that the study has ended.
    """
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": resources.gpu} if resources.gpu is not None else {})
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
