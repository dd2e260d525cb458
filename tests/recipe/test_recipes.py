"""The recipes that come with mygpt."""

import re
import shutil
import tomllib

import pytest
from support.commands import REPOSITORY
from support.runs import TINY

from mygpt import GPT
from mygpt.cli.train import TrainOptions
from mygpt.recipe.files import load_recipe, recipe_schema, shipped_recipes
from mygpt.recipe.flags import parse_recipe
from mygpt.recipe.names import named_after
from mygpt.recipe.tables import UNNAMED_KEYS, ExpectedTable, Recipe, check_recipe
from mygpt.runs.changes import MAY_CHANGE
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


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ("", "hardened"),
        ("--warmup 0", "hardened-warmup=0"),
        ("--lr 3e-4 --steps 3000", "hardened-lr=0.0003"),
        ("--seed 3", "hardened-seed=3"),
        ("--init-seed 3 --no-tied-head", "hardened-tied_head=false-init_seed=3"),
        ("--corpus ../texts/a*b.txt", "hardened-corpus=.._texts_a_b.txt"),
        ("--warmup 100 --print-every 7 --threads 1 --steps 3000", "hardened"),
        ("--val-every 0", "hardened-val_every=0"),
        ("--warmup 0 --output checkpoints/mine", "mine"),
        ("--warmup 0 --out checkpoints/mine", "mine"),
    ],
)
def test_output_of_a_changed_shipped_recipe_is_named_after_the_change(arguments, output, tmp_path):
    """So it does not collide with the run of the recipe itself. A recipe of one's own keeps its output."""
    for target in ("hardened", shipped_recipes()["hardened"]):
        recipe = parse_recipe([str(target), *arguments.split()], "mygpt train", TrainOptions)[0]
        assert recipe.checkpoint.output == f"checkpoints/{output}"
    shutil.copy(FOLDER / "hardened.toml", tmp_path / "mine.toml")
    shutil.copy(FOLDER / "default.toml", tmp_path)
    recipe = parse_recipe([str(tmp_path / "mine.toml"), *arguments.split()], "mygpt train", TrainOptions)[0]
    assert recipe.checkpoint.output == "checkpoints/mine"


def test_names_of_changes_are_short_and_differ():
    """However long the values are."""
    long = [named_after("run", {"corpus": "a"}, {"corpus": f"{'ü-x/' * 200}{n}"}, {"corpus"}) for n in range(2)]
    assert len(set(long)) == 2
    assert all(re.fullmatch(r"run[\w.=-]{80}", name, re.ASCII) for name in long)


def test_keys_that_do_not_name_the_output_can_change_when_a_run_continues():
    """A run whose other keys change is refused, so its name must say so."""
    assert not UNNAMED_KEYS - MAY_CHANGE


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
