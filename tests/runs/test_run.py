"""What a run directory says of itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mygpt.errors import CheckpointError, DamagedCheckpointError
from mygpt.runs.run import RunDirectory
from mygpt.training.train import train


def test_a_run_knows_what_it_holds(tiny):
    """Recipe, records, checkpoints, the best of them, and whether it has ended: not before its last step."""
    recipe = tiny(save_every=2, save_best=True, val_split=0.2, val_every=2, lr=1e-2)
    run = RunDirectory(train(recipe, last_step=5))
    assert run.recipe == recipe
    assert [record.step for record in run.records] == [1, 2, 3, 4, 5]
    assert list(run.checkpoints) == [2, 4, 5]
    losses = {record.step: record.val for record in run.records if record.val is not None}
    assert run.best == run.checkpoints[min(losses, key=losses.get)]
    assert run.newest_checkpoint() == run.checkpoints[5]
    assert not run.is_finished
    train(recipe)
    assert run.is_finished
    assert run.origin is None


def test_checkpoints_have_names(tiny, call, tmp_path, monkeypatch):
    """RUN/best and RUN/latest are checkpoints wherever one is expected, and `best` and `latest` are steps."""
    monkeypatch.chdir(tmp_path)
    run = train(tiny(save_every=2, save_best=True, val_split=0.2, val_every=2, lr=1.0))
    best = RunDirectory(run).best
    assert best is not None
    assert best.name != "step-000006"
    same = call("compare", run / "best", best)
    assert same[0] == 0
    assert call("compare", run / "latest", run) == (0, call("compare", run, run)[1].splitlines()[0] + "\n", "")
    for name in ("best", "latest"):
        assert call("generate", "--checkpoint", run / name, "--max-new-tokens", 3)[0] == 0
        assert call("at", run, name, "--out", f"at-{name}")[0] == 0
        assert call("train", run / "recipe.toml", "--output", name, "--resume", run / name, "--steps", 7)[0] == 0
    steps = [max(RunDirectory(Path(f"at-{name}")).checkpoints) for name in ("best", "latest")]
    assert steps == [int(best.name[-6:]), 6]
    begun = [RunDirectory(Path(name)).info.origin for name in ("best", "latest")]
    assert [origin and origin.after_step for origin in begun] == steps
    assert call("fork", run, "latest", "--steps", 7)[0] == 0
    assert "not a run, but in one; expected the run" in call("verify", run / "best")[2]
    for name in ("best", best.name, f"{best.name}/model.safetensors"):
        code, _, err = call("train", run / name)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{run}/{name}: a checkpoint, not a recipe; `mygpt train {run}/recipe.toml` continues the run" in err
    assert f"a run, not a recipe; `mygpt train {run}/recipe.toml` continues it" in call("train", run)[2]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(run)
    message = "runs: a folder of runs, not a recipe; `mygpt train runs/one/recipe.toml` continues one of them"
    assert call("train", "runs") == (2, "", f"mygpt: {message}\n")
    (run / "best").unlink()
    code, _, err = call("generate", "--checkpoint", run / "best")
    assert (code, err) == (
        2,
        f"mygpt: {run}/best: {run} keeps no best checkpoint: it has save_best = false, or no held-out loss yet\n",
    )


def test_a_run_whose_last_checkpoint_is_damaged_has_not_ended(tiny):
    """It falls back, and would train on; where no checkpoint is whole, or there is no run, that is an error."""
    run = RunDirectory(train(tiny(save_every=2)))
    os.truncate(run.checkpoints[6] / "state.safetensors", 10)
    assert not run.is_finished
    for step in (2, 4):
        os.truncate(run.checkpoints[step] / "state.safetensors", 10)
    with pytest.raises(DamagedCheckpointError, match="none of its 3 checkpoints is whole"):
        _ = run.is_finished
    with pytest.raises(CheckpointError, match="no such run"):
        _ = RunDirectory(run.path / "nothing").recipe


def test_a_step_directory_has_one_name(tiny):
    """A name with more zeros than needed is none: it cannot stand in for the checkpoint of that step."""
    run = RunDirectory(train(tiny()))
    (run.path / "step-0000006").mkdir()
    assert list(run.checkpoints.values()) == [run.path / "step-000006"]
    assert run.is_finished


def test_a_run_is_read_without_torch(tmp_path):
    """Comparing, plotting and listing runs answer at once."""
    modules = ("run", "files", "lock", "schemas", "start", "changes", "records", "steps")
    names = ", ".join(f"mygpt.runs.{module}" for module in modules)
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
