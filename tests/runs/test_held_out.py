"""Evaluations window by window: what a run remembers, paired differences, early stopping."""

import numpy as np
import pytest
from support.checkpoints import rewrite
from support.commands import torchrun
from support.runs import EXACT, assert_same_run, evaluation_of, flags_of

from mygpt.checks.compare import compare
from mygpt.errors import DamagedCheckpointError, RecipeError
from mygpt.recipe.tables import Recipe, check_recipe
from mygpt.runs.held_out import difference, load_history, read_history, remember
from mygpt.runs.records import read_records
from mygpt.runs.run import Run
from mygpt.runs.steps import read_manifest
from mygpt.training.train import train, train_until

NOISE = np.random.default_rng(0).standard_normal(40)
EVALUATED = {"val_split": 0.2, "val_every": 2, "sampling": "own-stream", "eval_batches": 3}


def history_of(*losses, same_windows=True, every=10):
    """The history of evaluations with these mean losses, whose windows all differ from the mean in the same way."""
    history = None
    for number, loss in enumerate(losses, 1):
        jitter = np.random.default_rng(number).standard_normal(40) * 0.01
        evaluation = evaluation_of(loss + NOISE + jitter, step=number * every)
        history = remember(history, evaluation, same_windows=same_windows)
    return history


def test_losses_of_the_last_evaluation_are_in_the_checkpoint(tiny, tmp_path):
    """With their windows; they come to the recorded loss and error."""
    run = train(tiny(**EVALUATED, steps=6))
    history = load_history(run / "step-000006" / "state.safetensors")
    assert len(history.last.losses) == 3 * 4
    record = read_records(run)[-1]
    loss, bits = history.last.loss, history.last.bits_per_byte
    assert (loss.mean, loss.stderr, loss.dof) == (record.val, record.val_stderr, record.val_dof)
    assert (bits.mean, bits.stderr) == (record.val_bits_per_byte, record.val_bits_per_byte_stderr)
    assert load_history(train(tiny(output=str(tmp_path / "none"))) / "step-000006" / "state.safetensors") is None


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


def test_history_survives_a_state_file_and_forgets_what_it_needs_no_more():
    """It holds the last, the lowest, the reference and two marks, however many there were."""
    history = history_of(*np.linspace(5, 3, 50), 3.5)
    assert len(history.losses) <= 5
    assert (history.lowest, history.reference, history.waited) == (500, 500, 1)
    first, second = history.marks
    assert 1.1 * first <= second <= 510
    assert 0.8 * 510 < first < 510 / 1.1
    again = read_history(history.metadata(), history.arrays())
    assert again.metadata() == history.metadata()
    assert all(np.array_equal(again.losses[step], losses) for step, losses in history.losses.items())
    assert again.difference(first, 510) == history.difference(first, 510)


def test_history_of_random_windows_keeps_summaries_alone():
    """Windows that are others each time cannot be paired: differences are those of independent estimates."""
    history = history_of(5, 4, 3, same_windows=False)
    assert history.losses.keys() == {30}
    assert history.difference(20, 30).stderr == pytest.approx(2**0.5 * history.last.loss.stderr, rel=0.01)


def test_improvement_must_be_beyond_doubt():
    """Small steps count together: each is below its error, and the second from the reference is not."""
    assert history_of(3.0, 2.999).waited == 1
    history = history_of(3.0, 2.999, 2.99)
    assert (history.reference, history.waited) == (30, 0)


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
    assert list(Run(run).checkpoints)[-1] == end
    assert Run(run).best == Run(run).checkpoints[12]


def test_best_is_not_named_while_it_is_not_kept(tiny, monkeypatch):
    """Lower losses that have no checkpoint may follow: an old `best` would be false."""
    losses_at(monkeypatch, TURNING)
    run = train(tiny(**PATIENT))
    assert Run(run).best == run / "step-000006"
    train(tiny(**PATIENT | {"patience": 0}))
    assert Run(run).best is None


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
    assert (manifest.finished, manifest.ended_by, manifest.reason) == (True, "patience", "scheduled")
    assert Run(run).is_finished
    assert Run(run).best == run / "step-000006"
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
    assert [(s.after_step, s.patience) for s in Run(run).info.stretches] == [(0, 2), (10, 3)]
    other = train(tiny(**PATIENT | {"patience": 3, "output": str(tmp_path / "other")}))
    assert_same_run(run, other)


def test_early_stopping_survives_interruption(tiny, monkeypatch, tmp_path):
    """Stopped after each step and continued, the run ends at the same step with the same bytes."""
    losses_at(monkeypatch, TURNING)
    run = train(tiny(**PATIENT))
    for step in range(1, 10):
        train_until(tiny(**PATIENT, output=str(tmp_path / "pieces")), step)
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


@pytest.mark.parametrize("damage", ["shorter", "missing", "unknown"])
def test_damaged_losses_are_found(tiny, damage):
    """A state whose losses do not fit its windows or its metadata is refused, and a run falls back or stops."""
    run = train_until(tiny(**EVALUATED), 4)

    def change(tensors):
        name = next(name for name in tensors if name.startswith("held_out.losses."))
        if damage == "shorter":
            tensors[name] = tensors[name][:-1].clone()
        elif damage == "missing":
            del tensors["held_out.tokens"]
        else:
            tensors["held_out.losses.3"] = tensors[name].clone()

    rewrite(run / "step-000004" / "state.safetensors", tensors=change)
    with pytest.raises(DamagedCheckpointError, match="no held-out losses"):
        load_history(run / "step-000004" / "state.safetensors")


def test_pieces_are_compared_piece_by_piece(tiny, tmp_path):
    """Of two runs that hold out the same pieces, in windows of other lengths; and a run's history keeps them."""
    keys = {"val_split": 0.2, "val_every": 3, "sampling": "full", "hold_out": "pieces"}
    runs = [train(tiny(**keys, seq_len=length, output=str(tmp_path / str(length)))) for length in (16, 8)]
    a, b = (load_history(run / "step-000006" / "state.safetensors") for run in runs)
    assert (a.last.windows.piece_tokens, len(a.last.windows.starts)) == (125, 32 * 8)
    nats, bits, manner = difference(a.last, b.last, same_tokens=True)
    assert manner == "paired over 32 pieces"
    assert nats.mean == pytest.approx(b.last.loss.mean - a.last.loss.mean)
    assert bits.mean == pytest.approx(b.last.bits_per_byte.mean - a.last.bits_per_byte.mean)
    assert a.difference(3, 6).mean == pytest.approx(read_records(runs[0])[-1].val - read_records(runs[0])[2].val)
    assert compare(*runs).held_out.population == "unseen passages of this text"
    again = read_history(a.metadata(), a.arrays())
    assert again.last.loss == a.last.loss


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
