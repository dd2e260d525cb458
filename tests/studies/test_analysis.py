"""What a study concludes from the losses of its runs."""

import json

import numpy as np
import pytest
from support.runs import evaluation_of

from mygpt.estimates import CrossedEstimate, Estimate
from mygpt.studies.analysis import (
    RunResult,
    VariantResult,
    compare_variants,
    holm,
    mean_curve,
    paired_change,
    seeds_for,
)
from mygpt.studies.results import table_lines, to_json, verdict_lines

NATS = "nats per token"


def simulated(
    rng, *, variants, seeds=5, windows=60, seed_deviation=0.012, text_deviation=0.1, effect=0.0, consecutive=False
):
    """Cells whose losses differ by chance alone, but for the first, which is better by `effect`.

    Windows are hard or easy for all models; each model is a little better on some of them than on others; each recipe
    is better with some seeds than with others.
    """
    hard = rng.standard_normal(windows) * 0.4 + 2.2

    def run(mean):
        own = rng.standard_normal(windows) * text_deviation + rng.standard_normal() * seed_deviation
        return RunResult(
            evaluation_of(hard + own + mean, tokens=64, step=100, consecutive=consecutive), ((100, 0.0),), ""
        )

    return [
        VariantResult(f"r{variant}", {seed: run(-effect * (variant == 0)) for seed in range(seeds)}, {}, "same")
        for variant in range(variants)
    ]


def alarms(studies, **settings):
    """The share of simulated studies that see a difference, between any two recipes."""
    rng = np.random.default_rng(0)
    seen = [
        any(result.is_seen for result in compare_variants(simulated(rng, **settings), 0.01)) for _ in range(studies)
    ]
    return sum(seen) / studies


@pytest.mark.parametrize(
    "settings",
    [
        {"variants": 2},
        {"variants": 2, "seeds": 2},
        {"variants": 4, "seeds": 3},
        {"variants": 2, "text_deviation": 0.0},
        {"variants": 4, "seed_deviation": 0.0},
        {"variants": 2, "windows": 200, "consecutive": True},
        {"variants": 6, "seeds": 2, "windows": 160, "text_deviation": 0.05},
        {"variants": 4, "seeds": 3, "windows": 1000},
    ],
    ids=str,
)
def test_equal_recipes_are_called_different_in_at_most_5_percent_of_studies(settings):
    """Of 600 studies; by chance alone 5% would be up to 41 with a probability of 98%."""
    assert alarms(600, **settings) <= 41 / 600


def test_a_difference_that_is_there_is_seen():
    """Five times its error, with five seeds: nearly always, though the windows' losses deviate by 0.4."""
    assert alarms(100, variants=2, effect=0.06) > 0.9


def variant(name, losses, tokenizer="same", curve=None):
    """A recipe whose runs have these losses, on windows that differ by the same for all."""
    noise = np.linspace(-1, 1, 40)
    runs = {
        seed: RunResult(
            evaluation_of(loss + noise, step=400), curve or ((200, loss + 0.5), (400, loss)), f"{name}/{seed}"
        )
        for seed, loss in enumerate(losses, 1)
    }
    return VariantResult(name, runs, {}, tokenizer)


def test_seeds_and_windows_are_paired():
    """The seeds' losses scatter by 0.1 and the windows' by 0.6; the difference is the same for each: no error."""
    a, b = variant("a", [2.0, 2.1, 2.2]), variant("b", [1.9, 2.0, 2.1])
    (change, seed_stderr, window_stderr, _), manner = paired_change(a, b, NATS)
    assert change.mean == pytest.approx(-0.1, abs=1e-6)
    assert max(change.stderr, seed_stderr, window_stderr) < 1e-6
    assert manner == "seeds paired; windows paired over 40 windows"


def test_verdict_says_what_the_difference_is_worth():
    """The better recipe has the other's last loss halfway between its two evaluations."""
    a, b = variant("a", [2.25, 2.351, 2.449]), variant("b", [2.0, 2.1, 2.2])
    (result,) = compare_variants([a, b], 0.01)
    assert result.is_seen
    assert (result.better, result.worse, result.worth_steps, result.is_bound) == ("b", "a", 100, False)
    assert result.verdict(0.01).startswith("b is better than a by 0.25000 +- 0.00058, worth 100 steps (corrected p ")
    far = variant("c", [3.0, 3.101, 3.199])
    (result,) = compare_variants([far, b], 0.01)
    assert "worth more than 200 steps" in result.verdict(0.01)


def test_verdict_says_how_many_seeds_would_reveal_a_difference():
    """None is seen: with the errors at hand, so many more seeds; or none, if the text is the limit."""
    (result,) = compare_variants([variant("a", [2.0, 2.03, 2.02]), variant("b", [2.02, 2.0, 2.03])], 0.02)
    assert result.verdict(0.02).startswith("no difference seen between a and b: +0.000 +- 0.015; ")
    assert result.verdict(0.02).endswith("more seeds would probably reveal a difference of 0.02")
    assert result.seeds_needed > 3
    assert seeds_for(0.02, CrossedEstimate(Estimate(0.0, 0.03, 2), 0.02, 0.025, 30), 3) is None
    assert result._replace(seeds_needed=None).verdict(0.02).endswith("more held-out windows might")
    assert result._replace(seeds_needed=0).verdict(0.02).endswith("a difference of 0.02 would probably have been seen")


def test_seeds_that_are_named_have_the_power():
    """A study with that many seeds sees the difference in about four of five simulations."""
    rng = np.random.default_rng(1)
    stderr = 0.02 * 2**0.5 / 3**0.5
    needed = seeds_for(0.02, CrossedEstimate(Estimate(0.0, stderr, 2), stderr, 0.0, 59), 3)
    settings = {"variants": 2, "seeds": needed, "text_deviation": 0.0, "seed_deviation": 0.02, "effect": 0.02}
    seen = [compare_variants(simulated(rng, **settings), 0.02)[0].is_seen for _ in range(300)]
    assert 0.75 < sum(seen) / 300 < 0.87


def test_other_tokenizers_are_compared_in_bits_per_byte():
    """Their tokens are others; what they are worth in steps is not said."""
    variants = [variant("a", [2.0, 2.1, 2.21]), variant("b", [1.0, 1.1, 1.2], tokenizer="other")]
    (result,) = compare_variants(variants, 0.01)
    assert "bits per byte" in "".join(table_lines(variants))
    assert result.worth_steps is None


def test_recipes_without_two_common_seeds_are_not_compared():
    a, b = variant("a", [2.0, 2.1]), variant("b", [1.0])
    failed = VariantResult("c", {}, {1: "step 3 was not finite", 2: "step 4 was not finite"}, "same")
    results = compare_variants([a, b, failed], 0.01)
    assert all(result.change is None for result in results)
    lines = list(verdict_lines([a, b, failed], results, 0.01))
    assert lines[0] == "c, seed 1: step 3 was not finite"
    assert lines[-1] == "b and c: not compared, since fewer than two seeds are complete with both"
    table = list(table_lines([a, b, failed]))
    assert [line.split()[0] for line in table[1:4]] == ["b", "a", "c"]
    assert "0 (2 failed)" in table[3]
    assert json.loads(to_json([a, b, failed], results, {}, 0.01))["recipes"][2]["failures"] == {
        "1": "step 3 was not finite",
        "2": "step 4 was not finite",
    }


def test_holm_is_the_published_procedure():
    """The example of many textbooks; values that are missing stay so."""
    assert holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_curve_is_the_mean_over_the_seeds_at_common_steps():
    assert mean_curve(variant("a", [2.0, 3.0])) == [
        (200, 3.0, pytest.approx(0.5**0.5)),
        (400, 2.5, pytest.approx(0.5**0.5)),
    ]
