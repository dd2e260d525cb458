"""Damaged, linked and newer checkpoints; a corpus and a recipe that have changed since."""

import json
import os
import re

import pytest
from support.checkpoints import fit_manifest, rewrite
from support.runs import contents

from mygpt.errors import CheckpointError, MismatchError, RecipeError
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.records import read_records
from mygpt.runs.run import RunDirectory
from mygpt.training.train import train


@pytest.fixture
def interrupted(tiny):
    """A run with checkpoints at steps 2 and 4, to be continued to step 6."""
    recipe = tiny(save_every=2)
    return recipe, train(recipe, last_step=4)


def truncate(file):
    os.truncate(file, file.stat().st_size - 10)


def extend(file):
    file.write_bytes(file.read_bytes() + b"0")


def break_header(file):
    file.write_bytes(file.read_bytes()[:8] + b"\xff" + file.read_bytes()[9:])


def flip_a_bit(file):
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def delete(file):
    file.unlink()


def make_a_directory(file):
    file.unlink()
    file.mkdir()


def make_a_link(file):
    file.rename(file.parent.parent.parent / f"moved-{file.name}")
    file.symlink_to(file.parent.parent.parent / f"moved-{file.name}")


@pytest.mark.fault(26, 27, 28, 29, 30, 33)
@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, extend, break_header, flip_a_bit, delete, make_a_directory, make_a_link])
def test_damaged_checkpoint_is_passed_over(interrupted, tiny, tmp_path, capsys, damage, name):
    """With a warning the run continues from the one before, to the same bytes, and sets the damaged one aside."""
    recipe, run = interrupted
    file = run / "step-000004" / name
    damage(file)
    if (name, damage) == ("manifest.json", extend):
        file.write_bytes(file.read_bytes() + b"}")
    train(recipe)
    messages = capsys.readouterr().err
    assert re.search(rf"step-000004/{re.escape(name)}: .*; falling back to the checkpoint before it", messages)
    assert "continuing after step 2 " in messages
    (aside,) = run.glob("damaged-*")
    assert aside.name == "damaged-step-000004-1"
    whole = train(tiny(save_every=2, output=str(tmp_path / "whole")))
    files = contents(run, without=("run.json", "recipe.toml"))
    expected = contents(whole, without=("run.json", "recipe.toml"))
    assert {name: value for name, value in files.items() if not name.startswith("damaged")} == expected


@pytest.mark.fault(26, 30)
def test_run_with_no_whole_checkpoint_is_not_started_again(interrupted):
    """Exit 1: the user may be able to repair a checkpoint."""
    recipe, run = interrupted
    for file in run.glob("step-*/model.safetensors"):
        truncate(file)
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints is whole; .*--overwrite") as caught:
        train(recipe)
    assert caught.value.exit_code == 1


@pytest.mark.fault(31)
def test_another_architecture_names_the_key(interrupted, tiny, tmp_path):
    """In the run's directory, and from another run; nothing is changed."""
    _, run = interrupted
    before = contents(run)
    for keys, way_out in (
        ({}, "choose another --output"),
        ({"output": str(tmp_path / "other"), "resume": str(run)}, "a branch goes on with what its checkpoint has"),
    ):
        with pytest.raises(
            MismatchError,
            match=rf"\[model\] num_layers: .*step-000004 has num_layers = 2, you gave 3; {way_out}",
        ) as caught:
            train(tiny(save_every=2, num_layers=3, **keys))
        assert caught.value.exit_code == 2
    assert contents(run) == before
    assert not (tmp_path / "other").exists()


@pytest.mark.fault(32)
@pytest.mark.parametrize("dangling", [False, True])
def test_linked_step_directory_is_neither_followed_nor_touched(interrupted, tmp_path, capsys, dangling):
    """Nothing is read, written or deleted through the link: it is set aside."""
    recipe, run = interrupted
    elsewhere = tmp_path / "elsewhere"
    (run / "step-000004").rename(elsewhere)
    (run / "step-000004").symlink_to(tmp_path / "nothing" if dangling else elsewhere)
    before = contents(elsewhere)
    with pytest.raises(CheckpointError, match="latest: got 'step-000004', which is not a checkpoint"):
        load_checkpoint(run)
    train(recipe)
    assert "is a link or a file" in capsys.readouterr().err
    assert contents(elsewhere) == before
    assert (run / "damaged-step-000004-1").is_symlink()
    assert (run / "step-000004").is_dir()
    assert not (run / "step-000004").is_symlink()


@pytest.mark.fault(32)
def test_links_in_a_run_are_not_followed(interrupted, tmp_path):
    """Records, pointers and temporary files that are links are replaced; their targets do not change."""
    recipe, run = interrupted
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("metrics.jsonl", "timing.jsonl", "latest", ".tmp-latest", ".tmp-run.json", ".tmp-step-000006"):
        (outside / name).write_text("precious")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / name)
    for overwrite in (False, True):
        train(recipe, overwrite=overwrite)
        assert {path.read_text() for path in outside.iterdir()} == {"precious"}


@pytest.mark.fault(34)
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_newer_format_is_named(interrupted, name):
    """And not passed over: continuing from an older checkpoint would discard the newer ones."""
    recipe, run = interrupted
    directory = run / "step-000004"
    if name == "manifest.json":
        manifest = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(manifest | {"format": 4}))
    else:
        rewrite(directory / name, metadata=lambda values: values.update(format=4))
        fit_manifest(directory / name)
    before = contents(run)
    with pytest.raises(
        CheckpointError, match=rf"{name}: of format 4, and this mygpt reads format 3; use a newer mygpt"
    ) as caught:
        train(recipe)
    assert caught.value.exit_code == 1
    assert contents(run) == before


@pytest.mark.fault(35)
def test_non_finite_weights_are_refused(interrupted):
    """Also where the hash is right."""
    recipe, run = interrupted
    file = run / "step-000004" / "model.safetensors"
    rewrite(file, tensors=lambda values: values["norm.bias"].fill_(float("nan")))
    fit_manifest(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged: norm\.bias has values that are") as caught:
        train(recipe)
    assert caught.value.exit_code == 1


@pytest.mark.fault(36)
def test_changed_corpus_is_refused(interrupted, tiny, tmp_path, text):
    """The same characters in another order; a branch may train on, but not on other characters."""
    recipe, run = interrupted
    other = tmp_path / "other.txt"
    other.write_text(text[10_000:] + text[:10_000], encoding="utf-8", newline="")
    changed = tiny(save_every=2, corpus=str(other))
    with pytest.raises(MismatchError, match=r"corpus: .*other\.txt is not the text that .*`mygpt fork") as caught:
        train(changed)
    assert caught.value.exit_code == 2
    branch = {"resume": str(run), "output": str(tmp_path / "branch")}
    assert RunDirectory(train(changed.replace(**branch))).is_finished
    other.write_text("abc" * 1000)
    with pytest.raises(MismatchError, match="its characters are not the vocabulary of"):
        train(tiny(save_every=2, corpus=str(other), steps=8, **branch), overwrite=True)
    # The same text under another name is the same corpus.
    other.write_text(text, encoding="utf-8", newline="")
    train(recipe, overwrite=True)
    train(tiny(save_every=2, corpus=str(other)))


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        (
            {"lr": 3e-4},
            r"\[optimizer\] lr: .* was trained with lr = 0\.001, you gave 0\.0003; .*`mygpt fork .*--lr 0\.0003`",
        ),
        ({"batch_size": 8, "data_seed": 1}, r"with batch_size = 4, you gave 8.*\n.*with data_seed = 42, you gave 1"),
        (
            {"val_split": 0.1, "val_every": 2},
            r"with val_split = 0\.0, you gave 0\.1.*\n.*with val_every = 0, you gave 2",
        ),
        ({"precision": "bf16"}, 'with precision = "fp32", you gave "bf16"'),
        ({"steps": 3}, r"steps: got 3, expected more than 4, the step of .*step-000004; raise --steps"),
    ],
)
def test_changed_recipe_is_refused(interrupted, tiny, keys, answer):
    """Exit 2: the differences and the remedies; nothing is changed."""
    _, run = interrupted
    before = contents(run)
    with pytest.raises(RecipeError, match=answer) as caught:
        train(tiny(save_every=2, **keys))
    assert caught.value.exit_code == 2
    assert contents(run) == before


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("keys", "warning"),
    [({"threads": 2}, r"threads 1 -> 2"), ({"micro_batch_size": 2}, r"micro_batch_size 4 -> 2")],
)
def test_changes_of_the_last_bits_are_reported(interrupted, tiny, capsys, keys, warning):
    """With a warning, and in run.json; the run continues."""
    _, run = interrupted
    train(tiny(save_every=2, **keys))
    assert re.search(
        rf"the last bits may differ from those of a run that was never.*{warning}", capsys.readouterr().err
    )
    ((name, now),) = keys.items()
    was = {"threads": 1, "micro_batch_size": 4}[name]
    stretches = json.loads((run / "run.json").read_text())["stretches"]
    found = [(stretch["after_step"], stretch["environment"][name]) for stretch in stretches]
    assert found == [(0, was), (4, now)]


@pytest.mark.fault(37)
def test_harmless_changes_pass(interrupted, tiny, tmp_path, capsys):
    """Printing, pruning and a larger number of steps: the weights are those of the longer run."""
    _, run = interrupted
    train(tiny(save_every=4, steps=8, print_every=3, log_every=2, keep_last=2))
    messages = capsys.readouterr().err
    assert "last bits" not in messages
    longer = train(tiny(steps=8, output=str(tmp_path / "longer")))
    for name in ("model.safetensors", "state.safetensors"):
        assert (run / "step-000008" / name).read_bytes() == (longer / "step-000008" / name).read_bytes()
    # A schedule that ends at `steps` is another one, which a warning says.
    falling = {"schedule": "linear", "output": str(tmp_path / "falling")}
    train(tiny(**falling))
    train(tiny(**falling, steps=8))
    assert "steps 6 -> 8: from step 7 on, the rate is that of a linear schedule over 8 steps" in capsys.readouterr().err
    rates = [record.lr for record in read_records(tmp_path / "falling")]
    assert rates[5] == 0
    assert rates[6] == pytest.approx(1e-3 / 8)
