"""`mygpt study`: the grid, its runs, and what it survives."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from support.commands import MYGPT, wait_for
from support.runs import TINY, assert_same_run, contents, flags_of

from mygpt.recipe.tables import Recipe
from mygpt.runs.records import read_records
from mygpt.runs.run import RunDirectory
from mygpt.studies import runner
from mygpt.studies.grid import Variant
from mygpt.training.train import train

PLAN = '{"side_by_side": 2, "threads": 1}'
KEYS = {key: value for key, value in TINY.items() if key != "threads"} | {
    "steps": 12,
    "val_split": 0.2,
    "val_every": 4,
    "sampling": "full",
    "save_every": 2,
    "dropout": 0.1,
}
SEEDS = ["--seeds", "2"]


@pytest.fixture
def place(tmp_path, text_file):
    """A folder with a recipe, and with a study's plan, so that the room for runs need not be measured."""
    (tmp_path / "text.txt").write_bytes(text_file.read_bytes())
    (tmp_path / "small.toml").write_text(Recipe.of(**KEYS, corpus="text.txt").to_toml())
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "plan.json").write_text(PLAN)
    return tmp_path


def study_command(*arguments):
    return [*MYGPT, "study", "small.toml", "--set", "lr=1e-3,1e-2", *SEEDS, "--out", "study", *arguments]


def start(place, *arguments):
    with (place / "err").open("a") as errors:
        return subprocess.Popen(study_command(*arguments), cwd=place, stdout=subprocess.DEVNULL, stderr=errors)


def run(place, *arguments):
    return subprocess.run(
        study_command(*arguments), cwd=place, capture_output=True, text=True, timeout=300, check=False
    )


def kill_children(process):
    """Kill the processes that this one has started, by their ids."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            child.kill()


def runs_of(place):
    return sorted(path.parent for path in (place / "study").glob("*/seed-*/run.json"))


def test_study_of_texts_compares_on_one(place, text):
    """With a val_corpus, recipes may differ in their corpus; a run is known by what it read and began with."""
    (place / "first.txt").write_text(text[:8000], newline="")
    (place / "second.txt").write_text(text[8000:], newline="")
    (place / "held.txt").write_text("".join(sorted(set(text))) + text[:3000], newline="")
    keys = ["val_split=0", "hold_out=tokens", "tokenizer=byte", "val_corpus=held.txt"]
    options = [part for key in ("corpus=first.txt,second.txt", *keys) for part in ("--set", key)]
    command = ("study", "small.toml", *options, "--seeds", "2", "--out", "texts", "--no-picture", "--side-by-side", "2")
    done = subprocess.run([*MYGPT, *command], cwd=place, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"corpus=first.txt", "corpus=second.txt"} <= {
        line.split()[0].split(",")[-1] for line in done.stdout.split("\n") if line
    }
    (place / "held.txt").write_text(text[:4000], newline="")  # a mistake
    done = subprocess.run([*MYGPT, *command], cwd=place, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "had another val_corpus than held.txt; choose another --out" in done.stderr


@pytest.mark.fault(99)
def test_one_code_trains_all_runs_of_a_study(place):
    """Runs of another code are not joined by new ones, nor compared with others; alone they are a result."""
    assert run(place).returncode == 0
    first, *others = [path / "run.json" for path in runs_of(place)]

    def trained_by_other_code(file):
        info = json.loads(file.read_text())
        info["stretches"][0]["environment"]["code_sha256"] = "0" * 64
        file.write_text(json.dumps(info))

    def problem(*arguments):
        before = contents(place / "study")
        refused = run(place, *arguments)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
        assert contents(place / "study") == before
        return refused.stderr

    trained_by_other_code(first)
    assert "was trained by another code of mygpt than other steps of the study; go back to" in problem()
    for file in others:
        trained_by_other_code(file)
    again = run(place)
    assert again.returncode == 0, again.stderr
    assert "was trained by another code of mygpt than this one; go back to that code, or" in problem("--seeds", "3")


@pytest.mark.fault(83)
def test_all_runs_begin_with_the_same_weights(place, tmp_path):
    """If the model that init_from names becomes another, also while the study trains, no run is added or compared."""
    source, given = tmp_path / "source", ["--set", "init_from=source", "--no-picture"]
    recipe = Recipe.of(**KEYS | {"save_seconds": 0}, corpus=str(place / "text.txt"), output=str(source), threads=1)
    train(recipe, last_step=3)
    first = run(place, *given)
    assert first.returncode == 0, first.stderr
    assert len({RunDirectory(path).info.init_sha256 for path in runs_of(place)}) == 1
    train(recipe)  # `source` names its newest checkpoint
    before = contents(place / "study")
    for extended in ([], ["--seeds", "3"]):
        refused = run(place, *given, *extended)
        assert refused.returncode == 2
        assert "had another init_from than source; choose another --out\n" in refused.stderr
    assert contents(place / "study") == before

    (place / "other").mkdir()
    (place / "other" / "plan.json").write_text(PLAN.replace("2", "1"))
    process = start(place, *given, "--set", "steps=400", "--set", "save_every=200", "--out", "other")
    try:
        wait_for(lambda: next((place / "other").glob("*/seed-*/run.json"), None), process)
        train(recipe.replace(steps=14))
        assert process.wait(120) == 2
    finally:
        process.kill()
    assert "had another init_from than source; choose another --out\n" in (place / "err").read_text()
    assert len(list((place / "other").glob("*/seed-*/run.json"))) == 2


def test_progress_of_a_run_is_passed_on(tmp_path):
    """The newest line of its log that tells the progress."""
    job = runner.Job(Variant("small", Recipe()), 1, tmp_path / "small" / "seed-1")
    log = tmp_path / "small" / "seed-1.log"
    log.parent.mkdir()
    log.write_text("step     1: loss = 1.0\nat step 8 of 9: 10 tokens/s, 00:01 left\nstep     9: loss = 1.0\n")
    assert runner._progress(job) == f"{job.name}: at step 8 of 9: 10 tokens/s, 00:01 left"
    log.write_text(log.read_text() + "a library's line\n" * 10_000)  # more than is read
    assert runner._progress(job) == ""


@pytest.mark.fault(110, 111)
def test_study_runs_the_grid_and_is_extended(place, monkeypatch):
    """Ordinary runs, with the bytes of `mygpt train`; the same command trains nothing, more seeds only the new ones."""
    result = run(place)
    assert result.returncode == 0, result.stderr
    assert [str(path.relative_to(place)) for path in runs_of(place)] == [
        f"study/small,lr={lr}/seed-{seed}" for lr in (0.001, 0.01) for seed in (1, 2)
    ]
    assert result.stdout.splitlines()[0].split() == ["recipe", "seeds", "loss", "deviation", "95%", "interval"]
    assert "small,lr=0.01" in result.stdout.splitlines()[1]
    document = json.loads((place / "study" / "study.json").read_text())
    assert document["recipes"][1]["losses"]["2"] == read_records(place / "study" / "small,lr=0.01" / "seed-2")[-1].val
    assert (place / "study" / "study.png").stat().st_size > 10_000
    keys = KEYS | {"lr": 1e-2, "init_seed": 2, "data_seed": 2, "threads": 1}
    alone = ["train", "text.txt", *flags_of(keys), "--output", "alone"]
    subprocess.run([*MYGPT, *alone], cwd=place, check=True, capture_output=True)
    assert_same_run(place / "study" / "small,lr=0.01" / "seed-2", place / "alone")

    monkeypatch.setenv("MPLBACKEND", "module://nonsense")
    drawn = run(place, "--picture", "a.svg")
    assert drawn.stderr.endswith("wrote study/study.json and a.svg\n")
    assert "<svg" in (place / "a.svg").read_text()
    (place / "a.svg").write_text("mine")
    refused = run(place, "--picture", "a.svg")
    assert (refused.returncode, (place / "a.svg").read_text()) == (2, "mine")

    before = contents(place / "study", without=["study.json", "study.png"])
    again = run(place)
    assert again.stdout == result.stdout
    assert "runs are complete" not in again.stderr
    assert contents(place / "study", without=["study.json", "study.png"]) == before
    shown = subprocess.run([*MYGPT, "study", "study"], cwd=place, capture_output=True, text=True, check=True)
    assert (shown.stdout, shown.stderr) == (result.stdout, "")
    more = run(place, "--seeds", "3")
    assert "4 of 6 runs are complete; 2 to go" in more.stderr
    assert len(runs_of(place)) == 6
    other = run(place, "--set", "steps=20")
    assert other.returncode == 2
    assert "seed-1: was trained with steps = 12, and the study has 20; choose another --out" in other.stderr
    plan, result_file = place / "study" / "plan.json", place / "study" / "study.json"
    for removed in ((plan,), (plan, result_file)):  # the folder stays a study
        for file in removed:
            file.unlink()
        again = run(place, "--seeds", "3")
        assert (again.returncode, again.stdout) == (0, more.stdout), again.stderr
        plan.write_text(PLAN)


def test_damaged_run_of_a_study_is_named_and_can_be_trained_again(place):
    """Whatever was damaged, the study says which directory to remove."""
    first = run(place)
    seed = place / "study" / "small,lr=0.01" / "seed-2"
    for name, content in (("metrics.jsonl", "{}\n"), ("run.json", "{"), ("run.json", None)):
        if content is None:
            (seed / name).unlink()
        else:
            (seed / name).write_text(content)
        damaged = run(place)
        assert damaged.returncode == 1
        assert "seed-2, and the same command trains it again" in damaged.stderr
    shutil.rmtree(seed)
    seed.touch()
    assert "remove study/small,lr=0.01/seed-2, and the same command" in run(place).stderr
    seed.unlink()
    assert run(place).stdout == first.stdout


@pytest.mark.fault(79, 80)
def test_killed_study_continues_to_the_same_bytes(place, tmp_path):
    """SIGKILL of the study, or of a run, at random moments. Runs of a killed study save and end by themselves."""
    rng = random.Random(0)
    for number in range(4):
        process = start(place)
        wait_for(lambda: runs_of(place), process)
        time.sleep(rng.uniform(0, 3))
        if number % 2:
            kill_children(process)
            time.sleep(1)
        process.kill()
        process.wait()
    result = run(place)
    assert result.returncode == 0, result.stderr
    for path in runs_of(place):
        recipe = RunDirectory(path).recipe.replace(output=str(tmp_path / "alone" / path.parent.name / path.name))
        assert_same_run(path, train(recipe))


@pytest.mark.fault(80)
def test_run_that_is_killed_again_and_again_ends_the_study(place):
    """As Linux does where memory is short; the study says how it comes to need less."""
    process = start(place)
    while process.poll() is None:
        kill_children(process)
        time.sleep(0.05)
    assert process.returncode == 1
    message = (place / "err").read_text().splitlines()[-1]
    assert "was killed by SIGKILL again and again; the same command continues the study" in message
    assert message.endswith("without study/plan.json it measures anew how many runs fit side by side")


@pytest.mark.fault(81)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_all_runs_and_the_same_command_continues(place, number):
    """They are saved; the study says so and ends with the code of the signal."""
    process = start(place, "--set", "steps=100000")
    try:
        wait_for(lambda: len({path.parent for path in (place / "study").glob("*/seed-*/step-*")}) == 2, process)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
    assert (
        f"stopped by {number.name}; the runs are saved, and the same command continues" in (place / "err").read_text()
    )
    assert all(RunDirectory(path).newest_checkpoint() for path in runs_of(place))


@pytest.mark.fault(82)
def test_recipe_that_diverges_is_reported_and_the_others_are_compared(place):
    """Its runs ended in a loss that is not a number: that is a result, too, and is not tried again."""
    command = [*MYGPT, "study", "small.toml", "--set", "lr=1e-3,1e30", *SEEDS, "--out", "study"]
    for _ in range(2):
        result = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        assert "small,lr=1e+30, seed 1: step 2 was not finite" in result.stdout
        assert "not compared" in result.stdout
    assert "runs" not in result.stderr


@pytest.mark.fault(83)
def test_error_of_a_run_ends_the_study(place):
    """With its message and exit code, whichever of them is the first; nothing else is left running."""
    device = "cuda" if sys.platform == "darwin" else "mps"
    result = run(place, "--set", f"device={device}")
    assert result.returncode == 2
    assert re.search(rf"^mygpt: small,lr=0.0\d+, seed 1: device: got {device}", result.stderr, re.MULTILINE), (
        result.stderr
    )
    assert "Traceback" not in result.stderr


@pytest.mark.fault(83)
def test_text_that_has_changed_is_refused(place):
    """Runs on another text are neither compared nor extended; nothing is trained or written."""
    arguments = ["--set", "lr=1e-3", "--set", "steps=4", "--no-picture"]
    command = [*MYGPT, "study", "small.toml", *SEEDS, "--out", "study", *arguments]
    subprocess.run(command, cwd=place, check=True, capture_output=True)
    before = contents(place / "study")
    (place / "text.txt").write_text("another text, " * 500)
    for extended in ([], ["--seeds", "3"]):
        result = subprocess.run([*command, *extended], cwd=place, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert "seed-1: was trained on another text than" in result.stderr
    assert contents(place / "study") == before


def test_study_refuses_what_it_cannot_use(place, call, monkeypatch):
    """Before anything is written: another folder, another recipe, one seed, no held-out loss."""
    monkeypatch.chdir(place)
    (place / "full").mkdir()
    (place / "full" / "notes").write_text("mine")
    (place / "short.txt").write_text("short")
    (place / "theirs").mkdir()
    (place / "theirs" / "study.png").write_text("theirs")
    for name in ("...toml", "plan.json.toml"):
        (place / name).write_bytes((place / "small.toml").read_bytes())
    before = contents(place)
    for arguments, message in (
        (["small.toml", "--seeds", "1"], "--seeds: got 1, expected 2 to 1000: one seed is not a result"),
        (["small.toml", "--seeds", "1001"], "--seeds: got 1001, expected 2 to 1000\n"),
        (["small.toml", "--out", "full"], "--out: full is not empty and not a study"),
        (["small.toml", "--out", "text.txt"], "--out: text.txt is a file"),
        (["small.toml", "--set", "lr"], "--set: got 'lr', expected KEY=VALUE,VALUE"),
        (["small.toml", "--set", "learning_rate=1"], "unknown key 'learning_rate'"),
        (["small.toml", "--set", "data_seed=1,2"], "--set: data_seed is set by the study"),
        (["small.toml", "--set", "lr=fast"], "got 'fast', expected a valid number"),
        (["small.toml", "--set", "val_every=0"], "val_every: got 0, expected evaluations"),
        (["small.toml", "./small.toml"], "two recipes of the study are called 'small'"),
        (["smal.toml"], "no such recipe"),
        (["study"], "study: a study that is not complete; the command that began it continues it"),
        (["study", "--seeds", "9"], "study: is shown as it is; leave --seeds out, or give the recipes of the study"),
        (["study", "small.toml"], "study: a study, and one is shown at a time; leave small.toml out"),
        (["...toml"], "a study needs this name for a file of its own; rename the recipe"),
        (["plan.json.toml"], "a study needs this name for a file of its own; rename the recipe"),
        (["small.toml", "--set", "seed=1,2"], "--set: seed is set by the study; --seeds says how many"),
        (["small.toml", "--set", "corpus=short.txt"], "the training part has 4 of the corpus's 5 characters"),
        (["small.toml", "--set", "val_split=0.1,0.2"], "[data] val_split: got 0.2, and small,val_split=0.1 has 0.1"),
        (["small.toml", "--set", "corpus=text.txt,python-docs"], "expected the same in all recipes of a study"),
        (["small.toml", "--picture", "no/a.png"], "--picture: there is no folder no; make it, or choose another name"),
        (["small.toml", "--picture", "a.png", "--no-picture"], "got --picture a.png and --no-picture; leave one out"),
        (["small.toml", "--out", "theirs"], "theirs/study.png: exists, and has no mark of mygpt; choose another name"),
        (["small.toml", "--picture", "text.txt"], "text.txt: got the ending '.txt', expected .png, .svg or .pdf"),
        (["small.toml", "--side-by-side", "0"], "--side-by-side: got 0, expected at least 1"),
        (
            ["small.toml", "--out", "study", "--side-by-side", "3"],
            "and the study has begun with 2; remove study/plan.json",
        ),
        (["small.toml", "--effect", "0"], "--effect: got 0.0, expected greater than 0"),
        ([], "RECIPE missing; usage: mygpt study RECIPE..."),
    ):
        code, _, err = call("study", *arguments)
        assert (code, message in err) == (2, True), err
    assert contents(place) == before


def test_study_in_a_place_that_cannot_be_written_to_is_refused(place, call, monkeypatch):
    """Before a run is looked at; also where the folder of the study is not there yet."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "access", lambda *_: False)
    for out, existing in (("study", "study"), ("new/study", place)):
        code, _, err = call("study", "small.toml", "--out", out)
        assert (code, err) == (2, f"mygpt: --out: {existing} cannot be written to; choose another --out\n")
