"""Any step of a run again, bit for bit, and forks that go on from it otherwise."""

import json
import os
import re
import shutil
import signal

import pytest
from support.checkpoints import fit_manifest, rewrite
from support.commands import BIN, MYGPT, free_port, run_process, torchrun
from support.fault_points import disturb, send
from support.forked import ARGUMENTS
from support.forked import run as run_forked
from support.runs import FLAGS, TINY, assert_same_run, contents, flags_of, steps_of

from mygpt.checks import at
from mygpt.checks.at import recreate
from mygpt.checks.compare import compare
from mygpt.checks.verify import verify
from mygpt.errors import InterruptedRunError
from mygpt.recipe.tables import Recipe
from mygpt.reports import recorder
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.run import RunDirectory
from mygpt.training.train import train

KEYS = {"steps": 12, "dropout": 0.1, "val_split": 0.2, "val_every": 3, "save_best": True, "schedule": "cosine"}
KEYS |= {"warmup": 4, "max_grad_norm": 1.0, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def place(text_file, tmp_path_factory):
    """A folder with a run that keeps a few checkpoints, and with `all`, the same run with a checkpoint of each step."""
    place = tmp_path_factory.mktemp("steps")
    for name, keys in (("run", {"save_every": 5, "keep_last": 1}), ("all", {"save_every": 1})):
        train(Recipe.of(**TINY | KEYS | keys, corpus=str(text_file), output=str(place / name)))
    return place


def assert_is_step(run, step, expected):
    """The newest checkpoint of `run` is that step of the run in `expected`, byte for byte."""
    name = f"step-{step:06d}"
    assert (run / "latest").read_text() == f"{name}\n"
    for file in ("model.safetensors", "state.safetensors"):
        assert (run / name / file).read_bytes() == (expected / name / file).read_bytes(), file
    assert not list(run.parent.glob(".tmp-*"))


def test_checkpoints_on_the_way_are_removed_where_one_is_asked_for(place, tmp_path, call, monkeypatch):
    """--no-keep-all keeps that of the step alone, and removes each of the others when it has been compared."""
    counts, compare_one = [], at.compare_with_recorded

    def count(run, first, step, again):
        counts.append(len(steps_of(again)))
        return compare_one(run, first, step, again)

    monkeypatch.setattr(at, "compare_with_recorded", count)
    for number, flags in enumerate(([], ["--no-keep-all"])):
        counts.clear()
        out = tmp_path / str(number)
        assert call("at", place / "all", 6, "--out", out, "--from-beginning", *flags)[0] == 0
        assert max(counts) == (2 if flags else 6)
        assert steps_of(out) == ([6] if flags else [1, 2, 3, 4, 5, 6])
        assert not (out / "best").exists() or RunDirectory(out).best
        assert_is_step(out, 6, place / "all")


@pytest.mark.parametrize("step", [1, 4, 10, 11, 12])
def test_any_step_has_the_bytes_that_it_had(place, tmp_path, step):
    """Before, between, at and after the checkpoints that are left; with the records up to it, and the best so far."""
    before = contents(place / "run")
    made = recreate(place / "run", step, tmp_path / "at")
    assert_is_step(tmp_path / "at", step, place / "all")
    assert contents(place / "run") == before
    assert made.first == max(other for other in (0, *steps_of(place / "run")) if other <= step)
    lines = (place / "run" / "evaluations.jsonl").read_text().splitlines()
    assert (tmp_path / "at" / "evaluations.jsonl").read_text().splitlines() == lines[: step // 3]
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    assert (tmp_path / "at" / "metrics.jsonl").read_text().splitlines() == lines[:step]
    assert made.records == step - made.first
    info = RunDirectory(tmp_path / "at").info
    assert (info.recreated.run, info.recreated.after_step) == (str(place / "run"), step)
    assert info.stretches == RunDirectory(place / "run").info.stretches
    assert RunDirectory(tmp_path / "at").recipe == RunDirectory(place / "run").recipe.replace(
        output=str(tmp_path / "at")
    )


def test_what_is_made_is_a_run(place, tmp_path, call, text_file):
    """It can generate, be compared and verified, and continued to the end of the run."""
    at = tmp_path / "at"
    code, out, _ = call("at", place / "run", 4, "--out", at)
    assert (code, out) == (
        0,
        f"{at} is {place / 'run'} after step 4: trained 4 steps from step 0\n"
        "identical to what was recorded: 4 records, 0 checkpoints\n",
    )
    assert load_checkpoint(at).step == 4
    assert compare(at, place / "all" / "step-000004").identical
    assert verify(at).identical
    assert call("train", at / "recipe.toml")[0] == 0
    assert_same_run(at, place / "run")
    # Anything but its provenance is as in the run, whose checkpoint of step 10 is pruned at its end, too.
    assert contents(at, without=("run.json",)) == contents(place / "run", without=("run.json",))


def test_steps_begin_before_a_damaged_checkpoint(place, tmp_path, capsys):
    """With a warning; the checkpoint that is made in its place is compared with its manifest."""
    run = shutil.copytree(place / "all", tmp_path / "run")
    for step in (6, 7, 8):
        os.truncate(run / f"step-{step:06d}" / "model.safetensors", 100)
    made = recreate(run, 8, tmp_path / "at")
    assert (made.first, made.checkpoints) == (5, 3)
    assert "step-000007/model.safetensors: damaged: 100 bytes" in capsys.readouterr().err
    assert_is_step(tmp_path / "at", 8, place / "all")
    again = recreate(run, 3, tmp_path / "again", from_beginning=True)
    assert (again.first, again.checkpoints, again.records) == (0, 3, 3)
    later = recreate(run, 9, tmp_path / "later", start=tmp_path / "again" / "step-000003")
    assert (later.first, later.checkpoints) == (3, 6)
    assert_is_step(tmp_path / "later", 9, place / "all")


@pytest.mark.parametrize("what", ["record", "weights", "metadata"])
def test_machine_that_does_not_repeat_the_run_is_an_error(place, tmp_path, call, what):
    """It says what has changed since, and nothing is made; without the check it is."""
    run = shutil.copytree(place / "all", tmp_path / "run")
    file = run / "step-000003" / ("state.safetensors" if what == "metadata" else "model.safetensors")
    if what == "record":
        records = run / "metrics.jsonl"
        records.write_text(re.sub(r'("step":3,"loss":)', r"\g<1>1", records.read_text()))
        message = r"step 3: loss 1\d+\.\d+ against \d"
    elif what == "weights":
        rewrite(file, tensors=lambda values: values["norm.bias"][0].add_(1))
        message = r"step 3: norm\.bias differs from .*step-000003: 1 of 16"
    else:
        rewrite(file, metadata=lambda values: values.update(processes=None))
        message = r"step 3: the metadata of .*step-000003 differ"
    fit_manifest(file)
    info = json.loads((run / "run.json").read_text())
    info["stretches"][0]["environment"]["versions"]["torch"] = "2.9.0"
    (run / "run.json").write_text(json.dumps(info))
    at = ("at", run, 4, "--from-beginning", "--out", tmp_path / "at")
    code, _, err = call(*at)
    assert code == 1
    assert re.search(rf"mygpt: .*run: cannot be repeated here: {message}.*; changed since: torch 2\.9\.0 -> 2\.", err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    code, out, _ = call(*at, "--no-check")
    assert code == 0
    assert "changed since: torch 2.9.0 -> 2." in out
    assert_is_step(tmp_path / "at", 4, place / "all")


def test_progress_is_told_while_steps_are_made_again(place, tmp_path, capsys, monkeypatch):
    """In each part of the work, up to its end; nothing else is."""
    monkeypatch.setattr(recorder, "PROGRESS_SECONDS", 0.001)
    recreate(place / "run", 11, tmp_path / "eleven", from_beginning=True)
    lines = capsys.readouterr().err.splitlines()
    told = [re.match(r"at step (\d+) of (\d+): ", line) for line in lines]
    assert all(told)
    ends = list(dict.fromkeys(int(line[2]) for line in told if line))
    assert len(ends) > 1
    assert ends[-1] == 11


def test_steps_of_a_run_that_changed_are_made_with_their_stretches(tiny, tmp_path):
    """With their threads and the schedule of their end; also at a checkpoint after which these changed."""
    keys = {"save_every": 4, "dropout": 0.1, "schedule": "linear"}
    for folder, every in (("run", 4), ("all", 1)):
        for steps, threads in ((4, 1), (8, 2)):
            last = keys | {"save_every": every, "output": str(tmp_path / folder)}
            train(tiny(steps=steps, threads=threads, **last))
    run, every = tmp_path / "run", tmp_path / "all"
    for step in (3, 4, 6):
        out = tmp_path / f"at-{step}"
        recreate(run, step, out)
        assert_is_step(out, step, every)
        assert RunDirectory(out).recipe.train.steps == (8 if step > 4 else 4)
        assert [stretch.after_step for stretch in RunDirectory(out).info.stretches] == ([0, 4] if step > 4 else [0])
    recreate(run, 7, tmp_path / "whole", from_beginning=True)
    assert_is_step(tmp_path / "whole", 7, every)
    found = [(s.after_step, s.steps, s.environment.threads) for s in RunDirectory(tmp_path / "whole").info.stretches]
    assert found == [(0, 4, 1), (4, 8, 2)]


def test_keys_that_change_no_number_may_have_changed(tiny, tmp_path):
    """Keeping the best from a later step on changes no byte of a checkpoint."""
    keys = {"save_every": 4, "val_split": 0.2, "val_every": 1, "steps": 8}
    train(tiny(**keys), last_step=4)
    run = train(tiny(**keys, save_best=True))
    for step in (3, 6):
        recreate(run, step, tmp_path / str(step))
        assert_is_step(tmp_path / str(step), step, train(tiny(**keys, output=str(tmp_path / "before")), last_step=step))
        shutil.rmtree(tmp_path / "before")


def test_steps_of_a_branch_begin_after_its_origin(tiny, tmp_path, call):
    """Earlier steps are its source's; it needs the checkpoint after which it began."""
    train(tiny(save_every=2, output=str(tmp_path / "source")), last_step=4)
    branch = train(tiny(resume=str(tmp_path / "source"), output=str(tmp_path / "branch"), steps=8))
    every = train(tiny(resume=str(tmp_path / "source"), output=str(tmp_path / "all"), steps=8, save_every=1))
    recreate(branch, 6, tmp_path / "at")
    assert_is_step(tmp_path / "at", 6, every)
    code, _, err = call("at", branch, 3, "--out", tmp_path / "x")
    assert code == 2
    assert "got step 3, expected one from 5 to 8" in err
    assert "its steps up to 4 are those of" in err
    shutil.rmtree(tmp_path / "source" / "step-000004")
    code, _, err = call("at", branch, 6, "--out", tmp_path / "x")
    assert code == 1
    assert "began is gone" in err
    assert not (tmp_path / "x").exists()


def test_mistakes_cost_one_line(place, tmp_path, call, text):
    """Exit code 2, and nothing is created."""
    own = tmp_path / "own.txt"
    own.write_text(text, encoding="utf-8", newline="")
    changed = train(Recipe.of(**TINY, corpus=str(own), output=str(tmp_path / "changed")))
    own.write_text(text[:-1], encoding="utf-8", newline="")
    short = tmp_path / "short.txt"
    short.write_text(text[:1000], encoding="utf-8")
    without_text = train(Recipe.of(**TINY, corpus=str(short), output=str(tmp_path / "without-text")))
    short.unlink()
    run, out = place / "run", tmp_path / "out"
    there = sorted(tmp_path.iterdir())
    for arguments, message in (
        (("at", run, 13, "--out", out), "got step 13, expected one from 1 to 12"),
        (("at", run, 0, "--out", out), "STEP: got '0', expected a number from 1 up"),
        (("at", run, "bset", "--out", out), 'STEP: got \'bset\', expected a number from 1 up, "best" or "latest"'),
        (("at", tmp_path / "gone", 3, "--out", out), "no such run"),
        (("at", changed, 3, "--out", out), "was trained on another text than"),
        (("at", without_text, 3, "--out", out), "the text on which it was trained cannot be read: "),
        (("fork", changed, 6, "--steps", 9, "--output", out), "was trained on another text than"),
        (("fork", run, 13, "--output", out), "got step 13, expected one from 1 to 12"),
        (("at", run, 3, "--out", changed), "is there already"),
        (("at", run, 3, "--out", own), "is there already"),
        (("at", run, 3, "--out", run / "x"), "which stays as it is"),
        (("at", run, 3, "--out", tmp_path / ("x" * 250)), "its name is too long; choose a shorter one"),
        (("at", run, 3, "--out", own / "x"), "Not a directory; choose another"),
        (("at", run, 3, "--start", run / "step-000012", "--out", out), "expected a checkpoint of a step from 1 to 3"),
        (("at", run, 9, "--start", changed / "step-000006", "--out", out), "is of another recipe or text than"),
        (("fork", run, 0, "--lr", 1), "STEP: got '0', expected a number from 1 up"),
        (("fork", run, 13, "--steps", 20, "--output", out), "got step 13, expected one from 1 to 12"),
        (("fork", run, 12, "--lr", 1, "--output", out), r"steps: got 12, expected more than 12; raise --steps"),
        (("fork", run, 3, "--lr", -1, "--output", out), "--lr: got -1.0, expected"),
        (("fork", run, 3, "--warmup", 13, "--output", out), "warmup: got 13, expected at most steps = 12"),
        (("fork", run, 3, "--resume", "never", "--output", out), "--resume: a fork begins after a step of its run"),
        (
            ("fork", run, 3, "--init-from", run, "--output", out),
            "--init-from: a fork begins with the weights of its run",
        ),
        (("fork", run, 3, "--output", place / "all"), "is there already, and no fork of"),
        (("fork", run, 3, "--output", run, "--lr", 0.5), "is there already, and no fork of"),
    ):
        code, _, err = call(*arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
        assert sorted(tmp_path.iterdir()) == there
    # As where a branch has another architecture.
    code, _, err = call("fork", run, 3, "--num-layers", 3, "--output", out)
    assert (code, err.count("\n")) == (2, 1)
    assert "has num_layers = 2, you gave 3; a branch goes on with what its checkpoint has" in err
    assert not out.exists()


def test_signal_keeps_nothing(place, tmp_path, monkeypatch):
    """The same command begins again."""
    disturb("before-step", send(signal.SIGINT), patch=monkeypatch.setattr)
    with pytest.raises(InterruptedRunError, match=r"stopped before step 3 of .*run was made again; nothing is kept"):
        recreate(place / "run", 3, tmp_path / "at")
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(84)
@pytest.mark.parametrize(
    ("point", "count"),
    [("made-run.json", 1), ("before-step", 3), ("before-rename", 1), ("after-latest", 1), ("made-recipe", 1)],
)
def test_killed_command_leaves_nothing_that_looks_like_a_result(place, tmp_path, folder, point, count):
    """And the same command again works; RUN has two checkpoints less, so that there is something to train."""
    here = folder(point)
    run = shutil.copytree(place / "all", here / "run")
    for step in (7, 8, 9):
        shutil.rmtree(run / f"step-{step:06d}")
    arguments = ("run", 9, "--out", "at")
    assert run_forked(arguments, here, point, count, command="at") == -signal.SIGKILL
    assert not (here / "at").exists()
    assert run_forked(arguments, here, command="at") == 0
    assert_is_step(here / "at", 9, place / "all")


def test_fork_that_changes_nothing_ends_as_its_run(place, tmp_path, call):
    """With the same bytes; its default name has the run and the step, after which it begins."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    assert call("fork", run, 7)[0] == 0
    made = tmp_path / "run-at-7"
    assert_same_run(made, run)
    assert contents(made / "step-000012") == contents(run / "step-000012")
    assert RunDirectory(made).info.origin.checkpoint == "origin/step-000007"
    assert_is_step(made / "origin", 7, place / "all")


def test_fork_differs_in_its_keys_alone(place, tmp_path, call):
    """It has the records up to its step; it can be verified, and compared, and moved, also without its run."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    code, _, err = call("fork", run, 7, "--lr", 5e-4, "--steps", 14)
    assert code == 0
    made = tmp_path / "run-at-7-steps=14-lr=0.0005"
    assert [(stretch.after_step, stretch.steps) for stretch in RunDirectory(made).info.stretches] == [(0, 12), (7, 14)]
    assert RunDirectory(made).recipe.optimizer.lr == 5e-4
    assert "from step 8 on: [optimizer] lr = 0.0005, before 0.001" in err
    records, others = ((path / "metrics.jsonl").read_text().splitlines() for path in (run, made))
    assert [a == b for a, b in zip(records, others, strict=False)] == [True] * 7 + [False] * 5
    assert verify(made).identical
    assert not compare(run, made).identical
    before = contents(made)
    code, _, err = call("fork", run, 7, "--lr", 5e-4, "--steps", 14)
    assert code == 0
    assert "is complete" in err
    assert contents(made) == before
    code, _, err = call("fork", run, 7, "--lr", 1e-4, "--steps", 14, "--output", made)
    assert code == 2
    assert "was trained with lr = 0.0005, you gave 0.0001; one run has one recipe" in err
    code, _, err = call("train", made / "recipe.toml", "--overwrite")
    assert code == 2
    assert "is in the run that --overwrite would remove" in err
    moved = made.rename(tmp_path / "moved")
    shutil.rmtree(run)
    assert verify(moved).identical
    recreate(moved, 9, tmp_path / "at")
    assert RunDirectory(tmp_path / "at").origin == moved / "origin" / "step-000007"
    assert call("train", moved / "recipe.toml", "--steps", 15)[0] == 0


def test_fork_is_named_after_the_keys_that_were_given(tiny, tmp_path, call):
    """Not after what goes with them: expectations that no longer hold, and keys that refine evaluations."""
    keys = {"val_split": 0.2, "val_every": 2, "log_val_stderr": True}
    run = train(tiny(**keys, expected_val=[[6, 3.0, 0.1]], expected_seeds=5))
    code, _, err = call("fork", run, 3, "--lr", 1e-2, "--val-every", 0, "--print-every", 2)
    assert code == 0, err
    assert (tmp_path / "run-at-3-lr=0.01-val_every=0" / "latest").is_file()


def test_fork_where_early_stopping_ended_the_run_needs_more_patience(tiny, tmp_path, call):
    """With the same, it would end there again; nothing is written."""
    keys = {"val_split": 0.2, "val_every": 2, "sampling": "full", "patience": 1, "lr": 1e-9, "steps": 20}
    run = train(tiny(**keys))
    step = RunDirectory(run).records[-1].step
    assert step < 20
    code, _, err = call("fork", run, step, "--lr", 1e-2)
    assert (code, err.count("\n")) == (2, 1)
    assert f"patience: got 1, with which {run} ended after step {step}; give --patience 0, or one above 1" in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["run"]
    assert call("fork", run, step, "--lr", 1e-2, "--patience", 0)[0] == 0
    made = tmp_path / f"run-at-{step}-lr=0.01-patience=0"
    assert RunDirectory(made).records[-1].step == 20


def test_fork_with_other_batches_or_seeds_is_named_and_warned_of_what_changes(tiny, tmp_path, call):
    """The micro-batch follows from the batch, and the initial weights are there already."""
    run = train(tiny(save_every=2))
    code, _, err = call("fork", run, 2, "--batch-size", 2, "--seed", 7)
    assert code == 0
    assert "[train] batch_size = 2, before 4" in err
    assert "last bits" not in err
    assert (tmp_path / "run-at-2-batch_size=2-data_seed=7").is_dir()


def test_fork_begins_with_the_end_of_its_step(tiny, tmp_path, call):
    """Not with the newest, whose schedule is another one."""
    train(tiny(steps=4, save_every=2, schedule="linear"))
    run = train(tiny(steps=8, save_every=2, schedule="linear"))
    assert call("fork", run, 2, "--output", tmp_path / "fork")[0] == 0
    whole = train(tiny(steps=4, save_every=2, schedule="linear", output=str(tmp_path / "whole")))
    assert_same_run(tmp_path / "fork", whole)


@pytest.mark.fault(85)
@pytest.mark.parametrize(
    ("point", "count"),
    [("before-step", 2), ("made-run.json", 3), ("loaded", 2), ("before-step", 5), ("before-latest", 4), ("record", 9)],
)
def test_killed_fork_is_continued(folder, forked_run, point, count):
    """At any moment: while its step is made again, before it differs, or later."""
    undisturbed = forked_run("undisturbed")
    assert run_forked(FORK, undisturbed, command="fork") == 0
    here = forked_run(point)
    assert run_forked(FORK, here, point, count, command="fork") == -signal.SIGKILL
    assert run_forked(FORK, here, command="fork") == 0
    assert_same_run(here / "fork", undisturbed / "fork")
    assert RunDirectory(here / "fork").recipe.optimizer.lr == 5e-4
    assert contents(here / "run") == contents(undisturbed / "run")


FORK = ("run", 6, "--lr", 5e-4, "--output", "fork")


@pytest.fixture
def forked_run(folder):
    """A function making a folder with a run."""

    def make(name):
        here = folder(name)
        assert run_forked(ARGUMENTS, here) == 0
        return here

    return make


@pytest.mark.slow
def test_processes_of_a_launch_make_a_step_and_a_fork(tmp_path, text_file):
    """With fast sums as many as trained the run; another number is a mistake."""
    keys = flags_of({"save_every": 4, "dropout": 0.1})
    assert torchrun(2, tmp_path, text_file, *FLAGS, *keys, "--output", "run").returncode == 0
    single = run_process([*MYGPT, "at", "run", 5, "--out", "at"], tmp_path)
    assert single.returncode == 2
    assert "step 5 was trained by 2 processes, on whose number the last bits depend; here are 1" in single.stderr
    assert not (tmp_path / "at").exists()
    launch = [BIN / "torchrun", "--nproc-per-node", 2, "--master-port", free_port(), "-m", "mygpt"]
    made = run_process([*launch, "fork", "run", 5, "--output", "fork"], tmp_path)
    assert made.returncode == 0, made.stderr
    assert_same_run(tmp_path / "fork", tmp_path / "run")
