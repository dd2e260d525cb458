"""What a run remembers: the recipe of each step, its text, the place where it lies, and who writes to it."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from support.commands import REPOSITORY
from support.fault_points import run as run_process
from support.runs import FLAGS, TINY, contents

from mygpt.checks.verify import parts_of, verify
from mygpt.errors import CheckpointError, CorpusError, InterruptedRunError, MygptError, RecipeError
from mygpt.recipe.files import load_recipe
from mygpt.recipe.flags import load_target
from mygpt.runs import saver as checkpoint
from mygpt.runs.files import BEST_FILE, LOCK_FILE
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.lock import locked
from mygpt.runs.records import read_records
from mygpt.runs.run import read_run
from mygpt.runs.schemas import RunInfo
from mygpt.runs.start import recorded_recipe
from mygpt.runs.steps import read_manifest
from mygpt.training import evaluate, loop
from mygpt.training.evaluate import HeldOutLoss
from mygpt.training.train import train, train_until

# ---- each step is judged by what it was trained with


@pytest.fixture
def changed(tiny):
    """A run that was trained to step 4 at one rate, and on to step 6 at another."""
    run = train(tiny(steps=4, save_every=2, dropout=0.1))
    return train(tiny(steps=6, save_every=2, dropout=0.1, lr=1e-4), allow_changes=True), run


@pytest.mark.fault(65)
def test_a_step_records_what_it_was_trained_with(changed, tiny, tmp_path):
    """Recipe, text, and whether the run ended with it: in its manifest, which names no path of this machine."""
    run, _ = changed
    manifests = {step: read_manifest(run / f"step-{step:06d}") for step in (2, 4, 6)}
    assert [manifest.recipe.optimizer.lr for manifest in manifests.values()] == [1e-3, 1e-3, 1e-4]
    assert [manifest.finished for manifest in manifests.values()] == [False, True, True]
    assert {manifest.corpus_sha256 for manifest in manifests.values()} == {read_run(run).corpus_sha256}
    assert str(tmp_path) not in (run / "step-000006" / "manifest.json").read_text()
    elsewhere = train(tiny(steps=4, save_every=2, dropout=0.1, output=str(tmp_path / "elsewhere")))
    for step in ("step-000002", "step-000004"):
        assert contents(run / step) == contents(elsewhere / step)


@pytest.mark.fault(65)
def test_a_branch_is_judged_by_the_recipe_of_its_step(changed, tiny, tmp_path, capsys):
    """After step 2 the rate of that step is no change, and the one that the run took later is."""
    run, _ = changed
    branch = {"steps": 6, "save_every": 2, "dropout": 0.1, "resume": str(run / "step-000002")}
    told = r"lr: got 0\.0001, expected 0\.001, as .*step-000002 was trained; set it so, or branch off with --allow-ch"
    with pytest.raises(RecipeError, match=told):
        train(tiny(**branch, lr=1e-4, output=str(tmp_path / "refused")))
    assert not (tmp_path / "refused").exists()
    same = train(tiny(**branch, output=str(tmp_path / "same")))
    assert "lr" not in capsys.readouterr().err
    whole = train(tiny(steps=6, save_every=2, dropout=0.1, output=str(tmp_path / "whole")))
    for name in ("model.safetensors", "state.safetensors"):
        assert (same / "step-000006" / name).read_bytes() == (whole / "step-000006" / name).read_bytes()


@pytest.mark.fault(65)
def test_falling_back_is_judged_by_the_recipe_of_the_step(changed, tiny, capsys):
    """Where later checkpoints are damaged, steps are not trained again at another rate without a word."""
    run, _ = changed
    for step in (4, 6):
        os.truncate(run / f"step-{step:06d}" / "model.safetensors", 100)
    again = tiny(steps=6, save_every=2, dropout=0.1, lr=1e-4)
    with pytest.raises(RecipeError, match=r"lr: got 0\.0001, expected 0\.001, as .*step-000002 was trained; choose"):
        train(again)
    train(again, allow_changes=True)
    assert "lr: got 0.0001, expected 0.001, as" in capsys.readouterr().err
    # What was recorded of the continuation that is gone, is gone too.
    (resumed,) = read_run(run).resumed
    assert (resumed.after_step, resumed.changed) == (2, {"lr": (1e-3, 1e-4), "steps": (4, 6)})
    assert verify(run).identical


@pytest.mark.fault(65)
@pytest.mark.parametrize("steps", [None, 3, 4, 5])
def test_verify_repeats_what_was_changed_on_the_way(tiny, steps):
    """Rate, threads, steps and kind of evaluation: each part of the run is run again as it was."""
    keys = {"save_every": 2, "dropout": 0.1, "val_split": 0.2, "val_every": 2, "sampling": "own-stream"}
    train_until(tiny(**keys, steps=4), 3)
    train(tiny(**keys, steps=5, lr=1e-4, threads=2), allow_changes=True)
    run = train(tiny(**keys | {"sampling": "full"}, steps=8, lr=1e-4, threads=2))
    result = verify(run, steps)
    assert result.identical, (result.difference, result.tensors)
    assert result.until == (steps or 8)
    assert result.records == result.until
    assert result.changes == []


@pytest.mark.fault(65)
def test_a_warning_names_the_steps_of_the_schedule_that_was_left(tiny, tmp_path, capsys):
    """A schedule over 4 steps, then over 6: after step 2 it is the first that is left, after step 5 the second."""
    keys = {"save_every": 1, "schedule": "linear"}
    run = train(tiny(**keys, steps=4))
    train_until(tiny(**keys, steps=6), 5)
    assert "steps 4 -> 6: from step 5 on" in capsys.readouterr().err
    train(tiny(**keys, steps=8, resume=str(run / "step-000002"), output=str(tmp_path / "branch")))
    assert "steps 4 -> 8: from step 3 on" in capsys.readouterr().err
    train(tiny(**keys, steps=8))
    assert "steps 6 -> 8: from step 6 on" in capsys.readouterr().err


@pytest.fixture
def format_1(tmp_path, monkeypatch):
    """A copy of a run that version 0.1 trained to step 4 at a rate of 1e-3, and to step 6 at 1e-4."""
    shutil.copytree(REPOSITORY / "tests" / "support" / "format-1", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Path("run")


@pytest.mark.fault(65)
def test_runs_of_format_1_are_read(format_1, capsys):
    """Loaded, continued, judged step by step from what run.json recorded; their later steps are of format 2."""
    assert load_checkpoint(format_1).step == 6
    recipe = recorded_recipe(format_1)
    assert recipe.checkpoint.output == "run"
    branch = {"resume": "run/step-000002", "output": "branch", "steps": 8}
    with pytest.raises(RecipeError, match=r"lr: got 0\.0001, expected 0\.001, as .*step-000002 was trained"):
        train(recipe.replace(**branch))
    train(recipe.replace(**branch, lr=1e-3))
    capsys.readouterr()
    train(recipe)
    assert "run is complete" in capsys.readouterr().err
    run = train(recipe.replace(steps=8))
    messages = capsys.readouterr().err
    assert "mygpt 0.1.0 -> " in messages
    assert "the held-out windows of own-stream are not those of mygpt 0.1" in messages
    assert [read_manifest(run / f"step-{step:06d}").format for step in (2, 4, 6, 8)] == [1, 1, 1, 2]
    assert [record.step for record in read_records(run)] == list(range(1, 9))
    # Losses over other windows are no rivals: the best of those before does not stand in the way.
    assert (run / BEST_FILE).read_text() == "step-000008\n"


@pytest.mark.parametrize("change", [{"sampling": "full"}, {"eval_batches": 5}])
def test_the_best_of_other_held_out_windows_is_not_the_best(tiny, monkeypatch, capsys, change):
    """After a change of sampling or eval_batches the losses are of other windows: the first one is the best so far."""
    losses = iter([1.0, 1.5, 2.0, 2.5])
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *_: HeldOutLoss(next(losses), 0.1))
    keys = {"save_every": 2, "save_best": True, "val_split": 0.2, "val_every": 2, "sampling": "own-stream"}
    run = train_until(tiny(**keys, steps=8), 4)
    assert (run / BEST_FILE).read_text() == "step-000002\n"
    capsys.readouterr()
    train(tiny(**keys | change, steps=8))
    assert "`best` begins again" in capsys.readouterr().err
    assert (run / BEST_FILE).read_text() == "step-000006\n"


# ---- a requeued job


@pytest.mark.fault(63)
def test_a_requeued_job_with_overwrite_keeps_its_run(tiny, monkeypatch, capsys):
    """Also where processor, kernel or commit are others than at the first start: recipe and command say whose it is."""
    recipe = tiny(save_every=2)
    run = train_until(recipe, 4, overwrite=True)
    info = json.loads((run / "run.json").read_text())
    other = {"cpu": "another", "platform": "another", "git_commit": "0" * 40 + "-dirty", "cpu_capability": "AVX2"}
    (run / "run.json").write_text(json.dumps(info | other))
    before = contents(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train(recipe, overwrite=True)
    assert "continuing after step 4" in capsys.readouterr().err
    after = contents(run)
    assert all(after[name] == before[name] for name in before if name.startswith("step-"))
    # Another command has begun another run, which is replaced.
    (run / "run.json").write_text(json.dumps(info | {"command": ["mygpt", "train", "other.toml"]}))
    train(recipe, overwrite=True)
    assert "continuing" not in capsys.readouterr().err


def test_another_commit_alone_costs_no_warning(tiny, capsys):
    """The commit is recorded, and changes no bits by itself: what does is the version, or a test's business."""
    run = train_until(tiny(save_every=2), 4)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"git_commit": "0" * 40}))
    train(tiny(save_every=2))
    assert "last bits" not in capsys.readouterr().err
    (resumed,) = read_run(run).resumed
    assert resumed.changed.keys() == {"git_commit"}


# ---- run directories stand alone


@pytest.mark.fault(66)
def test_a_copied_run_is_a_run_of_its_own(tmp_path, text_file, monkeypatch):
    """Continuing the copy by its recipe.toml leaves the run that was copied as it is, from any working directory."""
    shutil.copy(text_file, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    keys = TINY | {"corpus": "text.txt", "output": "run", "save_every": 2}
    flags = [str(part) for key, value in keys.items() for part in (f"--{key.replace('_', '-')}", value)]
    assert run_process(("text.txt", *flags), tmp_path, "before-step", 5) == -signal.SIGKILL
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree("run", tmp_path / "elsewhere" / "copy")
    before = contents(Path("run"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_process(("copy/recipe.toml",), tmp_path / "elsewhere") == 0
    assert (tmp_path / "elsewhere" / "copy" / "latest").read_text() == "step-000006\n"
    assert contents(tmp_path / "run") == before
    # A run that was moved is verified from anywhere.
    (tmp_path / "elsewhere" / "copy").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    assert verify(tmp_path / "moved").identical


@pytest.mark.fault(66)
def test_a_recipe_that_extends_a_run_writes_to_a_place_of_its_own(tiny, tmp_path):
    """What was recorded beside results is a recipe like another, and its directory stays its own."""
    run = train(tiny(lr=2e-3))
    (tmp_path / "mine.toml").write_text('extends = "run/recipe.toml"\n[train]\nsteps = 9\n')
    mine = load_target(str(tmp_path / "mine.toml"))
    assert (mine.optimizer.lr, mine.train.steps) == (2e-3, 9)
    assert mine.checkpoint.output == "checkpoints/mine"
    assert load_recipe(run / "recipe.toml").checkpoint.output == str(run)


@pytest.mark.fault(66)
def test_a_text_that_has_moved_is_the_same_text(tiny, tmp_path, text):
    """Named at its new place once, also for a complete run, it is found there for the steps before, too."""
    corpus = tmp_path / "text.txt"
    corpus.write_text(text, encoding="utf-8", newline="")
    run = train(tiny(corpus=str(corpus)))
    train(tiny(corpus=str(corpus), steps=8))
    corpus = corpus.rename(tmp_path / "moved.txt")
    with pytest.raises(CorpusError, match=r"text\.txt: no such text file; expected --corpus"):
        verify(run)
    train(recorded_recipe(run).replace(corpus=str(corpus)))
    assert verify(run).identical


@pytest.mark.fault(66)
def test_a_recipe_of_a_run_that_lost_its_run_json_trains_nowhere_else(tiny, tmp_path, monkeypatch):
    """It is told what is missing, and no other run begins in the working directory."""
    run = train(tiny())
    (run / "run.json").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"run holds a run without its run\.json; restore it"):
        train(load_recipe(run / "recipe.toml"))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.fault(66)
def test_a_recipe_that_extends_a_branch_does_not_begin_where_that_began(tiny, tmp_path):
    """`resume` belongs to the run, as `output` does."""
    source = train_until(tiny(save_every=2), 2)
    train(tiny(resume=str(source), output=str(tmp_path / "branch")))
    (tmp_path / "mine.toml").write_text('extends = "branch/recipe.toml"\n')
    assert load_recipe(tmp_path / "mine.toml").checkpoint.resume == "auto"
    assert load_recipe(tmp_path / "branch" / "recipe.toml").checkpoint.resume == str(source)


@pytest.mark.fault(66)
def test_a_corpus_is_looked_up_beside_its_recipe_first(tmp_path, monkeypatch):
    """Then in the working directory; a parent's beside the parent; and a name stays a name."""
    for folder in ("recipes/base", "work"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "recipes/base/base.toml").write_text('[data]\ncorpus = "a.txt"\n')
    (tmp_path / "recipes/mine.toml").write_text('extends = "base/base.toml"\n')
    monkeypatch.chdir(tmp_path / "work")
    mine = tmp_path / "recipes" / "mine.toml"
    assert load_recipe(mine).data.corpus == "a.txt"
    for name in ("recipes/base/a.txt", "work/a.txt", "recipes/tinyshakespeare"):
        (tmp_path / name).write_text("text")
    assert load_recipe(mine).data.corpus == str(tmp_path / "recipes/base/a.txt")
    mine.write_text('[data]\ncorpus = "tinyshakespeare"\n')
    assert load_recipe(mine).data.corpus == "tinyshakespeare"


# ---- the lock


@pytest.mark.fault(67)
def test_the_lock_is_one_that_holds_on_network_disks(tmp_path, monkeypatch):
    """On NFS a directory's lock is local to a machine, and a file's needs a descriptor that may write."""
    kinds = []
    flock = fcntl.flock

    def watching(descriptor, operation):
        writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        kinds.append((os.path.isfile(f"/proc/self/fd/{descriptor}"), writable))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", watching)
    with (
        locked(tmp_path / "run"),
        pytest.raises(CheckpointError, match="another process is training into"),
        locked(tmp_path / "run"),
    ):
        pass
    assert kinds == [(True, True)] * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(67)
def test_a_disk_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    """The run goes on, and the user knows that nothing keeps a second one out."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / "run"):
        pass
    assert "cannot be locked (No locks available): see that no two runs write there" in capsys.readouterr().err


@pytest.mark.fault(67)
def test_a_lock_file_that_was_removed_while_waiting_does_not_count(tmp_path, monkeypatch):
    """A process that ends removes the lock of a run that has nothing else; who opened it before opens the new one."""
    run, flock, calls = tmp_path / "run", fcntl.flock, []

    def removed_meanwhile(descriptor, operation):
        if not calls:
            (run / LOCK_FILE).unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with locked(run):
        assert (run / LOCK_FILE).exists()
    assert len(calls) == 2


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    """Nothing outside the run directory is opened for writing."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "outside")
    with pytest.raises(MygptError, match="cannot be written"), locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "outside").exists()


# ---- signals at the end


@pytest.mark.fault(68)
@pytest.mark.parametrize("moment", ["step", "evaluation", "save"])
def test_a_signal_during_the_last_step_ends_a_complete_run(tiny, monkeypatch, capsys, moment):
    """Exit 0 and complete: nothing is left to continue, so a scheduler need not queue the job again."""
    owner, name = {
        "step": (loop, "train_step"),
        "evaluation": (evaluate, "held_out_loss"),
        "save": (checkpoint, "publish"),
    }[moment]
    original, left = getattr(owner, name), [6 if moment == "step" else 1]

    def signalled(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)
    run = train(tiny(val_split=0.2, val_every=6))
    assert (run / "latest").read_text() == "step-000006\n"
    assert read_manifest(run / "step-000006").finished
    assert f"saved {run}" in capsys.readouterr().err
    # The negative control: one step earlier it is a run to be continued.
    left[0] = 5
    if moment == "step":
        with pytest.raises(InterruptedRunError):
            train(tiny(val_split=0.2, val_every=6), overwrite=True)


# ---- resume = "never"


def test_never_replaces_what_a_run_left_that_made_no_step(tmp_path, text_file):
    """Killed before its first step, the same command starts; killed after it, there is something to lose."""
    shutil.copy(text_file, tmp_path / "text.txt")
    command = ("text.txt", *FLAGS, "--resume", "never", "--output", "run")
    for point in ("made-run.json", "made-recipe", "before-step"):
        assert run_process(command, tmp_path, point) == -signal.SIGKILL
    assert run_process(command, tmp_path, "record") == -signal.SIGKILL
    assert run_process(command, tmp_path) == 2
    assert "already holds a run" in (tmp_path / "err").read_text()
    # Nor does it matter how the run before was to resume.
    shutil.rmtree(tmp_path / "run")
    assert run_process(command[:-4] + command[-2:], tmp_path, "before-step") == -signal.SIGKILL
    assert run_process(command, tmp_path) == 0


# ---- seeds on the command line


def test_one_flag_sets_both_seeds(command):
    """For a run that differs in chance alone; not together with one of the two."""
    shown = command("recipe", "show", "quickstart", "--seed", 7).stdout
    assert re.findall(r"^(\w+_seed) = (\d+)$", shown, re.MULTILINE) == [("init_seed", "7"), ("data_seed", "7")]
    for flag in ("--init-seed=3", "--data_seed=3"):
        refused = command("recipe", "show", "quickstart", "--seed", 7, flag)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "give --seed alone" in refused.stderr


def test_run_info_of_a_step_is_what_held_then(tiny):
    """Of a run that went on with more threads, and on from there with fewer."""
    info = read_run(train_until(tiny(save_every=2), 2))
    resumed = [
        {"after_step": 2, "changed": {"threads": [1, 2]}},
        {"after_step": 4, "changed": {"threads": [2, 1], "lr": [1e-3, 1e-4]}},
    ]
    info = RunInfo.model_validate_json(json.dumps(json.loads(info.to_json()) | {"resumed": resumed}))
    assert [info.recorded_at(step)["threads"] for step in (0, 2, 3, 4, 5)] == [1, 1, 2, 2, 1]
    assert "lr" not in info.recorded_at(5)


# ---- killed while a run goes on with changes


CHANGES = {
    "rate": ("--lr", 5e-4, "--allow-changes"),
    "text": ("--corpus", "other.txt", "--allow-changes"),
    "steps": (),
    "seed": ("--seed", 7, "--allow-changes"),
}


@pytest.mark.fault(65)
@pytest.mark.parametrize("point", ["made-run.json", "made-recipe", "before-step"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_is_killed_early_is_the_same_change_again(tmp_path, text, monkeypatch, change, point):
    """Killed before the first checkpoint after the change: the same command goes on, and the whole is verified."""
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "other.txt").write_text(text[10_000:] + text[:10_000], encoding="utf-8", newline="")
    command = ("text.txt", *FLAGS, "--save-every", 2, "--output", "run")
    assert run_process((*command, "--steps", 4), tmp_path) == 0
    changed = (*command, "--steps", 6, *CHANGES[change])
    assert run_process(changed, tmp_path, point) == -signal.SIGKILL
    assert run_process(changed, tmp_path) == 0, (tmp_path / "err").read_text()
    monkeypatch.chdir(tmp_path)
    result = verify(Path("run"))
    assert result.identical, (result.difference, result.tensors)
    (resumed,) = read_run(Path("run")).resumed
    assert (resumed.after_step, resumed.recipe.train.steps) == (4, 4)
    assert resumed.recipe.data.corpus == str(tmp_path / "text.txt")


def test_more_steps_that_are_given_up_leave_the_shorter_run(tiny, capsys):
    """Raised, killed, and lowered again: complete as it was, without records of the steps beyond, and verified."""
    run = train(tiny(steps=4, save_every=4))
    before = contents(run)
    with pytest.raises(InterruptedRunError):
        stopped_at(7, tiny(steps=8, save_every=4))
    shutil.rmtree(run / "step-000007")
    assert read_records(run)[-1].step == 7
    train(tiny(steps=4, save_every=4, lr=5e-4), allow_changes=True)
    assert "run is complete" in capsys.readouterr().err
    after = contents(run)
    assert {name: after[name] for name in before if name != "latest"} == {
        k: v for k, v in before.items() if k != "latest"
    }
    assert verify(run).identical


def stopped_at(step, recipe):
    """Train until SIGTERM in that step."""
    original, count = loop.train_step, []

    def signalled(*args, **kwargs):
        count.append(1)
        if len(count) == step - 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", signalled)
        train(recipe)


def test_a_step_at_which_a_run_was_interrupted_is_not_its_end(tiny):
    """There is no evaluation there, and its checkpoint goes when it is superseded: --steps must go beyond it."""
    train(tiny(steps=4))
    with pytest.raises(InterruptedRunError):
        stopped_at(6, tiny(steps=8))
    with pytest.raises(RecipeError, match="steps: got 6, expected more than 6, the step of"):
        train(tiny(steps=6))


@pytest.mark.fault(63)
@pytest.mark.parametrize("change", ["program", "text moved", "run.json damaged"])
def test_a_requeued_job_deletes_nothing_that_it_may_have_made(tiny, tmp_path, text, monkeypatch, change):
    """Another path of the program or of the same text is the same command; and what cannot be read is not removed."""
    corpus = tmp_path / "text.txt"
    corpus.write_text(text, encoding="utf-8", newline="")
    run = train_until(tiny(save_every=2, corpus=str(corpus)), 4, overwrite=True)
    before = contents(run)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if change == "program":
        monkeypatch.setattr("sys.argv", ["/elsewhere/mygpt", *sys.argv[1:]])
    elif change == "text moved":
        corpus = corpus.rename(tmp_path / "moved.txt")
    else:
        (run / "run.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"run\.json: damaged") as caught:
            train(tiny(save_every=2, corpus=str(corpus)), overwrite=True)
        assert caught.value.exit_code == 1
        assert contents(run).keys() == before.keys()
        return
    train(tiny(save_every=2, corpus=str(corpus)), overwrite=True)
    assert [json.loads(line)["step"] for line in (run / "timing.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.fault(10)
@pytest.mark.parametrize("point", ["made-run.json", "before-step", "old-run-half-removed"])
def test_a_recipe_in_a_run_is_there_whenever_the_run_is_made_anew(tmp_path, text_file, point):
    """`mygpt train run/recipe.toml --overwrite`, killed while it replaces the run: the same command works again."""
    shutil.copy(text_file, tmp_path / "text.txt")
    assert run_process(("text.txt", *FLAGS, "--save-every", 3, "--output", "run"), tmp_path) == 0
    before = contents(tmp_path / "run")
    again = ("run/recipe.toml", "--overwrite")
    assert run_process(again, tmp_path, point) == -signal.SIGKILL
    assert run_process(again, tmp_path) == 0, (tmp_path / "err").read_text()
    after = contents(tmp_path / "run")
    assert all(after[name] == before[name] for name in before if name != "run.json")


def test_a_run_that_made_no_step_does_not_hold_one_to_its_recipe(tmp_path, text_file):
    """Killed before step 1, then started with another rate: nothing was trained at the first one."""
    shutil.copy(text_file, tmp_path / "text.txt")
    command = ("text.txt", *FLAGS, "--output", "run")
    assert run_process(command, tmp_path, "before-step") == -signal.SIGKILL
    assert run_process((*command, "--lr", 5e-4), tmp_path) == 0


# ---- what a branch is


def test_a_branch_with_another_data_seed_sees_other_batches(tiny, tmp_path, capsys):
    """The weights stay those of the checkpoint, so that init_seed has nothing left to do, which is said."""
    run = train_until(tiny(save_every=2), 4)
    weights = set()
    for seed in (42, 7, 8):
        keys = {"init_seed": seed, "data_seed": seed, "output": str(tmp_path / str(seed)), "resume": str(run)}
        branch = train(tiny(**keys), allow_changes=True)
        weights.add((branch / "step-000006" / "model.safetensors").read_bytes())
        assert f"init_seed: stays 0: the weights are those of {run}" in capsys.readouterr().err
        assert recorded_recipe(branch).train.init_seed == 0
        assert verify(branch).identical
    assert len(weights) == 3


def test_a_branch_is_given_advice_that_helps(tiny, tmp_path):
    """It has an output of its own: another one, or --overwrite, would change nothing."""
    run = train_until(tiny(save_every=2), 4)
    branch = {"output": str(tmp_path / "branch"), "resume": str(run)}
    for keys in ({"lr": 5e-4}, {"num_layers": 3}, {"steps": 4}):
        with pytest.raises(MygptError) as caught:
            train(tiny(**branch, **keys))
        assert "--output" not in str(caught.value)
        assert "--overwrite" not in str(caught.value)


def test_parts_of_a_run_are_repeated_with_the_keys_that_they_had(tiny):
    """A key that was absent stays absent: what it came to depends on the processes, which may be others."""
    run = train_until(tiny(save_every=2), 2)
    train(tiny(save_every=2, micro_batch_size=2))
    first, second = parts_of(recorded_recipe(run), read_run(run), 0, 6)
    assert (first.until, first.recipe.train.micro_batch_size) == (2, None)
    assert (second.until, second.recipe.train.micro_batch_size) == (6, 2)


def test_continuations_that_were_given_up_do_not_count(tiny):
    """mygpt 0.1 left them in run.json, in the order of time: after step 4, then after step 2."""
    info = read_run(train_until(tiny(save_every=2), 2))
    given_up = [{"after_step": step, "changed": {"threads": [1, threads]}} for step, threads in ((4, 2), (2, 3))]
    info = RunInfo.model_validate_json(json.dumps(json.loads(info.to_json()) | {"resumed": given_up}))
    assert [resumed.after_step for resumed in info.history] == [2]
    assert info.recorded_at(6)["threads"] == 3


def test_a_directory_that_was_removed_while_locking_is_made_again(tmp_path, monkeypatch):
    """A run that fails at once removes its empty directory, maybe while another is about to lock it."""
    run, opened, calls = tmp_path / "run", os.open, []

    def removed_meanwhile(path, *args, **kwargs):
        if Path(path).name == LOCK_FILE and not calls:
            calls.append(path)
            run.rmdir()
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", removed_meanwhile)
    with locked(run):
        assert (run / LOCK_FILE).exists()
