"""A run that `--overwrite` replaces is not lost before the new one has a checkpoint."""

import signal

import pytest
from support.forked import ARGUMENTS, run
from support.runs import assert_undisturbed, contents

NEW = (*ARGUMENTS, "--seed", 3, "--overwrite")

BEFORE_THE_FIRST_SAVE = [
    ("making-run", 1),
    ("made-run.json", 1),  # the old one's copy
    ("made-recipe", 1),
    ("setting-aside", 1),
    ("setting-aside", 4),
    ("set-aside", 1),
    ("made-run.json", 2),
    ("made-recipe", 2),
    ("before-step", 1),
    ("record", 2),
    ("between-files", 1),
    ("before-rename", 1),
]


@pytest.fixture
def replaced(folder):
    """A folder with a complete run, which is to be replaced."""
    place = folder("replaced")
    assert run(ARGUMENTS, place) == 0
    return place


@pytest.mark.fault(96)
@pytest.mark.parametrize(("point", "count"), BEFORE_THE_FIRST_SAVE)
def test_kill_before_the_first_save_loses_no_run(replaced, undisturbed, point, count):
    """The command of the old run finds it whole; that of the new one, given again, makes the new run."""
    assert run(NEW, replaced, point, count) == -signal.SIGKILL
    assert run(ARGUMENTS, replaced) == 0
    assert "is complete" in (replaced / "err").read_text()
    assert_undisturbed(replaced, undisturbed(*ARGUMENTS))
    assert run(NEW, replaced, point, count) == -signal.SIGKILL
    assert run(NEW, replaced, "before-step", 2) == -signal.SIGKILL
    assert run(NEW, replaced) == 0
    assert_undisturbed(replaced, undisturbed(*NEW))


@pytest.mark.fault(96)
@pytest.mark.parametrize("count", [1, 4])
def test_kill_while_the_old_run_is_put_back(replaced, undisturbed, count):
    """The next start completes it."""
    assert run(NEW, replaced, "before-step", 3) == -signal.SIGKILL
    assert run(ARGUMENTS, replaced, "putting-back", count) == -signal.SIGKILL
    assert run(ARGUMENTS, replaced) == 0
    assert_undisturbed(replaced, undisturbed(*ARGUMENTS))


@pytest.mark.fault(96)
@pytest.mark.parametrize("point", ["after-directory-fsync", "before-latest", "removing-replaced-run", "before-step"])
def test_kill_after_the_first_save_leaves_the_new_run(replaced, undisturbed, point):
    """It continues, and nothing is left of the old run."""
    assert run(NEW, replaced, point, 9 if point == "before-step" else 1) == -signal.SIGKILL
    assert run(NEW[:-1], replaced) == 0
    assert "continuing after step" in (replaced / "err").read_text()
    assert_undisturbed(replaced, undisturbed(*NEW))


@pytest.mark.fault(95)
@pytest.mark.parametrize("fault", ["out-of-memory", "disk-full", "metrics-disk-full"])
def test_failure_before_the_first_save_puts_the_old_run_back(replaced, fault):
    """Exit 1 and a message; all is as it was before the command."""
    before = contents(replaced / "run")
    assert run(NEW, replaced, fault) == 1
    assert "Traceback" not in (replaced / "err").read_text()
    assert contents(replaced / "run") == before


@pytest.mark.fault(95)
def test_killed_replacement_says_where_the_old_run_is(replaced, call, monkeypatch):
    """It can be used there; without --overwrite it is put back, and a note says so."""
    assert run(NEW, replaced, "before-step") == -signal.SIGKILL
    note = "the run that is replaced stays in run/replaced-run until the first checkpoint"
    assert note in (replaced / "err").read_text()
    monkeypatch.chdir(replaced)
    code, _, err = call("generate", "--checkpoint", "run")
    assert (code, "the run that it replaces is run/replaced-run" in err) == (2, True)
    assert call("generate", "--checkpoint", "run/replaced-run", "--prompt", "the", "--max-new-tokens", 1)[0] == 0
    assert run(ARGUMENTS, replaced) == 0
    assert "run: the run that was to be replaced is back" in (replaced / "err").read_text()


@pytest.mark.fault(95)
def test_failed_step_of_a_replacement_can_be_replayed(replaced, call, monkeypatch):
    """Both are kept: what failed, and the old run, which the command without --overwrite finds."""
    diverging = (*ARGUMENTS, "--lr", 1e38, "--warmup", 0, "--save-every", 0, "--overwrite")
    assert run(diverging, replaced) == 1
    monkeypatch.chdir(replaced)
    assert call("replay", "run")[0] == 0
    assert call("check", "run/replaced-run")[0] == 0
    assert run(ARGUMENTS, replaced) == 0
    assert not list(replaced.glob("run/failed-step-*"))
