"""Runs of `mygpt train` that are disturbed at a chosen point, each in its own process.

The processes are forked from one that has imported everything, so that a run takes a fraction of a second.
"""

import functools
import gc
import multiprocessing
import os
import sys
from multiprocessing import forkserver

import pytest
import torch.distributed.tensor  # noqa: F401 - clipping imports it, which takes a second

from mygpt.cli.main import main
from support.commands import TESTS
from support.fault_points import FAULTS, disturb
from support.runs import FLAGS

# Whatever gives a run state: dropout, accumulation, warmup, a shared stream, a best checkpoint, pruning.
EVERYTHING = [
    *FLAGS,
    *("--steps", 12, "--dropout", 0.2, "--micro-batch-size", 2, "--schedule", "cosine", "--warmup", 8),
    *("--max-grad-norm", 1.0, "--val-split", 0.2, "--val-every", 3, "--print-every", 5),
    *("--save-every", 4, "--keep-last", 2, "--save-best", "--output", "run"),
]
ARGUMENTS = ("text.txt", *EVERYTHING)
LONG = ("text.txt", *FLAGS, "--steps", 100_000, "--save-every", 50, "--output", "run")


def start(arguments, folder, fault=None, count=1, *, command="train"):
    """Start `mygpt train ARGUMENTS`, or another command, in `folder`.

    The fault comes at the `count`-th time that its point is reached. It is a name in `FAULTS`, or one in `POINTS` for a
    kill.
    """
    process = server().Process(target=call, args=([command, *map(str, arguments)], folder, fault, count))
    process.start()
    return process


def run(arguments, folder, fault=None, count=1, *, command="train") -> int:
    """As `start`, to its end; returns the exit code, -9 for a kill. `folder`/out and `folder`/err have its streams."""
    process = start(arguments, folder, fault, count, command=command)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


@functools.cache
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.forked"])
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.14 the server looks for what it preloads along PYTHONPATH alone.
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
        # The tests are of the installed package, not of the working directory.
        patch.setenv("PYTHONSAFEPATH", "1")
        forkserver.ensure_running()
    return context


def call(arguments, folder, fault, count):
    gc.freeze()  # or the collections at the end of a run would copy all memory that was forked
    os.chdir(folder)
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    # A forked process has the streams of its parent.
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", encoding="utf-8", newline="") for stream in (1, 2))
    sys.argv = ["mygpt", *arguments]
    if fault in FAULTS:
        FAULTS[fault](count)
    elif fault:
        disturb(fault, count=count)
    main(sys.argv[1:])
