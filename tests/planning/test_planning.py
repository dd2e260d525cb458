"""What `mygpt init` finds in a text, chooses and writes."""

import math
import random

import pytest

from mygpt.data.prepare import TokenizerChoice, prepare
from mygpt.errors import CorpusError, MygptError, OutOfMemoryError
from mygpt.planning import plan as planning
from mygpt.planning.outlook import predict
from mygpt.planning.plan import SIZES, choose, recipe_for, share
from mygpt.planning.text import SAMPLE, look_at, ngram_bits, tokenizer_keys
from mygpt.planning.write import recipe_text, summary
from mygpt.recipe.files import load_recipe
from mygpt.recipe.flags import parse_recipe
from mygpt.recipe.tables import check_recipe

BYTE = {"tokenizer": "byte"}


@pytest.fixture
def timed(monkeypatch):
    """A function that lets a machine have a speed, in floating-point operations a second; returns what was timed."""

    def pretend(flops_per_second):
        sizes = []

        def time_training(recipe, task, guess):
            sizes.append(recipe.model.embed_dim)
            return flops_per_second / (72 * recipe.model.num_layers * recipe.model.embed_dim**2)

        monkeypatch.setattr(planning, "time_training", time_training)
        return sizes

    return pretend


def words(size, seed=0):
    """A text of so many bytes, of words that recur."""
    chance = random.Random(seed)
    known = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 7))) for _ in range(300)]
    return " ".join(chance.choice(known) for _ in range(size // 5))[:size]


@pytest.fixture
def long_text(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(words(200_000))
    return look_at(str(path), is_prepared=False)


def test_text_is_looked_at(text_file):
    text = look_at(str(text_file), is_prepared=False)
    assert text.bytes == text_file.stat().st_size
    assert text.sample == text_file.read_text()
    assert 1 < text.bits_per_byte < 4


def test_long_text_is_looked_at_from_end_to_end(tmp_path):
    """Its parts may be of different kinds."""
    path = tmp_path / "long.txt"
    path.write_text("a" * SAMPLE + "b" * SAMPLE)
    text = look_at(str(path), is_prepared=False)
    assert len(text.sample) == SAMPLE
    assert text.sample.count("b") == SAMPLE // 2


def test_prepared_text_is_looked_at_through_its_tokens(text_file, tmp_path):
    prepare([text_file], tmp_path / "tokens", TokenizerChoice("byte", 0, None))
    text = look_at(str(tmp_path / "tokens"), is_prepared=True)
    assert text.bytes == text_file.stat().st_size
    assert text.sample.removesuffix("<|endoftext|>") == text_file.read_text()
    assert text.tokenizer.metadata.type == "byte"


def test_text_that_is_too_short(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(CorpusError, match="has 9 bytes, expected at least 10,000"):
        look_at(str(path), is_prepared=False)


def test_random_text_is_harder_than_words():
    """Eight equally likely letters have three bits each, and no model needs fewer."""
    letters = "".join(random.Random(1).choices("abcdefgh", k=100_000))
    assert 3 < ngram_bits(letters) < 3.3
    assert ngram_bits(words(100_000)) < 2.5


@pytest.mark.parametrize(
    ("size", "sample", "has_library", "kind"),
    [
        (99_999, "abc", True, "char"),
        (100_000, "abc", True, "bpe"),
        (100_000, "abc", False, "char"),
        (50_000, "".join(map(chr, range(300))), True, "byte"),
        (1_000_000, None, True, "bpe"),
        (1_000_000, None, False, "byte"),
    ],
)
def test_tokenizer_fits_the_text(size, sample, has_library, kind, monkeypatch):
    """Characters where pairs of bytes are too rare, bytes where characters are too many."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: has_library or None)
    assert tokenizer_keys(size, sample)["tokenizer"] == kind


def test_faster_machines_get_larger_models(long_text, timed):
    """With more operations in the same time."""
    sizes = []
    for flops_per_second in (3e9, 3e11, 3e13):
        timed(flops_per_second)
        sizes.append(choose(long_text, 10, BYTE, print).best.params)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_sizes_are_tried_until_the_loss_rises(long_text, timed):
    """Larger ones would see too little of the text."""
    sizes = timed(3e10)
    plan = choose(long_text, 2, BYTE, print)
    losses = [candidate.outlook.middle for candidate in plan.tried]
    assert plan.best.outlook.middle == min(losses)
    assert losses[-1] > losses[-2] or len(plan.tried) == len(SIZES)
    assert set(sizes) == {candidate.recipe.model.embed_dim for candidate in plan.tried}


@pytest.mark.parametrize("minutes", [0.5, 10, 1000])
def test_recipe_fits_the_time(minutes, long_text, timed):
    """Less is used only where more passes over the text would be wasted."""
    timed(1e11)
    best = choose(long_text, minutes, BYTE, print).best
    assert best.minutes <= 0.951 * minutes
    assert best.is_exhausted or best.minutes > 0.9 * minutes
    check_recipe(best.recipe)


def test_too_little_time(long_text, timed):
    timed(1e6)
    with pytest.raises(MygptError, match=r"--minutes 0\.1: too short for 100 steps"):
        choose(long_text, 0.1, BYTE, print)


def test_model_that_does_not_fit_into_memory_is_not_chosen(long_text, monkeypatch):
    """Nor is a larger one tried."""

    def time_training(recipe, task, guess):
        if recipe.model.embed_dim > 128:
            raise OutOfMemoryError("out of memory")
        return 1e6

    monkeypatch.setattr(planning, "time_training", time_training)
    assert len(choose(long_text, 1000, BYTE, print).tried) == 2


def test_small_share_is_held_out_of_a_large_text(long_text):
    """Evaluating a tenth of it would take longer than training."""
    task = planning.Task(long_text, 1_000_000_000, None, 600.0, {}, None)
    held_out, to_train = share(task, 10_000, 128)
    assert held_out < 0.001
    assert 0.94 * 600 * 10_000 < to_train < 600 * 10_000


def test_large_batches_are_computed_in_parts():
    """Whose sizes divide them."""
    recipe = recipe_for(SIZES[0], 1e9, 10**10, 0.01, {})
    assert recipe.train.batch_size > recipe.train.micro_batch_size
    assert recipe.train.micro_batch_size * recipe.train.seq_len <= planning.MICRO_BATCH
    check_recipe(recipe)


def test_dropout_is_for_many_passes():
    assert recipe_for(SIZES[0], 1e6, 10**6, 0.1, {}).model.dropout == 0
    assert recipe_for(SIZES[0], 2e7, 10**6, 0.1, {}).model.dropout > 0


def test_outlook_improves_with_weights_and_text():
    """And a range has its middle inside."""
    small = predict(2.0, params=1e5, trained=1e6, unique=1e6)
    assert small.low < small.middle < small.high
    assert predict(2.0, params=1e6, trained=1e6, unique=1e6).middle < small.middle
    assert predict(2.0, params=1e5, trained=3e6, unique=3e6).middle < small.middle
    again = predict(2.0, params=1e5, trained=3e6, unique=1e6).middle
    assert predict(2.0, params=1e5, trained=3e6, unique=3e6).middle < again < small.middle
    assert math.isclose(predict(4.0, params=1e5, trained=1e6, unique=1e6).middle, 2 * small.middle)


def test_written_recipe_is_the_chosen_one(long_text, timed, tmp_path):
    timed(1e11)
    plan = choose(long_text, 10, BYTE, print)
    path = tmp_path / "own.toml"
    path.write_text(recipe_text(plan, "mygpt init 'a\nb'", tmp_path))
    recipe = load_recipe(path)
    without = {"expected_minutes": None, "expected_bits_per_byte": None, "output": plan.best.recipe.checkpoint.output}
    assert recipe.replace(**without) == plan.best.recipe
    assert recipe.expected.expected_minutes == round(plan.best.minutes, 1)
    low, high = recipe.expected.expected_bits_per_byte
    assert low == round(plan.best.outlook.low, 2)
    assert high == round(plan.best.outlook.high, 2)
    assert parse_recipe([str(path)], "mygpt train")[0].expected == recipe.expected
    for line in summary(plan):
        assert f"# {line}".rstrip() in path.read_text().splitlines()
