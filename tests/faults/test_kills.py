"""SIGKILL at any moment, then the same command: the bytes of a run that was never killed."""

import random
import signal
import sys

import pytest
from support.commands import needs_strace, run_process, wait_for
from support.forked import ARGUMENTS, run, start
from support.runs import FLAGS, assert_undisturbed, contents, latest_step, steps_of

from mygpt.runs.steps import read_manifest

SAVING_NOTHING = [
    *FLAGS,
    *("--steps", 12, "--dropout", 0.2, "--micro-batch-size", 2, "--val-split", 0.2, "--val-every", 3, "--log-every", 5),
    *("--output", "run"),
]

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
    (7, "after-latest", 4),
    (7, "before-best", 1),
    (8, "before-pruning", 3),
    (8, "renamed-for-pruning", 1),
    (8, "pruned-halfway", 1),
    (8, "after-pruning", 4),
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
def test_killed_run_ends_as_one_never_killed(folder, undisturbed, number, point, count):
    """SIGKILL at a point, then the same command: every file and printed line is that of a run never killed."""
    place = folder(point)
    assert run(ARGUMENTS, place, point, count) == -signal.SIGKILL
    assert run(ARGUMENTS, place) == 0
    assert_undisturbed(place, undisturbed(*ARGUMENTS))


@pytest.mark.fault(9)
@pytest.mark.parametrize("point", ["loading-weights", "loading-state", "loaded"])
def test_kill_while_loading_changes_nothing(folder, undisturbed, point):
    """Reading a checkpoint, and preparing the directory to continue, can be killed anywhere."""
    place = folder(point)
    assert run(ARGUMENTS, place, "before-step", 9) == -signal.SIGKILL
    assert run(ARGUMENTS, place, point) == -signal.SIGKILL
    assert run(ARGUMENTS, place) == 0
    assert_undisturbed(place, undisturbed(*ARGUMENTS))


@pytest.mark.fault(12)
@pytest.mark.parametrize("point", ["middle-of-file", "before-rename", "pruned-halfway", "before-latest"])
def test_killed_twice_in_the_same_save(folder, undisturbed, point):
    """The leftovers of the first kill disturb neither the second attempt nor the third."""
    place = folder(point)
    for _ in range(2):
        assert run(ARGUMENTS, place, point) == -signal.SIGKILL
    assert run(ARGUMENTS, place) == 0
    assert_undisturbed(place, undisturbed(*ARGUMENTS))


@pytest.mark.fault(10, 11)
@pytest.mark.parametrize("sampling", ["shared-stream", "own-stream", "full"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_resume_is_exact_with_every_sampling(folder, undisturbed, sampling, schedule):
    """Killed in warmup, between a save and an evaluation, with dropout and accumulation."""
    arguments = (*ARGUMENTS, "--sampling", sampling, "--schedule", schedule, "--log-val-stderr", "--log-grad-norm")
    place = folder(sampling)
    for point, count in (("before-step", 6), ("forward", 7)):
        assert run(arguments, place, point, count) == -signal.SIGKILL
    assert run(arguments, place) == 0
    assert_undisturbed(place, undisturbed(*arguments))


@pytest.mark.fault(11)
@pytest.mark.slow
def test_twelve_random_kills_change_no_byte(folder, undisturbed):
    """One run, killed 12 times: alternately a random time after its start, and after its next checkpoint."""
    arguments = (*ARGUMENTS, "--steps", 1200, "--save-every", 6, "--val-every", 50, "--log-every", 10)
    place, delays = folder("random"), random.Random(0)
    for kill in range(12):
        newest = place / "run" / "latest"
        before = newest.read_text() if newest.exists() else None
        process = start(arguments, place)
        if kill % 2:
            wait_for(lambda: newest.exists() and newest.read_text() != before)  # noqa: B023 - called at once
        process.join(delays.uniform(0, 0.1 if kill % 2 else 0.6))
        assert process.exitcode is None, "the run ended before it had been killed 12 times"
        process.kill()
        process.join()
    assert run(arguments, place) == 0
    assert_undisturbed(place, undisturbed(*arguments))


@pytest.mark.fault(11)
@pytest.mark.parametrize("defect", ["forget-moments", "forget-dropout", "forget-stream", "forget-rate"])
def test_resume_that_forgets_something_is_found(folder, undisturbed, defect):
    """The tests above can fail: a state that is not restored changes the bytes."""
    place = folder(defect)
    assert run(ARGUMENTS, place, "before-step", 6) == -signal.SIGKILL
    assert run(ARGUMENTS, place, defect) == 0
    assert contents(place / "run") != contents(undisturbed(*ARGUMENTS) / "run")


@pytest.mark.fault(86)
def test_kill_between_checkpoints_costs_little(folder, undisturbed):
    """Checkpoints by the clock, here at every reading, are continued from, and a complete run has none of them left."""
    arguments = ("text.txt", *SAVING_NOTHING)
    place = folder("timed")
    assert run(arguments, place, "timed-saves", 9) == -signal.SIGKILL
    saved = latest_step(place / "run")
    assert saved in (5, 6)  # read after steps 1, 3, 5 and 6; the last save may not be complete
    assert read_manifest(place / "run" / f"step-{saved:06d}").reason == "timed"
    assert run(arguments, place, "timed-saves", 100) == 0
    assert f"continuing after step {saved}" in (place / "err").read_text()
    assert_undisturbed(place, undisturbed(*arguments))
    assert steps_of(place / "run") == [12]


@needs_strace
@pytest.mark.slow
@pytest.mark.fault(1, 4, 5, 6, 7, 8)
@pytest.mark.parametrize("call", ["fsync:when=10", "/^rename:when=4", "unlinkat:when=2"])
def test_kill_at_a_system_call(folder, undisturbed, call):
    """The same from outside the program, at system calls of the thread that saves."""
    place = folder("strace")
    name, when = call.split(":")
    trace = ["strace", "-f", "-qq", "-o", "trace", "-e", f"trace={name}"]
    program = [sys.executable, "-c", "import sys; sys.argv[0] = 'mygpt'; from mygpt.cli.main import main; main()"]
    killed = run_process([*trace, "-e", f"inject={name}:signal=SIGKILL:{when}", *program, "train", *ARGUMENTS], place)
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr + (place / "trace").read_text()
    assert run(ARGUMENTS, place) == 0
    assert_undisturbed(place, undisturbed(*ARGUMENTS))
