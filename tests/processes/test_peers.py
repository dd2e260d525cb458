"""Several processes: restarts by the launcher, weights that differ, and whose error it is."""

import platform
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.commands import BIN, REPOSITORY, free_port, run_process
from support.peers import exchange, fail, lose, together
from support.runs import TINY
from torch.distributed import DistNetworkError, TCPStore
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from mygpt.cli.main import print_error
from mygpt.errors import PeerError
from mygpt.processes.channel import Channel, connect
from mygpt.processes.environment import Launched
from mygpt.recipe.tables import Recipe
from mygpt.training import agreement
from mygpt.training.train import train

KEYS = TINY | {"reduction": "exact", "dropout": 0.1, "save_every": 1, "keep_last": 0}
FLAGS = [part for key, value in KEYS.items() for part in (f"--{key.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def undisturbed(text_file, tmp_path_factory) -> Path:
    """A run of one process, never disturbed; with exact sums its bytes are those of any number of processes."""
    return train(Recipe.of(**KEYS, corpus=str(text_file), output=str(tmp_path_factory.mktemp("undisturbed") / "run")))


def torchrun(processes, text_file, place, patch, *flags, launcher=()):
    """Run so many processes with a patch of the program; returns what the launcher printed and how it ended."""
    (place / "patched.py").write_text(
        "import os, signal, sys\nfrom mygpt.cli import main as cli\nfrom mygpt.processes import channel\n"
        f"from mygpt.training import evaluate, loop, parts\nchannel.GRACE_SECONDS = 1.0\n{patch}\n"
        "from mygpt.cli.main import main\nmain(['train', *sys.argv[1:]])\n"
    )
    launcher = launcher or ("--master-port", free_port())
    command = [BIN / "torchrun", "--nproc-per-node", processes, *launcher, "patched.py", text_file, *FLAGS]
    return run_process([*command, "--output", "run", *flags], place, timeout=180)


def assert_same_run(run, expected):
    """Weights, state and records are those of the other run, byte for byte."""
    for name in ("step-000006/model.safetensors", "step-000006/state.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name


# ---- 64: restarts


DYING = """
cli.print_error = lambda *args, **kwargs: None  # it leaves others the time to speak first
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
    """Another process each time; the run ends with the bytes of a run never disturbed."""
    launcher = [*(launcher or ("--master-port", free_port())), "--max-restarts", 3]
    result = torchrun(processes, text_file, tmp_path, DYING, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed").read_text() == "0\n1\n2\n"
    assert_same_run(tmp_path / "run", undisturbed)


# ---- 69: weights that differ


FLIPPING = """
import torch
def flip(tensor):
    tensor.detach().view(torch.int32).view(-1)[7] ^= 1
GPT, restore, step, calls = parts.GPT, parts.restore, loop.train_step, []
def other_start(*args):
    model = GPT(*args)
    flip(next(model.parameters()))
    return model
def other_checkpoint(*args):
    restored = restore(*args)
    flip(next(tensor for name, tensor in restored[1].items() if name.endswith(".exp_avg")))
    return restored
def flipping_step(built, batch, number):
    update = step(built, batch, number)
    calls.append(1)
    if len(calls) == 4:
        parameter = next(built.model.parameters())
        flip(parameter if what == "weight" else built.optimizer.state[parameter][what])
    return update
def patch(rank, name, value):
    if os.environ["RANK"] == str(rank):
        setattr(loop if name == "train_step" else parts, name, value)
"""


@pytest.mark.slow
@pytest.mark.fault(69)
def test_processes_that_start_with_other_weights_are_refused(text_file, tmp_path):
    """One bit of one process, before anything is written: all of them end, and say which."""
    result = torchrun(3, text_file, tmp_path, f"{FLIPPING}\npatch(1, 'GPT', other_start)")
    assert result.returncode == 1
    assert (
        f"mygpt: before step 1: the processes hold different weights or optimizer state, rank 1 on {platform.node()} "
        f"against rank 0, 2 on {platform.node()}; their processors or versions compute other initial weights"
    ) in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.fault(69)
@pytest.mark.parametrize("what", ["weight", "exp_avg"])
def test_a_bit_that_flips_in_one_process_is_not_saved(text_file, tmp_path, undisturbed, what):
    """Nothing of that step; the same command continues from the checkpoint before, to the bytes of a sound run."""
    result = torchrun(3, text_file, tmp_path, f"{FLIPPING}\nwhat = '{what}'\npatch(2, 'train_step', flipping_step)")
    assert result.returncode == 1
    assert (
        f"mygpt: step 4: the processes hold different weights or optimizer state, rank 2 on {platform.node()} "
        f"against rank 0, 1 on {platform.node()}; this step is not saved"
    ) in result.stderr
    saved = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert saved == ["step-000001", "step-000002", "step-000003"]

    result = torchrun(3, text_file, tmp_path, f"{FLIPPING}\npatch(1, 'restore', other_checkpoint)")
    assert result.returncode == 1
    assert "mygpt: before step 4: the processes hold different weights or optimizer state, rank 1" in result.stderr
    assert "they have read different checkpoints" in result.stderr

    result = torchrun(3, text_file, tmp_path, "")
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_a_checksum_depends_on_every_bit_and_place(monkeypatch, dtype):
    """Of all tensors, across the borders of chunks, and on their order."""
    monkeypatch.setattr(agreement, "CHUNK", 16)
    tensors = [torch.arange(size).remainder(7).to(dtype) for size in (1, 50, 33)]

    def value():
        return agreement.checksum(tensors, torch.device("cpu")).item()

    seen, count = {value()}, 1
    for tensor in tensors:
        bits = tensor.view(torch.uint8)
        for place in range(len(bits)):
            for bit in range(8):
                bits[place] ^= 1 << bit
                seen.add(value())
                bits[place] ^= 1 << bit
                count += 1
    assert len(seen) == count
    assert value() in seen
    tensors.reverse()
    assert value() not in seen


# ---- 70: whose error it is


LOOK_LIKE_LOST = [
    RuntimeError("tracker: [Errno 32] Broken pipe"),
    RuntimeError("upload failed: Connection reset by peer"),
    RuntimeError("cannot log to wandb: Timed out waiting 5000ms; is NCCL or gloo there?"),
    RuntimeError("saved by: [/a/gloo/pair.cc:1] Connection closed by peer"),
    OSError("Connection reset by peer"),
]


@pytest.mark.fault(70)
@pytest.mark.parametrize("error", [*LOOK_LIKE_LOST, DistNetworkError("Broken pipe")])
def test_one_process_has_lost_nobody(error):
    """Whatever its error looks like, it stays what it is."""
    with pytest.raises(type(error)) as raised, connect(Launched()):
        raise error
    assert raised.value is error


@pytest.mark.fault(70)
@pytest.mark.parametrize("error", LOOK_LIKE_LOST)
def test_an_error_that_looks_like_a_lost_process_is_told_as_its_own(monkeypatch, error):
    """The process that has it raises it; the other, which has lost that process, tells whose it is."""
    lost, own = together(monkeypatch, lose, lambda peers: exchange(peers) and fail(error)(peers))
    assert own is error
    assert isinstance(lost, PeerError)
    assert str(lost) == f"rank 1 on {platform.node()}: {type(error).__name__}: {error}"


FAILING = """
step = loop.train_step
def failing_step(*args, **kwargs):
    if os.environ.get("RANK", "1") == "1" and os.path.exists("run/latest"):
        raise RuntimeError("tracker: Broken pipe")
    return step(*args, **kwargs)
loop.train_step = failing_step
"""


@pytest.mark.slow
@pytest.mark.fault(70)
@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_one_process_keeps_its_traceback(text_file, tmp_path, processes):
    """Exit 1 with its message and where it was raised; the other process tells whose it is."""
    if processes == 1:
        (tmp_path / "patched.py").write_text(
            f"import os, sys\nfrom mygpt.training import evaluate, loop, parts, train as phases\n{FAILING}\n"
            "from mygpt.cli.main import main\nmain(['train', *sys.argv[1:]])\n"
        )
        result = run_process([sys.executable, "patched.py", text_file, *FLAGS, "--output", "run"], tmp_path)
    else:
        result = torchrun(processes, text_file, tmp_path, FAILING, "--steps", 100_000)
        assert f"mygpt: rank 1 on {platform.node()}: RuntimeError: tracker: Broken pipe" in result.stderr
    assert result.returncode == 1
    assert "in failing_step" in result.stderr
    assert re.search(r"^(\[rank1\]: )?RuntimeError: tracker: Broken pipe$", result.stderr, re.MULTILINE)
    assert "has ended, or has not answered" not in result.stderr


class CountingStore:
    """A client of a store, which counts what it asks of the server."""

    def __init__(self, port):
        self._store, self.requests = TCPStore("127.0.0.1", port, is_master=False), 0

    def __getattr__(self, name):
        self.requests += 1
        return getattr(self._store, name)


@pytest.mark.slow
def test_many_processes_ask_little_of_the_store():
    """64 of them, on one store: some requests each, not some for each other; and an error is heard within a second."""
    count, delay = 64, 1.5
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    peers = [Channel(Launched(count, count, rank), CountingStore(server.port)) for rank in range(count)]
    results, ended = [None] * count, [0.0] * count

    def meet(rank):
        time.sleep(delay * (rank == 1))
        results[rank] = peers[rank].exchange({"node": f"node{rank}"})

    def fall_out(rank):
        try:
            if rank == 1:
                time.sleep(delay)
                raise KeyError("b")
            peers[rank].exchange({}, "more")
        except Exception as error:
            ended[rank] = time.monotonic()
            results[rank] = peers[rank].leave(error)

    def run(work):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    run(meet)
    assert results == [[{"node": f"node{rank}"} for rank in range(count)]] * count
    assert max(entry._store.requests for entry in peers) < count
    run(fall_out)
    assert isinstance(results[1], KeyError)
    others = [result for rank, result in enumerate(results) if rank != 1]
    assert {str(error) for error in others} == {f"rank 1 on {platform.node()}: KeyError: 'b'"}
    assert max(ended) - ended[1] < 2


# ---- what the launcher says at its end


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_launcher_ends_with_the_message(text_file, tmp_path, launcher):
    """Its summary of what failed comes last, and has the error's own line in place of how to get a traceback."""
    arguments = [text_file, *FLAGS, "--lr", -1, "--output", "run"]
    if launcher == "torchrun":
        command = [BIN / "torchrun", "--nproc-per-node", 2, "--master-port", free_port()]
    else:
        config = REPOSITORY / "recipes" / "launch" / "cpu2.yaml"
        command = [BIN / "accelerate", "launch", "--config_file", config, "--main_process_port", free_port()]
    result = run_process([*command, "-m", "mygpt", "train", *arguments], tmp_path)
    assert result.returncode == 1
    assert "traceback : --lr: got -1.0, expected greater than or equal to 0" in result.stderr.splitlines()[-2]
    assert "To enable traceback see" not in result.stderr


def test_a_launcher_is_told_what_is_printed(monkeypatch, tmp_path, capsys):
    """Lines of a message, with what a terminal would act on escaped; a file that cannot be written is no error."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    print_error("one\ntwo \x1b[31m")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message["message"] == "one\ntwo \\x1b[31m"
    assert abs(failure.timestamp - time.time()) < 60
    assert capsys.readouterr().err == "mygpt: one\nmygpt: two \\x1b[31m\n"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    print_error("three")
    assert capsys.readouterr().err == "mygpt: three\n"
