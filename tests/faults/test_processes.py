"""Several processes of one run, of which one fails; and two runs that meet in one directory."""

import platform
import re
import sys
import time

import pytest
from support.commands import BIN, run_process
from support.fault_points import EVERYTHING, run, start
from support.runs import FLAGS, contents, wait_for


@pytest.mark.fault(20)
def test_two_runs_in_one_directory_are_refused(folder):
    """The second says so and exits with 2; the first goes on."""
    place = folder("lock")
    arguments = ("text.txt", *FLAGS, "--steps", 100_000, "--save-every", 50, "--output", "run")
    first = start(arguments, place)
    wait_for((place / "run" / "latest").exists)
    for more in ((), ("--overwrite",)):
        result = run_process([sys.executable, "-m", "mygpt", "train", *arguments, *more], place)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert "another process is training into run; wait for it, or choose another --output" in result.stderr
    assert first.exitcode is None
    first.terminate()
    first.join(60)
    assert first.exitcode == 143


def two_processes(folder, patch, *flags):
    """Run two processes under torchrun with a patch of the program; returns the folder, the result and its seconds.

    What they say is that of the first of them, and of the launcher.
    """
    place = folder("two")
    (place / "patched.py").write_text(
        f"import os, signal, sys, time\nfrom mygpt.processes import channel as launch\nfrom mygpt.runs import saver as checkpoint\nfrom mygpt.training import evaluate, loop, parts, train as phases\n{patch}\n"
        "from mygpt.cli.main import main\nmain(['train', *sys.argv[1:]])\n"
    )
    command = [
        *(BIN / "torchrun", "--nproc-per-node", 2, "--local-ranks-filter", 0),
        place / "patched.py",
        "text.txt",
        *FLAGS,
        "--output",
        "run",
        *flags,
    ]
    started_at = time.monotonic()
    result = run_process(command, place, timeout=120)
    return place, result, time.monotonic() - started_at


@pytest.mark.fault(16)
@pytest.mark.slow
def test_memory_that_one_process_lacks_is_told_by_its_name(folder):
    """By the others, who would else only know that it has gone."""
    patch = """
step = loop.train_step
def filling_step(*args, **kwargs):
    if os.environ["RANK"] == "1" and os.path.exists("run/latest"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    return step(*args, **kwargs)
loop.train_step = filling_step
"""
    _, result, seconds = two_processes(folder, f"import torch\n{patch}", "--steps", 100_000, "--save-every", 20)
    assert result.returncode != 0
    assert seconds < 45
    told = (
        f"mygpt: rank 1 on {platform.node()}: out of memory with batch_size = 4, seq_len = 16; lower micro_batch_size"
    )
    assert told in result.stderr


@pytest.mark.fault(17)
@pytest.mark.slow
def test_a_killed_rank_ends_the_launch(folder):
    """The launcher says which, and fails within seconds."""
    patch = """
step = loop.train_step
def dying_step(*args, **kwargs):
    if os.environ["RANK"] == "1" and os.path.exists("run/latest"):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)
loop.train_step = dying_step
"""
    place, result, seconds = two_processes(folder, patch, "--steps", 100_000, "--save-every", 20)
    assert result.returncode != 0
    assert seconds < 45
    assert "Signal 9 (SIGKILL) received by PID" in result.stderr
    assert run(("text.txt", *FLAGS, "--steps", 40, "--output", "run", "--save-every", 20), place) in (0, 2)


@pytest.mark.fault(18)
@pytest.mark.slow
def test_a_failed_save_hangs_no_rank(folder):
    """The main process alone saves; when it cannot, all end and the message is its."""
    patch = """
def full(*args):
    raise OSError(28, "No space left on device")
checkpoint.save_file = full
"""
    _, result, seconds = two_processes(folder, patch, "--steps", 100_000, "--save-every", 20)
    assert result.returncode != 0
    assert seconds < 45
    assert "cannot be saved: [Errno 28] No space left on device" in result.stderr


@pytest.mark.fault(19)
@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_a_bounded_time(folder):
    """Ten minutes by default; here five seconds."""
    patch = """
from datetime import timedelta
launch.PROCESS_TIMEOUT = timedelta(seconds=5)
step = loop.train_step
def hanging_step(*args, **kwargs):
    if os.environ["RANK"] == "1" and os.path.exists("run/latest"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1000)
    return step(*args, **kwargs)
loop.train_step = hanging_step
"""
    _, result, seconds = two_processes(folder, patch, "--steps", 100_000, "--save-every", 20)
    assert result.returncode != 0
    assert seconds < 75
    who = re.escape(f"rank 1 on {platform.node()}")
    assert re.search(rf"^mygpt: {who} has ended, or has not answered for too long: .*Timed out", result.stderr, re.M)


@pytest.mark.slow
def test_several_processes_resume_exactly(folder):
    """Three, since two hide the order of sums; each has a dropout generator. Without settled buckets it shows."""
    arguments = ["text.txt", *EVERYTHING, "--batch-size", 24]
    torchrun = [BIN / "torchrun", "--nproc-per-node", 3]
    whole, places = folder("whole"), {patch: folder("parted") for patch in ("", "parts.settle_buckets = print")}
    assert run_process([*torchrun, "-m", "mygpt", "train", *arguments], whole).returncode == 0
    runs = []
    for patch, place in places.items():
        (place / "parts.py").write_text(
            "import functools, sys\nfrom mygpt.training import evaluate, loop, parts, train as phases\nfrom mygpt.cli.main import main\ntrain = phases.train\n"
            "if sys.argv.pop(1) == 'first':\n    phases.train = functools.partial(phases.train_until, last_step=5)\n"
            f"else:\n    {patch or 'pass'}\n"
            "main(['train', *sys.argv[1:]])\n"
        )
        for part in ("first", "second"):
            result = run_process([*torchrun, "parts.py", part, *arguments], place)
            assert result.returncode == 0, result.stderr
        runs.append({name: value for name, value in contents(place / "run").items() if name != "run.json"})
    expected = {name: value for name, value in contents(whole / "run").items() if name != "run.json"}
    assert runs[0] == expected
    assert runs[1] != expected
