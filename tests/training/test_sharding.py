"""Sharded weights (FSDP2): the numbers of one process, the checkpoints of any, the options of the recipe."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from support.commands import BIN, TESTS, run_process
from support.runs import TINY, assert_close_records, flags_of

from mygpt.checks.compare import compare
from mygpt.errors import LaunchError
from mygpt.processes.preflight import check_sharding
from mygpt.recipe.tables import Recipe
from mygpt.runs.records import read_records
from mygpt.runs.run import RunDirectory
from mygpt.training.train import train

SCRIPT = TESTS / "support" / "sharded.py"
TORCHRUN = [BIN / "torchrun", "--nproc-per-node"]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
KEYS = TINY | {
    "batch_size": 12,
    "micro_batch_size": 2,
    "max_grad_norm": 1.0,
    "schedule": "cosine",
    "warmup": 2,
    "val_split": 0.1,
    "val_every": 3,
    "sampling": "full",
    "log_grad_norm": True,
}
FLAGS = flags_of(KEYS)


def run(processes, text_file, folder, *flags, sharded=True, **environment):
    """Train on so many processes, 1 without a launcher, and return the finished process."""
    command = [*TORCHRUN, processes] if processes > 1 else [sys.executable]
    environment |= FSDP if sharded else {}
    result = run_process([*command, SCRIPT, text_file, *FLAGS, *flags], folder, environment=environment)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
def test_sharded_weights_give_the_numbers_of_one_process(text_file, tmp_path):
    """In float64, where a wrong average cannot hide in rounding: losses, held-out losses, norms, weights and moments.

    With accumulation, clipping and activation checkpointing.
    """
    run(1, text_file, tmp_path, "--output", "alone", sharded=False, FLOAT64="1")
    flags = ["--output", "sharded", "--activation-checkpointing"]
    # Three, among which the weights cannot be shared evenly.
    many = run(3, text_file, tmp_path, *flags, FLOAT64="1")
    assert "sharded over" in many.stderr
    assert RunDirectory(tmp_path / "sharded").info.stretches[0].environment.sharded
    names = ("loss", "grad_norm", "val", "val_stderr")
    assert_close_records(tmp_path / "sharded", tmp_path / "alone", *names, rel=1e-10, abs=0)
    assert max(record.grad_norm for record in read_records(tmp_path / "alone")) > 1.0
    for file in ("model.safetensors", "state.safetensors"):
        alone, sharded = (load_file(tmp_path / name / "step-000006" / file) for name in ("alone", "sharded"))
        assert alone.keys() - {"generator.cpu.0"} == {name for name in sharded if not name.startswith("generator.cpu")}
        for name in alone.keys() - {"generator.cpu.0"}:
            torch.testing.assert_close(sharded[name], alone[name], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_checkpoints_move_between_ways_to_train(text_file, tmp_path):
    """Saved by sharded processes, continued by them to the same bytes, and by one process to the same losses."""
    flags = ["--precision", "bf16", "--save-every", 3, "--keep-last", 0]
    run(2, text_file, tmp_path, *flags, "--output", "whole")
    begun = tmp_path / "whole" / "step-000003"
    again = run(2, text_file, tmp_path, *flags, "--output", "again", "--resume", begun)
    assert "last bits may differ" not in again.stderr
    for file in ("model.safetensors", "state.safetensors"):
        parts = (tmp_path / name / "step-000006" / file for name in ("whole", "again"))
        assert len({path.read_bytes() for path in parts}) == 1
    alone = run(1, text_file, tmp_path, *flags, "--output", "alone", "--resume", begun, sharded=False)
    assert "the last bits may differ" in alone.stderr
    assert "processes 2 -> 1, sharded True -> False" in alone.stderr
    whole = {record.step: record for record in read_records(tmp_path / "whole")}
    for record in read_records(tmp_path / "alone"):
        assert record.loss == pytest.approx(whole[record.step].loss, abs=5e-4)
        assert record.val == (whole[record.step].val and pytest.approx(whole[record.step].val, abs=5e-4))
    back = run(3, text_file, tmp_path, *flags, "--output", "back", "--resume", tmp_path / "alone", "--steps", 9)
    assert "processes 1 -> 3, sharded False -> True" in back.stderr


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["Adagrad", "ByRow"])
def test_sharded_state_of_any_optimizer_is_saved_and_continued(text_file, tmp_path, optimizer):
    """Whether its tensors are there before step 1, or have other shapes than the weights: the same bytes at step 6."""
    flags = ["--save-every", 3, "--keep-last", 0]
    run(2, text_file, tmp_path, *flags, "--output", "whole", OPTIMIZER=optimizer)
    begun = tmp_path / "whole" / "step-000003"
    run(2, text_file, tmp_path, *flags, "--output", "again", "--resume", begun, OPTIMIZER=optimizer)
    for file in ("model.safetensors", "state.safetensors"):
        parts = (tmp_path / name / "step-000006" / file for name in ("whole", "again"))
        assert len({path.read_bytes() for path in parts}) == 1
    run(1, text_file, tmp_path, *flags, "--output", "alone", sharded=False, OPTIMIZER=optimizer)
    shapes = [
        {name: tensor.shape for name, tensor in load_file(tmp_path / name / "step-000006" / file).items()}
        for name in ("whole", "alone")
    ]
    assert shapes[0].keys() - {"generator.cpu.1"} == shapes[1].keys()
    assert all(shapes[0][name] == shape for name, shape in shapes[1].items())


def test_activation_checkpointing_changes_no_bit(tiny, tmp_path):
    """Also with dropout, which has to drop the same activations when they are computed again."""
    keys = {"dropout": 0.2, "max_grad_norm": 1.0, "val_split": 0.1, "val_every": 3, "micro_batch_size": 2}
    kept, computed = (
        train(tiny(**keys, activation_checkpointing=on, output=str(tmp_path / str(on)))) for on in (False, True)
    )
    assert compare(kept, computed).identical


@pytest.mark.parametrize(
    ("runtime", "device", "problem"),
    [
        ({}, "cpu", "asks for FSDP on cpu"),
        ({"reduction": "exact"}, "cuda", "reduction: got 'exact'"),
        ({"compile": True}, "cuda", "compile"),
    ],
)
def test_impossible_sharding_is_refused(monkeypatch, runtime, device, problem):
    """On CPUs Accelerate would silently not shard; exact sums need whole gradients; compiling is not supported yet."""
    recipe = Recipe.of(**runtime)
    check_sharding(recipe, torch.device(device))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LaunchError, match=problem):
        check_sharding(recipe, torch.device(device))
