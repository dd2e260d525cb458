"""Comparing two models bit by bit."""

import json
import re
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import rewrite, save, small_gpt

from mygpt.checks.compare import compare, table
from mygpt.data.tokenizer import CharTokenizer
from mygpt.errors import DamagedCheckpointError
from mygpt.model.gpt import GPT
from mygpt.recipe.tables import ModelTable
from mygpt.runs.records import read_records
from mygpt.training.train import train


@pytest.fixture
def run(tmp_path):
    """A directory with two checkpoints of the same weights."""
    for step in (3, 6):
        save(tmp_path, small_gpt(), step)
    return tmp_path


def test_equal_weights_are_identical_at_any_step(run):
    """The steps are part of the result, but not a difference."""
    result = compare(run / "step-000003", run)
    assert result.weights.differences == []
    assert result.steps == (3, 6)
    assert result.weights.values == sum(
        t.numel() for t in load_file(run / "step-000003" / "model.safetensors").values()
    )


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.int32])
def test_ulp_distance_of_any_type_is_exact(run, kind):
    """The whole range apart takes one bit more than the type has."""
    ends = [torch.finfo(kind).min, torch.finfo(kind).max] if kind.is_floating_point else [0, 7]
    values = torch.tensor(ends, dtype=kind)
    for step, order in (("step-000003", (0, 1)), ("step-000006", (1, 0))):
        tensor = values[list(order)]
        rewrite(run / step / "model.safetensors", tensors=lambda parts, t=tensor: parts.update(extra=t))
    (difference,) = compare(run / "step-000003", run).weights.differences
    if kind.is_floating_point:
        view = {torch.float64: np.int64, torch.float16: np.int16}[kind]
        assert difference.max_ulp == 2 * int(tensor.max().numpy().view(view))
    else:
        assert (difference.max_abs, difference.max_ulp) == (7, None)


def test_one_bit_is_a_difference(run):
    """One unit in the last place of one weight is found, named and measured; so is the sign of a zero."""

    def change(tensors):
        tensors["norm.weight"][2] = float(np.nextafter(np.float32(1), np.float32(2)))
        tensors["norm.bias"][:2] = -0.0

    rewrite(run / "step-000006" / "model.safetensors", tensors=change)
    bias, weight = compare(run / "step-000003", run).weights.differences
    assert (weight.name, weight.text, weight.max_ulp) == ("norm.weight", "1 of 8", 1)
    assert weight.max_abs == pytest.approx(2**-23)
    assert (bias.name, bias.text, bias.max_abs, bias.max_ulp) == ("norm.bias", "2 of 8", 0.0, 0)


def test_ulp_distance_crosses_zero(run):
    """From the smallest negative to the smallest positive number it is two steps."""
    tiny = np.float32(1e-45)

    def put(value):
        return lambda tensors: tensors["norm.bias"].__setitem__(0, float(value))

    rewrite(run / "step-000003" / "model.safetensors", tensors=put(-tiny))
    rewrite(run / "step-000006" / "model.safetensors", tensors=put(tiny))
    (difference,) = compare(run / "step-000003", run).weights.differences
    assert difference.max_ulp == 2


def test_large_vocabularies_are_compared_in_time_that_grows_with_them(tmp_path):
    """Texts of tens of thousands of characters, such as Chinese ones: a second, not minutes."""
    config = ModelTable(embed_dim=2, num_heads=1, num_layers=1, max_seq_len=2)
    for name, start in (("a", 0x10000), ("b", 0x10003)):
        (tmp_path / name).mkdir()
        tokenizer = CharTokenizer("".join(map(chr, range(start, start + 50_000))))
        save(tmp_path / name, GPT(config, 50_000), 1, config, tokenizer)
    started_at = time.perf_counter()
    (line,) = compare(tmp_path / "a", tmp_path / "b").settings
    assert time.perf_counter() - started_at < 5
    assert line.endswith(
        f"{''.join(map(chr, range(0x10000, 0x10003)))!r} against {chr(0x1C350) + chr(0x1C351) + chr(0x1C352)!r}"
    )


def test_other_shapes_and_vocabularies_are_differences(run, tmp_path):
    """Models of other sizes are compared all the same; settings and tensors are listed apart."""
    other = tmp_path / "other"
    other.mkdir()
    table_b = ModelTable(embed_dim=8, num_heads=4, num_layers=2, max_seq_len=4)
    tokenizer = CharTokenizer("abcd")
    save(other, GPT(table_b, 4), 6, table_b, tokenizer)
    result = compare(run, other)
    lines = "\n".join(table(result.weights.differences))
    assert result.settings[:2] == ["num_heads: 2 against 4", "num_layers: 1 against 2"]
    assert result.settings[2].startswith("vocabulary: 7 against 4 characters")
    assert "float32 [7, 8] against float32 [4, 8]" in lines
    assert "only in" in lines


HELD_OUT = {"val_split": 0.2, "val_every": 3, "sampling": "own-stream"}


def test_held_out_losses_are_compared_window_by_window(tiny, tmp_path, call):
    """Of two runs on the same text: the paired difference, a verdict, and the keys that differ, after "different"."""
    for name, lr in (("a", 1e-4), ("b", 1e-2)):
        train(tiny(**HELD_OUT, lr=lr, output=str(tmp_path / name)))
    code, out, _ = call("compare", tmp_path / "a", tmp_path / "b")
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith("different: ")
    assert lines[0].endswith("; --tensors lists them")
    assert "recipe: lr 0.0001 against 0.01" in lines
    assert not any(line.startswith("environment") for line in lines)
    before, after = (read_records(tmp_path / name)[-1] for name in "ab")
    result = compare(tmp_path / "a", tmp_path / "b").held_out
    nats, bits, manner = result.difference
    assert nats.mean == pytest.approx(after.val - before.val)
    assert bits.mean == pytest.approx(after.val_bits_per_byte - before.val_bits_per_byte)
    assert nats.stderr < min(before.val_stderr, after.val_stderr)
    assert manner == "paired over 40 windows"
    assert re.search(r"^B - A: -\d\.\d{4} \+- 0\.\d{4} nats per token, .* bits per byte \(paired", out, re.MULTILINE)
    assert "verdict: B is better on this held-out text: 95% interval -" in out
    assert "blocks.0" not in out
    assert "blocks.0" in call("compare", tmp_path / "a", tmp_path / "b", "--tensors")[1]


def test_identical_runs_say_no_more(tiny, tmp_path, call):
    """Evaluations alone change no weight, and the state of the optimizer is compared without their losses."""
    for name, keys in (("a", HELD_OUT), ("b", HELD_OUT), ("c", {"val_split": 0.2})):
        train(tiny(**keys, output=str(tmp_path / name)))
    code, out, _ = call("compare", tmp_path / "a", tmp_path / "b")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["identical:", "optimizer", "metrics"]
    code, out, _ = call("compare", tmp_path / "a", tmp_path / "c")
    assert code == 0
    assert out.splitlines()[1].startswith("optimizer and generators identical")
    assert "recipe: val_every 3 against 0" in out


def test_other_texts_are_not_compared(tiny, tmp_path, text, call):
    """Their losses say nothing about the models."""
    (tmp_path / "other.txt").write_text(text[::-1], encoding="utf-8")
    train(tiny(**HELD_OUT, output=str(tmp_path / "a")))
    train(tiny(**HELD_OUT, corpus=str(tmp_path / "other.txt"), output=str(tmp_path / "b")))
    result = compare(tmp_path / "a", tmp_path / "b")
    assert result.held_out is None
    assert "corpus: another text" in result.recipe
    code, out, _ = call("compare", tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert out.endswith("verdict: none, because they were evaluated on different texts\n")
    (tmp_path / "b" / "step-000006" / "state.safetensors").unlink()  # which is not needed
    steps = [tmp_path / name / "step-000006" for name in "ab"]
    assert call("compare", *steps)[1].endswith("verdict: none, because they were evaluated on different texts\n")
    assert json.loads(call("compare", *steps, "--json")[1])["no_verdict"] == "they were evaluated on different texts"
    train(tiny(**HELD_OUT | {"val_split": 0.4}, output=str(tmp_path / "more")))
    answer = json.loads(call("compare", tmp_path / "a", tmp_path / "more", "--json")[1])
    assert (answer["held_out"], answer["no_verdict"]) == (None, "they hold out different parts of the text")
    train(tiny(corpus=str(tmp_path / "other.txt"), output=str(tmp_path / "never")))
    out = call("compare", tmp_path / "a", tmp_path / "never")[1]
    assert out.endswith("verdict: none, because a checkpoint has no held-out loss\n")


def test_one_window_has_no_verdict(tiny, tmp_path):
    """And no error."""
    keys = {**HELD_OUT, "eval_batches": 1, "batch_size": 1}
    for name, lr in (("a", 1e-4), ("b", 1e-2)):
        train(tiny(**keys, lr=lr, output=str(tmp_path / name)))
    *_, verdict = compare(tmp_path / "a", tmp_path / "b").verdict_lines()
    assert verdict == "verdict: none, because a single held-out window has no standard error"


def test_records_after_the_compared_checkpoint_are_left_out(tiny, tmp_path):
    """A run that was killed has some: their losses are not those of the model that is compared."""
    a = train(tiny(**HELD_OUT, output=str(tmp_path / "a")), last_step=3)
    b = train(tiny(**HELD_OUT, lr=1e-4, output=str(tmp_path / "b")))
    before = compare(a, b).records
    again = train(tiny(**HELD_OUT, output=str(tmp_path / "again")), last_step=6)
    (a / "metrics.jsonl").write_bytes((again / "metrics.jsonl").read_bytes())
    assert compare(a, b).records == before
    assert before.totals[0] == 3


def test_damaged_evaluations_are_not_compared(tiny, tmp_path):
    """One bit of a held-out loss would give a verdict that is nonsense."""
    for name in ("a", "b"):
        train(tiny(**HELD_OUT, lr=1e-3 if name == "a" else 1e-4, output=str(tmp_path / name)))
    file = tmp_path / "b" / "evaluations.jsonl"
    content = bytearray(file.read_bytes())
    content[content.rindex(b'"losses"') + 20] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"evaluations\.jsonl: damaged: line \d is no record"):
        compare(tmp_path / "a", tmp_path / "b")


def test_same_weights_have_no_verdict(tiny, tmp_path, call):
    """Their losses differ only where the held-out windows do."""
    for sampling in ("own-stream", "full"):
        train(tiny(**HELD_OUT | {"sampling": sampling}, output=str(tmp_path / sampling)))
    code, out, _ = call("compare", tmp_path / "own-stream", tmp_path / "full")
    assert code == 1
    assert out.startswith("identical: ")
    assert out.endswith("verdict: none, because these are the same weights\n")
