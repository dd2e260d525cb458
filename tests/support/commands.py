"""Run programs as a user does, in new processes."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mygpt.compat import has_onednn_linear

REPOSITORY = Path(__file__).parents[2]
TESTS = REPOSITORY / "tests"
LAUNCH = REPOSITORY / "recipes" / "launch"
SCRIPT = REPOSITORY / "scripts" / "train.py"
BIN = Path(sys.executable).parent
MYGPT = [sys.executable, "-m", "mygpt"]

needs_onednn = pytest.mark.skipif(not has_onednn_linear(), reason="needs a torch with oneDNN")
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")


def run_process(arguments, cwd, timeout=300, environment=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )


def patched(place, patch) -> Path:
    """A script in `place` for `mygpt train`, which first runs the code in `patch`, with the names of fault_points."""
    script = place / "patched.py"
    script.write_text(
        f"import os, signal, sys, time\nsys.path.append({str(TESTS)!r})\nfrom support.fault_points import *\n{patch}\n"
        "cli.main(['train', *sys.argv[1:]])\n"
    )
    return script


def torchrun(processes, place, *arguments, patch="", launcher=(), timeout=180, environment=None):
    """Run `mygpt train ARGUMENTS` in so many processes in `place`, patched, by torchrun with the `launcher` flags."""
    launcher = [*launcher, *(() if "--standalone" in launcher else ("--master-port", free_port()))]
    command = [BIN / "torchrun", "--nproc-per-node", processes, *launcher, patched(place, patch), *arguments]
    return run_process(command, place, timeout, environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(happened, *processes, seconds=90):
    """Wait until `happened()`, while these processes run."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it has not happened in time"
        assert all(process.poll() is None for process in processes), "a process has ended too early"
        time.sleep(0.005)
