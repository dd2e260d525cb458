"""What a run survives: every way to be killed, signals, disks that fail, damaged files, numbers that break.

`@pytest.mark.fault(n)` gives the number under which docs/faults.md tells what a user sees.
"""

import ast
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, run_process
from fault_points import ARGUMENTS, EVERYTHING, FLAGS, contents, run, start
from safetensors.torch import load_file, save_file

from mygpt.checkpoint import load_checkpoint
from mygpt.cli import main
from mygpt.errors import CheckpointError, MismatchError, NonFiniteError, RecipeError
from mygpt.failure import replay
from mygpt.loop import train
from mygpt.metrics import read_records
from mygpt.model import GPT
from mygpt.rundir import METADATA_KEY

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    """A function making folders to run in, each with the text."""

    def make(name) -> Path:
        path = tmp_path_factory.mktemp(name)
        shutil.copy(text_file, path / "text.txt")
        return path

    return make


@pytest.fixture(scope="module")
def quiet(folder):
    """A function giving the folder in which these arguments have been run undisturbed, once."""
    done = {}

    def undisturbed(*arguments) -> Path:
        if arguments not in done:
            done[arguments] = folder("quiet")
            assert run(arguments, done[arguments]) == 0
        return done[arguments]

    return undisturbed


def assert_undisturbed(place, quiet_place):
    """The run directory and what was printed are those of the run that was never disturbed."""
    assert contents(place / "run") == contents(quiet_place / "run")
    assert (place / "out").read_text() == (quiet_place / "out").read_text()


# ---- 1 to 12: killed


KILLS = [
    (1, "made-temporary-directory", 1),
    (1, "made-temporary-directory", 3),
    (2, "middle-of-file", 1),
    (2, "middle-of-file", 4),
    (3, "between-files", 1),
    (3, "before-manifest", 2),
    (4, "before-fsync", 2),
    (5, "before-rename", 1),
    (5, "before-rename", 4),
    (6, "after-rename", 2),
    (6, "after-directory-fsync", 1),
    (7, "before-latest", 1),
    (7, "before-latest", 2),
    (7, "after-latest", 5),
    (7, "before-best", 2),
    (8, "before-pruning", 3),
    (8, "renamed-for-pruning", 1),
    (8, "pruned-halfway", 1),
    (8, "after-pruning", 5),
    (10, "making-run", 1),
    (10, "made-run.json", 1),
    (10, "made-recipe", 1),
    (10, "loaded", 1),
    (10, "before-step", 1),
    (11, "before-step", 8),
    (11, "after-step", 5),
    (11, "forward", 12),
    (11, "validation", 2),
    (11, "after-validation", 3),
    (11, "record", 7),
]


@pytest.mark.fault(1, 2, 3, 4, 5, 6, 7, 8, 10, 11)
@pytest.mark.parametrize(("number", "point", "count"), KILLS)
def test_killed_run_ends_as_if_it_had_not_been(folder, quiet, number, point, count):
    """SIGKILL at a point, then the same command: every file and line is that of a run never killed."""
    place = folder(point)
    assert run(ARGUMENTS, place, point, count) == -signal.SIGKILL
    assert run(ARGUMENTS, place) == 0
    assert_undisturbed(place, quiet(*ARGUMENTS))


@pytest.mark.fault(9)
@pytest.mark.parametrize("point", ["loading-weights", "loading-state", "loaded"])
def test_kill_while_loading_changes_nothing(folder, quiet, point):
    """Reading a checkpoint, and making the directory ready to go on, may be broken off anywhere."""
    place = folder(point)
    assert run(ARGUMENTS, place, "before-step", 9) == -signal.SIGKILL
    assert run(ARGUMENTS, place, point) == -signal.SIGKILL
    assert run(ARGUMENTS, place) == 0
    assert_undisturbed(place, quiet(*ARGUMENTS))


@pytest.mark.fault(12)
@pytest.mark.parametrize("point", ["middle-of-file", "before-rename", "pruned-halfway", "before-latest"])
def test_killed_twice_in_the_same_save(folder, quiet, point):
    """What the first kill left is no error for the second, nor for the run after it."""
    place = folder(point)
    for _ in range(2):
        assert run(ARGUMENTS, place, point) == -signal.SIGKILL
    assert run(ARGUMENTS, place) == 0
    assert_undisturbed(place, quiet(*ARGUMENTS))


@pytest.mark.fault(10, 11)
@pytest.mark.parametrize("sampling", ["shared-stream", "own-stream", "full"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_resume_is_exact_with_every_sampling(folder, quiet, sampling, schedule):
    """Killed in warmup, between a save and an evaluation, with dropout and accumulation."""
    arguments = (*ARGUMENTS, "--sampling", sampling, "--schedule", schedule, "--log-val-stderr", "--log-grad-norm")
    place = folder(sampling)
    for point, count in (("before-step", 6), ("forward", 7)):
        assert run(arguments, place, point, count) == -signal.SIGKILL
    assert run(arguments, place) == 0
    assert_undisturbed(place, quiet(*arguments))


@pytest.mark.fault(11)
@pytest.mark.slow
def test_fifty_random_kills_change_no_byte(folder, quiet):
    """One run, killed 50 times: by turns after a random time from its start, and from its next checkpoint."""
    arguments = (*ARGUMENTS, "--steps", 2000, "--save-every", 6, "--val-every", 50, "--log-every", 10)
    place, delays = folder("random"), random.Random(0)
    for kill in range(50):
        newest = place / "run" / "latest"
        before = newest.read_text() if newest.exists() else None
        process = start(arguments, place)
        if kill % 2:
            wait_for(lambda: newest.exists() and newest.read_text() != before)  # noqa: B023 - called at once
        process.join(delays.uniform(0, 0.1 if kill % 2 else 0.6))
        assert process.exitcode is None, "it ended before it had been killed 50 times"
        process.kill()
        process.join()
    assert run(arguments, place) == 0
    assert_undisturbed(place, quiet(*arguments))


@pytest.mark.fault(11)
@pytest.mark.parametrize("defect", ["forget-moments", "forget-dropout", "forget-stream", "forget-rate"])
def test_a_resume_that_forgets_something_is_found(folder, quiet, defect):
    """The tests above can fail: whatever is not put back shows in the bytes."""
    place = folder(defect)
    assert run(ARGUMENTS, place, "before-step", 6) == -signal.SIGKILL
    assert run(ARGUMENTS, place, defect) == 0
    assert contents(place / "run") != contents(quiet(*ARGUMENTS) / "run")


needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")


@needs_strace
@pytest.mark.slow
@pytest.mark.fault(1, 4, 5, 6, 7, 8)
@pytest.mark.parametrize("call", ["fsync:when=10", "/^rename:when=4", "unlinkat:when=2"])
def test_kill_at_a_system_call(folder, quiet, call):
    """The same from outside the program, by the system calls of the thread that saves."""
    place = folder("strace")
    name, when = call.split(":")
    trace = ["strace", "-f", "-qq", "-o", "trace", "-e", f"trace={name}"]
    program = [sys.executable, "-c", "import sys; sys.argv[0] = 'mygpt'; from mygpt.cli import main; main()"]
    killed = run_process([*trace, "-e", f"inject={name}:signal=SIGKILL:{when}", *program, "train", *ARGUMENTS], place)
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr + (place / "trace").read_text()
    assert run(ARGUMENTS, place) == 0
    assert_undisturbed(place, quiet(*ARGUMENTS))


# ---- 13 to 15: signals


def signalled(
    folder, *signals, arguments=("text.txt", *FLAGS, "--steps", 100_000, "--save-every", 50, "--output", "run")
):
    """Start a long run, send it signals once it has saved, and return its folder, exit code and messages."""
    place = folder("signal")
    process = start(arguments, place)
    wait_for((place / "run" / "latest").exists)
    for number in signals:
        os.kill(process.pid, number)
    process.join(60)
    return place, process.exitcode, (place / "err").read_text()


def wait_for(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "what is waited for does not happen"
        time.sleep(0.005)


@pytest.mark.fault(13, 14)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(folder, quiet, number, code):
    """The step is finished and saved; the same command goes on from there, to the bytes of a run never stopped."""
    place, exitcode, messages = signalled(folder, number)
    assert exitcode == code
    step = int((place / "run" / "latest").read_text().removeprefix("step-"))
    assert f"stopped by {number.name}; saved run/step-{step:06d}, and the same command continues" in messages
    assert "Traceback" not in messages
    arguments = ("text.txt", *FLAGS, "--steps", step + 20, "--save-every", 50, "--output", "run")
    assert run(arguments, place) == 0
    assert f"continuing after step {step}" in (place / "err").read_text()
    undisturbed = quiet(*arguments)
    saved = contents(place / "run")
    for name in (f"step-{step + 20:06d}/model.safetensors", f"step-{step + 20:06d}/state.safetensors", "metrics.jsonl"):
        assert saved[name] == contents(undisturbed / "run")[name]
    assert f"step-{step:06d}" not in saved or step % 50 == 0


@pytest.mark.fault(15)
def test_a_second_signal_ends_at_once(folder, monkeypatch):
    """While the first is still being answered; the checkpoint before stays whole."""
    place = folder("twice")
    arguments = ("text.txt", *FLAGS, "--steps", 100_000, "--save-every", 50, "--output", "run")
    process = start(arguments, place, "slow-saves")
    wait_for((place / "run" / "latest").exists)
    before = (place / "run" / "latest").read_text()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    assert process.exitcode == 130
    assert (place / "run" / "latest").read_text() == before
    assert run((*arguments, "--steps", 60), place) == 0


@pytest.mark.fault(13, 14)
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_signal_to_a_launcher_saves_and_stops(folder, launcher, number):
    """One process or several: they stop at the same step, save and leave; also when the launcher is killed."""
    place = folder(launcher)
    command = {
        "torchrun": [BIN / "torchrun", "--nproc-per-node", 2],
        "accelerate": [BIN / "accelerate", "launch", "--config_file", REPOSITORY / "recipes/launch/cpu1.yaml"],
    }[launcher]
    command += ["-m", "mygpt"]
    arguments = ["train", "text.txt", *FLAGS, "--steps", 100_000, "--save-every", 20, "--output", "run"]
    process = subprocess.Popen(
        [*map(str, command), *map(str, arguments)], cwd=place, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for((place / "run" / "latest").exists)
    if number == signal.SIGINT:  # as a terminal sends it, to all
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode != 0
    # All processes hold stderr: it has ended, so they have. A launcher that was killed passed on no signal.
    assert f"stopped by {'SIGTERM' if number == signal.SIGKILL else number.name}; saved run/step-" in messages
    saved = max(int(path.name.removeprefix("step-")) for path in (place / "run").glob("step-*"))
    manifest = json.loads((place / "run" / f"step-{saved:06d}" / "manifest.json").read_text())
    assert manifest["reason"] == ("scheduled" if saved % 20 == 0 else "interrupted")
    assert (place / "run" / "latest").read_text() == f"step-{saved:06d}\n"


# ---- 16 to 20: processes


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
        f"import os, signal, sys, time\nfrom mygpt import checkpoint, launch, loop\n{patch}\n"
        "from mygpt.cli import main\nmain(['train', *sys.argv[1:]])\n"
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
    whole, places = folder("whole"), {patch: folder("parted") for patch in ("", "loop.settle_buckets = print")}
    assert run_process([*torchrun, "-m", "mygpt", "train", *arguments], whole).returncode == 0
    runs = []
    for patch, place in places.items():
        (place / "parts.py").write_text(
            "import functools, sys\nfrom mygpt import loop\nfrom mygpt.cli import main\ntrain = loop.train\n"
            "if sys.argv.pop(1) == 'first':\n    loop.train = functools.partial(train, until=5)\n"
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


# ---- 21 to 25: storage that fails


needs_namespaces = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode,
    reason="needs user namespaces",
)


@needs_namespaces
@pytest.mark.slow
@pytest.mark.fault(21)
def test_full_disk_keeps_what_was_saved(folder, quiet):
    """A disk that fills: exit 1, the old checkpoint whole; with room the same command ends as if nothing had been."""
    arguments = ("text.txt", *FLAGS, "--steps", 12, "--save-every", 2, "--output", "disk/run")
    undisturbed = folder("quiet-disk")
    assert run(arguments, undisturbed) == 0
    place = folder("disk")
    (place / "disk").mkdir()
    mygpt = f"{sys.executable} -m mygpt"
    script = f"""
mount -t tmpfs -o size=500k tmpfs disk
{mygpt} train {" ".join(map(str, arguments))} > out 2> err; echo $? > code
ls disk/run > listing
{mygpt} generate --checkpoint disk/run --prompt the > generated; echo $? > generate-code
mount -o remount,size=10m disk
{mygpt} train {" ".join(map(str, arguments))} > out2 2> err2; echo $? > code2
cp -a disk/run saved
"""
    subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=place, check=True)
    read = {path.name: path.read_text() for path in place.iterdir() if path.is_file()}
    assert read["code"].strip() == "1"
    assert re.search(r"step-\d+: cannot be saved: .*No space left on device.*the same command continues", read["err"])
    assert "step-000002" in read["listing"]
    assert read["generate-code"].strip() == "0"
    assert read["code2"].strip() == "0", read["err2"]
    ours, theirs = contents(place / "saved"), contents(undisturbed / "disk" / "run")
    for files in (ours, theirs):
        for name in ("run.json", "recipe.toml"):  # which name the text by its path
            del files[name]
    assert ours == theirs


@pytest.mark.fault(21, 22, 23)
@pytest.mark.parametrize(
    ("point", "count", "message"),
    [
        ("disk-full", 5, "No space left on device"),
        ("fsync-fails", 7, "Input/output error"),
        ("metrics-disk-full", 1, "File too large"),
        ("file-size-limit", 1, "File too large"),
    ],
)
def test_a_disk_that_fails_costs_one_line_and_no_checkpoint(folder, quiet, point, count, message):
    """Exit 1, naming the file and the way out; what was saved stays, and the same command goes on from it."""
    place = folder(point)
    arguments = ARGUMENTS
    assert run(arguments, place, "before-step", 6) == -signal.SIGKILL
    before = contents(place / "run")
    assert run(arguments, place, point, count) == 1
    messages = (place / "err").read_text().splitlines()
    assert message in messages[-1]
    assert messages[-1].startswith("mygpt: ")
    assert not any(line.startswith("Traceback") for line in messages)
    after = contents(place / "run")
    assert all(after.get(name) == before[name] for name in before if name.startswith("step-000004"))
    assert run(arguments, place) == 0
    assert_undisturbed(place, quiet(*arguments))


@needs_strace
@pytest.mark.slow
@pytest.mark.fault(23)
def test_a_sync_that_fails_is_an_error(folder, quiet):
    """EIO from the kernel: what could not be synced is not taken for saved."""
    place = folder("eio")
    command = ["strace", "-f", "-qq", "-o", "trace", "-e", "inject=fsync:error=EIO:when=3+"]
    result = run_process([*command, sys.executable, "-m", "mygpt", "train", *ARGUMENTS], place)
    assert result.returncode == 1, result.stderr
    assert "Input/output error" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(place.glob("run/step-*"))


@needs_namespaces
@pytest.mark.fault(24)
def test_read_only_output_is_found_before_the_first_step(folder):
    """Exit 2 and one line."""
    place = folder("read-only")
    (place / "disk").mkdir()
    script = f"""
mount -t tmpfs -o ro tmpfs disk
{sys.executable} -m mygpt train text.txt {" ".join(map(str, FLAGS))} --output disk/run
"""
    result = run_process(["unshare", "-rm", "sh", "-c", script], place)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "disk: cannot be written to; choose another --output" in result.stderr


# ---- 26 to 37: what is on the disk is not what was saved


@pytest.fixture
def interrupted(tiny):
    """A run with checkpoints at steps 2 and 4, to be continued to step 6."""
    recipe = tiny(save_every=2)
    return recipe, train(recipe, until=4)


def truncate(file):
    os.truncate(file, file.stat().st_size - 10)


def extend(file):
    file.write_bytes(file.read_bytes() + b"0")


def break_header(file):
    file.write_bytes(file.read_bytes()[:8] + b"\xff" + file.read_bytes()[9:])


def flip_a_bit(file):
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def delete(file):
    file.unlink()


def make_a_directory(file):
    file.unlink()
    file.mkdir()


def make_a_link(file):
    file.rename(file.parent.parent.parent / f"moved-{file.name}")
    file.symlink_to(file.parent.parent.parent / f"moved-{file.name}")


@pytest.mark.fault(26, 27, 28, 29, 30, 33)
@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, extend, break_header, flip_a_bit, delete, make_a_directory, make_a_link])
def test_a_damaged_checkpoint_is_passed_over(interrupted, tiny, tmp_path, capsys, damage, name):
    """With a warning the run goes on from the one before, to the same bytes, and sets the damaged one aside."""
    recipe, run = interrupted
    file = run / "step-000004" / name
    damage(file)
    if (name, damage) == ("manifest.json", extend):
        file.write_bytes(file.read_bytes() + b"}")
    train(recipe)
    messages = capsys.readouterr().err
    assert re.search(rf"step-000004/{re.escape(name)}: .*; falling back to the checkpoint before it", messages)
    assert "continuing after step 2 " in messages
    (aside,) = run.glob("damaged-*")
    assert aside.name == "damaged-step-000004-1"
    whole = contents(train(tiny(save_every=2, output=str(tmp_path / "whole"))))
    ours = {name: value for name, value in contents(run).items() if not name.startswith("damaged")}
    for name in ("run.json", "recipe.toml"):
        del ours[name], whole[name]
    assert ours == whole


@pytest.mark.fault(26, 30)
def test_a_run_with_no_whole_checkpoint_is_not_started_again_silently(interrupted):
    """Exit 1: what is left may be worth mending."""
    recipe, run = interrupted
    for file in run.glob("step-*/model.safetensors"):
        truncate(file)
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints is whole; .*--overwrite") as caught:
        train(recipe)
    assert caught.value.exit_code == 1


@pytest.mark.fault(31)
def test_another_architecture_names_the_key(interrupted, tiny, tmp_path):
    """In the run's own directory, and from another run; nothing is changed."""
    _, run = interrupted
    before = contents(run)
    for keys, way_out in (
        ({}, "choose another --output"),
        ({"output": str(tmp_path / "other"), "resume": str(run)}, "a branch goes on with what its checkpoint has"),
    ):
        with pytest.raises(
            MismatchError,
            match=rf"\[model\] num_layers: got 3, expected 2, as in .*step-000004; {way_out}",
        ) as caught:
            train(tiny(save_every=2, num_layers=3, **keys), allow_changes=True)
        assert caught.value.exit_code == 1
    assert contents(run) == before
    assert not (tmp_path / "other").exists()


@pytest.mark.fault(32)
@pytest.mark.parametrize("dangling", [False, True])
def test_a_linked_step_directory_is_neither_followed_nor_touched(interrupted, tmp_path, capsys, dangling):
    """Never read, written or deleted through it: it is set aside."""
    recipe, run = interrupted
    elsewhere = tmp_path / "elsewhere"
    (run / "step-000004").rename(elsewhere)
    (run / "step-000004").symlink_to(tmp_path / "nothing" if dangling else elsewhere)
    before = contents(elsewhere)
    with pytest.raises(CheckpointError, match="latest: got 'step-000004', which is not a checkpoint"):
        load_checkpoint(run)
    train(recipe)
    assert "is a link or a file" in capsys.readouterr().err
    assert contents(elsewhere) == before
    assert (run / "damaged-step-000004-1").is_symlink()
    assert (run / "step-000004").is_dir()
    assert not (run / "step-000004").is_symlink()


@pytest.mark.fault(32)
def test_links_in_a_run_lead_nothing_out_of_it(interrupted, tmp_path):
    """Records, recipe and pointers that are links are replaced; what they point to stays as it was."""
    recipe, run = interrupted
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("metrics.jsonl", "timing.jsonl", "latest", ".tmp-latest", ".tmp-run.json", ".tmp-step-000006"):
        (outside / name).write_text("precious")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / name)
    before = contents(outside)
    train(recipe)
    assert contents(outside) == before
    train(recipe, overwrite=True)
    assert contents(outside) == before


@pytest.mark.fault(34)
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_a_newer_format_is_named(interrupted, name):
    """And not passed over: going on from an older checkpoint would discard the newer ones."""
    recipe, run = interrupted
    directory = run / "step-000004"
    if name == "manifest.json":
        manifest = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(manifest | {"format": 3}))
    else:
        rewrite(directory, metadata=lambda values: values | {"format": 3})
    before = contents(run)
    with pytest.raises(CheckpointError, match=rf"{name}: of format 3, and this mygpt reads up to 2") as caught:
        train(recipe)
    assert caught.value.exit_code == 1
    assert contents(run) == before


def rewrite(directory, name="model.safetensors", *, metadata=lambda values: values, tensors=lambda values: None):
    """Change a file of a checkpoint, and its manifest with it: damage that no hash shows."""
    import hashlib

    from safetensors import safe_open

    file = directory / name
    with safe_open(file, framework="pt") as opened:
        values = metadata(json.loads(opened.metadata()[METADATA_KEY]))
    parts = load_file(file)
    tensors(parts)
    save_file(parts, file, {METADATA_KEY: json.dumps(values)})
    manifest = json.loads((directory / "manifest.json").read_text())
    raw = file.read_bytes()
    manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.fault(35)
def test_weights_that_are_no_numbers_are_refused(interrupted):
    """Also where the hash is right."""
    recipe, run = interrupted
    rewrite(run / "step-000004", tensors=lambda values: values["norm.bias"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged: norm\.bias has values that are") as caught:
        train(recipe)
    assert caught.value.exit_code == 1


@pytest.mark.fault(36)
def test_a_changed_corpus_is_refused_unless_allowed(interrupted, tiny, tmp_path, text):
    """The same characters, in another order; and other characters, which no flag allows."""
    recipe, run = interrupted
    other = tmp_path / "other.txt"
    other.write_text(text[10_000:] + text[:10_000], encoding="utf-8", newline="")
    changed = tiny(save_every=2, corpus=str(other))
    with pytest.raises(MismatchError, match=r"corpus: .*other\.txt is not the text that .*--allow-changes") as caught:
        train(changed)
    assert caught.value.exit_code == 1
    train(changed, allow_changes=True)
    assert (run / "latest").read_text() == "step-000006\n"
    other.write_text("abc" * 1000)
    with pytest.raises(MismatchError, match="its characters are not the vocabulary of"):
        train(tiny(save_every=2, corpus=str(other), steps=8), allow_changes=True)
    # The same text under another name is the same corpus.
    other.write_text(text, encoding="utf-8", newline="")
    train(recipe, overwrite=True)
    train(tiny(save_every=2, corpus=str(other)))


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        ({"lr": 3e-4}, r"\[optimizer\] lr: got 0\.0003, expected 0\.001, as .* was trained; .*--allow-changes"),
        ({"batch_size": 8, "data_seed": 1}, r"batch_size: got 8, expected 4.*\n.*data_seed: got 1, expected 42"),
        ({"val_split": 0.1, "val_every": 2}, r"val_split: got 0\.1, expected 0\.0.*\n.*val_every: got 2, expected 0"),
        ({"precision": "bf16"}, "precision: got bf16, expected fp32"),
        ({"steps": 3}, r"steps: got 3, expected more than 4, the step of .*step-000004; raise --steps"),
    ],
)
def test_a_changed_recipe_is_refused(interrupted, tiny, keys, answer):
    """Exit 2: what differs, and the ways out; nothing is changed."""
    _, run = interrupted
    before = contents(run)
    with pytest.raises(RecipeError, match=answer) as caught:
        train(tiny(save_every=2, **keys))
    assert caught.value.exit_code == 2
    assert contents(run) == before


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("keys", "warning"),
    [({"threads": 2}, r"threads 1 -> 2"), ({"micro_batch_size": 2}, r"micro_batch_size 4 -> 2")],
)
def test_what_changes_the_last_bits_is_told(interrupted, tiny, capsys, keys, warning):
    """And recorded in run.json; the run goes on."""
    _, run = interrupted
    train(tiny(save_every=2, **keys))
    assert re.search(
        rf"the last bits may differ from those of a run that was never.*{warning}", capsys.readouterr().err
    )
    ((name, now),) = keys.items()
    was = {"threads": 1, "micro_batch_size": 4}[name]
    info = json.loads((run / "run.json").read_text())
    (resumed,) = info["resumed"]
    assert (resumed["after_step"], resumed["changed"]) == (4, {name: [was, now]})


@pytest.mark.fault(37)
def test_harmless_changes_pass(interrupted, tiny, tmp_path, capsys):
    """What is printed and kept may change, and more steps be asked for: the weights are those of the longer run."""
    _, run = interrupted
    train(tiny(save_every=4, steps=8, print_every=3, log_every=2, keep_last=2))
    messages = capsys.readouterr().err
    assert "last bits" not in messages
    longer = train(tiny(steps=8, output=str(tmp_path / "longer")))
    for name in ("model.safetensors", "state.safetensors"):
        assert (run / "step-000008" / name).read_bytes() == (longer / "step-000008" / name).read_bytes()
    # A schedule that ends at `steps` is told to be another one.
    falling = {"schedule": "linear", "output": str(tmp_path / "falling")}
    train(tiny(**falling))
    train(tiny(**falling, steps=8))
    assert "steps 6 -> 8: from step 7 on, the rate is that of a linear schedule over 8 steps" in capsys.readouterr().err
    rates = [record.lr for record in read_records(tmp_path / "falling")]
    assert rates[5] == 0
    assert rates[6] == pytest.approx(1e-3 / 8)


# ---- 59 to 62: numbers that break


def broken_step(monkeypatch, tiny, at, **keys):
    """Train until the numbers of step `at` break, and return the error and the run."""
    from mygpt import loop

    step, count = loop.train_step, []

    def breaking(accelerator, model, optimizer, batch, **options):
        count.append(1)
        if len(count) == at:
            keys["how"](model, batch)
        return step(accelerator, model, optimizer, batch, **options)

    monkeypatch.setattr(loop, "train_step", breaking)
    recipe = tiny(save_every=2, dropout=0.1, **keys.get("recipe", {}))
    with pytest.raises(NonFiniteError) as caught:
        train(recipe)
    assert caught.value.exit_code == 1
    return str(caught.value), Path(recipe.checkpoint.output)


def make_nan(model, _batch):
    model.norm.weight.data[3] = float("nan")


def make_infinite(model, _batch):
    # Logits so far apart that the loss overflows, while their gradients are finite.
    model.token_embedding.weight.data.mul_(1e20)
    model.norm.weight.data.mul_(1e20)


def make_infinite_gradient(model, _batch):
    # LayerNorm divides by a spread that is nearly nothing: forward fine, backward not.
    model.token_embedding.weight.data.mul_(1e-30)
    model.position_embedding.weight.data.mul_(1e-30)
    model.norm.weight.data.mul_(1e30)


def make_large(model, _batch):
    # Logits far apart, so that what comes back through the norm is large, but no overflow.
    model.token_embedding.weight.data.mul_(1e-6)
    model.position_embedding.weight.data.mul_(1e-6)
    model.norm.weight.data.mul_(1e9)


@pytest.mark.fault(59, 60, 61)
@pytest.mark.parametrize(
    ("how", "problem", "first"),
    [
        (make_nan, "the loss is nan", "the weights of norm.weight, 1 of 16 values, already before the step"),
        (make_infinite, "the loss is (inf|nan)", "."),
        (make_infinite_gradient, r"the loss is [\d.e+]+, the gradient norm (inf|nan)", "gradient"),
    ],
)
def test_numbers_that_break_stop_before_the_update(monkeypatch, tiny, capsys, how, problem, first):
    """Exit 1 naming the step; the checkpoints stay, the batch is written down, and replay says where it broke."""
    message, run = broken_step(monkeypatch, tiny, 5, how=how)
    assert re.match(rf"step 5: {problem}.*; not updated: `mygpt replay .*` looks into it", message)
    assert (run / "latest").read_text() == "step-000004\n"
    assert {record.step for record in read_records(run)} == {1, 2, 3, 4}
    failed = run / "failed-step-000005"
    batch = json.loads((failed / "batch.json").read_text())
    text = Path(tiny().data.corpus).read_text(encoding="utf-8")
    assert len(batch["starts"]) == 4
    assert all(text[at : at + 17] == window for at, window in zip(batch["starts"], batch["windows"], strict=True))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["replay", str(run), "--device", "cpu"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("step 5: the loss is ")
    assert re.search(rf"^first non-finite: .*{first}", out, re.MULTILINE), out


@pytest.mark.fault(59, 60, 61)
@pytest.mark.parametrize("how", [make_nan, make_infinite, make_infinite_gradient])
def test_numbers_that_break_unseen_are_told_of_their_step(monkeypatch, tiny, tmp_path, how):
    """The host reads every other step; what broke in between has updated nothing, and is told and kept as it was."""
    runs = {}
    for log_every in (1, 1000):
        recipe = {"log_every": log_every, "output": str(tmp_path / str(log_every))}
        message, run = broken_step(monkeypatch, tiny, 5, how=how, recipe=recipe)
        runs[message.replace(str(run), "RUN")] = contents(run / "failed-step-000005")
    (kept,) = {json.dumps(files, sort_keys=True, default=repr) for files in runs.values()}
    assert len(runs) == 1
    assert "model.safetensors" in kept


@pytest.mark.fault(59, 60, 61)
@pytest.mark.parametrize("how", [make_nan, make_infinite, make_infinite_gradient, make_large])
def test_exact_sums_stop_before_the_update_too(monkeypatch, tiny, how):
    """Also for a gradient that is finite, but larger than they hold."""
    message, run = broken_step(monkeypatch, tiny, 5, how=how, recipe={"reduction": "exact", "log_every": 1000})
    assert re.match(
        r"step 5: [14] of 4 micro-batches have a loss or gradients that are no numbers, or beyond the 1,048,576 "
        r"that an exact sum holds; not updated: `mygpt replay .*` looks into it; .*; or, if they are numbers, use ",
        message,
    )
    assert message.endswith('use reduction = "fast"')
    found = replay(run, torch.device("cpu"))
    assert bool(found.broken) is (how is not make_large)
    assert len(found.failed.dropout_seeds) == 4


def test_numbers_of_a_failed_step_are_replayed_with_its_threads(monkeypatch, tiny):
    """The record has the number of threads that computed the step, and replay sets the same."""
    _, run = broken_step(monkeypatch, tiny, 5, how=make_infinite, recipe={"threads": 2})
    torch.set_num_threads(1)
    found = replay(run, torch.device("cpu"))
    assert (found.failed.threads, torch.get_num_threads()) == (2, 2)
    assert found.not_repeated == ()


def test_numbers_that_only_compiled_code_breaks_are_not_called_sound(monkeypatch, tiny, capsys):
    """Replay computes eagerly, without activation checkpointing: it says so beside a result that may hang on it."""
    from mygpt import loop

    # The weights are whole and only the loss is a nan, as if a compiled kernel had made it.
    step = loop.train_step

    def breaking(accelerator, model, optimizer, batch, **options):
        update = step(accelerator, model, optimizer, batch, **options)
        return update._replace(loss=update.loss * float("nan"), grad_norm=update.grad_norm * float("nan"))

    monkeypatch.setattr(loop, "train_step", breaking)
    monkeypatch.setattr(GPT, "compile", lambda self: None)
    recipe = tiny(compile=True, activation_checkpointing=True)
    with pytest.raises(NonFiniteError):
        train(recipe)
    capsys.readouterr()
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")  # so that it is put back afterwards
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
    with pytest.raises(SystemExit) as stopped:
        main(["replay", recipe.checkpoint.output, "--device", "cpu"])
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "computed compiled; replayed without",
        "computed with activation checkpointing; replayed without",
        "all numbers are finite this time: not reproduced, with the differences above",
    ]


def test_numbers_of_an_older_record_are_replayed_too(monkeypatch, tiny):
    """A batch.json without the settings that it did not have at first still reads; nothing is known to differ."""
    _, run = broken_step(monkeypatch, tiny, 5, how=make_infinite)
    file = run / "failed-step-000005" / "batch.json"
    batch = json.loads(file.read_text())
    for key in ("threads", "compile", "activation_checkpointing"):
        del batch[key]
    file.write_text(json.dumps(batch))
    found = replay(run, torch.device("cpu"))
    assert (found.failed.threads, found.not_repeated) == (None, ())
    assert found.broken


@pytest.mark.fault(59)
def test_the_weights_of_a_failed_step_are_those_before_it(monkeypatch, tiny, tmp_path):
    """There was no update: they are the weights after the step before."""
    recipe = tiny(save_every=2, lr=1e30, steps=50)
    with pytest.raises(NonFiniteError, match=r"^step 2: "):
        train(recipe)
    run = Path(recipe.checkpoint.output)
    before = train(tiny(lr=1e30, steps=50, output=str(tmp_path / "before")), until=1)
    for name, weight in load_file(before / "step-000001" / "model.safetensors").items():
        assert torch.equal(weight, load_file(run / "failed-step-000002" / "model.safetensors")[name])


@pytest.mark.fault(62)
def test_a_held_out_loss_that_is_no_number_is_never_the_best(monkeypatch, tiny, tmp_path):
    """It stops the run; `best` names the evaluation before."""
    from mygpt import loop
    from mygpt.evaluate import HeldOutLoss

    held_out, values = loop.held_out_loss, [None, float("nan"), float("-inf")]
    for broken in values[1:]:
        calls = []

        def once(*args, calls=calls, broken=broken):
            calls.append(1)
            return held_out(*args) if len(calls) == 1 else HeldOutLoss(broken, None)

        monkeypatch.setattr(loop, "held_out_loss", once)
        recipe = tiny(val_split=0.2, val_every=2, save_best=True, output=str(tmp_path / str(broken)))
        with pytest.raises(NonFiniteError, match="step 4: the held-out loss is") as caught:
            train(recipe)
        assert caught.value.exit_code == 1
        assert (tmp_path / str(broken) / "best").read_text() == "step-000002\n"


# ---- the list itself


def test_every_fault_has_a_test_and_a_row():
    """Each number from 1 to 70 is the mark of a test, and a row of docs/faults.md; and no other number is."""
    marked = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fault":
                marked |= {argument.value for argument in node.args}
    rows = re.findall(r"^\| (\d+) \|", (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(map(int, rows)) == list(range(1, 71))
    assert marked == set(range(1, 71))
