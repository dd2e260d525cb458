"""Launchers: accelerate launch and torchrun, one process and several, and the traps among their settings."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, TINY, run_process

from mygpt.compare import compare
from mygpt.errors import LaunchError
from mygpt.metrics import read_records
from mygpt.runtime import check_processes, launched_processes, set_threads

BIN = Path(sys.executable).parent
SCRIPT = REPOSITORY / "scripts" / "train.py"
LAUNCH = REPOSITORY / "recipes" / "launch"
TINY_FLAGS = [part for key, value in TINY.items() for part in (f"--{key.replace('_', '-')}", value)]


def launch(*launcher, target, cwd, flags=(), environment=None):
    return run_process([BIN / launcher[0], *launcher[1:], SCRIPT, target, *flags], cwd, 600, environment)


@pytest.mark.slow
def test_one_process_gives_the_same_file_by_any_launcher(text_file, tmp_path):
    """python, accelerate launch and torchrun: byte for byte, though launchers set OMP_NUM_THREADS to 1."""
    keys = [*TINY_FLAGS, "--threads", 2, "--val-split", 0.1, "--val-every", 3, "--dropout", 0.1]
    launchers = {
        "python": ["python"],
        "accelerate": ["accelerate", "launch", "--config_file", LAUNCH / "cpu1.yaml"],
        "torchrun": ["torchrun", "--nproc-per-node", 1],
    }
    files = []
    for name, launcher in launchers.items():
        result = launch(*launcher, target=text_file, cwd=tmp_path, flags=[*keys, "--output", name])
        assert result.returncode == 0, result.stderr
        files.append((tmp_path / name / "step-000006" / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_trains_on_the_same_batches(text_file, tmp_path, processes):
    """Losses, held-out losses and rates are those of one process; only the last bits of sums differ."""
    flags = [*TINY_FLAGS, "--batch-size", 24, "--val-split", 0.1, "--val-every", 2, "--schedule", "cosine"]
    flags += ["--warmup", 2, "--max-grad-norm", 1.0, "--micro-batch-size", 2]
    flags += ["--sampling", "full" if processes == 3 else "shared-stream"]
    alone = launch("python", target=text_file, cwd=tmp_path, flags=[*flags, "--output", "alone"])
    assert alone.returncode == 0, alone.stderr
    launcher = ["torchrun", "--nproc-per-node", processes]
    if processes == 2:
        launcher = ["accelerate", "launch", "--config_file", LAUNCH / "cpu2.yaml"]
    together = launch(*launcher, target=text_file, cwd=tmp_path, flags=[*flags, "--output", "together"])
    assert together.returncode == 0, together.stderr
    assert f"processes:    {processes}\n" in together.stdout
    without_processes = [line for line in together.stdout.splitlines() if not line.startswith("processes")]
    assert without_processes == alone.stdout.splitlines()
    for one, many in zip(*(read_records(tmp_path / name) for name in ("alone", "together")), strict=True):
        assert (many.step, many.lr, many.tokens) == (one.step, one.lr, one.tokens)
        assert many.loss == pytest.approx(one.loss, abs=5e-5)
        assert many.val == (one.val and pytest.approx(one.val, abs=5e-5))
        assert many.val_stderr == (one.val_stderr and pytest.approx(one.val_stderr, abs=5e-5))
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert max(d.max_abs for d in compare(tmp_path / "alone", tmp_path / "together").differences) < 1e-3
    assert json.loads((tmp_path / "together" / "run.json").read_text())["processes"] == processes


@pytest.mark.slow
def test_mistakes_under_a_launcher_are_told_once(text_file, tmp_path):
    """Each process finds the mistake; one prints it, nothing is created, and the launcher fails."""
    result = launch("torchrun", "--nproc-per-node", 3, target=text_file, cwd=tmp_path, flags=TINY_FLAGS)
    assert result.returncode != 0
    assert result.stderr.count("batch_size: got 4, expected a multiple of the 3 processes") == 1
    assert not list(tmp_path.glob("checkpoints"))


@pytest.mark.slow
def test_a_launcher_that_starts_fewer_processes_is_refused(text_file, tmp_path):
    """`--cpu --num_processes 2` silently starts one process; training must not go on as if it were two."""
    launcher = ["accelerate", "launch", "--cpu", "--num_processes", 2]
    result = launch(*launcher, target=text_file, cwd=tmp_path, flags=TINY_FLAGS)
    assert result.returncode != 0
    assert "asked for several processes but started one" in result.stderr
    assert not list(tmp_path.glob("checkpoints"))


def test_launch_files_name_known_keys_only():
    """Accelerate refuses unknown ones; there is a file for each way to launch."""
    from accelerate.commands.config.config_args import ClusterConfig

    paths = sorted(LAUNCH.glob("*.yaml"))
    assert {"cpu1", "cpu2", "ddp"} <= {path.stem for path in paths}
    for path in paths:
        config = ClusterConfig.from_yaml_file(str(path))
        assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
        assert config.mixed_precision == "no"


def test_launched_processes_are_counted_from_the_environment():
    """torchrun's WORLD_SIZE; one without a launcher; an error for what would train something else."""
    assert launched_processes({}) == 1
    assert launched_processes({"WORLD_SIZE": "8", "MASTER_PORT": "1"}) == 8
    assert launched_processes({"ACCELERATE_MIXED_PRECISION": "no"}) == 1
    with pytest.raises(LaunchError, match=r"cpu2\.yaml"):
        launched_processes({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"})
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        with pytest.raises(LaunchError, match=name):
            launched_processes({f"ACCELERATE_USE_{name}": "true", "WORLD_SIZE": "2"})


def test_processes_that_do_not_meet_are_refused():
    """Two independent runs of one process each would train two models."""
    check_processes(2, 2)
    with pytest.raises(LaunchError, match="started 2 processes but 1 joined"):
        check_processes(2, 1)


def test_threads_are_set_in_process(monkeypatch):
    """The recipe's number, else the cores shared among the processes of this machine."""
    import torch

    before = torch.get_num_threads()
    try:
        assert set_threads(1, 1) == torch.get_num_threads() == 1
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
        assert set_threads(None, 4) == 1
        assert set_threads(None, 3) == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
