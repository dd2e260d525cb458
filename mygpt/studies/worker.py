"""A process of a study: trains one run, or times a recipe beside others. Started as `python -m mygpt.studies.worker`.

The first line of stdin is a `Task` as JSON. The study holds the other end of stdin open: when the study is killed this
process notices, saves, and stops, so that nothing is left behind.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from mygpt.errors import CheckpointError, MygptError, printable
from mygpt.posix import resource
from mygpt.recipe.tables import Recipe
from mygpt.runs.lock import locked

LOCK_SECONDS = 60
"""How long to wait for a process of a killed study to save and stop."""


class Task(NamedTuple):
    """What a process of a study does: it trains a recipe or, as a probe, times it."""

    recipe: str
    """The recipe as JSON."""
    cpus: tuple[int, ...] = ()
    """The cores to run on; empty: any."""
    seconds: float = 0.0
    """How long a probe times steps."""
    reports: int | None = None
    """The descriptor to which a probe reports; None: this is no probe."""


class Measured(NamedTuple):
    """What a probe measured."""

    seconds: float
    """The duration of a step."""
    memory: int
    """The peak of the memory of its process, in bytes."""
    device_share: float
    """The share of its GPU's memory that it used; 0 without a GPU."""


def main() -> None:
    """Do the task, and exit as `mygpt train` does."""
    task = Task(*json.loads(sys.stdin.readline()))
    recipe = Recipe.model_validate_json(task.recipe)
    if task.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, task.cpus)
    os.environ["OMP_NUM_THREADS"] = str(recipe.runtime.threads or 1)  # before torch is imported
    try:
        train_run(recipe) if task.reports is None else probe(recipe, task.seconds, task.reports)
    except MygptError as error:
        for line in str(error).splitlines():
            print(f"mygpt: {printable(line)}", file=sys.stderr)
        sys.exit(error.exit_code)


def train_run(recipe: Recipe) -> None:
    """Start or continue a run."""
    threading.Thread(target=_stop_without_study, daemon=True).start()
    run = Path(recipe.checkpoint.output)
    deadline = time.monotonic() + LOCK_SECONDS
    while run.exists() and time.monotonic() < deadline:
        try:
            with locked(run):
                break
        except CheckpointError:
            time.sleep(0.2)
    from mygpt.training.train import train

    train(recipe)


def _stop_without_study() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def probe(recipe: Recipe, seconds: float, reports: int) -> None:
    """Report "ready", wait for a line on stdin, time steps for a while, and report what was measured."""
    import torch

    from mygpt.checks.speed import time_step
    from mygpt.processes.machine import resolve_device
    from mygpt.runs.initial import open_dataset
    from mygpt.training.train import explain_out_of_memory

    device = resolve_device(recipe.runtime.device, recipe.runtime.precision)
    dataset = open_dataset(recipe)
    os.write(reports, b"ready\n")
    if not sys.stdin.readline():
        return
    with explain_out_of_memory(recipe.train):
        step_seconds = time_step(recipe, device, dataset, seconds).seconds
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    share = torch.cuda.max_memory_reserved() / torch.cuda.mem_get_info()[1] if device.type == "cuda" else 0.0
    os.write(reports, json.dumps(Measured(step_seconds, memory, share)).encode() + b"\n")


if __name__ == "__main__":
    main()
