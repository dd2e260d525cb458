"""Runs on a CUDA device."""

import pytest
import torch
from safetensors.torch import load_file
from support.runs import assert_close_records, assert_same_run

from mygpt.checks.compare import compare
from mygpt.checks.replay import replay
from mygpt.data.dataset import load_dataset
from mygpt.data.prepare import TokenizerChoice, prepare
from mygpt.errors import NonFiniteError
from mygpt.runs.records import read_records
from mygpt.training.gradient_sum import gradient_sum_for
from mygpt.training.loop import train_step
from mygpt.training.parts import build_parts, open_accelerator
from mygpt.training.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KEYS = {
    "device": "cuda",
    "embed_dim": 64,
    "num_heads": 4,
    "max_seq_len": 64,
    "seq_len": 64,
    "batch_size": 16,
    "steps": 60,
    "lr": 1e-3,
    "max_grad_norm": 1.0,
    "schedule": "cosine",
    "warmup": 10,
    "val_split": 0.1,
    "val_every": 20,
}


@pytest.fixture(autouse=True)
def _restore_determinism():
    # The compiler gives up on a function that it has compiled for too many runs in one process.
    torch.compiler.reset()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.*:UserWarning")
def test_cuda_runs_repeat_to_the_last_bit(tiny, tmp_path, precision, compiled):
    """Two runs on one GPU write the same weights, with dropout and in every mode."""
    keys = KEYS | {"precision": precision, "compile": compiled, "dropout": 0.1}
    runs = []
    for name in "ab":
        torch.compiler.reset()
        runs.append(train(tiny(**keys, output=str(tmp_path / name))))
    assert compare(*runs).weights.differences == []


def test_cuda_gives_the_cpu_numbers(tiny, tmp_path):
    """fp32 on CUDA is fp32: the losses of sixty steps agree with the CPU's to four decimals."""
    runs = [train(tiny(**KEYS | {"device": device}, output=str(tmp_path / device))) for device in ("cuda", "cpu")]
    assert_close_records(*runs, "loss", "val", abs=5e-5)


def test_bf16_stays_near_fp32(tiny, tmp_path):
    """The last held-out losses differ by at most 0.02, as on the CPU."""
    runs = [train(tiny(**KEYS | {"precision": p}, output=str(tmp_path / p))) for p in ("fp32", "bf16")]
    last = [read_records(run)[-1].val for run in runs]
    assert last[1] == pytest.approx(last[0], abs=0.02)


def test_compiled_stays_at_the_eager_numbers(tiny, tmp_path):
    """torch.compile changes speed only."""
    runs = [train(tiny(**KEYS | {"compile": c}, output=str(tmp_path / str(c)))) for c in (False, True)]
    assert_close_records(*runs, "loss", abs=5e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_cuda_runs_resume_to_the_last_bit(tiny, tmp_path, precision, compiled, reduction):
    """Stopped in warmup and again later, a run writes the files of one never stopped: dropout draws on the GPU."""
    keys = KEYS | {"precision": precision, "compile": compiled, "dropout": 0.1, "micro_batch_size": 8, "save_every": 25}
    keys |= {"reduction": reduction}
    whole = train(tiny(**keys, output=str(tmp_path / "whole")))
    for until in (5, 30, None):
        torch.compiler.reset()
        parted = train(tiny(**keys, output=str(tmp_path / "parted")), last_step=until)
    assert_same_run(parted, whole)


def test_checkpoint_moves_between_cpu_and_cuda(tiny, tmp_path, capsys):
    """A warning says that the last bits may differ; the losses agree to four decimals."""
    keys = KEYS | {"log_every": 1, "save_every": 30}
    alone = train(tiny(**keys | {"device": "cpu"}, output=str(tmp_path / "alone")))
    for device, until in (("cpu", 20), ("cuda", 40), ("cpu", None)):
        moved = train(tiny(**keys | {"device": device}, output=str(tmp_path / "moved")), last_step=until)
    assert "device cpu -> cuda" in capsys.readouterr().err
    assert_close_records(moved, alone, "loss", abs=5e-5)


@pytest.mark.parametrize("log_every", [1, 1000])
def test_device_withholds_the_update_of_a_non_finite_step(tiny, tmp_path, log_every):
    """The host may read later: no step from the non-finite one on changes a weight, and the record is of that step."""
    keys = KEYS | {"lr": 1e30, "warmup": 0, "max_grad_norm": 0.0, "log_every": log_every, "print_every": 1000}
    with pytest.raises(NonFiniteError, match=r"^step 2: the loss is nan"):
        train(tiny(**keys))
    before = train(tiny(**keys, output=str(tmp_path / "before")), last_step=1)
    failed = tmp_path / "run" / "failed-step-000002" / "model.safetensors"
    for name, weight in load_file(before / "step-000001" / "model.safetensors").items():
        assert torch.equal(weight, load_file(failed)[name]), name
    assert replay(tmp_path / "run", torch.device("cuda")).non_finite


def test_corpus_too_large_for_the_device_gives_the_same_bits(tiny, tmp_path, text_file, monkeypatch):
    """Its windows are gathered on the host and copied; a small corpus is on the device."""
    prepare([text_file], tmp_path / "corpus", TokenizerChoice("byte", 0, None))
    keys = KEYS | {"corpus": str(tmp_path / "corpus")}
    runs = [train(tiny(**keys, output=str(tmp_path / "device")))]
    monkeypatch.setattr("mygpt.data.dataset.MAX_ON_DEVICE", 0)
    runs.append(train(tiny(**keys, output=str(tmp_path / "host"))))
    assert compare(*runs).identical


@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_nothing_waits_for_the_device_between_readings(tiny, reduction):
    """torch raises at whatever would make the host wait: the host can prepare the next steps meanwhile."""
    recipe = tiny(**KEYS | {"reduction": reduction, "dropout": 0.1, "micro_batch_size": 8})
    gradient_sum, device = gradient_sum_for(recipe), torch.device("cuda")
    dataset = load_dataset(recipe.data, recipe.train.seq_len)
    with open_accelerator(recipe.runtime, device, gradient_sum.accumulation_steps) as accelerator:
        parts = build_parts(recipe, accelerator, dataset, gradient_sum)
        for step in range(1, 9):
            # The first steps make the optimizer's state and choose kernels.
            torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
            try:
                train_step(parts, parts.stream.batch(), step)
                parts.scheduler.step()
                parts.generators()
            finally:
                torch.cuda.set_sync_debug_mode("default")
