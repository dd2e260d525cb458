"""`mygpt doctor`: what a launch would train on."""

import re

import pytest
from support.commands import BIN, LAUNCH, run_process
from support.runs import FLAGS


@pytest.mark.slow
def test_doctor_describes_a_launch(text_file, tmp_path):
    """Machine, device, threads and share of each process, unused settings of the launch file, and idle processes."""
    launcher = [BIN / "accelerate", "launch", "--config_file", LAUNCH / "cpu2.yaml", "--num_processes", 3]
    launcher += ["--mixed_precision", "bf16", "-m", "mygpt", "doctor", text_file]
    flags = [*FLAGS, "--reduction", "exact", "--micro-batch-size", 2]
    result = run_process([*launcher, *flags], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "launch:       3 processes on 1 machine, gradients summed exactly" in result.stdout
    assert re.search(r"^network: +gloo; adding one number takes [\d.]+ ms$", result.stdout, re.MULTILINE)
    assert "batch:        4 windows of 16 tokens a step, 2 to a micro-batch" in result.stdout
    ranks = re.findall(r"^rank (\d) .*: cpu \(.*\), 1 thread, (\d) micro-batch", result.stdout, re.MULTILINE)
    assert ranks == [("0", "0"), ("1", "1"), ("2", "1")]
    assert "note:         mixed_precision: bf16 of the launch configuration is not used" in result.stdout
    assert "note:         2 of 3 processes have a micro-batch in each step" in result.stdout
    assert not list(tmp_path.iterdir())


def test_doctor_refuses_what_train_refuses(text_file, command):
    """FSDP on CPUs, where Accelerate would silently not shard; a mistake in the recipe."""
    found = command("doctor", text_file, *FLAGS)
    assert found.returncode == 0
    assert "launch:       1 process on 1 machine, alone\n" in found.stdout
    refused = command("doctor", text_file, *FLAGS, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert (
        "asks for FSDP on cpu, where Accelerate would silently not shard; use recipes/launch/cpu2.yaml"
        in refused.stderr
    )
    assert command("doctor", text_file, "--warmup", 1000, "--steps", 1).returncode == 2
