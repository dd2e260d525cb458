"""Runs that are continued, and the checkpoints that they keep."""

import errno
import itertools
import os
import re
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from support.checkpoints import fit_manifest, rewrite
from support.fault_points import disturb, fail
from support.forked import run as run_forked
from support.runs import FLAGS, assert_same_run, contents, latest_step, steps_of

from mygpt.errors import CheckpointError, DiskError, MygptError
from mygpt.recipe.files import load_recipe
from mygpt.recipe.seeds import process_dropout_seed
from mygpt.runs import files, saver, steps
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.records import read_records
from mygpt.runs.run import RunDirectory
from mygpt.runs.saver import Saver
from mygpt.runs.steps import verify_checkpoint
from mygpt.training import pending
from mygpt.training.pending import PendingSteps
from mygpt.training.train import train


def test_the_newest_checkpoints_and_the_best_are_kept(tiny):
    """`keep_last` counts the checkpoints of `save_every`; the best is kept besides, while it is the best."""
    run = train(tiny(steps=12, save_every=2, keep_last=2, val_split=0.2, val_every=3, save_best=True, lr=1e-2))
    losses = {record.step: record.val for record in read_records(run) if record.val is not None}
    best = min(losses, key=losses.get)
    assert (run / "best").read_text() == f"step-{best:06d}\n"
    assert steps_of(run) == sorted({10, 12, best})
    assert load_checkpoint(run).step == 12
    assert load_checkpoint(run / f"step-{best:06d}").step == best


@pytest.mark.parametrize("keep_last", [0, 2])
def test_a_save_reads_no_manifest_of_those_before(tiny, monkeypatch, keep_last):
    """However many there are: a process reads each once, and those that it removes once more."""
    train(tiny(steps=20, save_every=1, keep_last=0), last_step=10)
    read, read_manifest = [], steps.read_manifest
    monkeypatch.setattr(steps, "read_manifest", lambda *args: read.append(args[0].name) or read_manifest(*args))
    write, counts = Saver._write, []

    def count(self, *arguments):
        read.clear()
        write(self, *arguments)
        counts.append(len(read))

    monkeypatch.setattr(Saver, "_write", count)
    run = train(tiny(steps=20, save_every=1, keep_last=keep_last))
    assert steps_of(run) == list(range(1, 21))[-keep_last:]
    assert counts[1:] == [1 if keep_last else 0] * 9


def test_checkpoints_by_the_clock(tiny, monkeypatch):
    """`save_seconds` after the last checkpoint there is another, which the next replaces; 0: there is none."""
    saved, now = [], itertools.count(time.monotonic(), 10)
    save = Saver.save
    monkeypatch.setattr(Saver, "save", lambda self, *args: saved.append(args[2]) or save(self, *args))
    monkeypatch.setattr(saver.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(
        Saver,
        "is_time_to_save",
        lambda self, is_time_to_save=Saver.is_time_to_save: self.wait() or is_time_to_save(self),
    )
    run = train(tiny(steps=9, save_seconds=25))
    # The clock is read at each step and after each save.
    assert saved == ["timed", "timed", "timed", "scheduled"]
    assert steps_of(run) == [9]
    saved.clear()
    train(tiny(steps=9, save_seconds=0, output=f"{run}-without"))
    assert saved == ["scheduled"]


def test_a_checkpoint_by_the_clock_that_fails_costs_a_warning(tiny, tmp_path, monkeypatch, capsys):
    """The run goes on, and tries again; a scheduled one that fails ends it."""
    whole = train(tiny(output=str(tmp_path / "whole")))
    write, refused = saver.write_checkpoint, []

    def refuse(target, weights, metadata, state, manifest, reason="timed"):
        if manifest.reason == reason and len(refused) < 2:
            refused.append(manifest.step)
            raise DiskError(f"{target}: cannot be saved: No space left on device{files.MEND_DISK}")
        write(target, weights, metadata, state, manifest)

    monkeypatch.setattr(saver, "write_checkpoint", refuse)
    monkeypatch.setattr(Saver, "is_time_to_save", lambda self: True)
    run = train(tiny(save_seconds=7))
    assert refused == [1, 2]
    warnings = capsys.readouterr().err.splitlines()
    again = "cannot be saved: No space left on device; the run goes on, and the next one is tried when due"
    assert [line for line in warnings if "cannot" in line] == [f"{run}/step-00000{step}: {again}" for step in refused]
    assert_same_run(run, whole)
    refused.clear()
    monkeypatch.setattr(saver, "write_checkpoint", partial(refuse, reason="scheduled"))
    with pytest.raises(DiskError, match=r"cannot be saved: .*the same command continues"):
        train(tiny(output=str(tmp_path / "other")))


def test_all_checkpoints_are_kept_by_default(tiny):
    """Without keep_last no scheduled checkpoint is removed, also when training continues."""
    run = train(tiny(save_every=2))
    train(tiny(save_every=3, steps=9))
    assert steps_of(run) == [2, 4, 6, 9]
    assert not (run / "best").exists()


def test_pruning_removes_only_whole_checkpoints(tiny):
    """A directory that merely has the name of a step, or holds another file, stays."""
    run = train(tiny(save_every=2), last_step=4)
    (run / "step-000001").mkdir()
    (run / "step-000001" / "thesis.txt").write_text("precious")
    (run / "step-000002" / "notes.txt").write_text("precious")
    train(tiny(save_every=2, keep_last=1))
    assert steps_of(run) == [1, 2, 6]
    assert (run / "step-000001" / "thesis.txt").read_text() == "precious"
    assert (run / "step-000002" / "notes.txt").read_text() == "precious"


def test_run_with_a_dangling_run_json_is_not_replaced(tiny, tmp_path):
    """A link to nothing looks like a missing run.json, but the run stays."""
    run = train(tiny(save_every=2))
    (run / "run.json").unlink()
    (run / "run.json").symlink_to(tmp_path / "nothing")
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"run\.json: cannot be read"):
        train(tiny(save_every=2))
    assert contents(run) == before


def test_damaged_records_are_set_aside(tiny, capsys):
    """With a damaged line in the middle the run continues, and the file that it replaces is kept."""
    run = train(tiny(save_every=2), last_step=4)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], "scribble\n", *lines[2:]]))
    train(tiny(save_every=2))
    assert "line 2 is no record; the file is kept as" in capsys.readouterr().err
    assert "scribble" in (run / "damaged-metrics.jsonl-1").read_text()
    assert [record.step for record in read_records(run)] == [1, 5, 6]


def test_complete_run_does_not_change(tiny, capsys):
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


def test_more_steps_after_an_extra_evaluation_cost_a_warning(tiny, capsys):
    """The evaluation at the last step draws from the shared stream; a longer run would not have made it there."""
    train(tiny(val_split=0.2, val_every=4))
    train(tiny(val_split=0.2, val_every=4, steps=8))
    assert re.search(r"steps 6 -> 8: the held-out loss at step 6, then the last, drew from", capsys.readouterr().err)


def test_missing_records_cost_a_warning(tiny, capsys):
    """The weights continue exactly; a message says that the records before are missing."""
    run = train(tiny(save_every=2), last_step=4)
    (run / "metrics.jsonl").unlink()
    train(tiny(save_every=2))
    assert "metrics.jsonl: it has no record, and the checkpoint is of step 4" in capsys.readouterr().err
    assert [record.step for record in read_records(run)] == [5, 6]


def test_records_of_a_complete_run_are_not_rewritten(tiny):
    """Also damaged ones: no later step would make them again."""
    run = train(tiny(save_every=2))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], "\n", *lines[1:]]))
    before = contents(run)
    train(tiny(save_every=2))
    assert contents(run) == before


def test_tokens_are_counted_across_a_change_of_the_batch(tiny, tmp_path):
    """A record has the tokens trained on so far, at both batch sizes."""
    run = train(tiny(save_every=2), last_step=2)
    run = train(tiny(save_every=2, batch_size=2, resume=str(run), output=str(tmp_path / "branch")))
    assert [record.tokens for record in read_records(run)] == [64, 128, 160, 192, 224, 256]


def test_model_file_of_another_name_is_not_that_of_the_manifest(tiny, tmp_path, call):
    """A copy beside a checkpoint is a file of its own: to generate, compare, evaluate and begin with."""
    run = train(tiny(val_split=0.2, val_every=3))
    copy = run / "step-000006" / "copy.safetensors"
    shutil.copy(run / "step-000006" / "model.safetensors", copy)
    assert load_checkpoint(copy).step == 6
    assert call("generate", "--checkpoint", copy, "--max-new-tokens", 2)[0] == 0
    assert call("compare", copy, run)[0] == 0
    code, _, err = call("eval", copy)
    assert code == 2
    assert "belongs to no run, so no text is held out; give a text with --corpus" in err
    train(tiny(init_from=str(copy), output=str(tmp_path / "more")))


def test_checkpoint_may_be_copied_and_linked_for_generating(tiny, tmp_path, monkeypatch):
    """Its name matters only in its run; without the run's `latest`, the message says which path to give."""
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


def test_continued_run_is_read_from_its_first_step(tiny, monkeypatch):
    """Where nothing is recorded for long, the host still reads, and so notices a signal, every second."""
    keys = {"steps": 40, "log_every": 1000, "print_every": 1000}
    train(tiny(**keys), last_step=3)
    read, calls = PendingSteps.read, []
    monkeypatch.setattr(PendingSteps, "read", lambda *args, **keys: calls.append(1) or read(*args, **keys))
    monkeypatch.setattr(pending, "MAX_UNREAD_SECONDS", 0.0)
    train(tiny(**keys), last_step=9)
    assert len(calls) == 6


def test_recipe_of_a_run_that_never_resumes_continues_it(tiny):
    """The key is about the first call: the run's own recipe.toml has `resume = "auto"`."""
    run = train(tiny(resume="never"), last_step=4)
    with pytest.raises(CheckpointError, match="already holds a run"):
        train(tiny(resume="never"))
    assert RunDirectory(train(load_recipe(run / "recipe.toml"))).is_finished


def test_continued_schedule_is_not_called_another(tiny, capsys):
    """Only another number of steps changes its rates."""
    keys = {"schedule": "cosine", "save_every": 2}
    train(tiny(**keys), last_step=4)
    capsys.readouterr()
    train(tiny(**keys))
    assert "would differ" not in capsys.readouterr().err


def test_resume_never_may_replace_a_run_without_a_step(folder):
    """Killed before its first step, the same command starts again; killed after it, it refuses."""
    place, output = folder("never"), ("--output", "run")
    never = ("text.txt", *FLAGS, "--resume", "never", *output)
    for point in ("made-run.json", "made-recipe", "before-step"):
        assert run_forked(never, place, point) == -signal.SIGKILL
    assert run_forked(never, place, "record") == -signal.SIGKILL
    assert run_forked(never, place) == 2
    assert "already holds a run" in (place / "err").read_text()
    # Nor does it matter how the run before was to resume.
    shutil.rmtree(place / "run")
    assert run_forked(("text.txt", *FLAGS, *output), place, "before-step") == -signal.SIGKILL
    assert run_forked(never, place) == 0


def test_run_that_failed_before_its_first_checkpoint_begins_again(tiny, tmp_path, monkeypatch):
    """Its records, too."""
    with monkeypatch.context() as patch:
        disturb("before-step", fail(MemoryError()), count=4, patch=patch.setattr)
        with pytest.raises(MygptError):
            train(tiny())
    assert [record.step for record in read_records(tmp_path / "run")] == [1, 2, 3]
    assert_same_run(train(tiny()), train(tiny(output=str(tmp_path / "undisturbed"))))


def test_folder_that_cannot_be_removed_stays_until_the_next_start(tiny, monkeypatch):
    """A network disk keeps a file that is open, and so its folder."""
    run = train(tiny(save_every=2), last_step=4)
    (run / ".tmp-step-000003").mkdir()

    def refuse(*_args, **_keys):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        train(tiny(save_every=2), last_step=5)
    assert latest_step(run) == 5
    assert any(path.name.startswith(".tmp-") for path in run.iterdir())
    train(tiny(save_every=2))
    assert not any(path.name.startswith(".tmp-") for path in run.iterdir())


def test_dropout_on_another_number_of_processes_is_seeded_by_the_data_seed(tiny, monkeypatch):
    """The checkpoint has no generator for it."""
    keys = {"dropout": 0.1, "save_every": 2, "data_seed": 7}
    run = train(tiny(**keys), last_step=4)
    file = run / "step-000004" / "state.safetensors"
    rewrite(file, metadata=lambda values: values.update(processes=2))
    fit_manifest(file)
    seeds = []
    disturb("before-step", lambda *_: seeds.append(torch.initial_seed()), patch=monkeypatch.setattr)
    train(tiny(**keys))
    assert seeds == [process_dropout_seed(7, 0, 4)]
