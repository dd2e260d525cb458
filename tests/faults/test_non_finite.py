"""Non-finite losses and gradients: the run stops before the update, and `mygpt replay` looks into the step."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import needs_onednn
from support.fault_points import POINTS, disturb
from support.runs import evaluation_of

from mygpt import compat
from mygpt.checks.replay import replay
from mygpt.errors import NonFiniteError
from mygpt.model.gpt import GPT
from mygpt.runs.records import read_records
from mygpt.training.train import train

CPU = torch.device("cpu")


def nan_weight(parts, *_):
    parts.gpt.norm.weight.data[3] = float("nan")


def infinite_loss(parts, *_):
    # Logits so far apart that the loss overflows, while their gradients are finite.
    parts.gpt.token_embedding.weight.data.mul_(1e20)
    parts.gpt.norm.weight.data.mul_(1e20)


def infinite_gradient(parts, *_):
    # LayerNorm divides by a standard deviation near zero: only the backward pass overflows.
    parts.gpt.token_embedding.weight.data.mul_(1e-30)
    parts.gpt.position_embedding.weight.data.mul_(1e-30)
    parts.gpt.norm.weight.data.mul_(1e30)


def large_gradient(parts, *_):
    # Logits far apart, so that the gradient is large behind the norm, but finite.
    parts.gpt.token_embedding.weight.data.mul_(1e-6)
    parts.gpt.position_embedding.weight.data.mul_(1e-6)
    parts.gpt.norm.weight.data.mul_(1e9)


NON_FINITE = [nan_weight, infinite_loss, infinite_gradient]


@pytest.fixture
def fail_at_step_5(monkeypatch, tiny):
    """A function that changes the weights before step 5, so that it fails; returns the message and the run."""

    def fail(change, **keys) -> tuple[str, Path]:
        recipe = tiny(save_every=2, dropout=0.1, **keys)
        with monkeypatch.context() as patch:
            disturb("before-step", change, count=5, patch=patch.setattr)
            with pytest.raises(NonFiniteError) as caught:
                train(recipe)
        assert caught.value.exit_code == 1
        return str(caught.value), Path(recipe.checkpoint.output)

    return fail


@pytest.mark.fault(59, 60, 61)
@pytest.mark.parametrize(
    ("change", "problem", "first"),
    [
        (nan_weight, "the loss is nan", "the weights of norm.weight, 1 of 16 values, already before the step"),
        (infinite_loss, "the loss is (inf|nan)", "."),
        (infinite_gradient, r"the loss is [\d.e+]+, the gradient norm (inf|nan)", "gradient"),
    ],
)
def test_non_finite_step_stops_the_run_before_its_update(fail_at_step_5, tiny, call, change, problem, first):
    """Exit 1 naming the step; checkpoints stay, the batch is recorded, and replay names the first non-finite values."""
    message, run = fail_at_step_5(change)
    assert re.match(rf"step 5: {problem}.*; not updated: `mygpt replay .*` looks into it", message)
    assert (run / "latest").read_text() == "step-000004\n"
    assert {record.step for record in read_records(run)} == {1, 2, 3, 4}
    batch = json.loads((run / "failed-step-000005" / "batch.json").read_text())
    text = Path(tiny().data.corpus).read_text(encoding="utf-8")
    assert len(batch["starts"]) == 4
    assert all(text[at : at + 17] == window for at, window in zip(batch["starts"], batch["windows"], strict=True))
    code, out, _ = call("replay", run, "--device", "cpu")
    assert code == 0
    assert out.startswith("step 5: the loss is ")
    assert re.search(rf"^first non-finite: .*{first}", out, re.MULTILINE), out


@pytest.mark.fault(59, 60, 61)
@pytest.mark.parametrize("change", NON_FINITE)
def test_step_that_the_host_reads_late_is_reported_as_if_read_at_once(fail_at_step_5, tmp_path, change):
    """Where the host reads rarely, a non-finite step and later ones update nothing: same message, same record."""
    failures = []
    for log_every in (1, 1000):
        message, run = fail_at_step_5(change, log_every=log_every, output=str(tmp_path / str(log_every)))
        files = {path.name: path.read_bytes() for path in (run / "failed-step-000005").iterdir()}
        files["manifest.json"] = files["manifest.json"].replace(b'"log_every":1000', b'"log_every":1')
        failures.append((message.replace(str(run), "RUN"), files))
    assert failures[0] == failures[1]
    assert {"model.safetensors", "state.safetensors", "batch.json"} <= failures[0][1].keys()


@pytest.mark.fault(59, 60, 61)
@pytest.mark.parametrize("change", [*NON_FINITE, large_gradient])
def test_exact_sums_stop_before_the_update_too(fail_at_step_5, change):
    """Also for a finite gradient that is larger than they hold."""
    message, run = fail_at_step_5(change, reduction="exact", log_every=1000)
    assert re.match(
        r"step 5: [14] of 4 micro-batches have a loss or gradients that are no numbers, or beyond the 1,048,576 "
        r"that an exact sum holds; not updated: `mygpt replay .*` looks into it; .*; or, if they are numbers, use ",
        message,
    )
    assert message.endswith('use reduction = "fast"')
    found = replay(run, CPU)
    assert found.non_finite
    assert ("beyond the 1,048,576" in found.non_finite) is (change in (large_gradient, infinite_gradient))
    assert len(found.failed.dropout_seeds) == 4


def test_replay_of_an_exact_sum_names_the_largest_gradient_of_any_micro_batch(fail_at_step_5):
    """In whichever order the micro-batches are computed."""
    _, run = fail_at_step_5(large_gradient, reduction="exact")
    file = run / "failed-step-000005" / "batch.json"
    batch, found = json.loads(file.read_text()), []
    for _ in range(2):
        found.append(replay(run, CPU).non_finite)
        for key in ("windows", "tokens", "dropout_seeds"):
            batch[key].reverse()
        file.write_text(json.dumps(batch))
    assert found[0] == found[1]


def test_failed_step_is_replayed_with_its_threads(fail_at_step_5):
    """The record has the number of threads that computed the step, and replay sets the same."""
    _, run = fail_at_step_5(infinite_loss, threads=2)
    torch.set_num_threads(1)
    found = replay(run, CPU)
    assert (found.failed.threads, torch.get_num_threads()) == (2, 2)
    assert found.not_repeated == ()


def test_replay_says_how_it_differs_from_the_failed_step(monkeypatch, tiny, call):
    """Replay computes eagerly, without activation checkpointing: a finite result may hang on that, so it says so."""
    # The weights are finite and only the loss is nan, as if a compiled kernel had made it.
    step = POINTS["before-step"]
    original = getattr(step.owner, step.name)

    def nan_step(*args):
        update = original(*args)
        return update._replace(loss=update.loss * float("nan"), grad_norm=update.grad_norm * float("nan"))

    monkeypatch.setattr(step.owner, step.name, nan_step)
    monkeypatch.setattr(GPT, "compile", lambda self: None)
    recipe = tiny(compile=True, activation_checkpointing=True)
    with pytest.raises(NonFiniteError):
        train(recipe)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")  # so that it is restored afterwards
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
    code, out, _ = call("replay", recipe.checkpoint.output, "--device", "cpu")
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    assert code == 1
    assert out.splitlines()[-3:] == [
        "computed compiled; replayed without",
        "computed with activation checkpointing; replayed without",
        "all numbers are finite this time: not reproduced, with the differences above",
    ]


@needs_onednn
def test_replay_computes_products_as_the_step_did(tiny, monkeypatch):
    """By oneDNN, where this machine has it; else it says so."""
    recipe = tiny(matmul="onednn", lr=1e30)
    with pytest.raises(NonFiniteError):
        train(recipe)
    used = []
    monkeypatch.setattr(compat._OneDNNLinear, "apply", lambda *xs: used.append(xs) or torch.nn.functional.linear(*xs))
    found = replay(Path(recipe.checkpoint.output), CPU)
    assert (len(used) > 0, found.not_repeated) == (True, ())
    assert found.non_finite
    used.clear()
    monkeypatch.setattr("mygpt.processes.machine.has_onednn_linear", lambda: False)
    found = replay(Path(recipe.checkpoint.output), CPU)
    assert (used, found.not_repeated) == ([], ("products computed by onednn; replayed without",))


@pytest.mark.parametrize(
    "variables",
    [
        {"LOCAL_RANK": "0"},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    ],
)
def test_replay_needs_no_other_process(fail_at_step_5, monkeypatch, variables):
    """Whatever a launcher says: replay is one process, and leaves the variables as they were."""
    _, run = fail_at_step_5(infinite_loss)
    found = replay(run, CPU)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert replay(run, CPU) == found
    assert variables.items() <= os.environ.items()


@pytest.mark.fault(59)
def test_failed_step_keeps_the_weights_before_it(tiny, tmp_path):
    """There was no update: they are the weights after the step before."""
    keys = {"lr": 1e30, "steps": 50}
    with pytest.raises(NonFiniteError, match=r"^step 2: "):
        train(tiny(save_every=2, **keys))
    before = train(tiny(**keys, output=str(tmp_path / "before")), last_step=1)
    failed = load_file(tmp_path / "run" / "failed-step-000002" / "model.safetensors")
    for name, weight in load_file(before / "step-000001" / "model.safetensors").items():
        assert torch.equal(weight, failed[name])


@pytest.mark.fault(62)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_held_out_loss_is_never_the_best(monkeypatch, tiny, value):
    """It stops the run; `best` names the evaluation before."""
    evaluation = POINTS["validation"]
    original, calls = getattr(evaluation.owner, evaluation.name), []

    def once_finite(*args, step):
        calls.append(1)
        return original(*args, step=step) if len(calls) == 1 else evaluation_of(value, step=step)

    monkeypatch.setattr(evaluation.owner, evaluation.name, once_finite)
    recipe = tiny(val_split=0.2, val_every=2, save_best=True)
    with pytest.raises(NonFiniteError, match="step 4: the held-out loss is") as caught:
        train(recipe)
    assert caught.value.exit_code == 1
    assert (Path(recipe.checkpoint.output) / "best").read_text() == "step-000002\n"
