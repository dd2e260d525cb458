"""What a run directory says of itself."""

import os
import subprocess
import sys

import pytest

from mygpt.errors import CheckpointError, DamagedCheckpointError
from mygpt.runs.run import Run
from mygpt.training.train import train, train_until


def test_a_run_knows_what_it_holds(tiny):
    """Recipe, records, checkpoints, the best of them, and whether it has ended: not before its last step."""
    recipe = tiny(save_every=2, save_best=True, val_split=0.2, val_every=2, lr=1e-2)
    run = Run(train_until(recipe, 5))
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


def test_a_run_whose_last_checkpoint_is_damaged_has_not_ended(tiny):
    """It falls back, and would train on; where no checkpoint is whole, or there is no run, that is an error."""
    run = Run(train(tiny(save_every=2)))
    os.truncate(run.checkpoints[6] / "state.safetensors", 10)
    assert not run.is_finished
    for step in (2, 4):
        os.truncate(run.checkpoints[step] / "state.safetensors", 10)
    with pytest.raises(DamagedCheckpointError, match="none of its 3 checkpoints is whole"):
        _ = run.is_finished
    with pytest.raises(CheckpointError, match="no such run"):
        _ = Run(run.path / "nothing").recipe


def test_a_step_directory_has_one_name(tiny):
    """A name with more zeros than needed is none: it cannot stand in for the checkpoint of that step."""
    run = Run(train(tiny()))
    (run.path / "step-0000006").mkdir()
    assert list(run.checkpoints.values()) == [run.path / "step-000006"]
    assert run.is_finished


def test_a_run_is_read_without_torch(tmp_path):
    """Comparing, plotting and listing runs answer at once."""
    modules = ("run", "files", "lock", "schemas", "start", "changes", "records", "steps")
    names = ", ".join(f"mygpt.runs.{module}" for module in modules)
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
