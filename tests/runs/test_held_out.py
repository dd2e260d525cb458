"""Evaluations window by window: the file of a run, paired differences, early stopping."""

import json

import numpy as np
import pytest
from support.commands import torchrun
from support.runs import EXACT, assert_same_run, contents, evaluation_of, flags_of

from mygpt.checks.compare import compare
from mygpt.errors import DamagedCheckpointError, RecipeError
from mygpt.recipe.tables import Recipe, check_recipe
from mygpt.runs.held_out import (
    change_between,
    count_waiting,
    difference,
    evaluation_line,
    evaluations_of,
    last_improvement,
    read_evaluations,
)
from mygpt.runs.records import EvaluationLine, read_records, read_until
from mygpt.runs.run import RunDirectory
from mygpt.runs.steps import read_manifest
from mygpt.training.state import Progress
from mygpt.training.train import train

NOISE = np.random.default_rng(0).standard_normal(40)
EVALUATED = {"val_split": 0.2, "val_every": 2, "sampling": "own-stream", "eval_batches": 3}


def evaluations_with(*losses, every=10):
    """Evaluations with these mean losses, whose windows all differ from the mean in the same way."""
    jitters = (np.random.default_rng(number).standard_normal(40) * 0.01 for number in range(1, 1 + len(losses)))
    steps = range(every, every * (len(losses) + 1), every)
    return [evaluation_of(x + NOISE + jitter, step=n) for x, jitter, n in zip(losses, jitters, steps, strict=True)]


@pytest.mark.parametrize("sampling", ["own-stream", "shared-stream", "full"])
def test_every_evaluation_is_kept_window_by_window(tiny, tmp_path, sampling):
    """In a file of the run, which can be read up to any step; they come to the recorded values."""
    run = train(tiny(**EVALUATED | {"sampling": sampling}, steps=6))
    evaluations = read_evaluations(run, 6)
    assert [evaluation.step for evaluation in evaluations] == [2, 4, 6]
    assert [evaluation.step for evaluation in read_evaluations(run, 5)] == [2, 4]
    records = [record for record in read_records(run) if record.val is not None]
    for evaluation, record in zip(evaluations, records, strict=True):
        loss, bits = evaluation.loss, evaluation.bits_per_byte
        assert (loss.mean, loss.stderr, loss.dof) == (record.val, record.val_stderr, record.val_dof)
        assert (bits.mean, bits.stderr) == (record.val_bits_per_byte, record.val_bits_per_byte_stderr)
    lines = list(map(json.loads, (run / "evaluations.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines if "windows" in line] == ([2, 4, 6] if sampling == "shared-stream" else [2])
    without = train(tiny(output=str(tmp_path / "none")))
    assert read_evaluations(without, 6) == []
    assert not (without / "evaluations.jsonl").exists()


def test_lines_are_read_as_they_were_written(tmp_path):
    """Windows are there once as long as they stay the same; a file that lacks them is read up to where it does."""
    evaluations = evaluations_with(3.0, 2.5)
    evaluations += [evaluation_of(NOISE + 2, step=30, starts=np.arange(40) + 7), evaluation_of(NOISE, step=40)]
    pairs = zip(evaluations, [None, *evaluations[:-1]], strict=True)
    lines = [evaluation_line(evaluation, before) for evaluation, before in pairs]
    assert [line.windows is None for line in lines] == [False, True, False, False]
    again = evaluations_of(EvaluationLine.model_validate_json(line.model_dump_json()) for line in lines)
    for evaluation, other in zip(evaluations, again, strict=True):
        assert evaluation.step == other.step
        assert evaluation.windows.same_as(other.windows)
        assert np.array_equal(evaluation.losses, other.losses)
    file = tmp_path / "evaluations.jsonl"
    for first, count in ((0, 4), (1, 0), (2, 2)):
        file.write_text("".join(f"{line.model_dump_json()}\n" for line in lines[first:]))
        assert len(evaluations_of(read_until(file, EvaluationLine, 40))) == count


def test_paired_error_is_that_of_the_differences():
    """The windows differ by far more from each other than the two models on any of them."""
    a, b = evaluation_of(3 + NOISE), evaluation_of(2.9 + NOISE + 0.01 * NOISE[::-1])
    paired, _, manner = difference(a, b, same_tokens=True)
    assert manner == "paired over 40 windows"
    assert paired.mean == pytest.approx((b.losses - a.losses).mean())
    assert paired.stderr == pytest.approx((b.losses - a.losses).std(ddof=1) / 40**0.5, rel=1e-5)
    other = evaluation_of(2.9 + NOISE, starts=np.arange(40) + 7)
    apart, _, manner = difference(a, other, same_tokens=True)
    assert manner.startswith("not paired")
    assert apart.stderr == pytest.approx((a.loss.stderr**2 + other.loss.stderr**2) ** 0.5)
    assert apart.stderr > 50 * paired.stderr
    assert 70 < apart.dof <= 78


def test_models_with_other_windows_are_paired_piece_by_piece():
    """The same losses token by token, once in windows of 8 and once of 4 tokens, with a longer held-out part: no
    difference, and no error."""
    rng = np.random.default_rng(1)
    per_4 = np.repeat(rng.standard_normal(500), 2)  # constant over 8 tokens
    long, short = (evaluation_of(losses, tokens=t, consecutive=True) for losses, t in ((per_4, 4), (per_4[400::2], 8)))
    nats, bits, manner = difference(long, short, same_tokens=True)
    assert "300 pieces of what both held out" in manner
    assert nats.mean == pytest.approx(0, abs=1e-6)
    assert nats.stderr == pytest.approx(0, abs=1e-6)
    assert bits.mean == pytest.approx(0, abs=1e-6)
    shifted = evaluation_of(per_4[400::2] + 0.5, tokens=8, consecutive=True)
    assert difference(long, shifted, same_tokens=False).nats_per_token is None
    assert difference(long, shifted, same_tokens=True, same_text=False).nats_per_token.mean == pytest.approx(0.5)
    assert difference(evaluation_of(NOISE), evaluation_of(NOISE), same_tokens=True, same_text=False) is None
    assert difference(long, shifted, same_tokens=False).bits_per_byte.mean == pytest.approx(0.5 / np.log(2))


def test_changes_within_a_run_are_paired_where_windows_are_the_same():
    """Otherwise they are those of independent estimates."""
    before, after = evaluations_with(4, 3)
    assert change_between(before, after).stderr == pytest.approx(0.0022, rel=0.3)
    other = evaluation_of(3 + NOISE, starts=np.arange(40) + 7)
    assert change_between(before, other).stderr == pytest.approx(2**0.5 * other.loss.stderr, rel=0.01)


def test_improvement_must_be_beyond_doubt():
    """Small steps count together: each is below its error, and the second from the reference is not."""
    assert count_waiting(evaluations_with(3.0, 2.999), 0) == 1
    evaluations = evaluations_with(3.0, 2.999, 2.99)
    assert (last_improvement(evaluations).step, count_waiting(evaluations, 0)) == (30, 0)
    assert [count_waiting(evaluations_with(3.0, 3.5, 3.5, 3.5), after) for after in (0, 20, 40)] == [3, 2, 0]
    assert count_waiting([], 0) == 0


def test_waiting_is_counted_as_evaluations_come():
    """It comes to what all evaluations together give, though each is compared with the last improvement alone."""
    recipe, progress = Recipe.of(patience=9), Progress()
    losses = (3.0, 2.999, 2.99, 2.995, 2.8, 2.9, 2.81, 2.805)
    for number, evaluation in enumerate(evaluations := evaluations_with(*losses), 1):
        progress.observe(evaluation, recipe)
        assert progress.waited == count_waiting(evaluations[:number], 0)
        assert progress.improved is last_improvement(evaluations[:number])
    assert progress.waited == 3


def losses_at(monkeypatch, losses):
    """Let evaluations have these mean losses, by step."""
    from support.fault_points import POINTS

    point = POINTS["validation"]

    def fake(*_args, step):
        return evaluation_of(losses[step] + NOISE + np.random.default_rng(step).standard_normal(40) * 0.001, step=step)

    monkeypatch.setattr(point.owner, point.name, fake)


TURNING = {2: 3.0, 4: 2.5, 6: 2.0, 8: 2.1, 10: 2.2, 12: 2.3, 14: 1.0}
PATIENT = {**EVALUATED, "steps": 14, "patience": 2}


RISING = {step: 2.0 + abs(step - 6) / 20 for step in range(2, 30, 2)}


@pytest.mark.parametrize(("patience", "end"), [(1, 14), (2, 16), (3, 18)])
def test_patience_that_is_set_later_counts_from_there(tiny, monkeypatch, capsys, patience, end):
    """What was not waited for does not count; and `best` is the lowest loss that has a checkpoint."""
    losses_at(monkeypatch, RISING)
    train(tiny(**PATIENT | {"patience": 0, "steps": 12}))
    run = train(tiny(**PATIENT | {"patience": patience, "steps": 28}))
    notes = capsys.readouterr().err
    assert "not lower beyond doubt than that of step 6" in notes
    assert list(RunDirectory(run).checkpoints)[-1] == end
    assert RunDirectory(run).best == RunDirectory(run).checkpoints[12]


def test_best_is_not_named_while_it_is_not_kept(tiny, monkeypatch):
    """Lower losses that have no checkpoint may follow: an old `best` would be false."""
    losses_at(monkeypatch, TURNING)
    run = train(tiny(**PATIENT))
    assert RunDirectory(run).best == run / "step-000006"
    train(tiny(**PATIENT | {"patience": 0}))
    assert RunDirectory(run).best is None


def test_patience_ends_the_run_and_keeps_the_best(tiny, monkeypatch, capsys):
    """Two evaluations without improvement: the run is over, and says why; the same command leaves it alone."""
    losses_at(monkeypatch, TURNING)
    run = train(tiny(**PATIENT))
    notes = capsys.readouterr().err
    assert (
        "ended early, after step 10: the last 2 held-out losses are not lower beyond doubt than that of step 6" in notes
    )
    assert "verdict: overfitting since step 6: held-out loss +0.1996" in notes
    manifest = read_manifest(run / "step-000010")
    assert (manifest.ended_by, manifest.reason) == ("patience", "scheduled")
    assert RunDirectory(run).is_finished
    assert RunDirectory(run).best == run / "step-000006"
    before = (run / "metrics.jsonl").read_bytes()
    train(tiny(**PATIENT))
    assert "is complete" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    assert read_manifest(
        train(tiny(**PATIENT | {"output": str(run) + "-2", "patience": 9})) / "step-000014"
    ).ended_by == ("steps")


def test_more_patience_continues_a_run_that_ended_early(tiny, monkeypatch, tmp_path):
    """To the same bytes as with that patience from the start."""
    losses_at(monkeypatch, TURNING)
    train(tiny(**PATIENT))
    run = train(tiny(**PATIENT | {"patience": 3}))
    assert read_manifest(run / "step-000012").ended_by == "patience"
    assert [(s.after_step, s.patience) for s in RunDirectory(run).info.stretches] == [(0, 2), (10, 3)]
    other = train(tiny(**PATIENT | {"patience": 3, "output": str(tmp_path / "other")}))
    assert_same_run(run, other)


def test_run_that_early_stopping_ended_stays_ended_without_its_evaluations(tiny, monkeypatch, capsys):
    """It is its last checkpoint that says why the run is finished."""
    losses_at(monkeypatch, TURNING)
    run = train(tiny(**PATIENT))
    file = run / "evaluations.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    before = contents(run)
    capsys.readouterr()
    train(tiny(**PATIENT))
    assert f"{run} is complete; raise --patience to train on" in capsys.readouterr().err
    assert contents(run) == before


def test_early_stopping_survives_interruption(tiny, monkeypatch, tmp_path):
    """Stopped after each step and continued, the run ends at the same step with the same bytes."""
    losses_at(monkeypatch, TURNING)
    run = train(tiny(**PATIENT))
    for step in range(1, 10):
        train(tiny(**PATIENT, output=str(tmp_path / "pieces")), last_step=step)
    assert_same_run(train(tiny(**PATIENT, output=str(tmp_path / "pieces"))), run)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"patience": 2}, "0 without evaluations"),
        ({"patience": 2, "val_split": 0.1, "val_every": 2}, "0 with sampling = .shared-stream., whose windows differ"),
    ],
)
def test_patience_needs_evaluations_of_the_same_windows(tiny, keys, expected):
    with pytest.raises(RecipeError, match=rf"patience: got 2, expected {expected}"):
        check_recipe(tiny(**keys))


@pytest.mark.parametrize("damage", ["bit", "gap", "text"])
def test_damaged_evaluations_are_found(tiny, call, damage):
    """A flipped bit would be a verdict: commands that read them say so. The run goes on with those before."""
    run = train(tiny(**EVALUATED, patience=5), last_step=4)
    file = run / "evaluations.jsonl"
    first, second = file.read_text().splitlines(keepends=True)
    at = second.index('"losses"') + 30
    flipped = second[:at] + ("B" if second[at] == "A" else "A") + second[at + 1 :]
    broken = flipped if damage == "bit" else "scribble\n"
    file.write_text(second if damage == "gap" else first + broken)
    line = 1 if damage == "gap" else 2
    with pytest.raises(DamagedCheckpointError, match=rf"evaluations\.jsonl: damaged: line {line} is"):
        read_evaluations(run, 4)
    code, _, err = call("check", run)
    assert (code, err.count("\n")) == (1, 1)
    train(tiny(**EVALUATED, patience=5))
    assert (run / "damaged-evaluations.jsonl-1").exists()
    assert [evaluation.step for evaluation in read_evaluations(run, 6)] == ([6] if damage == "gap" else [2, 6])


def test_lost_evaluations_are_said(tiny, capsys):
    """Where early stopping counts them."""
    run = train(tiny(**EVALUATED, patience=5), last_step=4)
    (run / "evaluations.jsonl").unlink()
    train(tiny(**EVALUATED, patience=5))
    assert "evaluations.jsonl: has 0 of 2 evaluations" in capsys.readouterr().err
    assert [evaluation.step for evaluation in read_evaluations(run, 6)] == [6]


@pytest.mark.parametrize(
    ("keys", "has_val_corpus", "kept"),
    [
        ({"lr": 1e-4}, False, [2, 4, 6, 8]),
        ({"eval_batches": 5}, False, [6, 8]),
        ({"corpus": "other.txt"}, False, [6, 8]),
        ({"corpus": "other.txt"}, True, [2, 4, 6, 8]),
    ],
)
def test_branch_begins_with_the_evaluations_of_its_source(
    tiny, tmp_path, monkeypatch, text, text_file, keys, has_val_corpus, kept
):
    """Up to its step, if they are over the same windows: those of another text are no part of what was held out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text(text[::-1], encoding="utf-8", newline="")
    evaluated = EVALUATED | ({"val_split": 0.0, "val_corpus": str(text_file)} if has_val_corpus else {})
    source = train(tiny(**evaluated, save_every=2))
    branch = evaluated | {"resume": str(source / "step-000004"), "output": str(tmp_path / "branch"), "steps": 8} | keys
    train(tiny(**branch), last_step=5)
    run = train(tiny(**branch))
    assert [evaluation.step for evaluation in read_evaluations(run, 8)] == kept


def test_pieces_are_compared_piece_by_piece(tiny, tmp_path):
    """Of two runs that hold out the same pieces, in windows of other lengths; and of one run."""
    keys = {"val_split": 0.2, "val_every": 3, "sampling": "full", "hold_out": "pieces"}
    runs = [train(tiny(**keys, seq_len=length, output=str(tmp_path / str(length)))) for length in (16, 8)]
    (before, a), (_, b) = (read_evaluations(run, 6) for run in runs)
    assert (a.windows.piece_tokens, len(a.windows.starts)) == (125, 32 * 8)
    nats, bits, manner = difference(a, b, same_tokens=True)
    assert manner == "paired over 32 pieces"
    assert nats.mean == pytest.approx(b.loss.mean - a.loss.mean)
    assert bits.mean == pytest.approx(b.bits_per_byte.mean - a.bits_per_byte.mean)
    changed = read_records(runs[0])[-1].val - read_records(runs[0])[2].val
    assert change_between(before, a).mean == pytest.approx(changed)
    assert compare(*runs).held_out.population == "unseen passages of this text"


def test_early_stopping_is_the_same_on_any_number_of_processes(folder):
    """A model that learns nothing ends with its second evaluation, with the same bytes on one process and on three."""
    place = folder("patient")
    keys = EXACT | EVALUATED | {"steps": 9, "lr": 0.0, "patience": 1}
    run = train(Recipe.of(**keys, corpus=str(place / "text.txt"), output=str(place / "one")))
    assert read_manifest(run / "step-000004").ended_by == "patience"
    result = torchrun(3, place, "text.txt", *flags_of(keys), "--output", "three")
    assert result.returncode == 0, result.stderr
    assert "ended early, after step 4: the last held-out loss is not lower" in result.stderr
    assert_same_run(place / "three", run)


def test_best_is_kept_when_a_run_goes_on(tiny, monkeypatch):
    """Though it is older than the checkpoints that are kept."""
    losses_at(monkeypatch, TURNING)
    keys = PATIENT | {"save_every": 2, "keep_last": 1}
    train(tiny(**keys), last_step=8)
    run = train(tiny(**keys))
    assert RunDirectory(run).best == run / "step-000006"
