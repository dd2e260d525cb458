"""Launchers: accelerate launch and torchrun, with one process and several."""

import platform
import re
import sys
import time

import pytest
import reference
import yaml
from support.commands import BIN, LAUNCH, REPOSITORY, SCRIPT, free_port, patched, run_process, torchrun
from support.runs import EXACT, FLAGS, TINY, assert_close_records, assert_same_run, flags_of
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from mygpt.checks.compare import compare
from mygpt.cli.main import print_error
from mygpt.runs.records import read_records
from mygpt.runs.run import RunDirectory


def launch(*launcher, target, cwd, flags=()):
    return run_process([BIN / launcher[0], *launcher[1:], SCRIPT, target, *flags], cwd, 600)


@pytest.mark.slow
def test_one_process_gives_the_same_file_by_any_launcher(text_file, tmp_path):
    """python, accelerate launch and torchrun: byte for byte, though each sets another number of threads."""
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
    # The bits depend on the number of threads: so it was 1 in all three.
    assert files["accelerate", 2] != files["accelerate", 1]


@pytest.mark.slow
def test_any_number_of_processes_trains_on_the_same_batches(text_file, tmp_path):
    """Losses, held-out losses and rates are those of one process; only the last bits of sums differ."""
    flags = [*FLAGS, "--batch-size", 24, "--val-split", 0.1, "--val-every", 2, "--schedule", "cosine"]
    flags += ["--warmup", 2, "--max-grad-norm", 1.0, "--micro-batch-size", 2]
    flags += ["--sampling", "full"]
    alone = launch("python", target=text_file, cwd=tmp_path, flags=[*flags, "--output", "alone"])
    assert alone.returncode == 0, alone.stderr
    launcher = ["accelerate", "launch", "--config_file", LAUNCH / "ddp.yaml", "--num_processes", 3]
    together = launch(*launcher, target=text_file, cwd=tmp_path, flags=[*flags, "--output", "together"])
    assert together.returncode == 0, together.stderr
    assert "3 processes share each batch\n" in together.stderr
    assert together.stdout == alone.stdout
    runs = tmp_path / "together", tmp_path / "alone"
    assert_close_records(*runs, "step", "lr", "tokens", abs=0, rel=0)
    assert_close_records(*runs, "loss", "val", "val_stderr", abs=5e-5)
    assert_close_records(*runs, "grad_norm", rel=1e-4)
    assert max(difference.max_abs for difference in compare(*runs).weights.differences) < 1e-3
    assert RunDirectory(runs[0]).info.stretches[0].environment.processes == 3


@pytest.mark.slow
def test_late_process_does_not_find_an_old_run(text_file, tmp_path):
    """The main process checks the output and makes the run; another, seconds later, does not take it for an old one."""
    patch = """disturb("joined", lambda *_: time.sleep(5 * int(os.environ["RANK"])))"""
    arguments = (text_file, *FLAGS, "--output", "run")
    result = torchrun(2, tmp_path, *arguments, patch=patch, environment={"TORCH_GLOO_LAZY_INIT": "1"})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "latest").is_file()


@pytest.mark.slow
def test_each_process_drops_other_activations(text_file, tmp_path):
    """Each process draws its own dropout masks; with equal masks two processes would use half as many."""
    patch = """
import torch
def record_mask(*_):
    with open(os.environ["RANK"], "a") as file:
        print(torch.nn.functional.dropout(torch.ones(32)).tolist(), file=file)
disturb("before-step", record_mask, count=None)
"""
    result = torchrun(2, tmp_path, text_file, *FLAGS, "--dropout", 0.5, patch=patch)
    assert result.returncode == 0, result.stderr
    masks = [(tmp_path / rank).read_text().splitlines() for rank in "01"]
    assert len(set(masks[0]) | set(masks[1])) == 2 * TINY["steps"]


@pytest.mark.slow
def test_module_can_be_launched(text_file, tmp_path):
    """`accelerate launch -m mygpt train` needs no checkout with scripts."""
    result = run_process([BIN / "accelerate", "launch", "-m", "mygpt", "train", text_file, *FLAGS], tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "launcher"),
    [("default", "python"), ("hardened", "accelerate"), ("hardened", "two-processes")],
)
def test_shipped_recipes_give_the_reference_numbers(text, text_file, tmp_path, recipe, launcher):
    """On any text, so also without Tiny Shakespeare: thirty steps of the published recipes, by each way to start."""
    command = {
        "python": ["python"],
        "accelerate": ["accelerate", "launch"],
        "two-processes": ["accelerate", "launch", "--config_file", LAUNCH / "cpu2.yaml"],
    }[launcher]
    settings = {"steps": 30, "val_every": 10, "warmup": 5} if recipe == "hardened" else {"steps": 30}
    flags = [*flags_of(settings), "--corpus", text_file, "--device", "cpu", "--log-every", 1, "--output", "run"]
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
def test_mistakes_under_a_launcher_are_printed_once(text_file, tmp_path):
    """Each process finds the mistake; one prints it, nothing is created, and the launcher fails and repeats it."""
    result = launch("torchrun", "--nproc-per-node", 3, target=text_file, cwd=tmp_path, flags=FLAGS)
    assert result.returncode != 0
    mistake = "batch_size: got 4, expected a multiple of the 3 processes"
    assert (result.stderr.count("mygpt: batch_size: got 4"), result.stderr.count(mistake)) == (1, 2)
    assert not list(tmp_path.glob("checkpoints"))


@pytest.mark.slow
def test_launcher_that_starts_fewer_processes_is_refused(text_file, tmp_path):
    """`--cpu --num_processes 2` silently starts one process; training as if it were two is refused."""
    launcher = ["accelerate", "launch", "--cpu", "--num_processes", 2]
    result = launch(*launcher, target=text_file, cwd=tmp_path, flags=FLAGS)
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


DYING = """
end_silently()
attempt, rank, processes = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK", "WORLD_SIZE"))
def die(*_):
    with open("killed", "a") as file:
        print(attempt, file=file, flush=True)
    kill()
disturb("before-step", die, count=2, when=lambda: attempt < KILLS and rank == attempt % processes)
"""


@pytest.mark.slow
@pytest.mark.fault(64)
@pytest.mark.parametrize(
    ("processes", "kills", "launcher"),
    [(2, 3, ()), (3, 1, ("--standalone",))],
    ids=["2", "3-alone"],
)
def test_launcher_restarts_killed_processes(text_file, tmp_path, exact_run, processes, kills, launcher):
    """Another process is killed each time; the run ends with the bytes of a run never disturbed."""
    arguments = (text_file, *flags_of(EXACT), "--output", "run")
    patch, launcher = f"KILLS = {kills}\n{DYING}", [*launcher, "--max-restarts", kills]
    result = torchrun(processes, tmp_path, *arguments, patch=patch, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "killed").read_text() == "".join(f"{attempt}\n" for attempt in range(kills))
    assert_same_run(tmp_path / "run", exact_run)


@pytest.mark.slow
@pytest.mark.fault(70)
@pytest.mark.parametrize("processes", [1, 2])
def test_error_of_one_process_keeps_its_traceback(text_file, tmp_path, processes):
    """Exit 1 with its message and the place where it was raised; the other process names its rank."""
    patch = 'disturb("before-step", fail(RuntimeError("tracker: Broken pipe")), when=rank_1_after_a_save)'
    arguments = (text_file, *flags_of(EXACT), "--steps", 100_000, "--output", "run")
    if processes == 1:
        result = run_process([sys.executable, patched(tmp_path, patch), *arguments], tmp_path)
    else:
        result = torchrun(processes, tmp_path, *arguments, patch=patch)
        assert f"mygpt: rank 1 on {platform.node()}: RuntimeError: tracker: Broken pipe" in result.stderr
    assert result.returncode == 1
    assert re.search(r"fault_points\.py\", line \d+, in act", result.stderr)
    assert re.search(r"^(\[rank1\]: )?RuntimeError: tracker: Broken pipe$", result.stderr, re.MULTILINE)
    assert "has ended, or has not answered" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launcher_ends_with_the_message(text_file, tmp_path, launcher):
    """The summary of a launcher comes last, and has the error's line where it would explain how to get a traceback."""
    if launcher == "torchrun":
        command = [BIN / "torchrun", "--nproc-per-node", 2, "--master-port", free_port()]
    else:
        config = LAUNCH / "cpu2.yaml"
        command = [BIN / "accelerate", "launch", "--config_file", config, "--main_process_port", free_port()]
    arguments = ["-m", "mygpt", "train", text_file, *FLAGS, "--lr", -1, "--output", "run"]
    result = run_process([*command, *arguments], tmp_path)
    assert result.returncode == 1
    assert "traceback : --lr: got -1.0, expected at least 0" in result.stderr.splitlines()[-2]
    assert "To enable traceback see" not in result.stderr


def test_launcher_gets_the_printed_message(monkeypatch, tmp_path, capsys):
    """All its lines, with control characters escaped; an error file that cannot be written is no error."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    print_error("one\ntwo \x1b[31m")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message["message"] == "one\ntwo \\x1b[31m"
    assert abs(failure.timestamp - time.time()) < 60
    assert capsys.readouterr().err == "mygpt: one\nmygpt: two \\x1b[31m\n"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    print_error("three")
    assert capsys.readouterr().err == "mygpt: three\n"
