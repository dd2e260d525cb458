"""Running a run again, and comparing whole runs with optimizer and records."""

import json
import re
import shutil
import signal

import pytest
from support.checkpoints import rewrite
from support.commands import needs_onednn
from support.fault_points import disturb, send
from support.runs import steps_of

from mygpt.checks.compare import compare
from mygpt.checks.verify import verify
from mygpt.errors import CheckpointError, InterruptedRunError, MismatchError
from mygpt.processes import machine
from mygpt.runs.saver import Saver
from mygpt.training.train import train


@pytest.fixture
def answer(call):
    """A function that runs a command in this process; returns exit code and stdout."""
    return lambda *arguments: call(*arguments)[:2]


def test_untouched_run_verifies(tiny, answer):
    """All of it, or its first steps; also one that was interrupted and continued, and one that is not finished."""
    recipe = tiny(save_every=2, dropout=0.1, val_split=0.2, val_every=3)
    run = train(recipe, last_step=5)
    assert answer("verify", run) == (0, "identical: 5 records and 3 checkpoints up to step 5\n")
    train(recipe)
    assert answer("verify", run) == (0, "identical: 6 records and 3 checkpoints up to step 6\n")
    assert answer("verify", run, "--steps", 3) == (0, "identical: 3 records and 1 checkpoints up to step 3\n")


def test_checkpoints_that_the_newest_recipe_does_not_save_are_compared(tiny, tmp_path, answer):
    """Keys like save_every may change in place; nothing is called identical that was not compared."""
    other = train(tiny(save_every=2, data_seed=7, output=str(tmp_path / "other")))
    train(tiny(save_every=2))
    run = train(tiny(save_every=4, print_every=1))
    assert answer("verify", run) == (0, "identical: 6 records and 3 checkpoints up to step 6\n")
    shutil.rmtree(run / "step-000002")
    shutil.copytree(other / "step-000002", run / "step-000002")
    code, out = answer("verify", run)
    assert code == 1
    assert out.startswith("different: the first checkpoint that differs is that of step 2\n")


def test_more_steps_than_the_run_has_are_not_verified(tiny, answer):
    """A mistake, as for `mygpt at`."""
    run = train(tiny())
    assert answer("verify", run, "--steps", 7)[0] == 2
    with pytest.raises(CheckpointError, match="got step 7, expected one from 1 to 6, the last that it has trained"):
        verify(run, 7)


def test_verifying_keeps_no_checkpoint_that_it_has_compared(tiny, answer, monkeypatch):
    """However many the run has: the newest, and for a moment the one before."""
    run, seen, write = train(tiny(save_every=1, keep_last=0)), [], Saver._write

    def count(self, *arguments):
        write(self, *arguments)
        seen.append(len(steps_of(self.run)))

    monkeypatch.setattr(Saver, "_write", count)
    assert answer("verify", run) == (0, "identical: 6 records and 6 checkpoints up to step 6\n")
    assert seen == [1] * 6
    (run / "run.json").write_text((run / "run.json").read_text().replace('"data_seed": 42', '"data_seed": 43'))
    code, out = answer("verify", run)
    assert code == 1
    assert "the first checkpoint that differs is that of step 1\ntensor " in out


def test_the_first_step_and_tensor_that_differ_are_named(tiny, answer):
    """As after a change of the program that changes its numbers."""
    run = train(tiny(save_every=2))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[3])
    lines[3] = json.dumps(record | {"loss": record["loss"] + 1e-6})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    info = (run / "run.json").read_text()
    code, out = answer("verify", run)
    assert code == 1
    assert out.startswith(f"different: the first record that differs is that of step 4: loss {record['loss'] + 1e-6}")
    (run / "run.json").write_text(info.replace('"data_seed": 42', '"data_seed": 43'))
    code, out = answer("verify", run)
    assert code == 1
    assert "the first record that differs is that of step 1: loss" in out
    assert "the first checkpoint that differs is that of step 2\ntensor " in out
    assert re.search(r"^token_embedding\.weight +[\d,]+ of ", out, re.MULTILINE)
    assert re.search(r"^optimizer\.token_embedding\.weight\.exp_avg ", out, re.MULTILINE)


def test_changes_since_the_run_are_listed(tiny, answer):
    """Versions and processor; the threads are set as in the run."""
    run = train(tiny())
    info = json.loads((run / "run.json").read_text())
    environment = info["stretches"][0]["environment"]
    environment["versions"]["torch"], environment["cpu"] = "2.9.0", "another"
    (run / "run.json").write_text(json.dumps(info))
    code, out = answer("verify", run)
    assert code == 0
    assert re.search(r"^changed since: torch 2\.9\.0 -> 2\.", out, re.MULTILINE)
    assert "changed since: cpu another -> " in out
    assert "threads" not in out


@needs_onednn
def test_run_whose_products_cannot_be_had_here_is_verified_without(tiny, answer, monkeypatch):
    """And the change is listed."""
    run = train(tiny(matmul="onednn"))
    monkeypatch.setattr(machine, "has_onednn_linear", lambda: False)
    code, out = answer("verify", run)
    assert "changed since: matmul onednn -> blas" in out
    assert code in (0, 1)  # the last bits may be the same


def test_branch_is_verified_from_its_first_step(tiny, tmp_path, answer):
    """Records that it copied from its source are not compared with themselves."""
    train(tiny(save_every=2, output=str(tmp_path / "source")), last_step=4)
    branch = train(tiny(save_every=2, resume=str(tmp_path / "source"), output=str(tmp_path / "branch")))
    assert answer("verify", branch) == (0, "identical: 2 records and 1 checkpoints up to step 6\n")
    with pytest.raises(CheckpointError, match="got step 4, expected one from 5 to 6, the last that it has trained"):
        verify(branch, 4)


def test_verifying_without_a_run_or_its_text_is_an_error(tiny, tmp_path, text):
    """No such run; a text that has changed."""
    with pytest.raises(CheckpointError, match="no such run"):
        verify(tmp_path / "nothing")
    own = tmp_path / "own.txt"
    own.write_text(text, encoding="utf-8", newline="")
    run = train(tiny(corpus=str(own)))
    own.write_text(text[:-1], encoding="utf-8", newline="")
    with pytest.raises(MismatchError, match="was trained on another text than"):
        verify(run)


def test_runs_are_compared_with_optimizer_and_metrics(tiny, tmp_path, answer):
    """Runs with equal weights may differ; a different log_every is no difference."""
    a, b = (train(tiny(log_every=every, output=str(tmp_path / f"{every}"))) for every in (1, 2))
    code, out = answer("compare", a, b)
    assert code == 0
    assert out.splitlines()[2] == "metrics identical: 4 records, common of 6 and 4"
    state = b / "step-000006" / "state.safetensors"
    rewrite(state, tensors=lambda values: values["optimizer.norm.bias.exp_avg"][0].add_(1))
    code, out = answer("compare", a, b)
    assert code == 1
    assert re.search(r"^identical: .*\noptimizer and generators different: 1 of \d+ tensors", out)
    assert not compare(a, b).identical
    # The weights alone are still the same.
    assert answer("compare", a / "step-000006", b / "step-000006")[0] == 0
    text = (b / "metrics.jsonl").read_text()
    (b / "metrics.jsonl").write_text(text.replace('"tokens":128', '"tokens":129'))
    assert "metrics different: step 2: tokens 128 against 129" in answer("compare", a, b)[1]


def test_signals_stop_a_verification(tiny, tmp_path, text_file, monkeypatch):
    """The error says that nothing was compared."""
    run = train(tiny())
    disturb("before-step", send(signal.SIGINT), patch=monkeypatch.setattr)
    with pytest.raises(InterruptedRunError, match="stopped before anything was compared") as caught:
        verify(run)
    assert caught.value.exit_code == 130
