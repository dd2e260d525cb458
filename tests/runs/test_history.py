"""One run has one recipe. Its end and its environment may change, and each step is repeated with those that it had."""

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from support.commands import needs_onednn
from support.fault_points import disturb, send
from support.forked import run as run_forked
from support.runs import FLAGS, assert_same_run, contents

from mygpt.checks.rerun import segments_of
from mygpt.checks.verify import verify
from mygpt.errors import FormatError, InterruptedRunError, MismatchError, RecipeError
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.records import read_records
from mygpt.runs.run import RunDirectory
from mygpt.runs.steps import read_manifest
from mygpt.training.train import train


@pytest.fixture
def lengthened(tiny):
    """A run that was trained to step 4 with one thread, and on to step 6 with two."""
    keys = {"save_every": 2, "dropout": 0.1}
    train(tiny(**keys, steps=4))
    return train(tiny(**keys, steps=6, threads=2))


@pytest.mark.fault(65)
def test_run_info_knows_the_end_and_the_environment_of_each_step(lengthened, tiny, tmp_path):
    """As full values, stretch by stretch; manifests have no recipe, and a kill changes no byte of run.json."""
    stretches = RunDirectory(lengthened).info.stretches
    found = [(stretch.after_step, stretch.steps, stretch.environment.threads) for stretch in stretches]
    assert found == [(0, 4, 1), (4, 6, 2)]
    assert [RunDirectory(lengthened).info.stretch_of(step).steps for step in (1, 4, 5, 9)] == [4, 4, 6, 6]
    assert read_manifest(lengthened / "step-000006").model_dump().keys() == {
        *("format", "step", "reason", "ended_by", "files")
    }
    other = train(tiny(output=str(tmp_path / "other")), last_step=3)
    before = (other / "run.json").read_bytes()
    train(tiny(output=str(tmp_path / "other")))
    assert (other / "run.json").read_bytes() == before


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("keys", "flags"),
    [
        ({"lr": 3e-4}, "--lr 0.0003"),
        ({"tied_head": False, "wsd_decay": 2, "schedule": "wsd"}, None),
        ({"batch_size": 2, "data_seed": 7}, "--batch-size 2 --data-seed 7"),
        ({"val_split": 0.2, "val_every": 2, "order": "epoch"}, "--val-split 0.2 --order epoch --val-every 2"),
        ({"reduction": "exact"}, "--reduction exact"),
    ],
)
def test_refusal_has_the_command_that_goes_on(tiny, call, keys, flags):
    """Ready to copy: a run of its own, which begins with the checkpoint. Another architecture has none."""
    run = train(tiny(save_every=2), last_step=4)
    before = contents(run)
    with pytest.raises((RecipeError, MismatchError)) as caught:
        train(tiny(save_every=2, **keys))
    message = str(caught.value)
    if flags is None:
        assert "[model] tied_head: " in message
        assert message.endswith("; choose another --output")
        assert "mygpt fork" not in message
        return
    for key in keys:
        assert f"] {key}: {run / 'step-000004'} was trained with {key} = " in message
    command = f"mygpt fork {run} 4 {flags}"
    assert f"one run has one recipe: `{command}` goes on from there in a run of its own; or choose another" in message
    assert contents(run) == before
    code, _, err = call(*shlex.split(command)[1:])
    assert code == 0, err
    (made,) = run.parent.glob("run-at-4-*")
    assert RunDirectory(made).info.origin.after_step == 4
    assert RunDirectory(made).recipe.flat().items() >= keys.items()


@pytest.mark.parametrize(
    ("was", "given"),
    [
        ({}, {"lr": 0.5, "steps": 12}),
        ({}, {"warmup": 8, "steps": 20}),
        ({"micro_batch_size": 4}, {"batch_size": 6, "micro_batch_size": 3}),
    ],
)
def test_printed_fork_has_all_keys_that_it_needs(tiny, call, was, given):
    run = train(tiny(save_every=2, batch_size=4, **was), last_step=4)
    with pytest.raises(RecipeError) as caught:
        train(tiny(save_every=2, **{"batch_size": 4} | was | given))
    command = re.search("`mygpt (fork .*?)`", str(caught.value))[1]
    code, _, err = call(*shlex.split(command))
    assert code == 0, err
    (made,) = run.parent.glob("run-at-4-*")
    assert RunDirectory(made).recipe.flat().items() >= given.items()


def test_only_a_change_adds_a_stretch(tiny):
    """A run that is stopped and continued as it was has the stretches that it had, also after an earlier change."""
    run = train(tiny(steps=4))
    for last_step in (6, 7, 8):
        train(tiny(steps=8), last_step=last_step)
        assert [(s.after_step, s.steps) for s in RunDirectory(run).info.stretches] == [(0, 4), (4, 8)]


def test_characters_that_are_held_out_alone_are_named(tiny, tmp_path, text, capsys):
    (tmp_path / "own.txt").write_text(text + "中文" * 50, encoding="utf-8")
    train(tiny(corpus=str(tmp_path / "own.txt"), val_split=0.1))
    assert "2 characters occur only in the held-out text, and not in the training text: " in capsys.readouterr().err


def test_printed_fork_of_a_finished_run_says_what_is_missing(tiny):
    run = train(tiny())
    with pytest.raises(RecipeError, match=rf"`mygpt fork {run} 6 --lr 0.5` with --steps above 6 goes on from there"):
        train(tiny(lr=0.5))


@pytest.mark.fault(36)
def test_refusal_of_a_text_that_was_edited_has_the_flags_that_go_on(tiny, text, tmp_path):
    """A fork would make the step again with the text as it was."""
    own = tmp_path / "own.txt"
    own.write_text(text, encoding="utf-8", newline="")
    run = train(tiny(corpus=str(own), save_every=2), last_step=4)
    own.write_text(text[10_000:] + text[:10_000], encoding="utf-8", newline="")
    with pytest.raises(MismatchError, match=rf"corpus: {own} is not the text that {run / 'step-000004'} was") as caught:
        train(tiny(corpus=str(own), save_every=2))
    assert f"--resume {run / 'step-000004'} --output NEW, beside your flags, goes on from there" in str(caught.value)
    branch = tiny(corpus=str(own), save_every=2, resume=str(run / "step-000004"), output=str(tmp_path / "branch"))
    assert RunDirectory(train(branch)).is_finished


@pytest.mark.fault(65)
def test_branch_may_have_another_recipe(lengthened, tiny, tmp_path, capsys):
    """What differs from the recipe of its source is said; with the same one it ends as a whole run."""
    branch = {"save_every": 2, "dropout": 0.1, "steps": 6, "resume": str(lengthened / "step-000002")}
    capsys.readouterr()
    other = train(tiny(**branch, lr=1e-4, output=str(tmp_path / "other")))
    assert "from step 3 on: [optimizer] lr = 0.0001, before 0.001" in capsys.readouterr().err
    assert verify(other).identical
    capsys.readouterr()
    same = train(tiny(**branch, output=str(tmp_path / "same")))
    assert "from step 3 on: [" not in capsys.readouterr().err
    assert_same_run(same, train(tiny(steps=6, save_every=2, dropout=0.1, output=str(tmp_path / "whole"))))


@pytest.mark.fault(65)
def test_stretches_of_a_lost_continuation_are_lost(lengthened, tiny):
    """Where later checkpoints are damaged, the run goes on before them, and its history says how."""
    for step in (4, 6):
        os.truncate(lengthened / f"step-{step:06d}" / "model.safetensors", 100)
    train(tiny(steps=8, save_every=2, dropout=0.1, threads=3))
    found = [(stretch.after_step, stretch.environment.threads) for stretch in RunDirectory(lengthened).info.stretches]
    assert found == [(0, 1), (2, 3)]
    assert verify(lengthened).identical


@needs_onednn
@pytest.mark.fault(65)
@pytest.mark.parametrize("steps", [None, 3, 4, 5])
def test_verify_repeats_the_stretches(tiny, steps):
    """Threads, products, steps: each part of the run is run again as it was."""
    keys = {"save_every": 2, "dropout": 0.1, "val_split": 0.2, "val_every": 2, "schedule": "linear"}
    train(tiny(**keys, steps=4, matmul="blas"), last_step=3)
    train(tiny(**keys, steps=5, threads=2, matmul="onednn"))
    run = train(tiny(**keys, steps=8, threads=2, matmul="onednn"))
    found = [(s.after_step, s.steps, s.environment.matmul) for s in RunDirectory(run).info.stretches]
    assert found == [(0, 4, "blas"), (3, 5, "onednn"), (5, 8, "onednn")]
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
    train(tiny(**keys, steps=6), last_step=5)
    assert "steps 4 -> 6: from step 5 on" in capsys.readouterr().err
    train(tiny(**keys, steps=8, resume=str(run / "step-000002"), output=str(tmp_path / "branch")))
    assert "steps 4 -> 8: from step 3 on" in capsys.readouterr().err
    train(tiny(**keys, steps=8))
    assert "steps 6 -> 8: from step 6 on" in capsys.readouterr().err


@pytest.mark.fault(34)
def test_older_formats_are_named(tiny):
    """A run or a checkpoint of a mygpt that was never released: one line with the file, its format and what to do."""
    run = train(tiny())
    problem = "of format {}, and this mygpt reads format 3; use the mygpt that wrote it, or train the run again"
    info, manifest = (json.loads(file.read_text()) for file in (run / "run.json", run / "step-000006/manifest.json"))
    (run / "step-000006" / "manifest.json").write_text(json.dumps(manifest | {"format": 2, "recipe": {}}))
    with pytest.raises(FormatError, match=f"manifest.json: {problem.format(2)}"):
        load_checkpoint(run)
    del info["format"], info["stretches"]
    (run / "run.json").write_text(json.dumps(info))
    with pytest.raises(FormatError, match=f"run.json: {problem.format('1 or 2')}") as caught:
        train(tiny(steps=8))
    assert (caught.value.exit_code, str(caught.value).count("\n")) == (1, 0)


def test_another_commit_alone_costs_no_warning(tiny, capsys):
    """The commit is recorded, but changes no bits by itself."""
    run = train(tiny(save_every=2), last_step=4)
    info = json.loads((run / "run.json").read_text())
    info["stretches"][0]["environment"]["git_commit"] = "0" * 40
    (run / "run.json").write_text(json.dumps(info))
    train(tiny(save_every=2))
    assert "last bits" not in capsys.readouterr().err
    first, second = RunDirectory(run).info.stretches
    assert first.environment.values() == second.environment.values()
    assert first.environment.git_commit == "0" * 40 != second.environment.git_commit


@pytest.mark.fault(65)
@pytest.mark.parametrize("point", ["made-run.json", "made-recipe", "before-step"])
def test_lengthened_run_that_is_killed_early_continues(folder, monkeypatch, point):
    """Killed before the first checkpoint after the change: the same command continues, and the whole run verifies."""
    place = folder("changed")
    command = ("text.txt", *FLAGS, "--save-every", 2, "--output", "run")
    assert run_forked((*command, "--steps", 4), place) == 0
    changed = (*command, "--steps", 6)
    assert run_forked(changed, place, point) == -signal.SIGKILL
    assert run_forked(changed, place) == 0, (place / "err").read_text()
    monkeypatch.chdir(place)
    result = verify(Path("run"))
    assert result.identical, (result.difference, result.tensors)
    assert [(stretch.after_step, stretch.steps) for stretch in RunDirectory(Path("run")).info.stretches] == [
        (0, 4),
        (4, 6),
    ]


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
    train(tiny(steps=4, save_every=4))
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


def test_stretches_are_repeated_with_their_micro_batches(tiny):
    """As they were resolved."""
    run = train(tiny(save_every=2), last_step=2)
    train(tiny(save_every=2, micro_batch_size=2))
    first, second = segments_of(RunDirectory(run), 0, 6)
    assert (first.until, first.recipe.train.micro_batch_size) == (2, 4)
    assert (second.until, second.recipe.train.micro_batch_size) == (6, 2)
