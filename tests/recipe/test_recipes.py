"""The recipes that come with mygpt."""

import tomllib

import pytest
from support.commands import REPOSITORY
from support.runs import TINY

from mygpt.recipe.files import load_recipe, recipe_schema, shipped_recipes
from mygpt.recipe.tables import Recipe, check_recipe
from mygpt.training.train import train

FOLDER = REPOSITORY / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))


def test_there_are_recipes():
    """The other tests of this file are about these."""
    assert {"default", "hardened", "overfit", "quickstart", "memorize"} <= {path.stem for path in RECIPES}
    assert shipped_recipes().keys() == {path.stem for path in RECIPES}


def test_default_recipe_spells_out_the_defaults():
    """default.toml names every key that has a default, with that default."""
    assert load_recipe(FOLDER / "default.toml") == Recipe()
    document = tomllib.loads((FOLDER / "default.toml").read_text())
    resolved = Recipe().model_dump(exclude_none=True)
    resolved["checkpoint"].pop("output")
    assert document == resolved


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_names_the_schema(path):
    """Editors find the schema from the first line."""
    assert path.read_text().startswith("#:schema recipe.schema.json\n")


def test_schema_file_is_current():
    """`mygpt recipe schema > recipes/recipe.schema.json` renews it."""
    assert (FOLDER / "recipe.schema.json").read_text() == recipe_schema()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(path, tmp_path, text_file):
    """A few steps of a tiny model on a short text."""
    recipe = load_recipe(path)
    check_recipe(recipe)
    small = {"steps": 4, "warmup": min(2, recipe.schedule.warmup), "val_every": min(2, recipe.validation.val_every)}
    small |= {"corpus": str(text_file), "output": str(tmp_path / "run")}
    run = train(recipe.replace(**TINY | small))
    assert (run / "step-000004" / "model.safetensors").is_file()
