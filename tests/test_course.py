"""The calls of the course: as in a chapter, with the numbers of `mygpt train`."""

import random
import statistics
import subprocess
import sys

import numpy as np
import pytest
import reference
import torch
from safetensors import safe_open
from support.runs import TINY

import mygpt
from mygpt.course import (
    GPT,
    CharTokenizer,
    cosine_warmup_lr,
    estimate_val_loss,
    generate,
    get_batch,
    load_checkpoint,
    pick_device,
    save_checkpoint,
    set_seed,
)
from mygpt.errors import CheckpointError, NonFiniteError, RecipeError, TokenizerError
from mygpt.recipe.tables import ModelTable
from mygpt.runs.records import read_records
from mygpt.training.train import train

SIZES = {"embed_dim": 16, "num_heads": 2, "num_layers": 2, "max_seq_len": 16}
CHAPTER = {"val_split": 0.1, "val_every": 3, "schedule": "cosine", "warmup": 3, "max_grad_norm": 1.0, "steps": 8}


def small_model(vocab_size=8, **keys) -> GPT:
    set_seed(0)
    return GPT(vocab_size=vocab_size, **SIZES | keys)


def train_as_a_chapter_does(text):
    """A chapter's loop; returns the model, its tokenizer, and each step's (step, loss, held-out loss or None, rate)."""
    tokenizer = CharTokenizer.from_text(text)
    data = tokenizer.encode(text)
    boundary = int((1 - CHAPTER["val_split"]) * len(data))
    train_data, val_data = data[:boundary], data[boundary:]
    set_seed(0)
    model = GPT(vocab_size=tokenizer.vocab_size, **SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    set_seed(42)
    records = []
    for step in range(1, CHAPTER["steps"] + 1):
        lr = cosine_warmup_lr(step, CHAPTER["warmup"], CHAPTER["steps"], 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, y = get_batch(train_data, 4, 16)
        optimizer.zero_grad()
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CHAPTER["max_grad_norm"])
        optimizer.step()
        val = None
        if step % CHAPTER["val_every"] == 0 or step == CHAPTER["steps"]:
            val = estimate_val_loss(model, val_data, 4, 16)
        records.append((step, loss.item(), val, lr))
    return model, tokenizer, records


def test_chapter_gives_the_numbers_of_mygpt_train(text, tiny):
    """Losses, held-out losses and rates, step by step; the plainest implementation agrees, too."""
    _, _, records = train_as_a_chapter_does(text)
    trained = read_records(train(tiny(**CHAPTER)))
    known = {key: value for key, value in TINY.items() if key in reference.Settings.__dataclass_fields__}
    plainest = list(reference.run(text, reference.Settings(**known | CHAPTER)))
    assert len(records) == len(trained) == len(plainest) == 8
    for (step, loss, val, lr), record, (_, plain_loss, plain_val, _, _) in zip(records, trained, plainest, strict=True):
        assert (record.step, record.lr) == (step, pytest.approx(lr, rel=1e-12))
        assert (val is None) is (record.val is None) is (plain_val is None)
        for own, others in ((loss, (record.loss, plain_loss)), (val, (record.val, plain_val))):
            assert own is None or [pytest.approx(own, abs=1e-5, rel=0)] * 2 == list(others)


def test_chapter_saves_loads_and_generates(text, tmp_path, command):
    """The loaded model has the same weights, writes the same text, and is a checkpoint for `mygpt generate`."""
    model, tokenizer, _ = train_as_a_chapter_does(text)
    path = tmp_path / "saved" / "model.safetensors"
    save_checkpoint(model, tokenizer, path, step=8)
    loaded, loaded_tokenizer = load_checkpoint(path)
    assert loaded_tokenizer.chars == tokenizer.chars
    assert type(loaded) is GPT
    assert not loaded.training
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    written = []
    for each in (model, loaded):
        set_seed(1)
        prompt = loaded_tokenizer.encode("The ").unsqueeze(0)
        out = generate(each, prompt, max_new_tokens=20, temperature=0.8, top_k=5)
        written.append(loaded_tokenizer.decode(out[0]))
    assert written[0] == written[1]
    assert written[0].startswith("The ")
    assert len(written[0]) == 24
    most_likely = tokenizer.decode(generate(model, tokenizer.encode("The ")[None], 20, temperature=0)[0])
    arguments = ("--checkpoint", path, "--prompt", "The ", "--max-new-tokens", 20, "--temperature", 0)
    assert command("generate", *arguments, "--device", "cpu").stdout == most_likely + "\n"


def test_prompts_are_continued_side_by_side():
    """Each row of a batch of prompts, beyond the longest context too; the model keeps its mode."""
    model = small_model(dropout=0.5).train()
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = generate(model, prompts, max_new_tokens=30, temperature=0)
    assert out.shape == (2, 33)
    assert torch.equal(out[:, :3], prompts)
    assert torch.equal(out[1:], generate(model, prompts[1:], max_new_tokens=30, temperature=0))
    assert model.training


def test_tokenizer_is_saved_and_loaded(tmp_path):
    """As JSON; another or a missing file is named."""
    tokenizer = CharTokenizer.from_text("hé\nllo")
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = CharTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.chars == tokenizer.chars == ["\n", "h", "l", "o", "é"]
    (tmp_path / "other.json").write_text("[1]")
    for name in ("other.json", "missing.json"):
        with pytest.raises(TokenizerError, match=f"{name}: not a tokenizer that was saved here"):
            CharTokenizer.load(tmp_path / name)


def test_trained_run_loads_and_is_saved_as_the_same_bytes(tiny, tmp_path):
    """Weights have their plain names, so that a run's checkpoint is a model of the course, and the reverse."""
    run = train(tiny(dropout=0.2))
    model, tokenizer = load_checkpoint(run)
    assert model.dropout.p == 0.2
    save_checkpoint(model, tokenizer, tmp_path / "copy.safetensors", step=6)
    (trained,) = run.glob("step-*/model.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == trained.read_bytes()
    # Training can continue.
    model.train()
    _, loss = model(*get_batch(tokenizer.encode("some text to go on with, long enough"), 2, 8))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tokenizer_encodes_to_a_tensor_for_get_batch():
    """A 1-d int64 tensor; decoding takes it or a list, and refuses other ids."""
    tokenizer = CharTokenizer.from_text("hello")
    ids = tokenizer.encode("hole")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [1, 3, 2, 0]
    assert tokenizer.vocab_size == 4
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == "hole"
    x, y = get_batch(tokenizer.encode("hello" * 9), batch_size=3, seq_len=5)
    assert x.shape == y.shape == (3, 5)
    assert torch.equal(x[:, 1:], y[:, :-1])
    with pytest.raises(TokenizerError, match="character 'x'"):
        tokenizer.encode("x")
    with pytest.raises(IndexError, match="token id -1"):
        tokenizer.decode([-1])


def test_model_equals_the_model_of_mygpt():
    """The same weights from the same seed, the same logits and loss; the same defaults as in recipes."""
    set_seed(0)
    course = GPT(vocab_size=65)
    torch.manual_seed(0)
    plain = mygpt.GPT(ModelTable(), vocab_size=65)
    assert course.config == plain.config
    assert course.num_params() == 207_296
    assert list(course.state_dict()) == list(plain.state_dict())
    for name, weight in plain.state_dict().items():
        assert torch.equal(course.state_dict()[name], weight)
    x, y = get_batch(torch.arange(400) % 65, 2, 16)
    logits, loss = course(x, y)
    alone, nothing = course(x)
    assert logits.shape == (2, 16, 65)
    assert nothing is None
    assert torch.equal(logits, alone)
    assert torch.equal(logits, plain(x))
    assert torch.equal(loss, plain(x, y))


@pytest.mark.parametrize("training", [True, False])
def test_estimate_is_the_mean_over_random_batches(training):
    """In eval mode, without gradients, and the mode is restored; the models of mygpt are accepted, too."""
    model = small_model(dropout=0.3).train(training)
    data = torch.randint(0, 8, (300,), generator=torch.Generator().manual_seed(1))
    set_seed(7)
    estimate = estimate_val_loss(model, data, batch_size=4, seq_len=8)
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    set_seed(7)
    model.eval()
    losses = [model(*get_batch(data, 4, 8))[1].item() for _ in range(10)]
    assert estimate == pytest.approx(statistics.mean(losses), abs=1e-6)
    plain = mygpt.GPT(model.config, vocab_size=8)
    plain.load_state_dict(model.state_dict())
    set_seed(7)
    assert estimate_val_loss(plain, data, 4, 8, n_eval_batches=10) == estimate


def test_seed_sets_all_three_generators():
    """Those of torch, numpy and Python."""
    draws = []
    for seed in (3, 3, 4):
        set_seed(seed)
        draws.append((torch.rand(1).item(), np.random.random(), random.random()))
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


@pytest.mark.parametrize(
    ("available", "expected"), [((True, True), "cuda"), ((False, True), "mps"), ((False, False), "cpu")]
)
def test_device_is_the_first_available_kind(monkeypatch, available, expected):
    """cuda before mps before cpu."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available[0])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(available[0]))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available[1])
    assert pick_device() == pick_device("auto") == torch.device(expected)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 3}, "GPT [model] num_heads: got 3, expected a divisor of embed_dim = 16"),
        ({"dropout": 1.0}, "GPT [model] dropout: got 1.0, expected less than 1"),
    ],
)
def test_wrong_sizes_cost_one_line(sizes, message):
    """As in a recipe: the value, and what was expected."""
    with pytest.raises(RecipeError) as caught:
        small_model(**sizes)
    assert str(caught.value) == message


def test_ids_of_a_wrong_shape_are_named():
    """A forgotten batch axis, too many tokens, an empty prompt."""
    model, ids = small_model(), torch.tensor([1, 2, 3])
    for call in (lambda: model(ids), lambda: generate(model, ids, 5)):
        with pytest.raises(
            ValueError, match=r"got ids of shape \(3,\), expected \(batch, tokens\): use ids\.unsqueeze"
        ):
            call()
    with pytest.raises(ValueError, match="got 17 tokens, expected from 1 to max_seq_len = 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match="got 0 tokens"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 5)


def test_failed_saves_do_not_change_existing_files(tiny, tmp_path):
    """Non-finite weights, a folder, or a file of a run: an error, and the existing file does not change."""
    model, tokenizer = small_model(), CharTokenizer.from_text("abcdefgh")
    path = tmp_path / "model.safetensors"
    save_checkpoint(model, tokenizer, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="has 9 characters, the model a vocab_size of 8"):
        save_checkpoint(model, CharTokenizer.from_text("abcdefghi"), path)
    with pytest.raises(CheckpointError, match="a folder"):
        save_checkpoint(model, tokenizer, tmp_path)
    run = train(tiny())
    (trained,) = run.glob("step-*/model.safetensors")
    saved = trained.read_bytes()
    with pytest.raises(CheckpointError, match="belongs to a run"):
        save_checkpoint(model, tokenizer, trained)
    assert trained.read_bytes() == saved
    torch.nn.init.constant_(model.norm.bias, float("nan"))
    with pytest.raises(NonFiniteError, match=r"norm\.bias"):
        save_checkpoint(model, tokenizer, path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".tmp-*"))


def test_compiled_models_are_saved_under_their_plain_names(tmp_path):
    """torch.compile renames the weights of the model that it returns; no other program knows these names."""
    model, tokenizer = small_model(), CharTokenizer.from_text("abcdefgh")
    save_checkpoint(torch.compile(model, backend="eager"), tokenizer, tmp_path / "a.safetensors")
    save_checkpoint(model, tokenizer, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())


def test_star_import_is_all_that_a_notebook_needs(tmp_path):
    """In an empty folder, without launcher and recipe, every name is there."""
    code = "from mygpt.course import *; x = CharTokenizer.from_text('ab').encode('abab'); print(GPT(2)(x[None])[1])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("None\n", "")
