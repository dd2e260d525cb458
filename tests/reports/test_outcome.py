"""What a recipe expects, and what a complete run says of it."""

import re
import shutil
from collections import Counter

import numpy as np
import pytest
from support.runs import FLAGS, evaluation_of

from mygpt.errors import NonFiniteError, RecipeError
from mygpt.recipe.files import load_recipe
from mygpt.recipe.flags import parse_recipe
from mygpt.recipe.tables import DataTable, ExpectedTable, Recipe, check_recipe
from mygpt.reports.outcome import outcome_lines, place_lines, verdict_line
from mygpt.runs.records import Record, Timing, read_records
from mygpt.training.train import train

RANGE = ExpectedTable(expected_bits_per_byte=(1.9, 2.2))


def lines(expected, *, bits=None, seconds=60.0):
    record = Record(step=1, loss=1.0, lr=0.1, tokens=1, val_bits_per_byte=bits)
    return list(outcome_lines(expected, record, Timing(step=1, elapsed_seconds=seconds, tokens_per_second=1.0)))


@pytest.mark.parametrize(
    ("bits", "where"),
    [(1.9, "as expected"), (2.2, "as expected"), (1.85, "lower than expected"), (2.305, "higher than expected")],
)
def test_loss_is_placed_in_the_range(bits, where):
    """Both ends belong to it."""
    assert lines(RANGE, bits=bits) == [
        f"held-out loss: {bits:.2f}, {where}; the recipe expects between 1.90 and 2.20 bits per byte"
    ]


def test_loss_that_was_not_measured():
    assert lines(RANGE) == ["held-out loss: not measured; the recipe expects between 1.90 and 2.20 bits per byte"]


def test_time_is_compared():
    assert lines(ExpectedTable(expected_minutes=2.0), seconds=90) == [
        "time: 1.5 minutes, 0.75 times the 2 minutes that the recipe expects"
    ]


def test_nothing_expected_nothing_said():
    assert lines(ExpectedTable(), bits=2.0) == []


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(
        "[train]\nsteps = 10\n[expected]\nexpected_minutes = 3.5\nexpected_bits_per_byte = [2, 2.5]\n", encoding="utf-8"
    )
    return path


def test_expectations_are_read_and_written(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.expected == ExpectedTable(expected_minutes=3.5, expected_bits_per_byte=(2.0, 2.5))
    recipe_file.write_text(recipe.to_toml())
    assert load_recipe(recipe_file) == recipe


def test_heirs_do_not_inherit_expectations(recipe_file, tmp_path):
    """They are those of the recipe as it stands."""
    heir = tmp_path / "heir.toml"
    heir.write_text('extends = "own.toml"\n[train]\nsteps = 20\n', encoding="utf-8")
    assert load_recipe(heir).expected == ExpectedTable()
    heir.write_text('extends = "own.toml"\n[expected]\nexpected_minutes = 7\n', encoding="utf-8")
    assert load_recipe(heir).expected == ExpectedTable(expected_minutes=7.0)


@pytest.mark.parametrize(
    ("flags", "minutes", "bits"),
    [
        ([], 3.5, (2.0, 2.5)),
        (["--print-every", "5", "--output", "elsewhere", "--seed", "3"], 3.5, (2.0, 2.5)),
        (["--steps", "11"], None, None),
        (["--threads", "1"], None, (2.0, 2.5)),
        (["--activation-checkpointing"], None, (2.0, 2.5)),
        (["--resume", "checkpoints/other"], None, (2.0, 2.5)),
        (["--steps", "11", "--expected-bits-per-byte", "2", "3"], None, (2.0, 3.0)),
        (["--steps", "11", "--expected-minutes", "3.5"], 3.5, None),
    ],
)
def test_flags_that_change_the_training_drop_expectations(flags, minutes, bits, recipe_file):
    """Those that are no flags themselves. A seed does not: the range is that of all seeds."""
    expected = parse_recipe([str(recipe_file), *flags], "mygpt train")[0].expected
    assert (expected.expected_minutes, expected.expected_bits_per_byte) == (minutes, bits)


def test_time_of_one_process_is_not_expected_of_several():
    expected = ExpectedTable(expected_minutes=2.0, expected_bits_per_byte=(1.9, 2.2))
    timing = Timing(step=1, elapsed_seconds=1.0, tokens_per_second=1.0)
    record = Record(step=1, loss=1.0, lr=0.1, tokens=1, val_bits_per_byte=2.0)
    assert [line.split(":")[0] for line in outcome_lines(expected, record, timing, processes=2)] == ["held-out loss"]


def test_range_begins_with_its_lower_end(call, recipe_file):
    code, _, err = call("recipe", "show", recipe_file, "--expected-bits-per-byte", "3", "2")
    assert code == 2
    assert "expected_bits_per_byte: got [3.0, 2.0], expected the lower end of the range" in err


def test_complete_run_says_how_close_it_came(call, text_file, tmp_path):
    """Once: not when the complete run is called again."""
    held_out = ("--val-split", "0.1", "--val-every", "3", "--sampling", "full")
    expected = ("--expected-minutes", "5", "--expected-bits-per-byte", "1", "99")
    arguments = ("train", text_file, *FLAGS, *held_out, *expected, "--output", tmp_path / "run")
    code, _, err = call(*arguments)
    assert code == 0
    assert "times the 5 minutes that the recipe expects\nheld-out loss: " in err
    assert "as expected; the recipe expects between 1.00 and 99.00" in err
    assert "expects" not in call(*arguments)[2]


def records(losses, held_out=()):
    """A record of each step; every tenth has a held-out loss."""
    val = {10 * number: loss for number, loss in enumerate(held_out, 1)}
    return [Record(step=s, loss=loss, lr=0.1, tokens=s, val=val.get(s)) for s, loss in enumerate(losses, 1)]


def evaluations_with(*losses):
    """Evaluations after every 10 steps; their windows differ from the mean in nearly the same way."""
    found = []
    for number, loss in enumerate(losses, 1):
        rng = np.random.default_rng(number)
        noise = np.linspace(-1, 1, 50) + 0.01 * rng.standard_normal(50)
        found.append(evaluation_of(loss + noise, step=10 * number))
    return found


FALLING = np.linspace(4, 2, 300)
TURNS = [2 + np.exp(-0.8 * number) + 0.05 * number for number in range(1, 11)]


@pytest.mark.parametrize(
    ("held_out", "training", "verdict"),
    [
        ([3, 2.5, 2.4], FALLING, r"still improving: held-out loss -1.000 \+- 0.018 per 100 steps from step 20 to 30$"),
        ([3, 2.4, 2.4], FALLING, r"flat from step 20 to 30: held-out loss [+-]0.000\d \+- 0.0018$"),
        (TURNS, FALLING, r"overfitting since step [34]0: held-out loss \+0.1\d+ \+- 0.0\d+ by step 100$"),
        (TURNS, FALLING[::-1], "getting worse since step [34]0: .*, and the training loss rises, too$"),
        ([3, 2.5, 2.8], FALLING, r"rising from step 20 to 30: held-out loss \+0.300\d .*; it is not known since when$"),
        ([3], FALLING, "none, because .* measured only once, after step 10; lower val_every$"),
    ],
)
def test_verdict_names_the_evidence(held_out, training, verdict):
    """Improving, flat, overfitting or diverging, with the steps, the change and its error."""
    assert re.match(
        f"verdict: {verdict}", verdict_line(evaluations_with(*held_out), records(training, held_out), DataTable())
    )


def test_verdict_on_an_early_end_is_about_what_came_after_the_last_improvement():
    """Not on the whole last part of the run, in which it may have improved: that would contradict why it ended."""
    held_out = [*np.linspace(5, 2.3, 28), 2.3, 2.3]
    evaluations = evaluations_with(*held_out)
    known = records(FALLING, held_out)
    assert "still improving: held-out loss -0.6" in (line := verdict_line(evaluations, known, DataTable()))
    assert line.endswith("from step 260 to 300")
    assert "flat from step 280 to 300" in verdict_line(evaluations, known, DataTable(), ended_by="patience")


def test_verdict_without_held_out_text_says_how_to_get_one():
    for data, flags in (
        (DataTable(), "--val-split 0.1 --val-every 500"),
        (DataTable(val_corpus="x.txt"), "--val-every 500"),
        (DataTable(val_split=0.1), "--val-every 500"),
    ):
        line = f"verdict: none, because no held-out loss was measured; {flags} measures it"
        assert verdict_line([], records(FALLING), data) == line


def test_every_complete_run_ends_with_a_verdict(tiny, capsys):
    """Also one that is found complete; not one that a signal or a last step stopped."""
    recipe = tiny(val_split=0.2, val_every=2, sampling="full")
    train(recipe, last_step=4)
    assert "verdict" not in capsys.readouterr().err
    for _ in range(2):
        train(recipe)
        assert capsys.readouterr().err.count("verdict: ") == 1


KNOWN = ExpectedTable(
    expected_val=((10, 3.0, 0.02), (20, 2.5, 0.02), (30, 2.0, 0.02)), expected_seeds=10, expected_text="abcdef12"
)


def evaluated(*losses):
    return [Record(step=10 * n, loss=2.0, lr=0.1, tokens=1, val=loss) for n, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("losses", "line", "is_normal"),
    [
        (
            (3.05, 2.46, 2.01),
            r"held-out loss is normal: 2.0100 at step 30; 99% of runs with another seed are between 1.91.* and 2.08",
            True,
        ),
        ((3.05, 2.8, 2.7), "held-out loss is NOT normal since step 20: 2.7000 at step 30", False),
        ((4.0, 2.5, 2.3), "held-out loss is NOT normal since step 30: ", False),
        ((4.0, 2.5, 2.0), "held-out loss is normal at the end: .*; it was outside at step 10", False),
        ((3.0, 2.9), "held-out loss is NOT normal since step 20: 2.9000 at step 20", False),
        ((), "held-out loss: not compared, because it was measured at none", True),
    ],
)
def test_a_loss_is_placed_among_those_of_other_seeds(losses, line, is_normal):
    """At the end, since which step it is outside, or where it was for a while."""
    ((found, normal),) = place_lines(KNOWN, evaluated(*losses), "abcdef12" * 8)
    assert re.match(f"expected: {line}", found)
    assert normal is is_normal


def test_losses_of_another_text_say_nothing():
    """As those of quickstart, whose text comes with Python, under another version of it."""
    ((line, normal),) = place_lines(KNOWN, evaluated(9.0), "1" * 64)
    assert line == "expected: not compared, because the losses that the recipe expects are those of another text"
    assert normal
    assert list(place_lines(ExpectedTable(), evaluated(9.0), "1" * 64)) == []


def test_training_losses_are_averaged_over_ten_records():
    """One of them is that of a single batch."""
    expected = ExpectedTable(expected_loss=((20, 2.0, 0.01),), expected_seeds=5)
    noisy = [Record(step=step, loss=2.0 + (-1) ** step, lr=0.1, tokens=1) for step in range(1, 21)]
    assert [normal for _, normal in place_lines(expected, noisy, "")] == [True]


def test_other_seeds_are_hardly_ever_called_not_normal():
    """At most 1% of runs that differ by chance alone, however few seeds the expectation is from."""
    rng = np.random.default_rng(0)
    for seeds in (3, 10):
        alarms = 0
        for _ in range(2000):
            losses = rng.normal(2.0, 0.02, (seeds + 1, 3))
            means, deviations = losses[1:].mean(0), losses[1:].std(0, ddof=1)
            rows = tuple(zip((10, 20, 30), means, deviations, strict=True))
            expected = ExpectedTable(expected_val=rows, expected_seeds=seeds)
            alarms += not all(normal for _, normal in place_lines(expected, evaluated(*losses[0]), ""))
        assert alarms / 2000 <= 0.016


def test_rows_are_whole_and_have_their_number_of_runs():
    """Each mistake costs one line."""
    with pytest.raises(RecipeError, match="expected_seeds: got null, expected the number of runs"):
        check_recipe(Recipe.of(expected_val=[[10, 3.0, 0.1]]))
    for rows, message in (
        ([[10, 3.0]], "expected_val: got [10, 3.0], expected more values"),
        ([[10, 3.0, -0.1]], "expected_val: got -0.1, expected at least 0"),
        ([[10.0, 3.0, 0.1]], "expected_val: got 10.0, expected a valid integer"),
        ([], "expected_val: got [], expected at least one [step, mean, deviation]"),
        ([[20, 3.0, 0.1], [10, 3.0, 0.1]], "expected_val: got [[20, 3.0, 0.1], [10, 3.0, 0.1]], expected .* by rising"),
    ):
        with pytest.raises(RecipeError, match=re.sub(r"([\[\]])", r"\\\1", message)) as caught:
            check_recipe(Recipe.of(expected_val=rows, expected_seeds=5))
        assert str(caught.value).count("\n") == 0


def test_check_says_whether_a_run_is_normal(tiny, call, tmp_path):
    """With exit code 1 if it is not; also of a run that is not complete, and of a recipe of which nothing is known."""
    keys = {"val_split": 0.2, "val_every": 2, "init": "gpt2", "lr": 1e-2}
    run = train(tiny(**keys))
    code, out, _ = call("check", run)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["run", "loss", "verdict", "expected"]
    assert "complete after 6 steps" in out
    assert "the recipe has no expected losses" in out
    first, *_ = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(run, tmp_path / "lost")
    (tmp_path / "lost" / "metrics.jsonl").write_text(first)
    assert (
        "complete after 6 steps, of which the records after step 1 are missing" in call("check", tmp_path / "lost")[1]
    )
    value = read_records(run)[-1].val
    for mean, code in ((value, 0), (value - 1, 1)):
        other = tiny(**keys, expected_val=[[6, mean, 0.01]], expected_seeds=5, output=f"{run}-{code}")
        train(other, last_step=4)
        assert call("check", other.checkpoint.output)[0] == 0
        assert "step 4 of 6, not complete" in call("check", other.checkpoint.output)[1]
        train(other)
        assert call("check", other.checkpoint.output)[0] == code


def test_check_of_a_run_without_a_checkpoint(tiny, call, tmp_path):
    """The loss is known, and the verdict is not; it does not ask for evaluations that there are."""
    run = train(tiny(val_split=0.2, val_every=2, steps=20), last_step=5)
    shutil.rmtree(run / "step-000005")
    code, out, _ = call("check", run)
    assert code == 0
    assert re.search(r"^loss: training \d+\.\d{4} at step 5$", out, re.MULTILINE)
    assert "verdict: none, because no checkpoint has a held-out loss yet" in out


def test_check_says_what_the_recipe_expected(tiny, call):
    """The lines with which a complete run ends."""
    run = train(tiny(val_split=0.2, val_every=2, expected_bits_per_byte=(1.0, 2.0), expected_minutes=5.0))
    out = call("check", run)[1]
    assert "higher than expected; the recipe expects between 1.00 and 2.00" in out
    assert "times the 5 minutes that the recipe expects" in out
    assert "no expected losses" not in out


def test_check_of_a_run_that_diverged(tiny, call, tmp_path):
    """Its failed step is named, also where nothing was recorded before it."""
    with pytest.raises(NonFiniteError):
        train(tiny(lr=1e30, save_every=1))
    code, out, _ = call("check", tmp_path / "run")
    assert code == 1
    assert "failed-step-000002: a loss or a gradient was not finite; `mygpt replay" in out
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    code, out, _ = call("check", tmp_path / "run")
    assert (code, out.count("\n")) == (1, 1)
    assert "failed-step-000002" in out
    assert call("check", tmp_path / "nothing")[0] == 2


def verdicts(curve, noise, *, evaluations, same_windows=True, runs=100):
    """How many of `runs` with this curve, and noise from evaluation to evaluation, have which verdict."""
    counts = Counter()
    for seed in range(runs):
        rng, found, known = np.random.default_rng(seed), [], []
        hard = rng.standard_normal(50) * 0.5
        for step in range(1, evaluations + 1):
            loss = curve(step / evaluations) + rng.normal(0, noise)
            windows = hard if same_windows else rng.standard_normal(50) * 0.5
            starts = None if same_windows else np.arange(50) + step
            evaluation = evaluation_of(loss + windows + 0.01 * rng.standard_normal(50), step=step, starts=starts)
            found.append(evaluation)
            known.append(Record(step=step, loss=3 - step / evaluations, lr=0.1, tokens=1, val=evaluation.loss.mean))
        counts[verdict_line(found, known, DataTable()).split()[1].strip(":")] += 1
    return counts


@pytest.mark.parametrize("evaluations", [4, 10, 40])
@pytest.mark.parametrize("same_windows", [True, False])
def test_a_flat_curve_is_hardly_ever_called_anything_else(evaluations, same_windows):
    """However much the model moves from evaluation to evaluation: the lowest loss of many is not where it turns."""
    counts = verdicts(lambda _: 2.0, 0.01, evaluations=evaluations, same_windows=same_windows)
    assert counts["overfitting"] + counts["getting"] <= 8
    # From four evaluations, noise that moves them all one way looks like a trend.
    assert counts["still"] + counts["rising"] <= (30 if evaluations == 4 else 12)


def test_curves_that_fall_or_turn_are_called_so():
    """With noise as above."""
    assert verdicts(lambda x: 2 + np.exp(-2 * x), 0.003, evaluations=40)["still"] >= 90
    assert verdicts(lambda x: 2 + np.exp(-8 * x) + 0.5 * x, 0.01, evaluations=10)["overfitting"] >= 95
