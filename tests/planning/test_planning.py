"""What `mygpt init` finds in a text, chooses and writes."""

import json
import math
import os
import random
import runpy

import numpy as np
import pytest
from support.commands import REPOSITORY

from mygpt.data.corpus import load_corpus
from mygpt.data.prepare import TokenizerChoice, prepare
from mygpt.data.prepared import open_prepared
from mygpt.errors import CorpusError, MygptError, OutOfMemoryError
from mygpt.planning import plan as planning
from mygpt.planning.outlook import CONSTANTS, SPREAD, predict
from mygpt.planning.plan import SIZES, Size, choose, part_to_time, recipe_for, split_time
from mygpt.planning.text import NGRAM, SAMPLE, look_at, ngram_bits, ngram_probabilities, tokenizer_keys
from mygpt.planning.write import recipe_text, seen_from, summary
from mygpt.recipe.files import load_recipe
from mygpt.recipe.flags import parse_recipe
from mygpt.recipe.tables import check_recipe


@pytest.fixture
def timed(monkeypatch):
    """A function that lets a machine have a speed, in floating-point operations a second; returns what it was asked."""

    def pretend(flops_per_second):
        asked = []

        def time_training(recipe, text, device):
            asked.append(recipe)
            return flops_per_second / (72 * recipe.model.num_layers * recipe.model.embed_dim**2)

        monkeypatch.setattr(planning, "time_training", time_training)
        return asked

    return pretend


def words(size, seed=0):
    """A text of so many bytes, of words that recur."""
    chance = random.Random(seed)
    known = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 7))) for _ in range(300)]
    return " ".join(chance.choice(known) for _ in range(size // 5))[:size]


@pytest.fixture
def write(tmp_path):
    """A function that writes a text file and returns its path."""

    def make(text, name="text.txt"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8", newline="")
        return str(path)

    return make


@pytest.fixture
def long_text(write):
    return look_at(write(words(99_000)), is_prepared=False)


def test_text_is_looked_at(text_file):
    text = look_at(str(text_file), is_prepared=False)
    assert text.bytes == text_file.stat().st_size
    assert text.tokenizer.decode(text.ids) == text_file.read_text()
    assert text.tokens == len(text.ids)
    assert 1 < text.ngram_bits < 4


def test_long_text_is_looked_at_from_end_to_end(write):
    """Its parts may be of different kinds."""
    text = look_at(write("a" * SAMPLE + "b" * SAMPLE), is_prepared=False)
    assert text.tokens == 2 * SAMPLE
    sample = text.tokenizer.decode(text.ids)
    assert sample.count("a") == sample.count("b") == SAMPLE // 2


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_prepared_text_is_looked_at_through_its_tokens(write, tmp_path, kind):
    """What stands between short documents is no text, and is not predicted as such."""
    lines = [json.dumps({"text": line + "\n"}) for line in words(30_000).split(" ")]
    whole = look_at(write(words(30_000).replace(" ", "\n") + "\n"), is_prepared=False)
    source = tmp_path / "lines.jsonl"
    source.write_text("\n".join(lines))
    prepare([source], tmp_path / "tokens", TokenizerChoice(kind, 0, None))
    text = look_at(str(tmp_path / "tokens"), is_prepared=True)
    assert text.bytes == whole.bytes
    assert text.tokens == len(text.ids) == len(open_prepared(tmp_path / "tokens").tokens) == whole.bytes + len(lines)
    assert text.ngram_bits == whole.ngram_bits
    assert text.tokenizer_keys == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("too short", "has 9 bytes, expected at least 10,000"),
        ("a" * 20_000, "has a single distinct character"),
    ],
)
def test_text_that_cannot_be_learned(text, message, write):
    """Before anything is timed."""
    with pytest.raises(CorpusError, match=message):
        look_at(write(text), is_prepared=False)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (words(99_000), "char"),
        (load_corpus("python-docs").text[:120_000], "bpe"),
        ("ab" * 100_000, "char"),  # its pairs run out
        ("".join(map(chr, range(300, 700))) * 30, "byte"),
    ],
)
def test_tokenizer_fits_the_text(text, kind, write):
    """Characters where pairs are too rare, bytes where characters are too many."""
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    found = look_at(write(text), is_prepared=False)
    assert found.tokenizer_keys["tokenizer"] == found.tokenizer.metadata.type == kind


def test_tokenizer_needs_no_package(monkeypatch):
    """Pairs of bytes do."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tokenizer_keys(10**9) == {"tokenizer": "byte"}


def test_ngram_model_is_that_of_witten_and_bell():
    """By the definition, byte for byte; and the probabilities of all bytes after some context are 1 together."""
    chance = random.Random(0)
    text, rest = (bytes(chance.choices(b"abc", k=size)) for size in (300, 60))

    def probability(context, byte):
        lower = probability(context[1:], byte) if context else 1 / 256
        following = [text[at + len(context)] for at in range(len(text) - len(context)) if text[at:].startswith(context)]
        if not following:
            return lower
        kinds = len(set(following))
        return (following.count(byte) + kinds * lower) / (len(following) + kinds)

    expected = [probability(rest[max(0, at - NGRAM + 1) : at], rest[at]) for at in range(len(rest))]
    arrays = (np.frombuffer(data, dtype=np.uint8) for data in (text, rest))
    assert ngram_probabilities(*arrays) == pytest.approx(expected)
    assert sum(probability(b"abc", byte) for byte in range(256)) == pytest.approx(1)


def test_random_text_is_harder_than_words():
    """Eight equally likely letters have three bits each, and no model needs fewer."""
    letters = "".join(random.Random(1).choices("abcdefgh", k=100_000))
    assert 3 < ngram_bits(letters) < 3.3
    assert ngram_bits(words(100_000)) < 2.5


def test_faster_machines_get_larger_models(long_text, timed):
    """With more operations in the same time."""
    sizes = []
    for flops_per_second in (3e9, 3e10, 3e11):
        timed(flops_per_second)
        sizes.append(choose(long_text, 3, print).best.params)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_sizes_are_tried_until_the_loss_rises(long_text, timed):
    """Larger ones would see too little of the text."""
    asked = timed(1e10)
    plan = choose(long_text, 2, print)
    losses = [candidate.outlook.middle for candidate in plan.tried]
    assert plan.best.outlook.middle == min(losses)
    assert losses[-1] > losses[-2]
    assert {recipe.model.embed_dim for recipe in asked} == {
        candidate.recipe.model.embed_dim for candidate in plan.tried
    }


def test_short_text_gets_no_large_model(long_text, timed):
    """Which would memorise it, however much time there is."""
    timed(1e15)
    best = choose(long_text, 10_000, print).best
    assert best.params < planning.MOST_WEIGHTS * long_text.bytes
    assert best.is_exhausted
    assert best.recipe.model.dropout > 0


@pytest.mark.parametrize("minutes", [0.5, 10, 1000])
def test_recipe_fits_the_time(minutes, long_text, timed):
    """Less is used only where more passes over the text would be wasted."""
    timed(1e11)
    best = choose(long_text, minutes, print).best
    assert best.minutes <= 0.97 * minutes
    assert best.is_exhausted or best.minutes > 0.9 * minutes
    check_recipe(best.recipe)


def test_recipe_is_that_of_the_last_speed(long_text, monkeypatch):
    """A machine is not always equally fast."""
    speeds = iter([1_500, 100_000, 1_000, 1_000])
    monkeypatch.setattr(planning, "time_training", lambda *_: next(speeds))
    monkeypatch.setattr(planning, "SIZES", SIZES[:1])
    best = choose(long_text, 5, print).best
    assert best.tokens_per_second == 1_000
    assert 4 < best.minutes < 5


@pytest.mark.parametrize("flops_per_second", [1e9, 1e11, 1e14])
def test_what_is_timed_is_what_the_recipe_computes_at_a_time(flops_per_second, long_text, timed):
    """As large a batch, unless that would take longer than a second, and the same model."""
    asked = timed(flops_per_second)
    big = long_text._replace(bytes=10**10, tokens=10**10)
    for candidate in choose(big, 30, print).tried:
        train = candidate.recipe.train
        last = [recipe for recipe in asked if recipe.model.embed_dim == candidate.recipe.model.embed_dim][-1]
        assert last.model == candidate.recipe.model
        together = train.micro_batch_size or train.batch_size
        a_second = candidate.tokens_per_second / train.seq_len
        assert last.train.batch_size / max(1, min(together, a_second)) == pytest.approx(1, abs=0.5)
        assert last.train.batch_size * train.seq_len <= planning.MICRO_BATCH


def test_part_of_a_batch_is_timed_as_it_is_computed(long_text):
    recipe = recipe_for(SIZES[0], 1e9, long_text, 0.01)
    assert part_to_time(recipe, 1e9).train.batch_size == recipe.train.micro_batch_size
    assert part_to_time(recipe, 1e3).train.batch_size == 1000 // recipe.train.seq_len


def test_too_little_time(long_text, timed):
    timed(1e6)
    with pytest.raises(MygptError, match=r"--minutes 0\.1: too short for 100 steps"):
        choose(long_text, 0.1, print)


def test_model_that_does_not_fit_into_memory_is_not_chosen(long_text, monkeypatch):
    """Nor is a larger one tried."""

    def time_training(recipe, text, device):
        if recipe.model.embed_dim > 64:
            raise OutOfMemoryError("out of memory")
        return 1e5

    monkeypatch.setattr(planning, "time_training", time_training)
    assert len(choose(long_text, 1000, print).tried) == 1


def test_small_share_is_held_out_of_a_large_text():
    """Evaluating a tenth of it would take longer than training."""
    held_out, to_train = split_time(10**9, 600, 10_000, 128)
    assert held_out < 0.001
    assert 0.94 * 600 * 10_000 < to_train < 600 * 10_000


def test_short_text_has_held_out_windows():
    """However short the time."""
    held_out, _ = split_time(20_000, 1, 1_000, 128)
    assert held_out * 20_000 > (planning.HELD_OUT_WINDOWS - 1) * 128


def test_large_batches_are_computed_in_parts(long_text):
    """Of at most so many tokens; their size divides that of the batch."""
    train = recipe_for(SIZES[0], 1e9, long_text, 0.01).train
    assert train.batch_size > train.micro_batch_size
    assert train.batch_size % train.micro_batch_size == 0
    assert train.micro_batch_size * train.seq_len <= planning.MICRO_BATCH


@pytest.mark.parametrize(("minutes", "dropout"), [(1, 0.0), (30, planning.DROPOUT)])
def test_dropout_is_for_many_passes(minutes, dropout, long_text, timed, monkeypatch):
    """At the speed that was measured, not the one that was guessed; then it is timed, too."""
    asked = timed(1e10)
    monkeypatch.setattr(planning, "SIZES", SIZES[1:2])
    monkeypatch.setattr(planning, "FIRST_GUESS", 1e13)
    best = choose(long_text, minutes, print).best
    assert best.recipe.model.dropout == asked[-1].model.dropout == dropout
    assert (best.passes > planning.DROPOUT_FROM) is (dropout > 0)


def test_outlook_improves_with_weights_and_text():
    """Text that is read again counts less, and the range is two spreads wide to either side."""
    small = predict(2.0, params=1e5, trained=1e6, unique=1e6)
    assert math.log(small.middle / small.low) == pytest.approx(2 * SPREAD)
    assert math.log(small.high / small.middle) == pytest.approx(2 * SPREAD)
    assert predict(2.0, params=1e6, trained=1e6, unique=1e6).middle < small.middle
    again = predict(2.0, params=1e5, trained=3e6, unique=1e6).middle
    assert predict(2.0, params=1e5, trained=3e6, unique=3e6).middle < again < small.middle
    assert math.isclose(predict(1.0, params=1e5, trained=1e6, unique=1e6).middle, small.middle / 2)


def test_constants_are_those_of_the_measured_runs():
    """By the script that fits them."""
    script = runpy.run_path(str(REPOSITORY / "scripts" / "benchmarks" / "outlook.py"))
    rows = [row for row in script["read"]() if row.text not in script["LEFT_OUT"]]
    assert script["fit"](rows) == pytest.approx(CONSTANTS, abs=0.0006)
    with pytest.raises(ValueError, match="measure others, too"):
        script["fit"]([row._replace(bits_per_byte=row.params / 1e5) for row in rows])


def test_outlook_is_never_worse_than_knowing_nothing():
    assert predict(20.0, params=1e5, trained=1e4, unique=1e4) == (8.0, 8.0, 8.0)


def test_written_recipe_is_the_chosen_one(long_text, timed, tmp_path):
    """With what was printed as its first comment."""
    timed(1e11)
    plan = choose(long_text, 10, print)
    path = tmp_path / "own.toml"
    path.write_text(recipe_text(plan, "mygpt init 'a\nb'", tmp_path))
    recipe = load_recipe(path)
    without = {"expected_minutes": None, "expected_bits_per_byte": None, "output": plan.best.recipe.checkpoint.output}
    assert recipe.replace(**without) == plan.best.recipe
    assert recipe.expected.expected_minutes == pytest.approx(plan.best.minutes, rel=0.05)
    low, _, high = plan.best.outlook
    assert recipe.expected.expected_bits_per_byte == pytest.approx((low, high), rel=0.005)
    assert parse_recipe([str(path)], "mygpt train")[0].expected == recipe.expected
    for line in summary(plan):
        assert f"# {line}".rstrip() in path.read_text().splitlines()


def test_what_was_chosen_is_written_though_it_is_the_default(long_text, timed, tmp_path, monkeypatch):
    """A reader wants to see it, and a later version may have other defaults."""
    timed(1e9)
    monkeypatch.setattr(planning, "SIZES", (Size(64, 4, 4, 64),))
    text = recipe_text(choose(long_text, 1, print), "mygpt init", tmp_path)
    for line in ("embed_dim = 64", "num_layers = 4", "num_heads = 4", "max_seq_len = 64", "seq_len = 64"):
        assert line in text.splitlines()


def test_text_is_named_as_a_recipe_finds_it(tmp_path, monkeypatch):
    """Also one that has the name of a known corpus, and from a folder that is a link."""
    monkeypatch.chdir(tmp_path)
    assert seen_from(tmp_path, "python-docs") == "python-docs"
    assert seen_from(tmp_path, "./python-docs") == "./python-docs"
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    (tmp_path / "a.txt").touch()
    name = seen_from(tmp_path / "link", "a.txt")
    assert os.path.samefile(tmp_path / "link" / name, tmp_path / "a.txt")
