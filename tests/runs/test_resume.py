"""Where a run begins: continued, branched off, replaced; what is kept of its checkpoints."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support.fault_points import ARGUMENTS
from support.fault_points import run as run_process
from support.runs import contents

from mygpt.errors import CheckpointError, MismatchError, NonFiniteError, RecipeError
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.records import read_records
from mygpt.runs.run import read_run
from mygpt.runs.start import find_start
from mygpt.runs.steps import verify_checkpoint
from mygpt.training import pending
from mygpt.training.pending import PendingSteps
from mygpt.training.train import train, train_until


def steps_of(run) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


def test_the_newest_checkpoints_and_the_best_are_kept(tiny):
    """`keep_last` counts those of `save_every`; the best is kept beside them, and only while it is the best."""
    run = train(tiny(steps=12, save_every=2, keep_last=2, val_split=0.2, val_every=3, save_best=True, lr=1e-2))
    losses = {record.step: record.val for record in read_records(run) if record.val is not None}
    best = min(losses, key=losses.get)
    assert (run / "best").read_text() == f"step-{best:06d}\n"
    assert steps_of(run) == sorted({10, 12, best})
    assert load_checkpoint(run).step == 12
    assert load_checkpoint(run / f"step-{best:06d}").step == best


def test_all_checkpoints_are_kept_unless_told(tiny):
    """Without keep_last nothing that was asked for is removed, also by training on."""
    run = train(tiny(save_every=2))
    train(tiny(save_every=3, steps=9))
    assert steps_of(run) == [2, 4, 6, 9]
    assert not (run / "best").exists()


def test_pruning_removes_only_what_is_whole_and_ours(tiny, capsys):
    """A directory that merely has the name of a step, or holds something else, stays."""
    run = train_until(tiny(save_every=2), 4)
    (run / "step-000001").mkdir()
    (run / "step-000001" / "thesis.txt").write_text("precious")
    (run / "step-000002" / "notes.txt").write_text("precious")
    train(tiny(save_every=2, keep_last=1))
    assert steps_of(run) == [1, 2, 6]
    assert (
        (run / "step-000001" / "thesis.txt").read_text()
        == (run / "step-000002" / "notes.txt").read_text()
        == "precious"
    )


@pytest.mark.parametrize("point", ["run", "step"])
def test_a_branch_goes_on_as_its_source_would(tiny, tmp_path, point):
    """A new run after another's checkpoint has its records, and ends with its bytes; the source stays as it is."""
    keys = {"save_every": 2, "dropout": 0.1, "val_split": 0.2, "val_every": 2}
    whole = train(tiny(**keys, output=str(tmp_path / "whole")))
    source = train_until(tiny(**keys, output=str(tmp_path / "source")), 4)
    before = contents(source)
    path = source if point == "run" else source / "step-000004"
    branch = train(tiny(**keys, output=str(tmp_path / "branch"), resume=str(path)))
    assert contents(source) == before
    ours, theirs = contents(branch), contents(whole)
    for name in ("metrics.jsonl", "step-000006/model.safetensors", "step-000006/state.safetensors"):
        assert ours[name] == theirs[name]
    assert steps_of(branch) == [6]
    (begun,) = read_run(branch).resumed
    assert (begun.after_step, Path(begun.checkpoint)) == (4, source / "step-000004")


def test_a_branch_that_is_killed_early_starts_where_it_began(tmp_path, text_file):
    """Also when the source has gone on since; and while its directory was being made."""
    (tmp_path / "text.txt").write_bytes(text_file.read_bytes())
    source = (*ARGUMENTS, "--keep-last", 0, "--output", "source")
    assert run_process(source, tmp_path, "before-step", 9) == -9
    branch = (*ARGUMENTS, "--resume", "source/step-000004", "--output")
    assert run_process((*branch, "quiet"), tmp_path) == 0
    for point in ("made-run.json", "copying-records", "made-recipe", "before-step"):
        assert run_process((*branch, "killed"), tmp_path, point) == -9
    assert run_process(source, tmp_path) == 0
    assert run_process((*branch, "killed"), tmp_path) == 0
    for name in ("metrics.jsonl", "latest", "best", "step-000012/model.safetensors", "step-000012/state.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes(), name
    best = (tmp_path / "quiet" / "best").read_text().strip()
    assert (tmp_path / "quiet" / best).is_dir()


def test_a_branch_that_makes_no_sense_is_a_mistake(tiny, tmp_path):
    """From nothing, from a finished run, from the run that it would replace; nothing is created or removed."""
    run = train(tiny(save_every=2))
    before = contents(run)
    for resume, output, message in (
        ("nowhere", "new", r'resume: got .*nowhere\', expected "auto", "never", or a run or step directory'),
        ("a\0b", "new", "resume: got"),
        (str(run / "run.json"), "new", "resume: got"),
        (str(run), "new", "steps: got 6, expected more than 6"),
        (str(run / "step-000002"), "run", "is in the run that --overwrite would remove"),
    ):
        with pytest.raises((CheckpointError, RecipeError), match=message) as caught:
            train(tiny(save_every=2, resume=resume, output=str(tmp_path / output)), overwrite=output == "run")
        assert caught.value.exit_code == 2
    assert contents(run) == before
    assert not (tmp_path / "new").exists()


def test_a_restart_continues_what_overwrite_began(tiny, monkeypatch):
    """A launcher that runs the same command again does not begin anew each time; another run is replaced still."""
    run = train_until(tiny(steps=8, save_every=2), 2)
    recipe, notes = tiny(save_every=2), []
    start = find_start(recipe, read_run(run), "", overwrite=True, is_restart=True, warn=notes.append)
    assert (start.checkpoint, start.overwrite) == (None, True)
    train_until(recipe, 4, overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(recipe, overwrite=True)
    assert [json.loads(line)["step"] for line in (run / "timing.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert read_run(run).resumed == ()


def test_a_run_is_removed_only_when_told(tiny, tmp_path):
    """Also where run.json is a link to nothing, which looks as if there were none."""
    run = train(tiny(save_every=2))
    (run / "run.json").unlink()
    (run / "run.json").symlink_to(tmp_path / "nothing")
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"run\.json: cannot be read"):
        train(tiny(save_every=2))
    assert contents(run) == before


def test_damaged_records_are_kept_aside(tiny, capsys):
    """A line in the middle that is no record: the run goes on, and the file that it replaces is not lost."""
    run = train_until(tiny(save_every=2), 4)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], "scribble\n", *lines[2:]]))
    train(tiny(save_every=2))
    assert "line 2 is no record; the file is kept as" in capsys.readouterr().err
    assert "scribble" in (run / "damaged-metrics.jsonl-1").read_text()
    assert [record.step for record in read_records(run)] == [1, 5, 6]


def test_changes_that_were_allowed_are_on_record(tiny, tmp_path):
    """run.json says which keys were changed after which step, and allowing them once is enough."""
    run = train_until(tiny(save_every=2), 2)
    train_until(tiny(save_every=2, lr=1e-4), 4, allow_changes=True)
    train(tiny(save_every=2, lr=1e-4))
    (resumed,) = read_run(run).resumed
    assert (resumed.after_step, resumed.changed) == (2, {"lr": (0.001, 0.0001)})


def test_a_complete_run_is_left_as_it_is(tiny, capsys):
    """The same command prints the same lines; another number of threads computes nothing and changes nothing."""
    run = train(tiny(save_every=2))
    printed, before = capsys.readouterr().out, contents(run)
    for keys in ({}, {"threads": 2}):
        train(tiny(save_every=2, **keys))
        captured = capsys.readouterr()
        assert captured.out == printed
        assert "is complete" in captured.err
        assert "last bits" not in captured.err
        assert contents(run) == before


def test_keys_of_evaluations_that_never_run_may_change(tiny):
    """And those of evaluations that draw nothing from the training batches."""
    run = train_until(tiny(save_every=2), 2)
    train_until(tiny(save_every=2, eval_batches=3, sampling="full"), 4)
    assert steps_of(run) == [2, 4]


def test_more_steps_after_an_evaluation_out_of_turn_are_told(tiny, capsys):
    """The held-out loss at the last step draws from the shared stream; a longer run would not have had it there."""
    train(tiny(val_split=0.2, val_every=4))
    train(tiny(val_split=0.2, val_every=4, steps=8))
    assert re.search(r"steps 6 -> 8: the held-out loss at step 6, then the last, drew from", capsys.readouterr().err)


def test_missing_records_are_told(tiny, capsys):
    """The weights go on exactly; that the record of how they came about is gone is said."""
    run = train_until(tiny(save_every=2), 4)
    (run / "metrics.jsonl").unlink()
    train(tiny(save_every=2))
    assert "metrics.jsonl: it has no record, and the checkpoint is of step 4" in capsys.readouterr().err
    assert [record.step for record in read_records(run)] == [5, 6]


def test_records_of_a_complete_run_are_left_alone(tiny):
    """Nothing would make them again."""
    run = train(tiny(save_every=2))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], "\n", *lines[1:]]))
    before = contents(run)
    train(tiny(save_every=2))
    assert contents(run) == before


def test_tokens_are_counted_over_a_change_of_the_batch(tiny):
    """Tokens trained on so far, whatever each step had."""
    train_until(tiny(save_every=2), 2)
    run = train(tiny(save_every=2, batch_size=2), allow_changes=True)
    assert [record.tokens for record in read_records(run)] == [64, 128, 160, 192, 224, 256]


def test_an_origin_that_is_gone_or_another_is_named(tiny, tmp_path):
    """A branch without checkpoints of its own cannot go on from what is not what it began with."""
    source = train_until(tiny(save_every=2, output=str(tmp_path / "source")), 4)
    branch = tiny(resume=str(source), output=str(tmp_path / "branch"), lr=1e30)
    with pytest.raises(NonFiniteError):
        train(branch, allow_changes=True)
    with pytest.raises(NonFiniteError):  # and not that a run is in the way
        train(branch, allow_changes=True)
    manifest = source / "step-000004" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(MismatchError, match=r"the checkpoint after which .*branch began is another now"):
        train(branch, allow_changes=True)
    manifest.unlink()
    with pytest.raises(MismatchError, match=r"the checkpoint after which .*branch began is gone"):
        train(branch, allow_changes=True)


def test_a_checkpoint_may_be_copied_and_linked_for_generating(tiny, tmp_path, monkeypatch):
    """Its name matters only in its run; without a run's `latest`, the message says what to name."""
    run = train(tiny())
    shutil.copytree(run / "step-000006", tmp_path / "mine")
    (tmp_path / "link").symlink_to("mine")
    monkeypatch.chdir(tmp_path / "mine")
    for path in (tmp_path / "mine", tmp_path / "link", ".", "model.safetensors"):
        assert load_checkpoint(path).step == 6
    (run / "latest").unlink()
    with pytest.raises(CheckpointError, match="has checkpoints, but no file `latest`"):
        load_checkpoint(run)
    (run / "recipe.toml").unlink()
    with pytest.raises(CheckpointError, match=r"holds checkpoints but no recipe\.toml; restore it"):
        train(tiny())
    (run / "step-000006").rename(run / "step-000004")
    with pytest.raises(CheckpointError, match=r"is that of step 6, not of step-000004"):
        verify_checkpoint(run / "step-000004")


def test_a_run_that_goes_on_is_listened_to_from_its_first_step(tiny, tmp_path, monkeypatch):
    """Where nothing is recorded for long, the host still reads, and so hears of a signal, every second."""
    keys = {"steps": 40, "log_every": 1000, "print_every": 1000}
    train_until(tiny(**keys), 3)
    read, calls = PendingSteps.read, []
    monkeypatch.setattr(PendingSteps, "read", lambda self, stop: calls.append(1) or read(self, stop))
    monkeypatch.setattr(pending, "MAX_UNREAD_SECONDS", 0.0)
    train_until(tiny(**keys), 9)
    assert len(calls) == 6
