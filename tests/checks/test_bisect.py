"""The first step, and in it the first value, at which two runs differ."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import MYGPT, wait_for
from support.runs import EXACT, TINY

from mygpt.checks import bisect as module
from mygpt.checks import trace
from mygpt.checks.at import fork
from mygpt.checks.bisect import bisect
from mygpt.cli.main import main
from mygpt.errors import CheckpointError, LaunchError, MygptError
from mygpt.recipe.tables import Recipe
from mygpt.runs.run import RunDirectory
from mygpt.training.train import train

STEPS = 24


@pytest.fixture
def in_this_process(monkeypatch, capsys):
    """Make steps again in this process: a new one would import torch each time. With another Python it is one."""
    original = module.call

    def call(side, name, arguments, makes):
        if side.python:
            return original(side, name, arguments, makes=makes)
        try:
            main(arguments) if name == "mygpt" else trace.main(arguments)
        except SystemExit as stopped:
            if stopped.code:
                raise MygptError(f"{capsys.readouterr().err}; {module.advice(side)}", stopped.code) from None
        return None

    monkeypatch.setattr(module, "call", call)


@pytest.fixture(scope="module")
def make(text_file, tmp_path_factory):
    """A function that trains a run of 24 steps with a checkpoint of the last one, into a folder of the module."""
    place, made = tmp_path_factory.mktemp("bisect"), {}

    def run(name, **keys):
        if name not in made:
            keys = TINY | {"steps": STEPS, "dropout": 0.1, "log_every": 8} | keys
            made[name] = train(Recipe.of(**keys, corpus=str(text_file), output=str(place / name)))
        return made[name]

    return run


@pytest.mark.slow
def test_other_batches_differ_in_the_first_tokens(make, call):
    """The command says in what, by how much, and which key does it; no step has to be trained again."""
    a, b = make("plain"), make("seed", data_seed=7)
    code, out, err = call("bisect", a, b)
    assert code == 1
    assert re.fullmatch(
        r"different: the first step that differs is step 1, in tokens: \d+ of 64 values, by at most [\d.e+]+\n"
        r"recipes differ: data_seed 42 against 7\ntrained again: 0 times, 0 steps together\n",
        out,
    )
    assert err == "recorded: the same up to step 0, different at step 1\n"


def test_equal_runs_are_identical(make, tmp_path, in_this_process):
    """Also where one has gone further, and where they log at other steps; a copy needs no rerun."""
    a = make("plain")
    b = shutil.copytree(a, tmp_path / "copy")
    assert bisect(a, b) == (None, STEPS, "", None, [], [], 0, 0)
    shorter = make("shorter", steps=15, log_every=5)
    found = bisect(a, shorter)
    assert (found.step, found.until) == (None, 15)
    assert found.recipes == ["steps 24 against 15"]
    assert (found.reruns, found.steps) == (1, 15)


@pytest.mark.parametrize("step", [1, 22])
def test_fork_differs_in_the_step_after_it(make, tmp_path, in_this_process, step):
    """In its learning rate: the values before it are the same. Few reruns find it."""
    a = make("plain")
    base = RunDirectory(a).recipe
    b = fork(a, step, base.replace(lr=5e-4), tmp_path / "fork")
    notes = []
    found = bisect(a, b, note=notes.append)
    assert (found.step, found.value) == (step + 1, "learning rate")
    assert found.difference.max_abs == pytest.approx(5e-4)
    assert found.recipes == ["lr 0.001 against 0.0005"]
    assert found.reruns <= 2 * 5
    assert found.steps <= 2 * STEPS
    assert len(notes) == 1 + found.reruns // 2


def test_other_beginnings_differ_in_step_0(make, in_this_process):
    """In their initial weights, by their values or their shapes."""
    a = make("plain")
    found = bisect(a, make("init", init_seed=1))
    assert (found.step, found.value) == (0, "token_embedding.weight")
    assert 0 < found.difference.differing <= found.difference.of
    wide = bisect(a, make("wide", embed_dim=32))
    assert (wide.step, wide.value) == (0, "token_embedding.weight")
    assert re.match(r"float32 \[\d+, 16\] against float32 \[\d+, 32\]", wide.difference.text)


def test_first_difference_on_the_way_forward_and_back(make, in_this_process):
    """Dropout changes the first output, an activation that of an MLP, and clipping the weights."""
    a = make("plain")
    assert bisect(a, make("dropout", dropout=0.2)).value == "dropout"
    assert bisect(a, make("tanh", activation="gelu-tanh")).value == "blocks.0.mlp.down"
    assert bisect(a, make("beta", beta2=0.9)).value == "exp_avg_sq of token_embedding.weight, updated"
    clipped = bisect(a, make("clipped", max_grad_norm=0.01))
    assert (clipped.step, clipped.value) == (1, "exp_avg of token_embedding.weight, updated")
    exact = bisect(make("exact", **EXACT | {"steps": 8}), make("exact-clipped", **EXACT | {"steps": 8, "lr": 1e-4}))
    assert (exact.step, exact.value) == (1, "learning rate")


def test_states_that_the_search_has_left_behind_are_removed(make, in_this_process, monkeypatch):
    """Of each run there are two at most beside the one that is made: one on each side of the difference."""
    keys = {"log_every": STEPS}  # what is recorded would tell at once
    a, b = make("whole", **keys), make("late", **keys, schedule="wsd", min_lr=1e-4)
    counts, make_again = [], module.make_again

    def count(side, step):
        made = make_again(side, step)
        counts.append(len(list(side.folder.glob(f"{side.name}-*/step-*"))))
        return made

    monkeypatch.setattr(module, "make_again", count)
    found = bisect(a, b)
    assert (found.step, found.value) == (21, "learning rate")
    assert len(counts) > 6
    assert max(counts) <= 3


def test_evaluation_that_draws_from_the_stream_is_found(make, in_this_process):
    """The step computes the same, and the next batch is another one."""
    keys = {"val_split": 0.2, "val_every": 8}
    a, b = make("evaluated", **keys), make("more", **keys, eval_batches=11)
    found = bisect(a, b)
    assert (found.step, found.value) == (8, "generator.stream")
    assert found.recipes == ["eval_batches 10 against 11"]


def test_run_that_is_not_repeated_here_is_an_error(make, tmp_path, in_this_process):
    """Its recorded numbers are others than those that are computed: it was trained in another environment."""
    a = make("plain")
    b = shutil.copytree(a, tmp_path / "elsewhere")
    records = (b / "metrics.jsonl").read_text()
    (b / "metrics.jsonl").write_text(re.sub(r'("step":8,"loss":)', r"\g<1>1", records))
    info = json.loads((b / "run.json").read_text())
    info["stretches"][0]["environment"]["versions"]["torch"] = "2.9.0"
    (b / "run.json").write_text(json.dumps(info))
    shutil.rmtree(b / f"step-{STEPS:06d}")
    (b / "latest").unlink()
    problem = r"elsewhere: cannot be repeated here: step 8: loss 1\d.* torch 2\.9\.0 -> 2(.|\n)*--python-b"
    with pytest.raises(MygptError, match=problem) as caught:
        bisect(a, b)
    assert caught.value.exit_code == 1
    # The loss of the first step shows it at once.
    (b / "metrics.jsonl").write_text(re.sub(r'("step":1,"loss":)', r"\g<1>1", records))
    other = make("seed", data_seed=7)
    with pytest.raises(MygptError, match=r"elsewhere cannot be repeated here: the loss of step 1 was 1\d.*--python-b"):
        bisect(other, b)


def test_branches_are_compared_where_they_have_steps(make, tmp_path, in_this_process, tiny):
    """From the checkpoint after which they begin on."""
    source = make("saved", save_every=8)
    keys = TINY | {"steps": STEPS, "dropout": 0.1, "corpus": RunDirectory(source).recipe.data.corpus}
    branch = Recipe.of(**keys, resume=str(source / "step-000008"), output=str(tmp_path / "branch"), weight_decay=0.5)
    found = bisect(source, train(branch))
    assert (found.step, found.value) == (9, "token_embedding.weight, updated")
    assert found.recipes == ["weight_decay 0.01 against 0.5"]


def test_mistakes_cost_one_line(make, tmp_path, call, monkeypatch):
    """No run, the same run twice, a Python that is not there, a launcher."""
    a = make("plain")
    for arguments, message in (
        ((a, tmp_path / "gone"), "no such run"),
        ((a, a), "are the same run; give the Python of another environment with --python-b"),
        ((a, make("seed", data_seed=7), "--python-b", tmp_path / "gone"), "gone: cannot be run: No such file"),
        (
            (a, make("seed", data_seed=7), "--python-b", shutil.which("true")),
            "expected a Python; it does not run mygpt",
        ),
    ):
        code, out, err = call("bisect", *arguments)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="without a launcher"):
        bisect(a, tmp_path)
    monkeypatch.undo()
    together = tmp_path / "together"
    shutil.copytree(a, together)
    info = (together / "run.json").read_text()
    (together / "run.json").write_text(info.replace('"processes": 1', '"processes": 2'))
    with pytest.raises(LaunchError, match="was trained by 2 processes with fast sums"):
        bisect(a, together)
    begun = tmp_path / "begun"
    shutil.copytree(a, begun)
    (begun / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="no step has been recorded yet"):
        bisect(a, begun)


@pytest.mark.slow
def test_signal_ends_all_and_leaves_nothing(make, tmp_path):
    """Neither the process that trains steps again, nor a folder."""
    run = make("long", steps=3000, log_every=3000, print_every=3000)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [*MYGPT, "bisect", run, run, "--python-b", sys.executable]
    process = subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob("mygpt-bisect-*/.tmp-at-*/run/metrics.jsonl")), process)
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.endswith("mygpt: stopped before the first difference was found; the runs are as they were\n")
    assert not Path(f"/proc/{child}").exists()
    assert not list(tmp_path.glob("mygpt-bisect-*"))


PERTURBED = """
import mygpt.training.loop as module
import torch

original = module.train_step

def train_step(parts, batch, step):
    update = original(parts, batch, step)
    if step == 2:
        with torch.no_grad():
            parts.gpt.norm.weight[3] = torch.nextafter(parts.gpt.norm.weight[3], torch.tensor(9.0))
    return update

module.train_step = train_step
"""


@pytest.mark.slow
def test_environment_that_changes_one_weight_at_one_step_is_found(make, tmp_path, call):
    """One run in two environments, each trained from its beginning by its own Python."""
    (tmp_path / "sitecustomize.py").write_text(PERTURBED)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec {sys.executable} "$@"\n')
    os.chmod(python, 0o755)
    a = make("plain", steps=8)
    code, out, err = call("bisect", a, a, "--python-b", python)
    assert code == 1, err
    first, *_, last = out.splitlines()
    assert first == (
        "different: the first step that differs is step 2, in norm.weight, updated: 1 of 16 values, "
        "by at most 5.960e-08 (1 units in the last place)"
    )
    reruns = int(re.match(r"trained again: (\d+) times", last)[1])
    assert reruns <= 2 * 2
    # One Python may be given for one of two runs.
    code, _, err = call("bisect", make("seed", steps=8, data_seed=7), a, "--python-b", python)
    assert code == 1, err


@pytest.mark.slow
def test_threads_are_named(make, call):
    """As a difference of the recipes, and of the environments of the two steps."""
    keys = {"embed_dim": 128, "seq_len": 64, "max_seq_len": 64, "batch_size": 16, "steps": 8, "dropout": 0.0}
    a, b = (make(f"threads-{threads}", **keys, threads=threads) for threads in (1, 2))
    code, out, _ = call("bisect", a, b)
    assert code == 1
    assert out.startswith("different: the first step that differs is step ")
    assert "recipes differ: threads 1 against 2\nenvironments differ: threads 1 against 2\n" in out
