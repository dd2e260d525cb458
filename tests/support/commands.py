"""Run programs as a user does, in processes of their own."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
