"""Runs with every tokenizer: trained, continued, failed, compared, and generated from."""

import json
import math
import re

import pytest
import torch
from support.fault_points import disturb
from support.runs import contents

from mygpt.checks.compare import compare
from mygpt.checks.replay import replay
from mygpt.checks.verify import verify
from mygpt.data.bpe import train_bpe
from mygpt.errors import MismatchError, NonFiniteError, RecipeError
from mygpt.recipe.tables import check_recipe
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.records import read_records
from mygpt.training.train import train

pytest.importorskip("tokenizers", reason="needs tokenizers")


@pytest.fixture
def keys(tmp_path, text):
    """The recipe keys of each way to tokenize."""
    (tmp_path / "tokenizer.json").write_text(train_bpe([text], 300).metadata.json_text)
    return {
        "char": {},
        "byte": {"tokenizer": "byte"},
        "bpe": {"tokenizer": "bpe", "vocab_size": 300},
        "file": {"tokenizer": "bpe", "tokenizer_file": str(tmp_path / "tokenizer.json")},
    }


EVALUATED = {"val_split": 0.2, "val_every": 3, "save_every": 2, "sampling": "full"}


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "file"])
def test_run_continues_to_the_same_bytes_and_can_be_verified(tiny, tmp_path, keys, kind):
    """Whatever a token is; the checkpoint alone is enough to generate from."""
    whole = train(tiny(**EVALUATED, **keys[kind]))
    where = {"output": str(tmp_path / "stopped" / "run")}
    train(tiny(**EVALUATED, **keys[kind], **where), last_step=4)
    stopped = train(tiny(**EVALUATED, **keys[kind], **where))
    own = ("run.json", "recipe.toml")  # they have the command and the paths
    assert contents(stopped, without=own) == contents(whole, without=own)
    assert verify(whole).identical
    (tmp_path / "tokenizer.json").unlink()
    model, tokenizer, _ = load_checkpoint(whole)
    assert (model.vocab_size, tokenizer.metadata.type) == (tokenizer.vocab_size, "bpe" if kind == "file" else kind)
    assert "\ufffd" not in tokenizer.decode(tokenizer.encode("The text\n"))


def test_held_out_loss_in_bytes_is_recorded(tiny, keys, text, call):
    """It is the loss in bits, over the bytes in place of the tokens."""
    for kind in ("char", "bpe"):
        run = train(tiny(**EVALUATED, **keys[kind]), overwrite=True)
        for record in read_records(run):
            assert (record.val is None) == (record.val_bits_per_byte is None)
            if record.val is None:
                continue
            assert record.val_perplexity == math.exp(record.val)
            in_bits = record.val / math.log(2)
            if kind == "char":
                targets = text[16_001:]  # the first held-out character is predicted from nothing
                assert record.val_bits_per_byte == pytest.approx(in_bits * len(targets) / len(targets.encode()))
            else:
                assert 0.3 * in_bits < record.val_bits_per_byte < 0.8 * in_bits
    code, out, _ = call("generate", "--checkpoint", run, "--max-new-tokens", 20)
    assert code == 0
    assert out.startswith("\n")


def test_other_tokenizer_cannot_continue_a_run(tiny, tmp_path, keys, call):
    """The message names both, and comparing the runs does, too."""
    a = train(tiny(**EVALUATED, **keys["bpe"]))
    changed = keys["bpe"] | {"vocab_size": 301}
    with pytest.raises(
        MismatchError, match=r"\[data\] tokenizer: .* has the tokenizer bpe \w{12}, you gave bpe \w{12}; "
    ):
        train(tiny(**EVALUATED, **changed))
    b = train(tiny(**EVALUATED, **keys["byte"], output=str(tmp_path / "other")))
    result = compare(a, b)
    assert not result.identical
    code, out, _ = call("compare", a, b)
    assert code == 1
    shown = (
        r"held-out loss at step 6: \d+\.\d{4} against \d+\.\d{4} nats per token, \d+\.\d{4} against \d+\.\d{4} bits per"
    )
    assert re.search(shown, out)
    assert any(line.startswith("tokenizer: bpe ") and " against byte " in line for line in result.settings)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_failed_step_is_replayed_by_its_tokens(tiny, tmp_path, keys, kind, monkeypatch):
    """Also where the text of a window does not give its tokens back, as when it begins within a character."""
    (tmp_path / "other.txt").write_text("añ€😀 b c, " * 400, encoding="utf-8")
    recipe = tiny(**keys[kind] | ({"vocab_size": 258} if kind == "bpe" else {}), corpus=str(tmp_path / "other.txt"))

    def break_weight(parts, *_):
        parts.gpt.norm.weight.data[3] = float("nan")

    disturb("before-step", break_weight, count=5, patch=monkeypatch.setattr)
    with pytest.raises(NonFiniteError):
        train(recipe)
    failed = json.loads((tmp_path / "run" / "failed-step-000005" / "batch.json").read_text())
    assert {len(ids) for ids in failed["tokens"]} == {17}
    assert any("\ufffd" in window for window in failed["windows"]) == (kind != "char")
    assert "norm" in replay(tmp_path / "run", torch.device("cpu")).non_finite


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"tokenizer": "char", "vocab_size": 300},
            'vocab_size: got 300, expected nothing, or tokenizer = "bpe" without',
        ),
        ({"tokenizer": "byte", "tokenizer_file": "t.json"}, 'got "t.json", expected nothing, or tokenizer = "bpe"'),
        ({"tokenizer": "bpe", "tokenizer_file": "t.json", "vocab_size": 300}, "vocab_size: got 300, expected nothing"),
    ],
)
def test_keys_that_mean_nothing_together_are_refused(tiny, keys, message):
    """Silently ignored keys would be believed."""
    with pytest.raises(RecipeError, match=message):
        check_recipe(tiny(**keys))
