"""Training runs: the same numbers as the plainest implementation, the same bits every time."""

import json
import sys
from importlib import metadata

import pytest
import reference
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.commands import run_process
from support.runs import TINY, assert_close_records, contents, model_bytes, steps_of

from mygpt.checks.compare import compare
from mygpt.compat import forget_accelerator, has_accelerator, has_onednn_linear
from mygpt.data.dataset import Dataset
from mygpt.data.tokenizer import CharTokenizer
from mygpt.errors import CheckpointError, LaunchError, NonFiniteError, RecipeError
from mygpt.model.gpt import GPT
from mygpt.recipe.tables import Recipe, TrainTable
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.records import Timing, read_records
from mygpt.training.gradient_sum import FastSum, gradient_sum_for
from mygpt.training.loop import train_step
from mygpt.training.parts import build_parts, open_accelerator
from mygpt.training.train import train


@st.composite
def small_recipes(draw):
    """Settings that both implementations have, at sizes at which a run takes a tenth of a second."""
    steps = draw(st.integers(1, 8))
    heads = draw(st.sampled_from([1, 2, 4]))
    max_seq_len = draw(st.integers(2, 24))
    schedule = draw(st.sampled_from(["constant", "cosine", "linear"]))
    val_split = draw(st.sampled_from([0.0, 0.1, 0.4]))
    lr = draw(st.sampled_from([1e-4, 1e-3, 3e-3]))
    return {
        "steps": steps,
        "num_heads": heads,
        "embed_dim": heads * draw(st.sampled_from([4, 6, 16])),
        "num_layers": draw(st.integers(1, 3)),
        "max_seq_len": max_seq_len,
        "seq_len": draw(st.integers(1, max_seq_len)),
        "batch_size": draw(st.integers(1, 9)),
        "max_grad_norm": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "schedule": schedule,
        "warmup": draw(st.integers(0, steps)),
        "min_lr": 0.0 if schedule == "constant" else draw(st.sampled_from([0.0, lr / 10])),
        "lr": lr,
        "val_split": val_split,
        "val_every": draw(st.integers(0, steps)) if val_split else 0,
        "eval_batches": draw(st.integers(1, 3)),
    }


# With windows of one token the gradients of attention are exactly zero in fp32, and in float64 noise that Adam would
# amplify to whole steps. So the oracle computes in fp32, too.
@example(
    keys={"steps": 4, "num_heads": 4, "embed_dim": 64, "num_layers": 3, "max_seq_len": 3, "seq_len": 1, "batch_size": 2}
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=small_recipes())
def test_any_recipe_gives_the_reference_numbers(keys, text, text_file, tmp_path):
    """Loss, held-out loss, rate and gradient norm of every step agree with reference.py to four decimals."""
    own = {"corpus": str(text_file), "output": str(tmp_path / "run"), "device": "cpu", "threads": 1, "log_every": 1}
    run = train(Recipe.of(**keys, **own, log_grad_norm=True), overwrite=True)
    expected = list(reference.run(text, reference.Settings(**keys, log_grad_norm=True)))
    for record, (step, loss, held_out, rate, norm) in zip(read_records(run), expected, strict=True):
        assert record.step == step
        assert record.loss == pytest.approx(loss, abs=5e-5)
        assert record.val == (held_out if held_out is None else pytest.approx(held_out, abs=5e-5))
        assert record.lr == pytest.approx(rate, rel=1e-12)
        assert record.grad_norm == pytest.approx(norm, abs=5e-5, rel=1e-4)


def test_fp32_follows_a_float64_run(tiny, text):
    """A small model's losses over forty steps agree with the plain implementation in float64 to four decimals."""
    keys = {"steps": 40, "val_split": 0.1, "val_every": 10, "schedule": "cosine", "warmup": 5, "max_grad_norm": 1.0}
    run = train(tiny(**keys))
    known = {key: value for key, value in TINY.items() if key in reference.Settings.__dataclass_fields__}
    expected = reference.run(text, reference.Settings(**known | keys), dtype=torch.float64)
    for record, (_, loss, held_out, _, norm) in zip(read_records(run), expected, strict=True):
        assert record.loss == pytest.approx(loss, abs=5e-5)
        assert record.val == (held_out and pytest.approx(held_out, abs=5e-5))
        assert record.grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("sampling", ["shared-stream", "own-stream", "full"])
def test_the_same_recipe_gives_the_same_bytes(tiny, tmp_path, sampling):
    """Two runs write the same model file, with dropout, accumulation, clipping and validation on."""
    keys = {"dropout": 0.2, "micro_batch_size": 2, "max_grad_norm": 1.0, "val_split": 0.1, "val_every": 2}
    runs = [train(tiny(**keys, sampling=sampling, output=str(tmp_path / name))) for name in "ab"]
    assert model_bytes(runs[0]) == model_bytes(runs[1])
    # The negative control: other batches give other bytes.
    other = train(tiny(**keys, sampling=sampling, data_seed=43, output=str(tmp_path / "c")))
    assert model_bytes(other) != model_bytes(runs[0])


def test_only_shared_stream_evaluation_changes_the_training(tiny, tmp_path):
    """Evaluations on separate windows change no weight; the default, which draws from the training stream, does."""

    def weights(name, **keys):
        return load_checkpoint(train(tiny(val_split=0.2, **keys, output=str(tmp_path / name)))).model.state_dict()

    plain = weights("plain")
    for sampling, same in (("own-stream", True), ("full", True), ("shared-stream", False)):
        other = weights(sampling, val_every=2, sampling=sampling)
        assert all(torch.equal(plain[name], other[name]) for name in plain) is same, sampling


def test_step_at_rate_zero_changes_no_bit(tiny):
    """The cosine's last rate is exactly zero, so the weights before and after the last step are the same."""
    run = train(tiny(schedule="cosine", warmup=2, max_grad_norm=1.0, save_every=5))
    result = compare(run / "step-000005", run / "step-000006")
    assert result.weights.differences == []
    assert result.steps == (5, 6)
    last = read_records(run)[-1]
    assert last.lr == 0.0


def test_weights_are_saved_when_due(tiny):
    """Every save_every steps and at the last; `latest` names the newest."""
    run = train(tiny(save_every=4))
    assert steps_of(run) == [4, 6]
    assert (run / "latest").read_text() == "step-000006\n"
    assert compare(run / "step-000004", run).weights.differences


def test_run_directory_holds_recipe_environment_and_records(tiny):
    """The resolved recipe, the environment, and one record per logged step."""
    recipe = tiny(val_split=0.1, val_every=3, log_every=2, max_grad_norm=1.0)
    run = train(recipe)
    records = {"metrics.jsonl", "timing.jsonl", "evaluations.jsonl"}
    names = {".lock", "recipe.toml", "run.json", "latest", "step-000006"} | records
    assert {path.name for path in run.iterdir()} == names
    info = json.loads((run / "run.json").read_text())
    (stretch,) = info["stretches"]
    assert stretch["environment"]["threads"] == 1
    assert stretch["environment"]["versions"]["torch"] == metadata.version("torch")
    assert len(info["corpus_sha256"]) == 64
    assert "output" not in info["recipe"]["checkpoint"]  # it is the directory in which the file lies
    records = read_records(run)
    assert [record.step for record in records] == [1, 2, 3, 4, 6]
    assert [record.val is not None for record in records] == [False, False, True, False, True]
    assert [record.tokens for record in records] == [64 * step for step in (1, 2, 3, 4, 6)]
    assert all(record.grad_norm > 0 for record in records)
    for line in (run / "timing.jsonl").read_text().splitlines():
        assert Timing.model_validate_json(line).tokens_per_second > 0


@pytest.mark.parametrize("sampling", ["shared-stream", "full"])
def test_evaluation_uses_the_micro_batch(tiny, tmp_path, monkeypatch, sampling):
    """Memory that is enough for training is enough for evaluation, and the held-out loss is the same."""
    keys = {"val_split": 0.2, "val_every": 3, "sampling": sampling, "steps": 3}
    whole = read_records(train(tiny(**keys, output=str(tmp_path / "whole"))))
    seen, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, x, y=None: seen.append(len(x)) or forward(self, x, y))
    small = read_records(train(tiny(**keys, micro_batch_size=1, output=str(tmp_path / "small"))))
    assert set(seen) == {1}
    assert small[-1].val == pytest.approx(whole[-1].val, abs=5e-5)
    assert small[-1].val_stderr == pytest.approx(whole[-1].val_stderr, abs=5e-5)


def test_accumulated_gradients_equal_the_gradient_of_the_whole_batch():
    """In float64, micro-batches of any size give the gradient norm and weights of one pass, to rounding."""

    def weights_after_step(micro_batch_size):
        keys = TINY | {"batch_size": 6, "micro_batch_size": micro_batch_size, "max_grad_norm": 0.5}
        recipe = Recipe.of(**keys)
        tokens = torch.randint(0, 12, (100,), generator=torch.Generator().manual_seed(0))
        dataset = Dataset(CharTokenizer("abcdefghijkl"), tokens, tokens[:0], sha256="")
        gradient_sum = gradient_sum_for(recipe)
        with open_accelerator(recipe.runtime, torch.device("cpu"), gradient_sum.accumulation_steps) as accelerator:
            parts = build_parts(recipe, accelerator, dataset, gradient_sum)
            parts.gpt.double()
            update = train_step(parts, parts.stream.batch(), 1)
        return [*update, *parts.gpt.parameters()]

    whole = weights_after_step(6)
    for micro_batch_size in (1, 2, 3):
        torch.testing.assert_close(weights_after_step(micro_batch_size), whole, rtol=1e-9, atol=1e-12)


def test_bf16_stays_near_fp32(tiny, tmp_path):
    """Matrix products in bfloat16 move the loss by at most 0.02 over a few hundred steps; weights stay fp32."""
    keys = {"steps": 200, "lr": 3e-3, "seq_len": 16, "batch_size": 16, "log_every": 10}
    runs = {p: train(tiny(**keys, precision=p, output=str(tmp_path / p))) for p in ("fp32", "bf16")}
    losses = [[record.loss for record in read_records(run)] for run in runs.values()]
    assert losses[0] != losses[1]
    worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert worst < 0.02
    assert all(p.dtype == torch.float32 for p in load_checkpoint(runs["bf16"]).model.parameters())


@pytest.mark.fault(107)
@pytest.mark.parametrize("matmul", ["blas", "onednn"])
@pytest.mark.parametrize("setting", ["medium", "high", "of one backend", "of all backends"])
def test_fp32_products_stay_fp32(tiny, tmp_path, setting, matmul):
    """Whatever the caller has set, before and after: the bits are those of a run without it."""
    if matmul == "onednn" and not has_onednn_linear():
        pytest.skip("needs a torch with oneDNN")
    keys = {"embed_dim": 64, "seq_len": 16, "batch_size": 16, "matmul": matmul}
    expected = model_bytes(train(tiny(**keys, output=str(tmp_path / "expected"))))
    try:
        if setting == "of one backend":
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        elif setting == "of all backends":
            torch.backends.mkldnn.matmul.fp32_precision = "none"
            torch.backends.fp32_precision = "bf16"
        else:
            torch.set_float32_matmul_precision(setting)
        assert model_bytes(train(tiny(**keys))) == expected
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # without bf16 instructions the bits show nothing
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


LOWER_PRECISION = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "ONEDNN_VERBOSE": "1"}
LOWER_PRECISION |= dict.fromkeys(("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"), "BF16")


@pytest.mark.fault(107)
def test_environment_does_not_lower_the_precision(tmp_path, text_file):
    """Neither the variable that torch reads when it is imported, nor oneDNN's, which shows what it has computed."""
    matmul = "onednn" if has_onednn_linear() else "blas"
    keys = TINY | {"corpus": str(text_file), "output": "run", "matmul": matmul}
    code = f"""
import os, sys
from mygpt import Recipe, train
assert os.environ["ONEDNN_DEFAULT_FPMATH_MODE"] == "BF16"
train(Recipe.of(**{keys}))
import torch
sys.exit(torch.get_float32_matmul_precision() != "highest")
"""
    result = run_process([sys.executable, "-c", code], tmp_path, 60, LOWER_PRECISION)
    assert result.returncode == 0, result.stderr
    assert ("inner_product" in result.stdout) == (matmul == "onednn")
    assert "attr-fpmath" not in result.stdout


@pytest.mark.fault(108)
@pytest.mark.parametrize("value", ["true", "Yes"])
def test_device_of_the_launch_that_is_not_the_recipes_is_refused(tiny, monkeypatch, value):
    """Accelerate would compute on the CPU, and the run would say that it was another device."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    message = 'device: got meta, and the launch asks for cpu; use device = "auto", or unset ACCELERATE_USE_CPU'
    with (
        pytest.raises(LaunchError, match=message),
        open_accelerator(tiny().runtime, torch.device("meta"), 1),
    ):
        pass
    assert not has_accelerator()
    with open_accelerator(tiny().runtime, torch.device("cpu"), 1) as accelerator:
        assert accelerator.device.type == "cpu"


# Inductor itself uses parts of torch that torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_model_gives_the_same_numbers(tiny, tmp_path):
    """torch.compile changes speed only: the losses agree to four decimals, and names in the file stay plain."""
    keys = {"val_split": 0.1, "val_every": 3, "max_grad_norm": 1.0}
    keys |= {"matmul": "onednn" if has_onednn_linear() else "auto"}
    plain, compiled = (train(tiny(**keys, compile=c, output=str(tmp_path / str(c)))) for c in (False, True))
    assert_close_records(compiled, plain, "loss", "val", abs=5e-5)
    names = [set(load_checkpoint(run).model.state_dict()) for run in (plain, compiled)]
    assert names[0] == names[1]


def test_non_finite_loss_stops_the_run(tiny):
    """A rate at which the weights diverge ends with an error that names the step."""
    with pytest.raises(NonFiniteError, match=r"^step \d+: the (loss|gradient norm) is (nan|inf)") as caught:
        train(tiny(lr=1e30, steps=50))
    assert caught.value.exit_code == 1


def test_non_finite_weights_are_not_saved(tiny, tmp_path):
    """The last update may give non-finite weights after a finite loss."""
    with pytest.raises(NonFiniteError, match="not finite; not saved"):
        train(tiny(lr=1e38, weight_decay=1e30, steps=1))
    assert not list((tmp_path / "run").glob("step-*"))


def test_existing_run_is_replaced_only_with_overwrite(tiny):
    """Nothing of a complete run changes; with overwrite all of it is new, and a file that is not a run's stays."""
    run = train(tiny(save_every=2))
    (run / "notes.txt").write_text("mine")
    before = contents(run)
    train(tiny(save_every=2))
    for recipe in (tiny(save_every=2, resume="never"), tiny(save_every=2, resume=str(run / "step-000002"))):
        with pytest.raises(CheckpointError, match=r"already holds a run.*--output.*--overwrite"):
            train(recipe)
    assert contents(run) == before
    train(tiny(steps=3), overwrite=True)
    assert {p.name for p in run.iterdir()} == {
        *(".lock", "recipe.toml", "run.json", "metrics.jsonl", "timing.jsonl", "latest", "step-000003", "notes.txt")
    }


def test_folder_that_is_no_run_is_not_replaced(tiny, tmp_path):
    """Overwriting replaces runs, and no other folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("precious")
    with pytest.raises(CheckpointError, match="not a run"):
        train(tiny(), overwrite=True)
    assert (tmp_path / "run" / "recipe.toml").read_text() == "precious"


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"), [(16, None, 1, 16), (16, None, 4, 4), (16, 2, 2, 2), (12, 3, 4, 3)]
)
def test_micro_batch_is_the_process_share_unless_given(batch, micro, processes, expected):
    """The global batch is that of the recipe on any number of processes."""
    assert (
        FastSum(TrainTable(batch_size=batch, micro_batch_size=micro), processes=processes).micro_batch_size == expected
    )


@pytest.mark.parametrize(("batch", "micro", "processes"), [(16, None, 3), (16, 8, 4), (12, 4, 4)])
def test_batch_that_processes_cannot_share_is_refused(batch, micro, processes):
    """It would be another batch than that of the recipe."""
    with pytest.raises(RecipeError, match=r"batch_size: got \d+, expected"):
        FastSum(TrainTable(batch_size=batch, micro_batch_size=micro), processes=processes)


def test_user_configuration_of_accelerate_does_not_reach_the_numbers(tiny, tmp_path, monkeypatch):
    """Precision, accumulation and compilation come from the recipe, whatever the environment says."""
    quiet = train(tiny(output=str(tmp_path / "quiet")))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    noisy = train(tiny(output=str(tmp_path / "noisy")))
    assert model_bytes(quiet) == model_bytes(noisy)


def test_another_accelerator_in_the_process_is_refused(tiny, tmp_path):
    """Its settings would override the recipe; it stays as it was."""
    own = Accelerator(cpu=True)
    try:
        with pytest.raises(LaunchError, match="already has an Accelerator"):
            train(tiny())
        assert own.state.device == torch.device("cpu")
    finally:
        forget_accelerator()
    assert not (tmp_path / "run").exists()


def test_records_are_strict_json_and_repeat(tiny, tmp_path):
    """One object of finite numbers a line; times are in timing.jsonl alone, so that metrics.jsonl repeats."""
    runs = [train(tiny(val_split=0.1, val_every=3, output=str(tmp_path / name))) for name in "ab"]
    for name in ("metrics.jsonl", "timing.jsonl"):
        lines = [json.loads(line, parse_constant=pytest.fail) for line in (runs[0] / name).read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert all(isinstance(value, int | float) for line in lines for value in line.values())
    assert (runs[0] / "metrics.jsonl").read_bytes() == (runs[1] / "metrics.jsonl").read_bytes()
