"""What a notebook uses: `from mygpt import Recipe, Run, load_recipe, plot, train`."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.runs import TINY

import mygpt
from mygpt import MygptError, Recipe, Run, load_checkpoint, load_recipe, plot, train
from mygpt.errors import CheckpointError
from mygpt.recipe.flags import parse_recipe
from mygpt.recipe.tables import ScheduleTable
from mygpt.runs.records import Record
from mygpt.training import train as trainer


@pytest.fixture
def run(tiny):
    """A run whose best checkpoint is not its last."""
    return train(tiny(val_split=0.2, val_every=2, save_every=2, save_best=True, lr=1.0))


def test_training_returns_a_run(run, tiny, tmp_path):
    """With typed records, its checkpoints and its model; it stands for its path, and is found again by it."""
    assert isinstance(run, Run)
    assert all(isinstance(record, Record) for record in run.records)
    assert [record.step for record in run.records] == [1, 2, 3, 4, 5, 6]
    assert run.latest == tmp_path / "run" / "step-000006"
    assert run.best != run.latest
    assert run.is_finished
    newest, best = run.load(), run.load("best")
    assert (newest.step, best.step) == (6, int(run.best.name[-6:]))
    assert run.load(4).step == 4
    for weight, other in zip(run.model.parameters(), load_checkpoint(run).model.parameters(), strict=True):
        assert torch.equal(weight, other)
    assert Run(run).recipe == Run(str(tmp_path / "run")).recipe == run.recipe
    again = train(run.recipe.replace(steps=8))
    assert again.records[-1].step == 8


def test_records_are_a_data_frame(run):
    """A row for each step, a column for each value."""
    frame = run.to_pandas()
    assert list(frame.index) == [1, 2, 3, 4, 5, 6]
    assert frame.loss.tolist() == [record.loss for record in run.records]
    assert frame.val.dropna().tolist() == [record.val for record in run.records if record.val is not None]


def test_without_pandas_the_message_says_what_to_install(run, monkeypatch):
    """It is no dependency."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MygptError, match="to_pandas needs pandas: pip install pandas"):
        run.to_pandas()


def test_recipe_from_keys_is_that_of_the_command_line():
    """The same recipe, without expectations that no longer hold; and the same messages."""
    for keys in ({"steps": 700}, {"init_seed": 3}, {"val_every": 0}, {"lr": 1e-4, "log_every": 5}, {}):
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in keys.items()]
        assert load_recipe("quickstart", **keys) == parse_recipe(["quickstart", *flags], "mygpt train")[0]
    assert load_recipe("quickstart").expected.expected_val
    assert load_recipe("quickstart", steps=700).expected.expected_val is None
    for key, value in (("steps", 50), ("num_heads", 5)):
        with pytest.raises(MygptError) as from_keys:
            load_recipe("hardened", **{key: value})
        with pytest.raises(MygptError) as from_flags:
            parse_recipe(["hardened", f"--{key.replace('_', '-')}={value}"], "mygpt train")
        assert str(from_keys.value) == str(from_flags.value).replace("--warmup 2", "warmup=2")
    with pytest.raises(MygptError, match="unknown key 'learning_rate'; did you mean 'lr'"):
        load_recipe("hardened", learning_rate=1.0)
    with pytest.raises(MygptError, match=r"recipe \[train\] steps: got '7', expected a valid integer"):
        Recipe.of(steps="7")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"lr": 0.5},
            "--lr 0.5` with steps above 6 goes on from there in a run of its own; or choose another output",
        ),
        ({"steps": 3}, "raise steps, or choose another output"),
        ({"embed_dim": 32}, "; choose another output"),
        ({"resume": "never"}, "choose another output, or replace it with overwrite"),
    ],
)
def test_errors_name_keys_and_not_flags(run, keys, message):
    """As the caller gives them; the command line names flags, and so does a command that is to be copied."""
    with pytest.raises(MygptError) as caught:
        train(run.recipe.replace(**keys))
    assert message in str(caught.value)
    assert "--" not in re.sub("`.*?`", "", str(caught.value))


def test_errors_leave_the_flags_of_launchers(run, monkeypatch):
    """Which are no keys, and neither is the name of a file."""

    def fail(*_args, **_keys):
        raise MygptError("/data/--output/a: lower --num_processes, or give --val-split 0.1 --val-every 500")

    monkeypatch.setattr(trainer, "train", fail)
    with pytest.raises(
        MygptError, match=r"^/data/--output/a: lower --num_processes, or give val_split=0.1 val_every=500$"
    ):
        train(run.recipe)


@pytest.mark.parametrize("seed", [-1, 1 << 32, 1.5, "1", True, None])
def test_wrong_seed_costs_one_line(call, text_file, seed):
    """Which names the seed that was given, and its range; not the two keys that it sets."""
    expected = f"seed: got {seed!r}, expected an integer from 0 to 4294967295"
    with pytest.raises(MygptError) as caught:
        load_recipe("quickstart", seed=seed)
    assert str(caught.value) == expected
    if type(seed) is int:
        assert call("train", text_file, "--seed", seed) == (2, "", f"mygpt: --{expected}\n")


@pytest.mark.parametrize("seed", [0, (1 << 32) - 1])
def test_first_and_last_seed_are_taken(seed):
    """Both ends of the range that a wrong seed is answered with."""
    keys = load_recipe("quickstart", seed=seed).flat()
    assert (keys["init_seed"], keys["data_seed"]) == (seed, seed)


def test_plot_returns_a_figure(run, tmp_path):
    """Of a run, of several, of a folder; and writes a file if one is named."""
    pytest.importorskip("matplotlib", reason="needs the report extra")
    figure = run.plot(y_max=99.0)
    assert figure.axes[0].get_ylim()[1] == 99.0
    for runs in (run, [run], {run.path}, (path for path in [run]), str(run.path), tmp_path):
        assert len(plot(runs).axes) == 2
    plot([run, run], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_no_run_or_recipe_is_named(run, tmp_path):
    """At once, with what was expected."""
    with pytest.raises(CheckpointError, match=r"nope: no such run; expected a directory that `mygpt train`"):
        Run("nope")
    with pytest.raises(CheckpointError, match="not a run, but in one; expected the run"):
        Run(run.latest)
    for given, example in (
        ("quickstart", r"load_recipe\('quickstart'\)"),
        ({"steps": 3}, r"Recipe\.of\(steps=100\)"),
        (run, "the .recipe of the run"),
    ):
        with pytest.raises(MygptError, match=rf"train: got .*, expected a recipe, such as {example}$"):
            train(given)


def test_keys_are_what_a_notebook_has(tmp_path):
    """Paths, numbers of numpy, and one seed for both; keys that are given in the place of tables are explained."""
    recipe = Recipe.of(steps=np.int64(5), lr=np.float32(0.5), corpus=tmp_path / "a.txt")
    assert (recipe.train.steps, recipe.optimizer.lr, recipe.data.corpus) == (5, 0.5, f"{tmp_path}/a.txt")
    recipe = load_recipe("quickstart", seed=3, data_seed=4)
    assert (recipe.train.init_seed, recipe.train.data_seed) == (3, 4)
    assert load_recipe("quickstart", seed=3).train.data_seed == 3
    with pytest.raises(MygptError, match=r"Recipe: expected tables; Recipe.of takes keys: Recipe.of\(steps=3\)$"):
        Recipe(steps=3)
    with pytest.raises(MygptError, match=r"Recipe.of\(schedule='cosine'\)$"):
        Recipe(schedule="cosine")
    tables = Recipe.of(schedule="cosine").model_dump()
    assert Recipe(**tables) == Recipe.model_validate(tables) == Recipe(schedule=ScheduleTable(schedule="cosine"))


def test_a_run_that_has_gone_says_so(run, tmp_path):
    """Whatever is asked."""
    run.path.rename(tmp_path / "moved")
    for question in ("is_finished", "info", "recipe", "records", "model"):
        with pytest.raises(CheckpointError):
            getattr(Run(tmp_path / "moved") and run, question)


def test_other_machines_of_a_launch_have_no_directory(tmp_path, monkeypatch):
    """Only the main process writes it, and `train` returns a run on each."""
    monkeypatch.setenv("RANK", "1")
    assert Run(tmp_path / "elsewhere").path == tmp_path / "elsewhere"


def test_a_checkpoint_that_is_not_there_is_named(run):
    """By the name that was asked for."""
    for name in ("bset", "", 5, 1.5, None):
        with pytest.raises(MygptError, match=f"has no checkpoint {name!r}; expected a step, 'best' or 'latest'"):
            run.load(name)


def test_interrupt_saves_and_the_same_call_continues(tiny, monkeypatch):
    """As the stop button of a notebook does."""
    import signal

    from support.fault_points import disturb, send

    whole = train(tiny(**TINY, output=f"{tiny().checkpoint.output}-whole"))
    with monkeypatch.context() as patch:
        disturb("before-step", send(signal.SIGINT), count=3, patch=patch.setattr)
        with pytest.raises(KeyboardInterrupt, match=r"stopped by SIGINT; saved .*, and the same command continues"):
            train(tiny())
    assert train(tiny()).records == whole.records
    with monkeypatch.context() as patch:  # while the run is made ready
        patch.setattr(trainer, "run_preflight", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(tiny())


def test_public_names_are_imported_on_first_use(tmp_path):
    """`import mygpt` waits for nothing, and each public name is there."""
    code = "import sys, mygpt; sys.exit(bool({'torch', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
    assert all(getattr(mygpt, name) is not None for name in mygpt.__all__)
