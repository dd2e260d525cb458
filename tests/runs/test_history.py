"""Runs whose recipe changed on the way: each step is judged, and repeated, by the recipe with which it was trained."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from support.commands import TESTS, needs_onednn
from support.fault_points import POINTS, disturb, send
from support.forked import run as run_forked
from support.runs import FLAGS, assert_same_run, contents, evaluation_of

from mygpt.checks.rerun import parts_of
from mygpt.checks.verify import verify
from mygpt.errors import InterruptedRunError, RecipeError
from mygpt.runs.files import BEST_FILE
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.records import read_records
from mygpt.runs.run import Run
from mygpt.runs.schemas import RunInfo
from mygpt.runs.steps import read_manifest
from mygpt.training.train import train, train_until


@pytest.fixture
def changed(tiny):
    """A run that was trained to step 4 at one rate, and on to step 6 at another."""
    run = train(tiny(steps=4, save_every=2, dropout=0.1))
    return train(tiny(steps=6, save_every=2, dropout=0.1, lr=1e-4), allow_changes=True), run


@pytest.mark.fault(65)
def test_step_records_its_recipe(changed, tiny, tmp_path):
    """Its manifest has recipe, text, and whether the run ended with it, and no path of this machine."""
    run, _ = changed
    manifests = {step: read_manifest(run / f"step-{step:06d}") for step in (2, 4, 6)}
    assert [manifest.recipe.optimizer.lr for manifest in manifests.values()] == [1e-3, 1e-3, 1e-4]
    assert [manifest.finished for manifest in manifests.values()] == [False, True, True]
    assert {manifest.corpus_sha256 for manifest in manifests.values()} == {Run(run).info.corpus_sha256}
    assert str(tmp_path) not in (run / "step-000006" / "manifest.json").read_text()
    elsewhere = train(tiny(steps=4, save_every=2, dropout=0.1, output=str(tmp_path / "elsewhere")))
    for step in ("step-000002", "step-000004"):
        assert contents(run / step) == contents(elsewhere / step)


@pytest.mark.fault(65)
def test_branch_is_judged_by_the_recipe_of_its_step(changed, tiny, tmp_path, capsys):
    """After step 2 the rate of that step is no change, and the one that the run took later is."""
    run, _ = changed
    branch = {"steps": 6, "save_every": 2, "dropout": 0.1, "resume": str(run / "step-000002")}
    problem = r"lr: .*step-000002 was trained with lr = 0\.001, you gave 0\.0001; set it so, or branch off with --allow"
    with pytest.raises(RecipeError, match=problem):
        train(tiny(**branch, lr=1e-4, output=str(tmp_path / "refused")))
    assert not (tmp_path / "refused").exists()
    same = train(tiny(**branch, output=str(tmp_path / "same")))
    assert "lr" not in capsys.readouterr().err
    assert_same_run(same, train(tiny(steps=6, save_every=2, dropout=0.1, output=str(tmp_path / "whole"))))


@pytest.mark.fault(65)
def test_falling_back_is_judged_by_the_recipe_of_the_step(changed, tiny, capsys):
    """Where later checkpoints are damaged, steps are not silently trained again at another rate."""
    run, _ = changed
    for step in (4, 6):
        os.truncate(run / f"step-{step:06d}" / "model.safetensors", 100)
    again = tiny(steps=6, save_every=2, dropout=0.1, lr=1e-4)
    with pytest.raises(RecipeError, match=r"lr: .*step-000002 was trained with lr = 0\.001, you gave 0\.0001; choose"):
        train(again)
    train(again, allow_changes=True)
    assert "from step 3 on: [optimizer] lr = 0.0001, before 0.001" in capsys.readouterr().err
    # The record of the lost continuation is gone, too.
    (resumed,) = Run(run).info.resumed
    assert (resumed.after_step, resumed.changed) == (2, {"lr": (1e-3, 1e-4), "steps": (4, 6)})
    assert verify(run).identical


@needs_onednn
@pytest.mark.fault(65)
@pytest.mark.parametrize("steps", [None, 3, 4, 5])
def test_verify_repeats_the_changes(tiny, steps):
    """Rate, threads, products, steps and sampling: each part of the run is run again as it was."""
    keys = {"save_every": 2, "dropout": 0.1, "val_split": 0.2, "val_every": 2, "sampling": "own-stream"}
    train_until(tiny(**keys, steps=4, matmul="blas"), 3)
    train(tiny(**keys, steps=5, lr=1e-4, threads=2, matmul="onednn"), allow_changes=True)
    run = train(tiny(**keys | {"sampling": "full"}, steps=8, lr=1e-4, threads=2, matmul="onednn"))
    changed = Run(run).info.resumed[0].changed
    assert changed["matmul"] == ("blas", "onednn")
    result = verify(run, steps)
    assert result.identical, (result.difference, result.tensors)
    assert result.until == (steps or 8)
    assert result.records == result.until
    assert result.changes == []


@pytest.mark.fault(65)
def test_warning_names_the_steps_of_the_schedule_before(tiny, tmp_path, capsys):
    """A schedule over 4 steps, then over 6: after step 2 the warning names the first, after step 5 the second."""
    keys = {"save_every": 1, "schedule": "linear"}
    run = train(tiny(**keys, steps=4))
    train_until(tiny(**keys, steps=6), 5)
    assert "steps 4 -> 6: from step 5 on" in capsys.readouterr().err
    train(tiny(**keys, steps=8, resume=str(run / "step-000002"), output=str(tmp_path / "branch")))
    assert "steps 4 -> 8: from step 3 on" in capsys.readouterr().err
    train(tiny(**keys, steps=8))
    assert "steps 6 -> 8: from step 6 on" in capsys.readouterr().err


@pytest.fixture
def format_1(tmp_path, monkeypatch):
    """A copy of a run that version 0.1 trained to step 4 at a rate of 1e-3, and to step 6 at 1e-4."""
    shutil.copytree(TESTS / "support" / "format-1", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Path("run")


@pytest.mark.fault(65)
def test_runs_of_format_1_are_read(format_1, capsys):
    """Loaded, continued, judged step by step by the records of run.json; their later steps are of format 2."""
    assert load_checkpoint(format_1).step == 6
    recipe = Run(format_1).recipe
    assert recipe.checkpoint.output == "run"
    branch = {"resume": "run/step-000002", "output": "branch", "steps": 8}
    with pytest.raises(RecipeError, match=r"lr: .*step-000002 was trained with lr = 0\.001, you gave 0\.0001"):
        train(recipe.replace(**branch))
    train(recipe.replace(**branch, lr=1e-3))
    capsys.readouterr()
    train(recipe)
    assert "run is complete" in capsys.readouterr().err
    run = train(recipe.replace(steps=8))
    messages = capsys.readouterr().err
    assert "mygpt 0.1.0 -> " in messages
    assert "the held-out windows of own-stream are not those of mygpt 0.1" in messages
    assert [read_manifest(run / f"step-{step:06d}").format for step in (2, 4, 6, 8)] == [1, 1, 1, 2]
    assert [record.step for record in read_records(run)] == list(range(1, 9))
    # Losses over other windows cannot be compared: the best begins again.
    assert (run / BEST_FILE).read_text() == "step-000008\n"


@pytest.mark.parametrize("change", [{"sampling": "full"}, {"eval_batches": 5}])
def test_the_best_of_other_held_out_windows_is_not_the_best(tiny, monkeypatch, capsys, change):
    """After a change of sampling or eval_batches the losses are of other windows: the first of them is the best."""
    losses = iter([1.0, 1.5, 2.0, 2.5])
    evaluation = POINTS["validation"]
    monkeypatch.setattr(evaluation.owner, evaluation.name, lambda *_, step: evaluation_of(next(losses), step=step))
    keys = {"save_every": 2, "save_best": True, "val_split": 0.2, "val_every": 2, "sampling": "own-stream"}
    run = train_until(tiny(**keys, steps=8), 4)
    assert (run / BEST_FILE).read_text() == "step-000002\n"
    capsys.readouterr()
    train(tiny(**keys | change, steps=8))
    assert "`best` begins again" in capsys.readouterr().err
    assert (run / BEST_FILE).read_text() == "step-000006\n"


def test_another_commit_alone_costs_no_warning(tiny, capsys):
    """The commit is recorded, but changes no bits by itself."""
    run = train_until(tiny(save_every=2), 4)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"git_commit": "0" * 40}))
    train(tiny(save_every=2))
    assert "last bits" not in capsys.readouterr().err
    (resumed,) = Run(run).info.resumed
    assert resumed.changed.keys() == {"git_commit"}


def test_run_info_knows_the_settings_of_each_step(tiny):
    """Of a run that continued with more threads, and later with fewer."""
    info = Run(train_until(tiny(save_every=2), 2)).info
    resumed = [
        {"after_step": 2, "changed": {"threads": [1, 2]}},
        {"after_step": 4, "changed": {"threads": [2, 1], "lr": [1e-3, 1e-4]}},
    ]
    info = RunInfo.model_validate_json(json.dumps(json.loads(info.to_json()) | {"resumed": resumed}))
    assert [info.recorded_at(step)["threads"] for step in (0, 2, 3, 4, 5)] == [1, 1, 2, 2, 1]
    assert "lr" not in info.recorded_at(5)


CHANGES = {
    "rate": ("--lr", 5e-4, "--allow-changes"),
    "text": ("--corpus", "other.txt", "--allow-changes"),
    "steps": (),
    "seed": ("--seed", 7, "--allow-changes"),
}


@pytest.mark.fault(65)
@pytest.mark.parametrize("point", ["made-run.json", "made-recipe", "before-step"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_run_that_is_killed_early_continues(folder, text, monkeypatch, change, point):
    """Killed before the first checkpoint after the change: the same command continues, and the whole run verifies."""
    place = folder("changed")
    (place / "other.txt").write_text(text[10_000:] + text[:10_000], encoding="utf-8", newline="")
    command = ("text.txt", *FLAGS, "--save-every", 2, "--output", "run")
    assert run_forked((*command, "--steps", 4), place) == 0
    changed = (*command, "--steps", 6, *CHANGES[change])
    assert run_forked(changed, place, point) == -signal.SIGKILL
    assert run_forked(changed, place) == 0, (place / "err").read_text()
    monkeypatch.chdir(place)
    result = verify(Path("run"))
    assert result.identical, (result.difference, result.tensors)
    (resumed,) = Run(Path("run")).info.resumed
    assert (resumed.after_step, resumed.recipe.train.steps) == (4, 4)
    assert resumed.recipe.data.corpus == str(place / "text.txt")


def stop_at(step, recipe):
    """Continue after step 4 until SIGTERM in this step."""
    with pytest.MonkeyPatch.context() as patch:
        disturb("before-step", send(signal.SIGTERM), count=step - 4, patch=patch.setattr)
        with pytest.raises(InterruptedRunError):
            train(recipe)


def test_steps_can_be_raised_and_lowered_again(tiny, capsys):
    """Raised, killed, and lowered: complete as before, without records of the later steps, and verified."""
    run = train(tiny(steps=4, save_every=4))
    before = contents(run)
    stop_at(7, tiny(steps=8, save_every=4))
    shutil.rmtree(run / "step-000007")
    assert read_records(run)[-1].step == 7
    train(tiny(steps=4, save_every=4, lr=5e-4), allow_changes=True)
    assert "run is complete" in capsys.readouterr().err
    after = contents(run)
    assert all(after[name] == before[name] for name in before if name != "latest")
    assert verify(run).identical


def test_steps_must_go_beyond_an_interruption(tiny):
    """The step has no evaluation, and its checkpoint is removed when it is superseded, so it cannot be the last."""
    train(tiny(steps=4))
    stop_at(6, tiny(steps=8))
    with pytest.raises(RecipeError, match="steps: got 6, expected more than 6, the step of"):
        train(tiny(steps=6))


def test_run_without_a_step_may_change_its_recipe(folder):
    """Killed before step 1, then started with another rate: nothing was trained at the first rate."""
    place, command = folder("no-step"), ("text.txt", *FLAGS, "--output", "run")
    assert run_forked(command, place, "before-step") == -signal.SIGKILL
    assert run_forked((*command, "--lr", 5e-4), place) == 0


def test_parts_of_a_run_are_repeated_with_their_keys(tiny):
    """An absent key stays absent: its value depends on the number of processes, which may be another."""
    run = train_until(tiny(save_every=2), 2)
    train(tiny(save_every=2, micro_batch_size=2))
    first, second = parts_of(Run(run), 0, 6)
    assert (first.until, first.recipe.train.micro_batch_size) == (2, None)
    assert (second.until, second.recipe.train.micro_batch_size) == (6, 2)


def test_abandoned_continuations_do_not_count(tiny):
    """mygpt 0.1 left them in run.json, in order of time: after step 4, then after step 2."""
    info = Run(train_until(tiny(save_every=2), 2)).info
    given_up = [{"after_step": step, "changed": {"threads": [1, threads]}} for step, threads in ((4, 2), (2, 3))]
    info = RunInfo.model_validate_json(json.dumps(json.loads(info.to_json()) | {"resumed": given_up}))
    assert [resumed.after_step for resumed in info.history] == [2]
    assert info.recorded_at(6)["threads"] == 3
