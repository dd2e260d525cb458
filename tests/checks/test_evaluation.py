"""`mygpt eval`: the loss of a saved model."""

import json
import shutil

import pytest

from mygpt.checks.evaluation import character_lengths
from mygpt.data.prepare import TokenizerChoice, prepare
from mygpt.data.tokenizer import ByteTokenizer
from mygpt.runs.records import read_records
from mygpt.training.train import train


@pytest.fixture
def other(tmp_path, text):
    """Another text, of characters that the first has."""
    path = tmp_path / "other.txt"
    path.write_text(text[::-1][:3000], encoding="utf-8", newline="")
    return path


def answer(call, *arguments) -> dict:
    code, out, err = call("eval", *arguments, "--json")
    notes = [line for line in err.splitlines() if "is the text that the run was trained on" not in line]
    assert (code, notes) == (0, [])
    return json.loads(out)


@pytest.mark.parametrize(
    "keys",
    [
        {"dropout": 0.2, "micro_batch_size": 2},
        {"tokenizer": "bpe", "vocab_size": 270},
        {"hold_out": "pieces", "reduction": "exact", "matmul": "onednn"},
    ],
    ids=["char", "bpe", "pieces"],
)
def test_recorded_loss_is_found_again(tiny, call, keys):
    """Of every checkpoint of a run, bit for bit, by any of its names; nothing is written."""
    run = train(tiny(val_split=0.2, val_every=3, save_every=3, save_best=True, sampling="full", lr=1e-2, **keys))
    recorded = {record.step: record for record in read_records(run) if record.val is not None}
    before = sorted(path.name for path in run.rglob("*"))
    for name, step in (("", 6), ("latest", 6), ("step-000003", 3), ("step-000003/model.safetensors", 3)):
        found = answer(call, run / name)
        assert found["step"] == step
        assert found["loss"]["mean"] == recorded[step].val
        assert found["loss"]["stderr"] == recorded[step].val_stderr
        assert found["bits_per_byte"]["mean"] == recorded[step].val_bits_per_byte
        assert found["perplexity"] == recorded[step].val_perplexity
    assert sorted(path.name for path in run.rglob("*")) == before


def test_any_text_can_be_evaluated(tiny, call, other, tmp_path):
    """All of it, also by a model file alone, which has no run; characters are counted, and not bytes."""
    other.write_text("Grüße, wie Öl. " * 100, encoding="utf-8")
    run = train(tiny(corpus=str(other), steps=2))
    shutil.copy(run / "step-000002" / "model.safetensors", tmp_path / "alone.safetensors")
    found = answer(call, tmp_path / "alone.safetensors", "--corpus", other)
    assert found["tokens"] == 1499
    assert found == answer(call, run, "--corpus", other) | {"checkpoint": found["checkpoint"]}
    assert found["bits_per_character"]["mean"] * 1499 == pytest.approx(found["bits_per_byte"]["mean"] * 1799)
    assert found["bits_per_character"]["mean"] == pytest.approx(found["loss"]["mean"] / 0.6931471805599453)
    code, out, _ = call("eval", run, "--corpus", other)
    assert code == 0
    assert f"loss: {found['loss']['mean']:.4f} +- " in out
    assert "1,499 tokens in 94 windows" in out


def test_text_that_was_trained_on_is_named(tiny, call, other, text_file):
    """Where the run held nothing of it out; another text, and the text that it held out, are no training text."""
    note = f"note: {text_file} is the text that the run was trained on: its loss says nothing about unseen text\n"
    run = train(tiny(steps=2))
    assert call("eval", run, "--corpus", text_file)[::2] == (0, note)
    assert call("eval", run, "--corpus", other)[::2] == (0, "")
    run = train(tiny(steps=2, val_corpus=str(other), val_every=2), overwrite=True)
    assert call("eval", run, "--corpus", text_file)[::2] == (0, note)
    assert note not in call("eval", run, "--corpus", other)[2]


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_prepared_corpus_is_evaluated_with_the_tokenizer_of_the_model(tiny, call, text, tmp_path, kind, monkeypatch):
    """Its documents are encoded as the model needs them, without a token between them if its tokenizer has none."""
    monkeypatch.chdir(tmp_path)
    documents = [text[start : start + 700] for start in range(0, 7000, 700)]
    (tmp_path / "held.txt").write_text("".join(documents), newline="")
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    run = train(tiny(tokenizer=kind, steps=2))
    code, _, err = call("eval", run, "--corpus", tmp_path / "held.jsonl")
    assert code == 2
    command = err.partition("give the folder: ")[2]
    assert command == f"mygpt data prepare {tmp_path / 'held.jsonl'} --out data/held\n"
    assert call(*command.split()[1:], "--tokenizer", "char" if kind == "byte" else "byte")[0] == 0
    found, expected = (answer(call, run, "--corpus", name) for name in ("data/held", tmp_path / "held.txt"))
    assert found == expected | {"text": "data/held"}


def test_prepared_documents_end_as_the_tokenizer_of_the_model_has_it(tiny, call, text, tmp_path):
    """A token ends each of them, as when they are prepared with that tokenizer."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text[n : n + 99]}) + "\n" for n in range(50)))
    for kind in ("byte", "char"):
        prepare([tmp_path / "a.jsonl"], tmp_path / kind, TokenizerChoice(kind, 0, None))
    run = train(tiny(corpus=str(tmp_path / "byte"), steps=2))
    found, expected = (answer(call, run, "--corpus", tmp_path / kind) for kind in ("char", "byte"))
    assert found == expected | {"text": found["text"]}
    assert found["tokens"] == 50 * 100 - 1


def test_random_windows_of_a_text(tiny, call, other):
    """`own-stream` takes as many batches as are asked for."""
    run = train(tiny(tokenizer="byte", steps=2))
    found = answer(call, run, "--corpus", other, "--sampling", "own-stream", "--eval-batches", 3)
    assert (found["windows"], found["tokens"], found["population"]) == (12, 12 * 16, "this text")
    assert answer(call, run, "--corpus", other)["population"] == "text like this one"


def test_held_out_text_needs_no_training_text(tiny, call, other, tmp_path, text_file):
    """With a val_corpus, what the run was trained on may be gone."""
    gone = tmp_path / "gone.txt"
    shutil.copy(text_file, gone)
    run = train(tiny(corpus=str(gone), val_corpus=str(other), val_every=6, sampling="full"))
    gone.unlink()
    assert answer(call, run)["loss"]["mean"] == read_records(run)[-1].val
    other.write_text(other.read_text()[::-1], newline="")
    assert "has changed since the model was trained" in call("eval", run)[2]


def test_characters_begin_with_one_byte():
    """A byte that continues a character begins none."""
    lengths = character_lengths(ByteTokenizer())
    assert lengths[list("aü€😀".encode())].tolist() == [1, 1, 0, 1, 0, 0, 1, 0, 0, 0]


def test_one_process_of_a_launch_answers(tiny, call, other, monkeypatch):
    """The others have nothing to add."""
    run = train(tiny(val_corpus=str(other), val_every=6))
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert call("eval", run) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert answer(call, run)["step"] == 6


def test_mistakes_cost_one_line(tiny, call, other, tmp_path):
    """What to give is in the message."""
    run = train(tiny(steps=2))
    alone = tmp_path / "alone.safetensors"
    shutil.copy(run / "step-000002" / "model.safetensors", alone)
    held_out = train(tiny(steps=2, val_split=0.2, output=str(tmp_path / "held"), corpus=str(other)))
    other.write_text(other.read_text()[::-1])
    (tmp_path / "new.txt").write_text("中" * 100)
    (tmp_path / "short.txt").write_text("the the t")
    for arguments, message in (
        ((run,), "its recipe holds no text out; give a text that it was not trained on with --corpus"),
        ((alone,), "belongs to no run, so no text is held out; give a text with --corpus"),
        ((held_out,), "has changed since the model was trained; put it back, or give --corpus"),
        ((run, "--corpus", tmp_path / "new.txt"), "is not among the 86 characters of the vocabulary of"),
        ((run, "--corpus", tmp_path / "nothing.txt"), "no such text file"),
        ((run, "--corpus", tmp_path / "short.txt"), "short.txt: has 9 characters, expected more than seq_len + 1 = "),
        ((run, "--eval-batches", 3), "--eval-batches: all of the text is evaluated; add --sampling own-stream"),
        ((tmp_path / "new.txt",), "new.txt: not a model; expected a run, a step directory or a model.safetensors"),
        ((run / "best",), "keeps no best checkpoint"),
        ((tmp_path / "nothing",), "no such run, step directory or model file"),
        ((run, "--corpus", other, "--eval-batches", 0), "--eval-batches: got 0, expected at least 1"),
    ):
        code, out, err = call("eval", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err
