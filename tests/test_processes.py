"""Several processes: restarts by the launcher, weights that differ, and whose error it is."""

import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, recipe_of, run_process
from torch.distributed import PrefixStore

from mygpt import launch
from mygpt.loop import accelerator_for, train
from mygpt.recipe import RuntimeTable

BIN = Path(sys.executable).parent
KEYS = TINY | {"reduction": "exact", "dropout": 0.1, "save_every": 1, "keep_last": 0}
FLAGS = [part for key, value in KEYS.items() for part in (f"--{key.replace('_', '-')}", value)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def undisturbed(text_file, tmp_path_factory) -> Path:
    """A run of one process, never disturbed; with exact sums its bytes are those of any number of processes."""
    return train(recipe_of(**KEYS, corpus=str(text_file), output=str(tmp_path_factory.mktemp("undisturbed") / "run")))


def torchrun(processes, text_file, place, patch, *flags, launcher=(), code="main(['train', *sys.argv[1:]])"):
    """Run so many processes with a patch of the program; returns what the launcher printed and how it ended."""
    (place / "patched.py").write_text(
        f"import os, signal, sys\nfrom mygpt import cli, launch, loop\nlaunch.GRACE_SECONDS = 1.0\n{patch}\n"
        f"from mygpt.cli import main\n{code}\n"
    )
    launcher = launcher or ("--master-port", free_port())
    command = [BIN / "torchrun", "--nproc-per-node", processes, *launcher, "patched.py", text_file, *FLAGS]
    return run_process([*command, "--output", "run", *flags], place, timeout=180)


# ---- 64: restarts


DYING = """
cli._complain = lambda *args, **kwargs: None  # it leaves others the time to speak first
attempt, calls, step = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), [], loop.train_step
def dying_step(*args, **kwargs):
    calls.append(1)
    if attempt < 3 and len(calls) == 2 and int(os.environ["RANK"]) == attempt % int(os.environ["WORLD_SIZE"]):
        with open("killed", "a") as file:
            print(attempt, file=file, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)
loop.train_step = dying_step
"""


@pytest.mark.slow
@pytest.mark.fault(64)
@pytest.mark.parametrize("launcher", [(), ("--standalone",)])
@pytest.mark.parametrize("processes", [2, 4])
def test_a_launcher_restarts_killed_processes_three_times_over(text_file, tmp_path, undisturbed, processes, launcher):
    """Another process each time: the next attempt calls none of the dead, and the run ends with the bytes of one."""
    launcher = [*(launcher or ("--master-port", free_port())), "--max-restarts", 3]
    result = torchrun(processes, text_file, tmp_path, DYING, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed").read_text() == "0\n1\n2\n"
    for name in ("step-000006/model.safetensors", "step-000006/state.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_accelerate_meets_where_mygpt_says(monkeypatch):
    """The canary for `INIT_METHOD`: Accelerate passes it on, so that each group has keys of its own in the store."""
    environment = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    for name, value in (environment | {"TORCHELASTIC_RESTART_COUNT": "2"}).items():
        monkeypatch.setenv(name, value)
    prefixes = []
    meet = PrefixStore
    monkeypatch.setattr(launch, "PrefixStore", lambda prefix, store: (prefixes.append(prefix), meet(prefix, store))[1])
    for _ in range(2):
        with accelerator_for(RuntimeTable(), torch.device("cpu"), 1) as accelerator:
            assert accelerator.num_processes == 1
            assert torch.distributed.is_initialized()
        assert not torch.distributed.is_initialized()
    assert len(set(prefixes)) == 2
    assert all(re.fullmatch(r"mygpt/2/\d+", prefix) for prefix in prefixes)
