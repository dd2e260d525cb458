"""Runs in processes of their own, which kill themselves at a chosen point; for the tests of what a kill leaves behind.

The processes are forked from one that has imported everything, so that a run takes a fraction of a second.
"""

import errno
import functools
import gc
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch.distributed.tensor  # noqa: F401 - clipping imports it, which takes a second

from mygpt.cli import main as cli
from mygpt.model.gpt import GPT
from mygpt.recipe.flags import parse_recipe
from mygpt.runs import run as rundir
from mygpt.runs import saver as checkpoint
from mygpt.training import evaluate, loop, parts, state
from mygpt.training import train as phases
from support.runs import FLAGS

parse_recipe(["python-docs"], "mygpt train")  # reads the sources for help texts, once for all processes

# Every way in which a run has state: dropout, accumulation, warmup, a shared stream, a best, checkpoints that go.
EVERYTHING = [
    *FLAGS,
    *("--steps", 12, "--dropout", 0.2, "--micro-batch-size", 2, "--schedule", "cosine", "--warmup", 8),
    *("--max-grad-norm", 1.0, "--val-split", 0.2, "--val-every", 3, "--print-every", 5),
    *("--save-every", 4, "--keep-last", 2, "--save-best", "--output", "run"),
]


ARGUMENTS = ("text.txt", *EVERYTHING)


def start(arguments, folder, point=None, count=1):
    """Start `mygpt train ARGUMENTS` in `folder`, to be killed at the `count`-th time that `point` is reached."""
    process = _server().Process(target=_run, args=([str(argument) for argument in arguments], folder, point, count))
    process.start()
    return process


@functools.cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.fault_points"])
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.14 the server looks for what it preloads along PYTHONPATH alone.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        # What is installed is to be tested, not what lies in the working directory.
        patch.setenv("PYTHONSAFEPATH", "1")
        forkserver.ensure_running()
    return context


def run(arguments, folder, point=None, count=1) -> int:
    """As `start`, to its end; returns the exit code, -9 for a kill. What it printed is in `folder`/out and err."""
    process = start(arguments, folder, point, count)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def _run(arguments, folder, point, count):
    gc.freeze()  # or the collections at the end of a run would copy all that was forked
    os.chdir(folder)
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    # A forked process has the streams that the first one had.
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", encoding="utf-8", newline="") for stream in (1, 2))
    sys.argv = ["mygpt", "train", *arguments]
    if point:
        POINTS[point](count)
    cli.main(sys.argv[1:])


def _kill(*_args):
    os.kill(os.getpid(), signal.SIGKILL)


def _at(owner, name, *, counts=lambda *args: True, after=False, act=None):
    """A point that is reached when `owner.name` is called with arguments that count, before or after it acts."""

    def install(count):
        original = getattr(owner, name)
        left = [count]

        def replacement(*args, **kwargs):
            reached = False
            if counts(*args):
                left[0] -= 1
                reached = left[0] == 0
            if reached and not after:
                return (act or _kill)(*args)
            result = original(*args, **kwargs)
            if reached:
                (act or _kill)(*args)
            return result

        setattr(owner, name, replacement)

    return install


def _named(prefix):
    return lambda path, *rest: Path(path).name.startswith(prefix)


def _renamed_to(prefix):
    return lambda path, target: Path(target).name.startswith(prefix)


def _halve_and_kill(_tensors, file, _metadata):
    os.truncate(file, os.path.getsize(file) // 2)
    _kill()


def _remove_half_and_kill(entry):
    next(iter(Path(entry).iterdir())).unlink()
    _kill()


def _fail(number):
    def act(*args):
        raise OSError(number, os.strerror(number))

    return act


def _slow_saves(_count):
    """Every save but the first takes ten seconds."""
    original, saved = checkpoint.publish, []

    def publish(*args):
        if saved:
            time.sleep(10)
        saved.append(1)
        original(*args)

    checkpoint.publish = publish


def _limit_file_size(bytes_):
    def install(_count):
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))

    return install


def _forget(owner, name):
    """No kill, but a defect: what a resumed run needs is not put back."""
    return lambda _count: setattr(owner, name, lambda *args: None)


def _forget_stream(_count):
    original = state.restore

    def restore(accelerator, path, gpt, stream, seed):
        before = stream.generator.get_state()
        result = original(accelerator, path, gpt, stream, seed)
        stream.generator.set_state(before)
        return result

    parts.restore = restore


def _forget_rate(_count):
    original = parts.build_scheduler
    parts.build_scheduler = lambda *args, steps_done: original(*args)


POINTS = {
    "made-temporary-directory": _at(Path, "mkdir", counts=_named(".tmp-step"), after=True),
    "middle-of-file": _at(checkpoint, "save_file", after=True, act=_halve_and_kill),
    "between-files": _at(checkpoint, "save_file", after=True),
    "before-fsync": _at(checkpoint, "sync"),
    "before-manifest": _at(checkpoint, "replace_text"),
    "before-rename": _at(checkpoint, "publish"),
    "after-rename": _at(Path, "rename", counts=_renamed_to("step-"), after=True),
    "after-directory-fsync": _at(checkpoint, "publish", after=True),
    "before-latest": _at(Path, "replace", counts=_renamed_to("latest")),
    "after-latest": _at(Path, "replace", counts=_renamed_to("latest"), after=True),
    "before-best": _at(Path, "replace", counts=_renamed_to("best")),
    "before-pruning": _at(checkpoint, "prune"),
    "renamed-for-pruning": _at(Path, "rename", counts=_renamed_to(".tmp-old"), after=True),
    "pruned-halfway": _at(shutil, "rmtree", counts=_named(".tmp-old"), act=_remove_half_and_kill),
    "after-pruning": _at(checkpoint, "prune", after=True),
    "loading-weights": _at(state, "read_weights"),
    "loading-state": _at(state, "read_state", after=True),
    "loaded": _at(phases, "begin_run", after=True),
    "making-run": _at(phases, "begin_run"),
    "made-run.json": _at(Path, "replace", counts=_renamed_to("run.json"), after=True),
    "made-recipe": _at(Path, "replace", counts=_renamed_to("recipe.toml"), after=True),
    "before-step": _at(loop, "train_step"),
    "after-step": _at(loop, "train_step", after=True),
    "forward": _at(GPT, "forward"),
    "validation": _at(evaluate, "held_out_loss"),
    "after-validation": _at(evaluate, "held_out_loss", after=True),
    "record": _at(phases.Recorder, "record", after=True),
    "old-run-half-removed": _at(rundir, "remove", counts=_named("step-"), after=True),
    "copying-records": _at(shutil, "copyfile", after=True),
    "fsync-fails": _at(checkpoint, "sync", act=_fail(errno.EIO)),
    "disk-full": _at(checkpoint, "save_file", act=_fail(errno.ENOSPC)),
    "metrics-disk-full": _limit_file_size(700),
    "file-size-limit": _limit_file_size(40_000),
    "slow-saves": _slow_saves,
    "forget-moments": _forget(parts, "load_optimizer_tensors"),
    "forget-dropout": _forget(state, "set_dropout_generator_state"),
    "forget-stream": _forget_stream,
    "forget-rate": _forget_rate,
}

__all__ = ["ARGUMENTS", "EVERYTHING", "POINTS", "run", "start"]
