"""Branches: new runs that begin with the checkpoint of another."""

from pathlib import Path

import pytest
from support.forked import ARGUMENTS
from support.forked import run as run_forked
from support.runs import assert_same_run, contents, steps_of

from mygpt.checks.verify import verify
from mygpt.errors import CheckpointError, MismatchError, MygptError, NonFiniteError, RecipeError
from mygpt.runs.run import RunDirectory
from mygpt.training.train import train


@pytest.mark.parametrize("point", ["run", "step"])
def test_branch_continues_as_its_source_would(tiny, tmp_path, point):
    """A branch has its source's records, and ends with the bytes of the whole run; the source does not change."""
    keys = {"save_every": 2, "dropout": 0.1, "val_split": 0.2, "val_every": 2}
    whole = train(tiny(**keys, output=str(tmp_path / "whole")))
    source = train(tiny(**keys, output=str(tmp_path / "source")), last_step=4)
    before = contents(source)
    path = source if point == "run" else source / "step-000004"
    branch = train(tiny(**keys, output=str(tmp_path / "branch"), resume=str(path)))
    assert contents(source) == before
    assert_same_run(branch, whole)
    assert steps_of(branch) == [6]
    begun = RunDirectory(branch).info.origin
    assert (begun.after_step, Path(begun.checkpoint)) == (4, source / "step-000004")


def test_branch_that_is_killed_early_starts_where_it_began(folder):
    """Also when the source has continued since, or when the branch's directory was only half made."""
    place = folder("branch")
    source = (*ARGUMENTS, "--keep-last", 0, "--output", "source")
    assert run_forked(source, place, "before-step", 9) == -9
    branch = (*ARGUMENTS, "--resume", "source/step-000004", "--output")
    assert run_forked((*branch, "undisturbed"), place) == 0
    for point in ("made-run.json", "copying-records", "made-recipe", "before-step"):
        assert run_forked((*branch, "killed"), place, point) == -9
    assert run_forked(source, place) == 0
    assert run_forked((*branch, "killed"), place) == 0
    assert_same_run(place / "killed", place / "undisturbed")
    for name in ("latest", "best"):
        assert (place / "killed" / name).read_bytes() == (place / "undisturbed" / name).read_bytes(), name
    assert (place / "killed" / (place / "killed" / "best").read_text().strip()).is_dir()


def test_branch_that_is_killed_early_stays_the_same_run(folder):
    """With `resume = "auto"`, too; another recipe is refused, though there is no checkpoint."""
    place = folder("branch")
    assert run_forked((*ARGUMENTS, "--output", "source"), place, "before-step", 9) == -9
    branch = (*ARGUMENTS, "--resume", "source/step-000004", "--output", "branch")
    assert run_forked(branch, place, "before-step", 2) == -9
    recorded = (place / "branch" / "recipe.toml").read_bytes()
    assert run_forked((*branch, "--lr", 0.5), place) == 2
    assert run_forked((*ARGUMENTS, "--output", "branch"), place, "before-step", 2) == -9
    assert (place / "branch" / "recipe.toml").read_bytes() == recorded
    assert run_forked(branch, place) == 0
    assert run_forked((*branch[:-1], "undisturbed"), place) == 0
    assert_same_run(place / "branch", place / "undisturbed")


def test_tokens_are_counted_with_the_batches_of_each_step(tiny, tmp_path):
    """Of a branch with other batches: those before it as its origin had them, where no record says so, either."""
    run = train(tiny(log_every=10, save_every=3, keep_last=0), last_step=5)  # records of step 1 alone
    branch = tiny(
        log_every=1,
        save_every=2,
        keep_last=0,
        batch_size=8,
        resume=str(run / "step-000003"),
        output=str(tmp_path / "branch"),
    )
    train(branch, last_step=4)
    before, after = tiny().train, branch.train
    tokens = 3 * before.batch_size * before.seq_len
    per_step = after.batch_size * after.seq_len
    assert RunDirectory(train(branch)).records[-1].tokens == tokens + 3 * per_step
    other = train(
        branch.replace(resume=str(tmp_path / "branch" / "step-000004"), output=str(tmp_path / "other"), seq_len=4)
    )
    assert RunDirectory(other).records[-1].tokens == tokens + per_step + 2 * 8 * 4


def test_impossible_branch_is_refused(tiny, tmp_path):
    """From nothing, from a finished run, from the run that it would replace; nothing is created or removed."""
    run = train(tiny(save_every=2))
    before = contents(run)
    for resume, output, message in (
        ("nowhere", "new", r'resume: got .*nowhere\', expected "auto", "never", or a run or step directory'),
        ("a\0b", "new", "resume: got"),
        (str(run / "run.json"), "new", "resume: got"),
        (str(run), "new", "steps: got 6, expected more than 6"),
        (str(run / "step-000002"), "run", "is in the run that --overwrite would remove"),
    ):
        with pytest.raises((CheckpointError, RecipeError), match=message) as caught:
            train(tiny(save_every=2, resume=resume, output=str(tmp_path / output)), overwrite=output == "run")
        assert caught.value.exit_code == 2
    assert contents(run) == before
    assert not (tmp_path / "new").exists()


def test_lost_or_changed_source_is_named(tiny, tmp_path):
    """A branch that has saved nothing continues only from the checkpoint with which it began."""
    source = train(tiny(save_every=2, output=str(tmp_path / "source")), last_step=4)
    branch = tiny(resume=str(source), output=str(tmp_path / "branch"), lr=1e30)
    with pytest.raises(NonFiniteError):
        train(branch)
    with pytest.raises(NonFiniteError):  # not that the output holds a run
        train(branch)
    manifest = source / "step-000004" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(MismatchError, match=r"the checkpoint after which .*branch began is another now"):
        train(branch)
    manifest.unlink()
    with pytest.raises(MismatchError, match=r"the checkpoint after which .*branch began is gone"):
        train(branch)


def test_branch_with_another_data_seed_sees_other_batches(tiny, tmp_path, capsys):
    """The weights are those of the checkpoint, so that init_seed has no effect, which a message says."""
    run = train(tiny(save_every=2), last_step=4)
    weights = set()
    for seed in (42, 7, 8):
        keys = {"init_seed": seed, "data_seed": seed, "output": str(tmp_path / str(seed)), "resume": str(run)}
        branch = train(tiny(**keys))
        weights.add((branch / "step-000006" / "model.safetensors").read_bytes())
        assert f"init_seed: stays 0: the weights are those of {run}" in capsys.readouterr().err
        assert RunDirectory(branch).recipe.train.init_seed == 0
        assert verify(branch).identical
    assert len(weights) == 3


def test_advice_for_a_branch_helps(tiny, tmp_path):
    """It has its own output already: another output, or --overwrite, would not help."""
    run = train(tiny(save_every=2), last_step=4)
    branch = {"output": str(tmp_path / "branch"), "resume": str(run)}
    for keys in ({"num_layers": 3}, {"steps": 4}):
        with pytest.raises(MygptError) as caught:
            train(tiny(**branch, **keys))
        assert "--output" not in str(caught.value)
        assert "--overwrite" not in str(caught.value)
