"""`mygpt doctor`: what a launch would train on."""

import re

import pytest
import torch
from support.commands import BIN, LAUNCH, run_process
from support.runs import FLAGS

from mygpt.checks import speed
from mygpt.data.dataset import load_dataset
from mygpt.errors import LaunchError
from mygpt.processes import machine
from mygpt.recipe.tables import Recipe

every = speed.alternatives


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


def test_doctor_says_what_would_be_faster(text_file, monkeypatch):
    """Of a recipe that takes its windows one by one: its speed, and what else would change."""
    # Compiling takes ten seconds each time.
    monkeypatch.setattr(speed, "alternatives", lambda *_: (a for a in every(*_) if "compile" not in a.keys))
    recipe = Recipe.of(corpus=str(text_file), micro_batch_size=1, batch_size=32, seq_len=16, embed_dim=16, num_layers=1)
    dataset = load_dataset(recipe.data, 16)
    monkeypatch.setattr("psutil.cpu_percent", lambda *_, **__: [1.0])
    (_, first), *faster = speed.measure_speed(recipe, torch.device("cpu"), dataset, seconds=0.1)
    assert re.fullmatch(r"[\d.]+ ms a step, [\d,]+ tokens/s", first)
    expected = r"micro_batch_size left out: [\d.]+ times as fast; the last bits differ; needs more memory"
    assert any(topic == "faster" and re.fullmatch(expected, text) for topic, text in faster), faster

    def time_step(recipe, *_):
        if recipe.runtime.precision == "bf16":
            raise LaunchError("no compiler\nmore")
        return speed.Timed(1.0, 1.0)

    monkeypatch.setattr(speed, "time_step", time_step)
    _, *rest = speed.measure_speed(recipe, torch.device("cpu"), dataset)
    assert rest == [("not possible", 'precision = "bf16": no compiler'), *rest[1:]]
    assert all(topic == "faster" and text.startswith("batch_size = 128: 4 times as fast; ") for topic, text in rest[1:])


def test_doctor_says_when_the_machine_is_busy(text_file, monkeypatch):
    """Other programs that use a core and a half of this process's four are named before the times that they spoil."""
    monkeypatch.setattr(speed, "alternatives", lambda *_: ())
    monkeypatch.setattr(speed, "time_step", lambda *_: speed.Timed(1.0, 1.0))
    monkeypatch.setattr(speed, "available_cores", lambda: [2, 3, 4, 5])
    monkeypatch.setattr("psutil.cpu_percent", lambda _, percpu: [99.0, 99.0, 100.0, 50.0, 0.0, 0.0, 99.0])
    recipe = Recipe.of(corpus=str(text_file), seq_len=16)
    (topic, text), *_ = speed.measure_speed(recipe, torch.device("cpu"), load_dataset(recipe.data, 16))
    assert (topic, text) == ("busy", "other programs use 1.5 of 4 cores: end them, or the times are too long")


def test_a_gpu_is_known_by_its_whole_name(monkeypatch):
    """An L40 is no L4; fp32 and bf16 have their own rates; of an unknown GPU, and of a processor, none is known."""
    found = {}
    for name in ("NVIDIA L4", "NVIDIA L40", "NVIDIA L400", "Tesla T4"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        found[name] = [machine.peak_flops(torch.device("cuda"), precision) for precision in ("fp32", "bf16")]
    expected = {"NVIDIA L4": [30.3e12, 121e12], "NVIDIA L40": [90.5e12, 181e12]}
    assert found == expected | {"NVIDIA L400": [None, None], "Tesla T4": [8.1e12, None]}
    assert machine.peak_flops(torch.device("cpu"), "fp32") is None


def test_doctor_proposes_what_the_recipe_does_not_have():
    """Each with what it costs; threads only on CPUs, and other kernels only on cuda."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    slow = {"reduction": "exact", "activation_checkpointing": True}
    named = {key for alternative in speed.alternatives(Recipe.of(**slow), cpu) for key in alternative.keys}
    assert named == {"precision", "compile", "activation_checkpointing", "reduction", "matmul", "threads", "batch_size"}
    fast = Recipe.of(precision="bf16", compile=True, deterministic=False)
    assert {key for alternative in speed.alternatives(fast, cuda) for key in alternative.keys} == {"batch_size"}
    assert "deterministic" in {key for alternative in speed.alternatives(Recipe(), cuda) for key in alternative.keys}


def test_doctor_times_a_single_process(text_file, command):
    """Under a launcher a step is not the recipe's alone."""
    several = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    refused = command("doctor", text_file, *FLAGS, "--speed", **several)
    assert refused.returncode == 2
    assert "--speed times a single process; start it without a launcher" in refused.stderr


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
