"""A run that `--overwrite` replaces is not lost before the new one has a checkpoint."""

import os
import shutil
import signal

import pytest
from support.fault_points import disturb, fail
from support.forked import ARGUMENTS, run
from support.runs import FLAGS, assert_undisturbed, contents

from mygpt.errors import CheckpointError
from mygpt.runs.replacing import put_back, set_aside_run
from mygpt.training.train import train

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


@pytest.mark.fault(96)
def test_kill_after_the_only_save_leaves_the_new_run(replaced):
    """No later save removes the old run: the next start does."""
    arguments = (*NEW[:-1], "--save-every", 12, "--val-every", 12)
    assert run((*arguments, "--overwrite"), replaced, "after-directory-fsync") == -signal.SIGKILL
    assert (replaced / "run" / "replaced-run").exists()
    assert run(arguments, replaced) == 0
    assert not (replaced / "run" / "replaced-run").exists()


@pytest.mark.fault(96)
def test_kill_while_an_unsaved_new_run_is_removed(tiny, monkeypatch):
    """However many of its files have gone, the old run is put back."""
    path = train(tiny())
    before = contents(path)
    for count in range(1, 4):
        set_aside_run(path)
        for name in ("latest", "evaluations.jsonl", "metrics.jsonl"):
            (path / name).touch()
        (path / "step-000001").mkdir()
        with monkeypatch.context() as patch:
            disturb("removing", fail(KeyboardInterrupt()), count=count + 1, patch=patch.setattr)
            with pytest.raises(KeyboardInterrupt):
                set_aside_run(path)
        assert put_back(path)
        assert contents(path) == before


@pytest.mark.fault(96)
def test_killed_replacement_is_undone_before_its_record_is_read(folder):
    """The old run began with a model that is gone by now, the new one with another."""
    place = folder("models")
    for name, seed in (("x", 1), ("z", 2)):
        assert run(("text.txt", *FLAGS, "--seed", seed, "--output", name), place) == 0
    old = ("text.txt", *FLAGS, "--output", "run", "--init-from", "x")
    assert run(old, place) == 0
    shutil.rmtree(place / "x")
    assert run((*old, "--init-from", "z", "--overwrite"), place, "before-step") == -signal.SIGKILL
    assert run(old, place) == 0, (place / "err").read_text()
    assert "run is complete" in (place / "err").read_text()


@pytest.mark.fault(96)
def test_replacement_that_is_killed_while_another_command_starts_is_undone(tiny, monkeypatch, capsys):
    """Between the first look and the moment in which the command has the run to itself."""
    path = train(tiny())
    disturb("checked", lambda *_: set_aside_run(path), patch=monkeypatch.setattr)
    train(tiny())
    assert f"{path} is complete" in capsys.readouterr().err


def test_folder_that_is_no_run_is_not_changed(tiny, tmp_path):
    """Also if it holds what looks like a replaced run."""
    (tmp_path / "run" / "replaced-run").mkdir(parents=True)
    (tmp_path / "run" / "best").touch()
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is not empty and not a run"):
        train(tiny())
    assert contents(tmp_path / "run") == before


def without_paths(path):
    """The files of a run that name no path, and move with it."""
    return contents(path, without=("run.json", "recipe.toml", ".lock"))


@pytest.mark.fault(117)
def test_interrupted_replacement_keeps_both_runs(replaced, undisturbed):
    """A mistaken --overwrite is noticed soon: what a signal saves replaces nothing, in this run or when it goes on."""
    before = without_paths(replaced / "run")
    for step, arguments in enumerate((NEW, NEW[:-1]), start=1):
        assert run(arguments, replaced, "sigterm") == 128 + signal.SIGTERM
        command = "the same command without --overwrite" if step == 1 else "the same command"
        stays = "the run that is replaced stays in run/replaced-run until the next checkpoint"
        assert f"saved run/step-00000{step}, and {command} continues; {stays}\n" in (replaced / "err").read_text()
        assert without_paths(replaced / "run" / "replaced-run") == before
    assert run(NEW, replaced, "before-step", 2) == -signal.SIGKILL  # begins again
    assert without_paths(replaced / "run" / "replaced-run") == before
    assert run(NEW, replaced, "sigterm") == 128 + signal.SIGTERM
    assert run(NEW[:-1], replaced) == 0
    assert_undisturbed(replaced, undisturbed(*NEW))


@pytest.mark.fault(117)
def test_failed_save_of_a_replacement_names_the_command_that_continues(replaced):
    """The same command would replace what was saved."""
    assert run(NEW, replaced, "disk-full", 3) == 1
    assert "make room, and the same command without --overwrite continues\n" in (replaced / "err").read_text()


@pytest.mark.fault(26, 96)
def test_damaged_new_run_does_not_count_as_saved(replaced, undisturbed):
    """It names the old run, which stays when the new one is begun again."""
    assert run(NEW, replaced, "after-directory-fsync") == -signal.SIGKILL
    os.truncate(replaced / "run" / "step-000003" / "model.safetensors", 100)
    assert run(NEW[:-1], replaced) == 1
    assert "none of its 1 checkpoints is whole" in (message := (replaced / "err").read_text())
    assert "; the run that it replaces is run/replaced-run\n" in message
    assert run(NEW, replaced, "before-step") == -signal.SIGKILL
    assert run(ARGUMENTS, replaced) == 0
    assert_undisturbed(replaced, undisturbed(*ARGUMENTS))


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
    assert run(NEW, replaced, "before-step") == -signal.SIGKILL
    assert not list(replaced.glob("run/failed-step-*"))
    assert run(diverging, replaced) == 1
    assert run(ARGUMENTS, replaced) == 0
    assert not list(replaced.glob("run/failed-step-*"))
