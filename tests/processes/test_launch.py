"""Launchers: accelerate launch and torchrun, one process and several, and the traps among their settings."""

import json
import re
import sys
from pathlib import Path

import pytest
import reference
import yaml
from support.commands import REPOSITORY, run_process
from support.runs import TINY

from mygpt.checks.compare import compare
from mygpt.errors import LaunchError
from mygpt.processes.environment import Launched, check_joined, launched_processes
from mygpt.processes.machine import set_threads
from mygpt.recipe.tables import Recipe
from mygpt.runs.records import read_records
from mygpt.training.train import train

BIN = Path(sys.executable).parent
SCRIPT = REPOSITORY / "scripts" / "train.py"
LAUNCH = REPOSITORY / "recipes" / "launch"
TINY_FLAGS = [part for key, value in TINY.items() for part in (f"--{key.replace('_', '-')}", value)]


def launch(*launcher, target, cwd, flags=(), environment=None):
    return run_process([BIN / launcher[0], *launcher[1:], SCRIPT, target, *flags], cwd, 600, environment)


@pytest.mark.slow
def test_one_process_gives_the_same_file_by_any_launcher(text_file, tmp_path):
    """python, accelerate launch and torchrun: byte for byte, though they and Accelerate set threads of their own."""
    keys = ["--steps", 6, "--device", "cpu", "--val-split", 0.1, "--val-every", 3, "--dropout", 0.1]
    launchers = {
        "python": ["python"],
        "accelerate": ["accelerate", "launch", "--config_file", LAUNCH / "cpu1.yaml"],
        "torchrun": ["torchrun", "--nproc-per-node", 1],
    }
    files = {}
    for threads, names in ((1, ["python", "accelerate", "torchrun"]), (2, ["accelerate"])):
        for name in names:
            flags = [*keys, "--threads", threads, "--output", f"{name}{threads}"]
            result = launch(*launchers[name], target=text_file, cwd=tmp_path, flags=flags)
            assert result.returncode == 0, result.stderr
            files[name, threads] = (tmp_path / f"{name}{threads}/step-000006/model.safetensors").read_bytes()
    assert files["python", 1] == files["accelerate", 1] == files["torchrun", 1]
    # The bits do depend on the number, so that these were all 1.
    assert files["accelerate", 2] != files["accelerate", 1]


@pytest.mark.slow
def test_any_number_of_processes_trains_on_the_same_batches(text_file, tmp_path):
    """Losses, held-out losses and rates are those of one process; only the last bits of sums differ."""
    flags = [*TINY_FLAGS, "--batch-size", 24, "--val-split", 0.1, "--val-every", 2, "--schedule", "cosine"]
    flags += ["--warmup", 2, "--max-grad-norm", 1.0, "--micro-batch-size", 2]
    flags += ["--sampling", "full"]
    alone = launch("python", target=text_file, cwd=tmp_path, flags=[*flags, "--output", "alone"])
    assert alone.returncode == 0, alone.stderr
    launcher = ["accelerate", "launch", "--config_file", LAUNCH / "ddp.yaml", "--num_processes", 3]
    together = launch(*launcher, target=text_file, cwd=tmp_path, flags=[*flags, "--output", "together"])
    assert together.returncode == 0, together.stderr
    assert "3 processes share each batch\n" in together.stderr
    assert together.stdout == alone.stdout
    for one, many in zip(*(read_records(tmp_path / name) for name in ("alone", "together")), strict=True):
        assert (many.step, many.lr, many.tokens) == (one.step, one.lr, one.tokens)
        assert many.loss == pytest.approx(one.loss, abs=5e-5)
        assert many.val == (one.val and pytest.approx(one.val, abs=5e-5))
        assert many.val_stderr == (one.val_stderr and pytest.approx(one.val_stderr, abs=5e-5))
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert max(d.max_abs for d in compare(tmp_path / "alone", tmp_path / "together").weights.differences) < 1e-3
    assert json.loads((tmp_path / "together" / "run.json").read_text())["processes"] == 3


EXACT = TINY | {
    "reduction": "exact",
    "steps": 12,
    "dropout": 0.1,
    "max_grad_norm": 1.0,
    "schedule": "cosine",
    "warmup": 4,
    "val_split": 0.1,
    "val_every": 5,
    "log_grad_norm": True,
}


def files_of(run) -> dict[str, bytes]:
    """What may not depend on the number of processes: all but how long it took, and what run.json says of them."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in ("timing.jsonl", "run.json"))
    return {str(path.relative_to(run)): path.read_bytes().replace(str(run).encode(), b"RUN") for path in files}


def launch_exact(processes, folder, recipe, until=None) -> str:
    """Train `recipe` on so many processes, up to step `until`, and return what was printed."""
    (folder / "recipe.toml").write_text(recipe.to_toml())
    script = folder / "script.py"
    script.write_text(f"""
from mygpt.recipe.files import load_recipe
from mygpt.training.train import train_until
train_until(load_recipe("recipe.toml"), {until})
""")
    result = run_process([BIN / "torchrun", "--nproc-per-node", processes, script], folder)
    assert result.returncode == 0, result.stderr
    assert "last bits may differ" not in result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "sampling"), [(2, "shared-stream"), (3, "own-stream"), (4, "full")])
def test_exact_sums_are_the_same_bits_on_any_number_of_processes(text_file, tmp_path, capfd, processes, sampling):
    """Weights, moments, records and printed lines, with dropout, clipping, a schedule and held-out losses.

    Four micro-batches cannot be dealt evenly to three processes, and need not.
    """
    recipes = {
        name: Recipe.of(**EXACT, sampling=sampling, corpus=str(text_file), output=str(tmp_path / name))
        for name in ("alone", "together")
    }
    alone = train(recipes["alone"])
    printed = capfd.readouterr().out
    assert launch_exact(processes, tmp_path, recipes["together"]) == printed
    assert files_of(tmp_path / "together") == files_of(alone)
    assert {"metrics.jsonl", "step-000012/model.safetensors"} <= files_of(alone).keys()
    # The negative control: "fast" sums are other bits, by accumulation alone.
    fast = Recipe.of(**EXACT | {"reduction": "fast", "dropout": 0.0}, corpus=str(text_file), output=str(tmp_path / "f"))
    exact = Recipe.of(**EXACT | {"dropout": 0.0}, corpus=str(text_file), output=str(tmp_path / "e"))
    assert compare(train(fast), train(exact)).weights.differences


@pytest.mark.slow
def test_exact_runs_move_between_numbers_of_processes(text_file, tmp_path, capfd):
    """Stopped on three processes in warmup, on two later, and ended by one: the bytes of a run never stopped."""
    keys = EXACT | {"corpus": str(text_file), "save_best": True, "keep_last": 1}
    whole = train(Recipe.of(**keys, output=str(tmp_path / "whole")))
    printed = capfd.readouterr().out
    moved = Recipe.of(**keys, output=str(tmp_path / "moved"))
    launch_exact(3, tmp_path, moved, until=3)
    launch_exact(2, tmp_path, moved, until=8)
    capfd.readouterr()
    train(moved)
    assert capfd.readouterr().out == printed
    assert files_of(tmp_path / "moved") == files_of(whole)
    changes = [entry["changed"] for entry in json.loads((tmp_path / "moved" / "run.json").read_text())["resumed"]]
    assert changes == [{"processes": [3, 2]}, {"processes": [2, 1]}]
    # And it verifies on yet another number.
    again = run_process([BIN / "torchrun", "--nproc-per-node", 4, "-m", "mygpt", "verify", "moved"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("identical: ")


@pytest.mark.slow
def test_processes_that_come_late_find_no_run_in_their_way(text_file, tmp_path):
    """One process looks at the output and makes the run; another, seconds behind, does not take it for an old one."""
    late = tmp_path / "late.py"
    late.write_text("""
import os, sys, time
from mygpt.training import evaluate, loop, parts, train as phases
check = phases.check_joined
phases.check_joined = lambda *counts: (check(*counts), time.sleep(5 * int(os.environ["RANK"])))
from mygpt.cli.main import main
main(["train", *sys.argv[1:]])
""")
    command = [BIN / "torchrun", "--nproc-per-node", 2, late, text_file, *TINY_FLAGS, "--output", "run"]
    result = run_process(command, tmp_path, environment={"TORCH_GLOO_LAZY_INIT": "1"})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "latest").is_file()


@pytest.mark.slow
def test_each_process_drops_other_activations(text_file, tmp_path):
    """Dropout masks belong to the rows of a process: two processes with the same masks would train on half as many."""
    script = tmp_path / "masks.py"
    script.write_text("""
import os, pathlib, sys
import torch
from mygpt.training import evaluate, loop, parts, train as phases
step = loop.train_step
def drawing_step(*args, **kwargs):
    mask = torch.nn.functional.dropout(torch.ones(32)).tolist()
    with pathlib.Path(os.environ["RANK"]).open("a") as file:
        print(mask, file=file)
    return step(*args, **kwargs)
loop.train_step = drawing_step
from mygpt.cli.main import main
main(["train", *sys.argv[1:]])
""")
    flags = [*TINY_FLAGS, "--dropout", 0.5]
    result = run_process([BIN / "torchrun", "--nproc-per-node", 2, script, text_file, *flags], tmp_path)
    assert result.returncode == 0, result.stderr
    masks = [(tmp_path / rank).read_text().splitlines() for rank in "01"]
    assert len(set(masks[0]) | set(masks[1])) == 2 * TINY["steps"]


@pytest.mark.slow
def test_the_module_can_be_launched(text_file, tmp_path):
    """`accelerate launch -m mygpt train`, where there is no checkout with scripts."""
    result = run_process([BIN / "accelerate", "launch", "-m", "mygpt", "train", text_file, *TINY_FLAGS], tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "launcher"),
    [("default", "python"), ("hardened", "python"), ("hardened", "accelerate"), ("hardened", "two-processes")],
)
def test_shipped_recipes_give_the_reference_numbers(text, text_file, tmp_path, recipe, launcher):
    """On any text, so also without Tiny Shakespeare: thirty steps of the published recipes, by each way to start."""
    command = {
        "python": ["python"],
        "accelerate": ["accelerate", "launch"],
        "two-processes": ["accelerate", "launch", "--config_file", LAUNCH / "cpu2.yaml"],
    }[launcher]
    settings = {"steps": 30, "val_every": 10, "warmup": 5} if recipe == "hardened" else {"steps": 30}
    flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)]
    flags += ["--corpus", text_file, "--device", "cpu", "--log-every", 1, "--output", "run"]
    result = launch(*command, target=REPOSITORY / "recipes" / f"{recipe}.toml", cwd=tmp_path, flags=flags)
    assert result.returncode == 0, result.stderr
    if recipe == "hardened":
        settings |= {"val_split": 0.1, "schedule": "cosine", "max_grad_norm": 1.0}
    expected = reference.run(text, reference.Settings(**settings))
    for record, (_, loss, held_out, rate, _) in zip(read_records(tmp_path / "run"), expected, strict=True):
        assert record.loss == pytest.approx(loss, abs=5e-5)
        assert record.val == (held_out and pytest.approx(held_out, abs=5e-5))
        assert record.lr == rate


@pytest.mark.slow
def test_the_doctor_says_what_a_launch_would_train_on(text_file, tmp_path):
    """Machine, device, threads and share of each process, what is not used of the launch file, and who is idle."""
    launcher = ["accelerate", "launch", "--config_file", LAUNCH / "cpu2.yaml", "--num_processes", 3]
    launcher += ["--mixed_precision", "bf16", "-m", "mygpt", "doctor", text_file]
    flags = [*TINY_FLAGS, "--reduction", "exact", "--micro-batch-size", 2]
    result = run_process([BIN / launcher[0], *launcher[1:], *flags], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "launch:       3 processes on 1 machine, gradients summed exactly" in result.stdout
    assert re.search(r"^network: +gloo; adding one number takes [\d.]+ ms$", result.stdout, re.MULTILINE)
    assert "batch:        4 windows of 16 tokens a step, 2 to a micro-batch" in result.stdout
    ranks = re.findall(r"^rank (\d) .*: cpu \(.*\), 1 thread, (\d) micro-batch", result.stdout, re.MULTILINE)
    assert ranks == [("0", "0"), ("1", "1"), ("2", "1")]
    assert "note:         mixed_precision: bf16 of the launch configuration is not used" in result.stdout
    assert "note:         2 of 3 processes have a micro-batch in each step" in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_doctor_refuses_what_train_refuses(text_file, command):
    """One process: what is found; FSDP on CPUs, which Accelerate would silently not do; a mistake in the recipe."""
    found = command("doctor", text_file, *TINY_FLAGS)
    assert found.returncode == 0
    assert "launch:       1 process on 1 machine, alone\n" in found.stdout
    refused = command("doctor", text_file, *TINY_FLAGS, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert (
        "asks for FSDP on cpu, where Accelerate would silently not shard; use recipes/launch/cpu2.yaml"
        in refused.stderr
    )
    assert command("doctor", text_file, "--warmup", 1000, "--steps", 1).returncode == 2


@pytest.mark.slow
def test_mistakes_under_a_launcher_are_told_once(text_file, tmp_path):
    """Each process finds the mistake; one prints it, nothing is created, and the launcher fails, and repeats it."""
    result = launch("torchrun", "--nproc-per-node", 3, target=text_file, cwd=tmp_path, flags=TINY_FLAGS)
    assert result.returncode != 0
    told, mistake = "mygpt: batch_size: got 4", "batch_size: got 4, expected a multiple of the 3 processes"
    assert (result.stderr.count(told), result.stderr.count(mistake)) == (1, 2)
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
    assert {path.stem for path in paths} == {"cpu1", "cpu2", "ddp", "fsdp2", "multinode"}
    for path in paths:
        config = ClusterConfig.from_yaml_file(str(path))
        assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
        assert config.mixed_precision == "no"


def test_launched_processes_are_counted_from_the_environment():
    """torchrun's WORLD_SIZE; one without a launcher; an error for what would train something else."""
    assert launched_processes({}) == Launched(1, 1, 0)
    several = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launched_processes(several) == Launched(8, 4, 5)
    assert launched_processes({"ACCELERATE_MIXED_PRECISION": "no"}) == Launched(1, 1, 0)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
        for count in ("many", "-1", "8" if name == "RANK" else "0"):
            with pytest.raises(LaunchError, match="WORLD_SIZE"):
                launched_processes(several | {name: count})
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(LaunchError, match=f"WORLD_SIZE is 8, and {name} not set; start with"):
            launched_processes({key: value for key, value in several.items() if key != name})
    for name, value in (("LOCAL_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2"), ("PMI_SIZE", "4")):
        with pytest.raises(LaunchError, match=f"{name} is set, and WORLD_SIZE is not"):
            launched_processes({name: value})
    assert launched_processes({"OMPI_COMM_WORLD_SIZE": "1"}) == Launched(1, 1, 0)
    with pytest.raises(LaunchError, match=r"cpu2\.yaml"):
        launched_processes({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"})
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        with pytest.raises(LaunchError, match=name):
            launched_processes({f"ACCELERATE_USE_{name}": "true", "WORLD_SIZE": "2"})


def test_processes_that_do_not_meet_are_refused():
    """Two independent runs of one process each would train two models."""
    check_joined(2, 2)
    with pytest.raises(LaunchError, match="started 2 processes but 1 joined"):
        check_joined(2, 1)


def test_threads_are_set_in_process(monkeypatch):
    """The recipe's number, else the cores shared among the processes of this machine."""
    import torch

    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        assert set_threads(1, 1) == torch.get_num_threads() == 1
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
        assert set_threads(None, 4) == 1
        assert set_threads(None, 3) == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
