"""The recipes that come with mygpt."""

import tomllib

import pytest
from support.commands import REPOSITORY
from support.runs import TINY

from mygpt import GPT
from mygpt.recipe.files import load_recipe, recipe_schema, shipped_recipes
from mygpt.recipe.flags import parse_recipe
from mygpt.recipe.tables import ExpectedTable, Recipe, check_recipe
from mygpt.training.train import train

FOLDER = REPOSITORY / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
EXPERIMENTS = sorted(FOLDER.glob("experiments/*.toml"))


def test_there_are_recipes():
    """The other tests of this file are about these."""
    assert {"default", "hardened", "overfit", "quickstart", "memorize"} <= {path.stem for path in RECIPES}
    assert shipped_recipes().keys() == {path.stem for path in RECIPES}
    assert len(EXPERIMENTS) >= 6


def test_default_recipe_spells_out_the_defaults():
    """default.toml names every key that has a default, with that default; and what this run comes to."""
    nothing = dict.fromkeys(ExpectedTable.model_fields)
    assert load_recipe(FOLDER / "default.toml").replace(**nothing) == Recipe()
    document = tomllib.loads((FOLDER / "default.toml").read_text())
    del document["expected"]
    resolved = Recipe().model_dump(exclude_none=True)
    resolved["checkpoint"].pop("output")
    del resolved["expected"]
    assert document == resolved


NOT_MEASURED = {"gpt2-124m", "shakespeare-10m"}
"""They take a GPU, or half a day."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_carries_the_losses_to_expect(path):
    """Mean and deviation over several seeds, up to its last step; a flag that changes the training drops them."""
    recipe = load_recipe(path)
    rows = recipe.expected.expected_val or recipe.expected.expected_loss
    assert bool(rows) is (path.stem not in NOT_MEASURED)
    if rows:
        assert rows[-1][0] == recipe.train.steps
        assert recipe.expected.expected_seeds >= 10
        assert recipe.expected.expected_text
        assert all(deviation > 0 for _, _, deviation in rows)
        changed, _ = parse_recipe([str(path), "--lr", "1e-5"], "mygpt train")
        assert changed.expected == ExpectedTable()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_names_the_schema(path):
    """Editors find the schema from the first line."""
    assert path.read_text().startswith("#:schema recipe.schema.json\n")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_names_the_schema(path):
    """From the folder above."""
    assert path.read_text().startswith("#:schema ../recipe.schema.json\n")


def test_gpt2_is_the_published_model():
    """124,439,808 weights, and rows that fill the vocabulary up; a step trains on half a million tokens."""
    recipe = load_recipe(FOLDER / "gpt2-124m.toml")
    gpt = GPT(recipe.model, 50_257)
    assert gpt.num_params() == 124_439_808 + 47 * 768
    assert recipe.train.batch_size * recipe.train.seq_len == 524_288
    assert recipe.train.steps * 524_288 == pytest.approx(10e9, rel=1e-4)


def test_schema_file_is_current():
    """`mygpt recipe schema > recipes/recipe.schema.json` renews it."""
    assert (FOLDER / "recipe.schema.json").read_text() == recipe_schema()


@pytest.mark.parametrize("path", RECIPES + EXPERIMENTS, ids=lambda path: path.stem)
def test_recipe_trains(path, tmp_path, text_file):
    """A few steps of a tiny model on a short text."""
    recipe = load_recipe(path)
    check_recipe(recipe)
    small = {"steps": 4, "warmup": min(2, recipe.schedule.warmup), "val_every": min(2, recipe.validation.val_every)}
    small |= {"corpus": str(text_file), "output": str(tmp_path / "run")}
    # Compiling takes ten seconds, and has tests of its own; one text has no documents.
    small |= {
        "compile": False,
        "micro_batch_size": None,
        "hold_out": "tokens",
        "val_split": recipe.data.val_split and 0.1,
    }
    if recipe.data.tokenizer == "bpe":
        pytest.importorskip("tokenizers", reason="needs tokenizers")
        small |= {"vocab_size": 300}
    run = train(recipe.replace(**TINY | small))
    assert (run / "step-000004" / "model.safetensors").is_file()
