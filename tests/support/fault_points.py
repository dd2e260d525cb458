"""Where tests disturb the program: the functions that they replace, and the faults that happen there."""

import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.cli import main as cli
from mygpt.model.gpt import GPT
from mygpt.processes import channel
from mygpt.runs import files
from mygpt.runs import saver as checkpoint
from mygpt.runs.replacing import PARTIAL_NAME
from mygpt.training import evaluate, loop, parts, state
from mygpt.training import train as phases


class Point(NamedTuple):
    """A call of the program at which a test can act."""

    owner: Any
    name: str
    counts: Callable[..., bool] = lambda *args: True
    """Which calls count, by their arguments."""
    after: bool = False
    """Act after the call, not before it."""


def named(prefix):
    return lambda path, *rest: Path(path).name.startswith(prefix)


def renamed_to(prefix):
    return lambda path, target: Path(target).name.startswith(prefix)


POINTS = {
    "made-temporary-directory": Point(Path, "mkdir", named(".tmp-step"), after=True),
    "between-files": Point(checkpoint, "save_file", after=True),
    "before-fsync": Point(files, "sync", lambda path: path.suffix in (".safetensors", ".jsonl")),
    "before-manifest": Point(files, "replace_text", named("manifest")),
    "before-rename": Point(files, "publish"),
    "after-rename": Point(Path, "rename", renamed_to("step-"), after=True),
    "after-directory-fsync": Point(files, "publish", after=True),
    "before-latest": Point(Path, "replace", renamed_to("latest")),
    "after-latest": Point(Path, "replace", renamed_to("latest"), after=True),
    "before-best": Point(Path, "replace", renamed_to("best")),
    "before-pruning": Point(checkpoint, "prune"),
    "renamed-for-pruning": Point(Path, "rename", renamed_to(".tmp-old"), after=True),
    "pruning": Point(shutil, "rmtree", named(".tmp-old")),
    "after-pruning": Point(checkpoint, "prune", after=True),
    "loading-weights": Point(state, "read_weights"),
    "loading-state": Point(state, "read_state", after=True),
    "loaded": Point(phases, "write_start", after=True),
    "checked": Point(phases, "run_preflight", after=True),
    "joined": Point(phases, "check_joined", after=True),
    "making-run": Point(phases, "write_start"),
    "made-run.json": Point(Path, "replace", renamed_to("run.json"), after=True),
    "made-recipe": Point(Path, "replace", renamed_to("recipe.toml"), after=True),
    "before-writing": Point(checkpoint, "save_file"),
    "before-step": Point(loop, "train_step"),
    "after-step": Point(loop, "train_step", after=True),
    "forward": Point(GPT, "forward"),
    "validation": Point(evaluate, "held_out_loss"),
    "after-validation": Point(evaluate, "held_out_loss", after=True),
    "record": Point(phases.Recorder, "record", after=True),
    "setting-aside": Point(Path, "rename", lambda path, target: Path(target).parent.name == PARTIAL_NAME, after=True),
    "set-aside": Point(Path, "rename", renamed_to("replaced-run"), after=True),
    "putting-back": Point(Path, "rename", lambda path, target: path.parent.name == PARTIAL_NAME, after=True),
    "removing": Point(files, "remove"),
    "removing-replaced-run": Point(shutil, "rmtree", named(".tmp-old-replaced")),
    "copying-records": Point(shutil, "copyfile", after=True),
}


def kill(*_args):
    os.kill(os.getpid(), signal.SIGKILL)


def send(number):
    """An act: send this process a signal."""
    return lambda *_args: os.kill(os.getpid(), number)


def fail(error):
    """An act: raise an error."""

    def act(*_args):
        raise error

    return act


def disturb(point, act=kill, *, count: int | None = 1, when=lambda: True, patch=setattr):
    """Do `act` with the arguments of the call, at the `count`-th time that `point` is reached while `when()` is true.

    With a `count` of None, each time. `patch` replaces the program's function: `monkeypatch.setattr` puts it back.
    """
    owner, name, counts, after = POINTS[point]
    original, reached = getattr(owner, name), []

    def replacement(*args, **kwargs):
        if is_reached := counts(*args) and when():
            reached.append(1)
            is_reached = count in (None, len(reached))
        if is_reached and not after:
            act(*args)
        result = original(*args, **kwargs)
        if is_reached and after:
            act(*args)
        return result

    patch(owner, name, replacement)


def wait_at_most(seconds):
    """How long processes wait for each other, in place of ten minutes."""
    channel.PROCESS_TIMEOUT = parts.PROCESS_TIMEOUT = timedelta(seconds=seconds)


def end_silently():
    """A process that fails ends without a message, and without the seconds in which it lets others print theirs."""
    cli.print_error = lambda *args, **kwargs: None


def rank_1_after_a_save() -> bool:
    return os.environ.get("RANK", "1") == "1" and os.path.exists("run/latest")


# ---- faults that are more than a kill at a point, by name: functions of how often the point is reached first


def halve_and_kill(_tensors, file, _metadata):
    os.truncate(file, os.path.getsize(file) // 2)
    kill()


def remove_one_and_kill(directory):
    next(iter(Path(directory).iterdir())).unlink()
    kill()


def limit_file_size(bytes_):
    return lambda _count: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))


def slow_saves(_count):
    """Every save but the first takes ten seconds."""
    first = iter([0])
    disturb("before-rename", lambda *_: time.sleep(next(first, 10)), count=None)


def save_at_every_reading(count):
    """As if `save_seconds` had passed; a kill comes before a step."""
    checkpoint.Saver.is_time_to_save = lambda saver: saver.wait() is None
    disturb("before-step", count=count)


def forget(owner, name):
    """No kill but a defect: a resumed run does not restore something."""
    return lambda _count: setattr(owner, name, lambda *args: None)


def forget_stream(_count):
    original = state.restore

    def restore(accelerator, path, gpt, optimizer, stream, seed):
        before = stream.state()
        result = original(accelerator, path, gpt, optimizer, stream, seed)
        stream.set_state(before)
        return result

    parts.restore = restore


def forget_rate(_count):
    original = parts.build_scheduler
    parts.build_scheduler = lambda *args, steps_done: original(*args)


def os_error(number):
    return fail(OSError(number, os.strerror(number)))


FAULTS = {
    "middle-of-file": lambda count: disturb("between-files", halve_and_kill, count=count),
    "pruned-halfway": lambda count: disturb("pruning", remove_one_and_kill, count=count),
    "fsync-fails": lambda count: disturb("before-fsync", os_error(errno.EIO), count=count),
    "disk-full": lambda count: disturb("before-writing", os_error(errno.ENOSPC), count=count),
    "out-of-memory": lambda count: disturb("before-step", fail(MemoryError()), count=count),
    "sigterm": lambda count: disturb("before-step", send(signal.SIGTERM), count=count),
    "metrics-disk-full": limit_file_size(700),
    "file-size-limit": limit_file_size(40_000),
    "slow-saves": slow_saves,
    "timed-saves": save_at_every_reading,
    "forget-moments": forget(parts, "load_optimizer_state"),
    "forget-dropout": forget(state, "set_dropout_generator_state"),
    "forget-stream": forget_stream,
    "forget-rate": forget_rate,
}
