"""Non-finite losses and gradients: the run stops before the update, and `mygpt replay` looks into the step."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import contents

from mygpt.checks.replay import replay
from mygpt.cli.main import main
from mygpt.errors import NonFiniteError
from mygpt.model.gpt import GPT
from mygpt.runs.records import read_records
from mygpt.training.train import train, train_until


def broken_step(monkeypatch, tiny, at, **keys):
    """Train until the numbers of step `at` break, and return the error and the run."""
    from mygpt.training import loop

    step, count = loop.train_step, []

    def breaking(parts, batch, number):
        count.append(1)
        if len(count) == at:
            keys["how"](parts.model, batch)
        return step(parts, batch, number)

    monkeypatch.setattr(loop, "train_step", breaking)
    recipe = tiny(save_every=2, dropout=0.1, **keys.get("recipe", {}))
    with pytest.raises(NonFiniteError) as caught:
        train(recipe)
    assert caught.value.exit_code == 1
    return str(caught.value), Path(recipe.checkpoint.output)


def make_nan(model, _batch):
    model.norm.weight.data[3] = float("nan")


def make_infinite(model, _batch):
    # Logits so far apart that the loss overflows, while their gradients are finite.
    model.token_embedding.weight.data.mul_(1e20)
    model.norm.weight.data.mul_(1e20)


def make_infinite_gradient(model, _batch):
    # LayerNorm divides by a spread that is nearly nothing: forward fine, backward not.
    model.token_embedding.weight.data.mul_(1e-30)
    model.position_embedding.weight.data.mul_(1e-30)
    model.norm.weight.data.mul_(1e30)


def make_large(model, _batch):
    # Logits far apart, so that what comes back through the norm is large, but no overflow.
    model.token_embedding.weight.data.mul_(1e-6)
    model.position_embedding.weight.data.mul_(1e-6)
    model.norm.weight.data.mul_(1e9)


@pytest.mark.fault(59, 60, 61)
@pytest.mark.parametrize(
    ("how", "problem", "first"),
    [
        (make_nan, "the loss is nan", "the weights of norm.weight, 1 of 16 values, already before the step"),
        (make_infinite, "the loss is (inf|nan)", "."),
        (make_infinite_gradient, r"the loss is [\d.e+]+, the gradient norm (inf|nan)", "gradient"),
    ],
)
def test_numbers_that_break_stop_before_the_update(monkeypatch, tiny, capsys, how, problem, first):
    """Exit 1 naming the step; the checkpoints stay, the batch is written down, and replay says where it broke."""
    message, run = broken_step(monkeypatch, tiny, 5, how=how)
    assert re.match(rf"step 5: {problem}.*; not updated: `mygpt replay .*` looks into it", message)
    assert (run / "latest").read_text() == "step-000004\n"
    assert {record.step for record in read_records(run)} == {1, 2, 3, 4}
    failed = run / "failed-step-000005"
    batch = json.loads((failed / "batch.json").read_text())
    text = Path(tiny().data.corpus).read_text(encoding="utf-8")
    assert len(batch["starts"]) == 4
    assert all(text[at : at + 17] == window for at, window in zip(batch["starts"], batch["windows"], strict=True))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["replay", str(run), "--device", "cpu"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("step 5: the loss is ")
    assert re.search(rf"^first non-finite: .*{first}", out, re.MULTILINE), out


@pytest.mark.fault(59, 60, 61)
@pytest.mark.parametrize("how", [make_nan, make_infinite, make_infinite_gradient])
def test_numbers_that_break_unseen_are_told_of_their_step(monkeypatch, tiny, tmp_path, how):
    """The host reads every other step; what broke in between has updated nothing, and is told and kept as it was."""
    runs = {}
    for log_every in (1, 1000):
        recipe = {"log_every": log_every, "output": str(tmp_path / str(log_every))}
        message, run = broken_step(monkeypatch, tiny, 5, how=how, recipe=recipe)
        runs[message.replace(str(run), "RUN")] = contents(run / "failed-step-000005")
    (kept,) = {json.dumps(files, sort_keys=True, default=repr) for files in runs.values()}
    assert len(runs) == 1
    assert "model.safetensors" in kept


@pytest.mark.fault(59, 60, 61)
@pytest.mark.parametrize("how", [make_nan, make_infinite, make_infinite_gradient, make_large])
def test_exact_sums_stop_before_the_update_too(monkeypatch, tiny, how):
    """Also for a gradient that is finite, but larger than they hold."""
    message, run = broken_step(monkeypatch, tiny, 5, how=how, recipe={"reduction": "exact", "log_every": 1000})
    assert re.match(
        r"step 5: [14] of 4 micro-batches have a loss or gradients that are no numbers, or beyond the 1,048,576 "
        r"that an exact sum holds; not updated: `mygpt replay .*` looks into it; .*; or, if they are numbers, use ",
        message,
    )
    assert message.endswith('use reduction = "fast"')
    found = replay(run, torch.device("cpu"))
    assert found.non_finite
    assert ("beyond the 1,048,576" in found.non_finite) is (how in (make_large, make_infinite_gradient))
    assert len(found.failed.dropout_seeds) == 4


def test_numbers_of_a_failed_step_are_replayed_with_its_threads(monkeypatch, tiny):
    """The record has the number of threads that computed the step, and replay sets the same."""
    _, run = broken_step(monkeypatch, tiny, 5, how=make_infinite, recipe={"threads": 2})
    torch.set_num_threads(1)
    found = replay(run, torch.device("cpu"))
    assert (found.failed.threads, torch.get_num_threads()) == (2, 2)
    assert found.not_repeated == ()


def test_numbers_that_only_compiled_code_breaks_are_not_called_sound(monkeypatch, tiny, capsys):
    """Replay computes eagerly, without activation checkpointing: it says so beside a result that may hang on it."""
    from mygpt.training import loop

    # The weights are whole and only the loss is a nan, as if a compiled kernel had made it.
    step = loop.train_step

    def breaking(parts, batch, number):
        update = step(parts, batch, number)
        return update._replace(loss=update.loss * float("nan"), grad_norm=update.grad_norm * float("nan"))

    monkeypatch.setattr(loop, "train_step", breaking)
    monkeypatch.setattr(GPT, "compile", lambda self: None)
    recipe = tiny(compile=True, activation_checkpointing=True)
    with pytest.raises(NonFiniteError):
        train(recipe)
    capsys.readouterr()
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")  # so that it is put back afterwards
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
    with pytest.raises(SystemExit) as stopped:
        main(["replay", recipe.checkpoint.output, "--device", "cpu"])
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "computed compiled; replayed without",
        "computed with activation checkpointing; replayed without",
        "all numbers are finite this time: not reproduced, with the differences above",
    ]


def test_numbers_of_an_older_record_are_replayed_too(monkeypatch, tiny):
    """A batch.json without the settings that it did not have at first still reads; nothing is known to differ."""
    _, run = broken_step(monkeypatch, tiny, 5, how=make_infinite)
    file = run / "failed-step-000005" / "batch.json"
    batch = json.loads(file.read_text())
    for key in ("threads", "compile", "activation_checkpointing"):
        del batch[key]
    file.write_text(json.dumps(batch))
    found = replay(run, torch.device("cpu"))
    assert (found.failed.threads, found.not_repeated) == (None, ())
    assert found.non_finite


@pytest.mark.fault(59)
def test_the_weights_of_a_failed_step_are_those_before_it(monkeypatch, tiny, tmp_path):
    """There was no update: they are the weights after the step before."""
    recipe = tiny(save_every=2, lr=1e30, steps=50)
    with pytest.raises(NonFiniteError, match=r"^step 2: "):
        train(recipe)
    run = Path(recipe.checkpoint.output)
    before = train_until(tiny(lr=1e30, steps=50, output=str(tmp_path / "before")), 1)
    for name, weight in load_file(before / "step-000001" / "model.safetensors").items():
        assert torch.equal(weight, load_file(run / "failed-step-000002" / "model.safetensors")[name])


@pytest.mark.fault(62)
def test_a_held_out_loss_that_is_no_number_is_never_the_best(monkeypatch, tiny, tmp_path):
    """It stops the run; `best` names the evaluation before."""
    from mygpt.training import evaluate
    from mygpt.training.evaluate import HeldOutLoss

    held_out, values = evaluate.held_out_loss, [None, float("nan"), float("-inf")]
    for broken in values[1:]:
        calls = []

        def once(*args, calls=calls, broken=broken):
            calls.append(1)
            return held_out(*args) if len(calls) == 1 else HeldOutLoss(broken, None)

        monkeypatch.setattr(evaluate, "held_out_loss", once)
        recipe = tiny(val_split=0.2, val_every=2, save_best=True, output=str(tmp_path / str(broken)))
        with pytest.raises(NonFiniteError, match="step 4: the held-out loss is") as caught:
            train(recipe)
        assert caught.value.exit_code == 1
        assert (tmp_path / str(broken) / "best").read_text() == "step-000002\n"
