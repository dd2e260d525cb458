"""Runs that begin with the weights of another model, and runs with a text of its own to hold out."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support.runs import FLAGS, assert_same_run

from mygpt.checks.at import fork, recreate
from mygpt.checks.compare import compare
from mygpt.checks.verify import verify
from mygpt.data.dataset import load_dataset
from mygpt.data.prepare import TokenizerChoice, prepare
from mygpt.errors import CheckpointError, CorpusError, MismatchError, RecipeError, TokenizerError
from mygpt.recipe.tables import Recipe, check_recipe
from mygpt.runs.initial import find_initial, open_dataset
from mygpt.runs.loading import load_checkpoint, read_weights
from mygpt.runs.run import RunDirectory
from mygpt.training import parts
from mygpt.training.train import train


@pytest.fixture(scope="module")
def source(tmp_path_factory, text_file):
    """A run with three checkpoints, of which the second is the best."""
    from support.runs import TINY

    output = tmp_path_factory.mktemp("source") / "run"
    recipe = Recipe.of(**TINY, corpus=str(text_file), output=str(output), save_every=2, dropout=0.1)
    run = train(recipe)
    (run / "best").write_text("step-000004\n")
    return run


@pytest.mark.parametrize("kind", ["foreign", "foreign folder", "state"])
@pytest.mark.fault(93)
def test_weights_of_another_program_are_a_mistake(tmp_path, source, text_file, call, kind):
    """One line that names the file and what is expected, from every command that takes a model; nothing is made."""
    file, message = tmp_path / "model.safetensors", "weights of another program, without mygpt's metadata; expected a"
    save_file({"wte.weight": np.zeros((8, 4), np.float32)}, file, {"format": "pt"})
    name = tmp_path if kind == "foreign folder" else file
    if kind == "state":
        name = file = source / "step-000006" / "state.safetensors"
        message = "the optimizer's state, not a model; expected model.safetensors"
    for command in (
        ("generate", "--checkpoint", name, "--prompt", "a"),
        ("eval", name, "--corpus", text_file),
        ("compare", name, source),
        ("compare", source, name),
        ("train", text_file, "--init-from", name, "--output", tmp_path / "run"),
    ):
        code, out, err = call(*command)
        assert (code, out) == (2, "")
        assert f"{file}: {message}" in err
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["outside", "run", "step"])
def test_copy_of_a_model_under_another_name_is_a_model(tmp_path, source, text_file, call, place):
    """It has no manifest and no run, wherever it lies: what is beside it may be of another model."""
    step = shutil.copytree(source, tmp_path / "source") / "step-000006"
    file = {"outside": tmp_path, "run": step.parent, "step": step}[place] / "copy.safetensors"
    shutil.copy(step.parent / "step-000002" / "model.safetensors", file)
    alone = call("generate", "--checkpoint", step.parent / "step-000002", "--prompt", "a")
    assert call("generate", "--checkpoint", file, "--prompt", "a") == alone
    assert call("eval", file, "--corpus", text_file)[0] == 0
    assert "belongs to no run, so no text is held out; give a text with --corpus" in call("eval", file)[2]
    code, out, err = call("compare", file, step)
    assert (code, err) == (1, "")
    assert "verdict" not in out
    flags = ("--init-from", file, "--output", tmp_path / "run", *FLAGS, "--dropout", 0.1)
    assert call("train", text_file, *flags)[0] == 0


@pytest.fixture
def other_text(tmp_path, text):
    """Other text, of characters that the first has."""
    path = tmp_path / "other.txt"
    path.write_text(text[::-1][:5000], encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize(
    ("name", "step"), [("", 6), ("best", 4), ("step-000002", 2), ("step-000002/model.safetensors", 2)]
)
def test_run_begins_with_the_weights_of_another(tiny, source, other_text, name, step):
    """With its weights and tokenizer and nothing else of it: at step 1, without moments, with its own rate."""
    run = train(tiny(corpus=str(other_text), init_from=str(source / name), lr=0.0, weight_decay=0.0, steps=1))
    begun, model = load_checkpoint(source / f"step-{step:06d}"), load_checkpoint(run)
    for key, weight in model.model.state_dict().items():
        assert torch.equal(weight, begun.model.state_dict()[key])
    assert model.tokenizer.metadata == begun.tokenizer.metadata
    assert model.step == 1
    assert find_initial(RunDirectory(run).recipe).sha256 == RunDirectory(run).info.init_sha256
    assert RunDirectory(run).recipe.train.init_from.startswith(str(source / f"step-{step:06d}"))


def test_run_goes_on_though_its_beginning_is_gone(tiny, source, other_text, tmp_path):
    """What is saved needs the other run no more; beginning again, or verifying, does, and says so."""
    shutil.copytree(source, tmp_path / "copy")
    recipe = tiny(corpus=str(other_text), init_from=str(tmp_path / "copy"), dropout=0.1)
    whole = train(recipe.replace(output=str(tmp_path / "whole"), init_from=str(source)))
    run = train(recipe.replace(save_every=3), last_step=3)
    shutil.rmtree(tmp_path / "copy")
    train(recipe)
    assert_same_run(run, whole)
    branch = train(recipe.replace(output=str(tmp_path / "branch"), resume=str(run / "step-000003"), steps=7))
    assert RunDirectory(branch).info.init_sha256 == RunDirectory(whole).info.init_sha256
    with pytest.raises(
        CheckpointError, match=r"began with \(sha256 \w{12}\) cannot be read, and step 1 needs them: .*no such run"
    ):
        verify(run)
    with pytest.raises(CheckpointError, match=r"init_from: .*no such run"):
        train(recipe.replace(output=str(tmp_path / "new")))


def test_steps_are_made_again_from_the_same_weights(tiny, source, other_text, tmp_path):
    """`verify` and `at` begin with them, and find that they have changed."""
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    run = train(tiny(corpus=str(other_text), init_from=str(copy / "step-000002"), save_every=3))
    assert verify(run).identical
    recreate(run, 2, tmp_path / "at", from_beginning=True)
    assert RunDirectory(tmp_path / "at").info.init_sha256 == RunDirectory(run).info.init_sha256
    shutil.rmtree(copy / "step-000002")
    train(tiny(output=str(tmp_path / "x"), steps=2, data_seed=1))
    shutil.copytree(tmp_path / "x" / "step-000002", copy / "step-000002")
    with pytest.raises(MismatchError, match=r"has changed since .* began with its weights; put it back"):
        verify(run)
    sha256 = RunDirectory(run).info.init_sha256
    train(tiny(corpus=str(other_text), init_from=str(copy / "step-000002"), save_every=3, steps=8))
    assert RunDirectory(run).info.init_sha256 == sha256  # it has its own weights by now
    recreate(run, 5, tmp_path / "five")  # from a checkpoint, which needs no other weights


def test_other_weights_to_begin_with_are_refused_for_a_run_that_is_there(tiny, source, other_text, tmp_path, capsys):
    """Its weights are its own by now: a branch keeps what is on record, with a note."""
    run = train(tiny(corpus=str(other_text), init_from=str(source)))
    other = tiny(corpus=str(other_text), init_from=str(source / "step-000002"), steps=8)
    with pytest.raises(MismatchError, match=r"init_from: .* is not what .*one run has one recipe: choose another"):
        train(other)
    run = train(other.replace(resume=str(run), output=str(tmp_path / "branch")))
    assert f"init_from: stays {source}/step-000006: the weights are those of" in capsys.readouterr().err
    assert RunDirectory(run).recipe.train.init_from == f"{source}/step-000006"
    assert RunDirectory(run).info.init_sha256 == find_initial(RunDirectory(run).recipe).sha256


def test_the_other_run_may_go_on(tiny, source, other_text, tmp_path):
    """The same command continues a run that began with the newest checkpoint of another, whatever is the newest now."""
    live = tmp_path / "live"
    shutil.copytree(source, live)
    recipe = tiny(corpus=str(other_text), init_from=str(live), dropout=0.1)
    whole = train(recipe.replace(output=str(tmp_path / "whole"), init_from=str(source)))
    for killed_at in (None, 3):  # before its first checkpoint, and after it
        if killed_at:
            train(recipe, last_step=killed_at)
        else:
            run = train(recipe, last_step=2)
            shutil.rmtree(run / "step-000002")
            (run / "latest").unlink()
        train(RunDirectory(live).recipe.replace(steps=7 + (killed_at or 0)))
        assert (live / "latest").read_text() != "step-000006\n"
    train(recipe)
    assert_same_run(run, whole)
    assert RunDirectory(run).recipe.train.init_from == f"{live}/step-000006"
    train(recipe, overwrite=True)  # begins again, with the newest
    assert RunDirectory(run).recipe.train.init_from == f"{live}/step-000010"


def test_restarted_command_keeps_its_run_though_the_other_went_on(tiny, source, other_text, tmp_path, monkeypatch):
    """With --overwrite, too: a requeued job begins nothing anew."""
    live = tmp_path / "live"
    shutil.copytree(source, live)
    recipe = tiny(corpus=str(other_text), init_from=str(live), save_every=2)
    run = train(recipe, last_step=4)
    train(RunDirectory(live).recipe.replace(steps=7))
    before = (run / "step-000002" / "model.safetensors").stat().st_ino
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train(recipe, overwrite=True)
    assert (run / "step-000002" / "model.safetensors").stat().st_ino == before
    assert RunDirectory(run).recipe.train.init_from == f"{live}/step-000006"


def test_fork_needs_the_first_weights_no_more(tiny, source, other_text, tmp_path):
    """Also where it differs in a key of the model or the text, which are compared with the checkpoint."""
    shutil.copytree(source, tmp_path / "copy")
    run = train(tiny(corpus=str(other_text), init_from=str(tmp_path / "copy"), save_every=2))
    shutil.rmtree(tmp_path / "copy")
    recipe = RunDirectory(run).recipe_for(5).replace(dropout=0.2)
    made = fork(run, 4, recipe, tmp_path / "fork")
    assert RunDirectory(made).is_finished


def test_beginning_with_a_checkpoint_that_will_go_says_so(tiny, source, other_text, tmp_path, capsys):
    """One that was made by the clock, or for a signal, is removed at the next save of its run."""
    stopped = train(tiny(output=str(tmp_path / "stopped")), last_step=3)
    train(tiny(corpus=str(other_text), init_from=str(stopped), steps=2))
    assert f"init_from: {stopped}/step-000003 may be removed when its run goes on, and" in capsys.readouterr().err
    shutil.copytree(stopped / "step-000003", tmp_path / "copy")
    train(tiny(corpus=str(other_text), init_from=str(tmp_path / "copy"), steps=2), overwrite=True)
    assert "may be removed" not in capsys.readouterr().err
    keys = {"output": str(tmp_path / "best"), "save_every": 2, "val_split": 0.2, "val_every": 1, "save_best": True}
    going_on = train(tiny(**keys, lr=1e-5), last_step=5)  # the best is none of those that are saved by the step
    for name, is_removable in (("best", True), ("step-000002", False)):
        assert bool(find_initial(tiny(init_from=str(going_on / name))).note) == is_removable
    going_on = train(tiny(**keys, lr=1e-5, keep_last=1), last_step=5)
    assert find_initial(tiny(init_from=str(going_on / "step-000004"))).note
    shutil.copytree(going_on, tmp_path / "damaged")
    (tmp_path / "damaged" / "run.json").write_text("{")  # what the run may do is not known
    assert find_initial(tiny(init_from=str(tmp_path / "damaged" / "step-000004"))).note
    train(tiny(**keys, lr=1e-5, keep_last=1))
    assert not find_initial(tiny(init_from=str(going_on / "best"))).note
    (tmp_path / "empty").mkdir()
    shutil.copy(stopped / "run.json", tmp_path / "empty")
    shutil.copytree(stopped / "step-000003", tmp_path / "empty" / "kept")  # by its user
    assert not find_initial(tiny(init_from=str(tmp_path / "empty" / "kept"))).note
    train(tiny(output=str(tmp_path / "branch"), resume=str(stopped)))
    assert f"resume: {stopped}/step-000003 is removed when its run saves the next" in capsys.readouterr().err


def test_a_beginning_that_is_not_there_is_named(tiny, source, other_text, capsys):
    """The run goes on with its own weights; a damaged newest checkpoint does not hide what it began with."""
    recipe = tiny(corpus=str(other_text), init_from=str(source), save_every=2)
    run = train(recipe, last_step=3)
    train(recipe.replace(init_from="mistyped"), last_step=4)
    note = f"init_from: mistyped is not there; what began with {source}/step-000006 goes on\n"
    assert note in capsys.readouterr().err
    (run / "step-000004" / "model.safetensors").write_bytes(b"")
    train(recipe)
    assert RunDirectory(run).recipe.train.init_from == f"{source}/step-000006"
    assert "init_from" not in capsys.readouterr().err
    train(recipe.replace(init_from=str(source / "best"), steps=7))
    note = f"init_from: {source}/best is {source}/step-000004 by now; what began with {source}/step-000006 goes on\n"
    assert note in capsys.readouterr().err


def test_overwriting_does_not_remove_the_beginning(tiny, source, tmp_path):
    """A run that would begin with its own weights, and remove them first."""
    run = tmp_path / "run"
    shutil.copytree(source, run)
    with pytest.raises(CheckpointError, match=r"init_from: .* is in the run that --overwrite would remove; choose"):
        train(tiny(init_from=str(run)), overwrite=True)
    assert (run / "step-000006" / "model.safetensors").exists()
    shutil.copytree(source, run / "inner")  # which --overwrite leaves where it is
    train(tiny(init_from=str(run / "inner")), overwrite=True)
    assert RunDirectory(run).recipe.train.init_from == str(run / "inner" / "step-000006")


def test_weights_that_change_while_a_run_begins_are_noticed(tiny, source, other_text, tmp_path, monkeypatch):
    """Between their hash, which run.json gets, and being read."""
    copy = tmp_path / "copy"
    shutil.copytree(source / "step-000006", copy)

    def replace_weights(*arguments):
        shutil.copy(source / "step-000002" / "model.safetensors", copy / "model.safetensors")
        return read_weights(*arguments)

    monkeypatch.setattr(parts, "read_weights", replace_weights)
    with pytest.raises(
        MismatchError, match=f"init_from: {copy}/model.safetensors is not what the run began with: its sha256 was"
    ):
        train(tiny(corpus=str(other_text), init_from=str(copy)))
    assert not (tmp_path / "run").exists()


def test_mistakes_about_the_beginning(tiny, source, other_text, tmp_path):
    """Another architecture is answered with the flags that fit; another tokenizer, and text beyond it, with names."""
    with pytest.raises(RecipeError, match=r"another architecture; set --embed-dim 16 --activation gelu$"):
        train(tiny(init_from=str(source), embed_dim=32, activation="gelu-tanh"))
    with pytest.raises(CheckpointError, match=r"init_from: .*other.txt: not a model; expected a run") as caught:
        train(tiny(init_from=str(other_text)))
    assert caught.value.exit_code == 2
    with pytest.raises(CorpusError, match="init_from: its tokenizer is 'char'; leave tokenizer"):
        train(tiny(init_from=str(source), tokenizer="byte"))
    other_text.write_text(other_text.read_text() + "中")
    with pytest.raises(
        TokenizerError,
        match=r"'中' .* is not among .* characters of the vocabulary of .*model.safetensors; give a text",
    ):
        train(tiny(init_from=str(source), corpus=str(other_text)))
    prepare([other_text], tmp_path / "tokens", TokenizerChoice("byte", 0, None))
    with pytest.raises(CorpusError, match=r"is prepared with the tokenizer byte .*, expected char"):
        train(tiny(init_from=str(source), corpus=str(tmp_path / "tokens")))
    with pytest.raises(CorpusError, match=r"is prepared with the tokenizer byte .*, expected char"):
        train(tiny(init_from=str(source), corpus=str(tmp_path / "tokens"), val_corpus=str(tmp_path / "tokens")))
    assert not (tmp_path / "run").exists()


def test_text_of_its_own_is_held_out(tiny, text, other_text, text_file):
    """All of it, and nothing of the corpus; characters that only it has are in the vocabulary."""
    other_text.write_text(other_text.read_text() + "中", newline="")
    table = tiny(val_corpus=str(other_text)).data
    dataset = load_dataset(table, 16)
    assert dataset.tokenizer.decode(dataset.train.tolist()) == text
    assert dataset.tokenizer.decode(dataset.val.tolist()) == other_text.read_text()
    assert dataset.unseen_characters() == "中"
    assert load_dataset(tiny(val_corpus=str(other_text), tokenizer="byte").data, 16).unseen_characters() == ""
    run = train(tiny(val_corpus=str(other_text), val_every=3, sampling="full"))
    assert verify(run).identical
    other_text.write_text(other_text.read_text()[::-1], newline="")
    with pytest.raises(
        MismatchError, match=r"\[data\] val_corpus: .* is not the text that .* held out: with other content"
    ):
        train(tiny(val_corpus=str(other_text), val_every=3, sampling="full", steps=9))
    with pytest.raises(MismatchError, match="held out another text than"):
        verify(run)


def test_held_out_text_that_is_trained_on_is_named(tiny, text_file, capsys):
    """Its loss would look like that of unseen text."""
    train(tiny(val_corpus=str(text_file), val_every=6, sampling="full"))
    assert "val_corpus: is the text that is trained on: its loss says nothing" in capsys.readouterr().err


def test_models_of_different_texts_are_compared_on_one(tiny, tmp_path, other_text, text):
    """With the same text held out, other training texts still have a verdict; with another one they have none."""
    (tmp_path / "second.txt").write_text(text[::-1], newline="")
    keys = {"val_corpus": str(other_text), "val_every": 6, "sampling": "full"}
    first = train(tiny(**keys, output=str(tmp_path / "first")))
    second = train(tiny(**keys, output=str(tmp_path / "second"), corpus=str(tmp_path / "second.txt")))
    result = compare(first, second)
    assert "corpus: another text" in result.recipe
    assert result.held_out is not None
    assert "paired over" in result.held_out.difference.manner
    third = train(tiny(val_corpus=str(tmp_path / "second.txt"), val_every=6, output=str(tmp_path / "third")))
    result = compare(first, third)
    assert "val_corpus: another text" in result.recipe
    assert result.held_out is None


def test_prepared_text_can_be_held_out(tiny, tmp_path, text, other_text, text_file, monkeypatch):
    """It gets the tokenizer of the corpus, which may be prepared, too, or not. A large one must have it already."""
    tokens, other = tmp_path / "tokens", tmp_path / "other"
    prepare([text_file], tokens, TokenizerChoice("byte", 0, None))
    prepare([other_text], other, TokenizerChoice("byte", 0, None))
    for corpus, held_out in ((tokens, other), (tokens, other_text)):
        dataset = load_dataset(tiny(corpus=str(corpus), val_corpus=str(held_out)).data, 16)
        assert dataset.check_unchanged is not None
        assert dataset.tokenizer.decode(dataset.val.tolist()[:50]) == other_text.read_text()[:50]
        assert np.array_equal(dataset.tokenizer.encode(text), dataset.train[: len(text.encode())])
    dataset = load_dataset(tiny(val_corpus=str(other)).data, 16)
    assert dataset.tokenizer.metadata.type == "char"
    assert dataset.tokenizer.decode(dataset.val.tolist()) == other_text.read_text()
    dataset = load_dataset(tiny(corpus=str(tokens), val_corpus=str(other)).data, 16)
    with (other / "tokens.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorpusError, match="has changed while it was in use"):
        dataset.check_unchanged()
    monkeypatch.setattr("mygpt.data.dataset.MAX_ENCODED_AGAIN", 100)
    with pytest.raises(CorpusError, match=r"tokens: is prepared with the tokenizer byte .*, expected char"):
        load_dataset(tiny(val_corpus=str(tokens)).data, 16)


def test_mistakes_about_held_out_text(tiny, tmp_path, other_text):
    """Two ways to hold text out, none of it, or too little."""
    with pytest.raises(RecipeError, match=r"val_split: got 0.1, expected 0 with val_corpus"):
        check_recipe(tiny(val_corpus=str(other_text), val_split=0.1))
    with pytest.raises(RecipeError, match='hold_out: got "pieces", expected "tokens" with val_corpus'):
        check_recipe(tiny(val_corpus=str(other_text), hold_out="pieces"))
    with pytest.raises(RecipeError, match=r"set val_split, such as 0.1, or val_corpus"):
        check_recipe(tiny(val_every=3))
    with pytest.raises(CorpusError, match=r"nothing\.txt: no such text"):
        open_dataset(tiny(val_corpus=str(tmp_path / "nothing.txt")))
    other_text.write_text("short")
    with pytest.raises(CorpusError, match=r"other\.txt: has 5 characters, expected more than seq_len \+ 1 = 17"):
        open_dataset(tiny(val_corpus=str(other_text)))
