"""Run directories that are copied, moved, or named by another recipe or from another working directory."""

import shutil
import signal

import pytest
from support.forked import run as run_forked
from support.runs import FLAGS, contents

from mygpt.checks.verify import verify
from mygpt.errors import CheckpointError, CorpusError
from mygpt.recipe.files import load_recipe
from mygpt.recipe.flags import load_target
from mygpt.runs.run import RunDirectory
from mygpt.training.train import train

TRAIN = ("text.txt", *FLAGS, "--save-every", 2, "--output", "run")


@pytest.mark.fault(66)
def test_copied_run_is_independent(folder, monkeypatch):
    """Continuing the copy by its recipe.toml does not change the original, from any working directory."""
    place = folder("copied")
    assert run_forked(TRAIN, place, "before-step", 5) == -signal.SIGKILL
    (place / "elsewhere").mkdir()
    shutil.copytree(place / "run", place / "elsewhere" / "copy")
    before = contents(place / "run")
    assert run_forked(("copy/recipe.toml",), place / "elsewhere") == 0
    assert (place / "elsewhere" / "copy" / "latest").read_text() == "step-000006\n"
    assert contents(place / "run") == before
    # A run that was moved is verified from anywhere.
    (place / "elsewhere" / "copy").rename(place / "moved")
    monkeypatch.chdir("/")
    assert verify(place / "moved").identical


@pytest.mark.fault(66)
def test_moved_text_is_the_same_text(tiny, tmp_path, text):
    """Its new place, once named, also for a complete run, holds for the steps before, too."""
    corpus = tmp_path / "text.txt"
    corpus.write_text(text, encoding="utf-8", newline="")
    run = train(tiny(corpus=str(corpus)))
    train(tiny(corpus=str(corpus), steps=8))
    corpus = corpus.rename(tmp_path / "moved.txt")
    with pytest.raises(CorpusError, match=r"text\.txt: no such text file; expected the path"):
        verify(run)
    train(RunDirectory(run).recipe.replace(corpus=str(corpus)))
    assert verify(run).identical


@pytest.mark.fault(66)
def test_recipe_of_a_run_without_run_json_trains_nowhere_else(tiny, tmp_path, monkeypatch):
    """The error names the missing file, and no other run begins in the working directory."""
    run = train(tiny())
    (run / "run.json").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"run holds a run without its run\.json; restore it"):
        train(load_recipe(run / "recipe.toml"))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.fault(66)
def test_recipe_that_extends_a_run_has_its_own_output(tiny, tmp_path):
    """A recorded recipe is a recipe like any other, but its output belongs to its run."""
    run = train(tiny(lr=2e-3))
    (tmp_path / "mine.toml").write_text('extends = "run/recipe.toml"\n[train]\nsteps = 9\n')
    mine = load_target(str(tmp_path / "mine.toml"))
    assert (mine.optimizer.lr, mine.train.steps) == (2e-3, 9)
    assert mine.checkpoint.output == "checkpoints/mine"
    assert load_recipe(run / "recipe.toml").checkpoint.output == str(run)


@pytest.mark.fault(66)
def test_recipe_that_extends_a_branch_does_not_inherit_resume(tiny, tmp_path):
    """`resume` belongs to the run, as `output` does."""
    source = train(tiny(save_every=2), last_step=2)
    train(tiny(resume=str(source), output=str(tmp_path / "branch")))
    (tmp_path / "mine.toml").write_text('extends = "branch/recipe.toml"\n')
    assert load_recipe(tmp_path / "mine.toml").checkpoint.resume == "auto"
    assert load_recipe(tmp_path / "branch" / "recipe.toml").checkpoint.resume == str(source)


@pytest.mark.fault(10)
@pytest.mark.parametrize("point", ["made-run.json", "before-step", "setting-aside"])
def test_recipe_of_a_run_survives_its_replacement(folder, point):
    """`mygpt train run/recipe.toml --overwrite`, killed while it replaces the run: the same command works again."""
    place = folder("replaced")
    assert run_forked(TRAIN, place) == 0
    before = contents(place / "run", without=["run.json"])
    again = ("run/recipe.toml", "--overwrite")
    assert run_forked(again, place, point) == -signal.SIGKILL
    assert run_forked(again, place) == 0, (place / "err").read_text()
    assert contents(place / "run", without=["run.json"]).items() >= before.items()


@pytest.mark.fault(66)
def test_corpus_is_looked_up_beside_its_recipe_first(tmp_path, monkeypatch):
    """Then in the working directory; a parent's corpus beside the parent; a named corpus stays a name."""
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


@pytest.mark.fault(66)
def test_output_that_is_written_into_the_recipe_of_a_run_changes_nothing(tiny, tmp_path):
    """A recorded recipe means its directory: a copy of the run would else train into the original."""
    run = train(tiny())
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace("[checkpoint]\n", '[checkpoint]\noutput = "elsewhere"\n'))
    assert load_recipe(run / "recipe.toml").checkpoint.output == str(run)
