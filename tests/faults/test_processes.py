"""Several processes of one run, of which one fails; and two runs that meet in one directory."""

import platform
import re
import subprocess
import time

import pytest
from support.commands import BIN, MYGPT, free_port, patched, run_process, torchrun, wait_for
from support.forked import EVERYTHING, LONG, start
from support.runs import FLAGS, contents
from support.threads import together

from mygpt.runs.records import EvaluationLine
from mygpt.runs.run import RunDirectory
from mygpt.runs.schemas import Best
from mygpt.runs.start import Start
from mygpt.training.train import share_start


@pytest.mark.fault(20)
def test_two_runs_in_one_directory_are_refused(folder):
    """The second says so and exits with 2; the first continues."""
    place = folder("lock")
    first = start(LONG, place)
    wait_for((place / "run" / "latest").exists)
    for more in ((), ("--overwrite",)):
        result = run_process([*MYGPT, "train", *LONG, *more], place)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert "another process is training into run; wait for it, or choose another --output" in result.stderr
    assert first.exitcode is None
    first.terminate()
    first.join(60)
    assert first.exitcode == 143


def two_processes(place, patch, *, steps=100_000, seconds=45):
    """Run two processes, patched; they fail in time. Returns stderr of the first process and of the launcher."""
    started_at = time.monotonic()
    arguments = ("text.txt", *FLAGS, "--steps", steps, "--save-every", 20, "--output", "run")
    result = torchrun(2, place, *arguments, patch=patch, launcher=("--local-ranks-filter", 0), timeout=120)
    assert result.returncode != 0
    assert time.monotonic() - started_at < seconds
    return result.stderr


RANK_1 = f"rank 1 on {platform.node()}"


@pytest.mark.fault(16)
@pytest.mark.slow
def test_all_processes_report_which_one_lacks_memory(folder):
    """The others would otherwise only know that it has ended."""
    patch = """
import torch
disturb("before-step", fail(torch.OutOfMemoryError("CUDA out of memory")), when=rank_1_after_a_save)
"""
    messages = two_processes(folder("memory"), patch)
    assert f"mygpt: {RANK_1}: out of memory with batch_size = 4, seq_len = 16; lower micro_batch_size" in messages


@pytest.mark.fault(17)
@pytest.mark.slow
def test_killed_rank_ends_the_launch_and_the_same_command_continues(folder):
    """The launcher names it and fails within seconds; the next launch ends with the bytes of a run never disturbed."""
    patch = """
def kill_once(*_):
    open("killed", "x").close()
    kill()
if not os.path.exists("killed"):
    disturb("before-step", kill_once, when=rank_1_after_a_save)
"""
    place, undisturbed = folder("killed"), folder("undisturbed")
    messages = two_processes(place, patch, steps=1000)
    assert "Signal 9 (SIGKILL) received by PID" in messages
    assert (place / "killed").exists()
    arguments = ("text.txt", *FLAGS, "--steps", 1000, "--save-every", 20, "--output", "run")
    result = torchrun(2, place, *arguments, patch=patch)
    assert result.returncode == 0, result.stderr
    assert re.search(r"continuing after step \d+0 from run/step-", result.stderr)
    expected = torchrun(2, undisturbed, *arguments)
    assert expected.returncode == 0, expected.stderr
    assert contents(place / "run") == contents(undisturbed / "run")
    assert result.stdout == expected.stdout


@pytest.mark.fault(18)
@pytest.mark.slow
def test_failed_save_hangs_no_rank(folder):
    """The main process alone saves; when it cannot, all end with its message."""
    messages = two_processes(folder("save"), 'disturb("before-writing", fail(OSError(28, "No space left on device")))')
    assert "cannot be saved: [Errno 28] No space left on device" in messages


@pytest.mark.fault(19)
@pytest.mark.slow
def test_rank_that_hangs_is_waited_for_a_bounded_time(folder):
    """Ten minutes by default; here five seconds."""
    patch = """
wait_at_most(5)
def hang(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1000)
disturb("before-step", hang, when=rank_1_after_a_save)
"""
    messages = two_processes(folder("hang"), patch, seconds=75)
    lost = rf"^mygpt: {re.escape(RANK_1)} has ended, or has not answered for too long: .*Timed out"
    assert re.search(lost, messages, re.MULTILINE)


@pytest.mark.slow
def test_processes_start_with_the_weights_of_the_first(folder):
    """Though another has other ones, as on a machine with another checkpoint or version of torch."""
    patch = """
original = parts.build_optimizer
def build(gpt, table):
    for weight in gpt.parameters() if os.environ["RANK"] == "1" else ():
        weight.data.mul_(2)
    return original(gpt, table)
parts.build_optimizer = build
"""
    runs = []
    for defect in ("", patch):
        place = folder("start")
        result = torchrun(2, place, "text.txt", *EVERYTHING, patch=defect)
        assert result.returncode == 0, result.stderr
        runs.append(contents(place / "run", without=["run.json"]))
    assert runs[0] == runs[1]


@pytest.mark.fault(104)
@pytest.mark.slow
def test_processes_that_wait_for_each_other_without_a_launcher_end(folder):
    """In different collectives, each would wait for the other; ten minutes by default, here five seconds."""
    patch = """
import torch
wait_at_most(5)
def wait(*_):
    open("waits", "x").close()
    torch.distributed.barrier()
disturb("before-step", wait, when=rank_1_after_a_save)
"""
    place = folder("orphans")
    arguments = ("text.txt", *FLAGS, "--steps", 100_000, "--save-every", 20, "--output", "run")
    command = [BIN / "torchrun", "--nproc-per-node", 2, "--master-port", free_port(), patched(place, patch), *arguments]
    process = subprocess.Popen([*map(str, command)], cwd=place, stderr=subprocess.PIPE, text=True)
    wait_for((place / "waits").exists, process)
    process.kill()
    _, messages = process.communicate(timeout=60)  # the other processes hold stderr: they have ended, too
    assert re.search(r"^mygpt: .* has ended, or has not answered for too long: .*Timed out", messages, re.MULTILINE)


@pytest.mark.fault(103)
@pytest.mark.slow
def test_run_that_patience_ended_is_over_for_all_processes(folder):
    """Given again, the command ends at once and changes nothing; also with less patience."""
    place, ended = folder("patience"), []
    patience = ("--val-split", 0.2, "--val-every", 2, "--sampling", "full", "--lr", 1e-9, "--patience")
    for evaluations in (2, 2, 1):
        arguments = ("text.txt", *FLAGS, "--steps", 100, "--output", "run", *patience, evaluations)
        result = torchrun(2, place, *arguments, patch="wait_at_most(10)", timeout=90)
        assert result.returncode == 0, result.stderr
        ended.append(contents(place / "run"))
    assert ended == ended[:1] * 3
    assert "run is complete; raise --patience to train on" in result.stderr


def test_all_processes_get_the_whole_start(exact_run, tiny, monkeypatch):
    """Every field; of the recipe all but the paths of what a process reads, which may differ between machines."""
    own, recipe = tiny(steps=9), tiny(corpus="/elsewhere.txt", lr=0.25, output="/a/run", tokenizer="byte")
    values = {
        "checkpoint": exact_run / "step-000006",
        "step": 6,
        "in_place": True,
        "overwrite": True,
        "info": RunDirectory(exact_run).info.model_copy(update={"recipe": recipe}),
        "ended_by": "patience",
        "best": Best(step=4, val=2.5),
        "evaluations": (EvaluationLine.of(2, None, bytes(range(200))),),
    }
    assert values.keys() == {*Start._fields}, "a new field needs a value here that is not its default"
    start = Start(**values)
    assert all(value != Start._field_defaults.get(name) for name, value in values.items())
    main, other = together(
        monkeypatch,
        lambda channel: share_start(start, start.recipe, channel),
        lambda channel: share_start(None, own, channel),
    )
    assert main is start
    assert other.recipe == recipe.replace(corpus=own.data.corpus)
    assert other._replace(info=start.info) == start
    assert other.info.model_copy(update={"recipe": recipe}) == start.info


UNTIL_5 = "import functools; phases.train = functools.partial(phases.train, last_step=5)"


@pytest.mark.slow
def test_several_processes_resume_exactly(folder):
    """Three, since two hide the order of sums; each has a dropout generator. Without settled buckets bytes change."""
    runs = []
    for patches in ([""], [UNTIL_5, ""], [UNTIL_5, "parts.settle_buckets = print"]):
        place = folder("resume")
        for patch in patches:
            result = torchrun(3, place, "text.txt", *EVERYTHING, "--batch-size", 24, patch=patch)
            assert result.returncode == 0, result.stderr
        runs.append(contents(place / "run", without=["run.json"]))
    whole, parted, unsettled = runs
    assert parted == whole
    assert unsettled != whole
