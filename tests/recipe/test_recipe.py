"""Reading, checking and writing recipes."""

import json
import re
from pathlib import Path

import pytest

from mygpt.errors import RecipeError
from mygpt.recipe.files import load_recipe, recipe_schema
from mygpt.recipe.flags import parse_recipe
from mygpt.recipe.names import KEY_OF_FOREIGN_NAME, NAMES_IN_OTHER_UNIT
from mygpt.recipe.tables import MIN_EXACT_EPS, TABLE_OF_KEY, Recipe, build_recipe, check_recipe, lay_over
from mygpt.training.gradient_sum import SCALE


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_keys_are_unique_across_tables():
    """Each key is also a flag without its table's name."""
    keys = [key for table in Recipe.model_fields.values() for key in type(table.default).model_fields]
    assert len(keys) == len(set(keys)) == len(TABLE_OF_KEY)


def test_every_key_has_help():
    """The text under a field is its flag's help."""
    for table in Recipe.model_fields.values():
        for key, info in type(table.default).model_fields.items():
            assert info.description, key


@pytest.mark.parametrize(("table", "key"), [("train", "log_grad_norm"), ("validation", "log_val_stderr")])
def test_help_of_printed_values_says_that_they_are_always_logged(table, key):
    """These two keys decide what is printed; metrics.jsonl holds both values without them."""
    description = type(getattr(Recipe(), table)).model_fields[key].description
    assert description.startswith("Print the ")
    assert description.endswith("; metrics.jsonl always has it.")


def test_resolved_recipe_reads_back_equal(tmp_path):
    """The recipe that a run writes can be trained again."""
    recipe = Recipe.of(steps=7, lr=1 / 3, micro_batch_size=2, schedule="cosine", warmup=3, output="a/b c")
    assert load_recipe(write(tmp_path / "recipe.toml", recipe.to_toml())) == recipe


def test_keys_without_their_tables_are_checked_as_in_a_file():
    """In code as in a file: unknown keys with a suggestion, then all wrong values at once."""
    with pytest.raises(RecipeError) as caught:
        Recipe.of(max_gradnorm=1.0, steps=3)
    assert str(caught.value) == "recipe: unknown key 'max_gradnorm'; did you mean 'max_grad_norm'?"
    with pytest.raises(RecipeError) as caught:
        Recipe.of().replace(steps=True, val_split=1.5)
    assert str(caught.value).splitlines() == [
        "recipe [data] val_split: got 1.5, expected less than 1",
        "recipe [train] steps: got true, expected a valid integer",
    ]


def test_names_of_other_programs_lead_to_keys():
    """Every such name is of a key, is none itself, and is answered with that key, wherever it was written."""
    assert len(KEY_OF_FOREIGN_NAME) > 70
    for name, key in KEY_OF_FOREIGN_NAME.items():
        assert key in TABLE_OF_KEY
        assert name not in TABLE_OF_KEY
        unit = re.escape(f" ({NAMES_IN_OTHER_UNIT[name]})") if name in NAMES_IN_OTHER_UNIT else ""
        with pytest.raises(RecipeError, match=f"unknown key '{name}'; did you mean '{key}'{unit}\\?"):
            Recipe.of(**{name: 1})
    with pytest.raises(RecipeError, match=r"'n_embd'; did you mean 'embed_dim' in the table \[model\]"):
        build_recipe({"train": {"n_embd": 3}}, source="mine.toml")


def test_message_does_not_list_all_keys():
    """Where no key is like the unknown one, the message says where all of them are."""
    with pytest.raises(RecipeError, match="unknown key 'zzz'; `mygpt recipe show default` prints all keys"):
        Recipe.of(zzz=1)


@pytest.mark.parametrize("with_flags", [True, False])
def test_evaluations_can_be_turned_off_alone(tmp_path, with_flags):
    """`val_every = 0` over a recipe with keys that refine evaluations drops those, unless they are given beside it."""
    first = (
        "[data]\nval_split = 0.1\n[validation]\nval_every = 5\npatience = 2\nsampling = 'full'\nlog_perplexity = true"
    )
    write(tmp_path / "first.toml", first + "\n[checkpoint]\nsave_best = true")
    target = write(
        tmp_path / "second.toml", 'extends = "first.toml"\n' + "[validation]\nval_every = 0" * (not with_flags)
    )
    flags = ["--val-every", "0"] * with_flags
    recipe = parse_recipe([str(target), *flags], "mygpt train")[0]
    assert (recipe.validation.patience, recipe.validation.log_perplexity, recipe.checkpoint.save_best) == (
        0,
        False,
        False,
    )
    assert recipe.data.val_split == 0.1
    with pytest.raises(RecipeError, match="patience: got 3, expected 0 without evaluations"):
        parse_recipe([str(target), *flags, "--patience", "3"], "mygpt train")


def test_message_on_warmup_names_one_that_works():
    """Of fewer steps than the recipe warms up for, the message names a warmup that fits, and it does."""
    with pytest.raises(RecipeError, match=r"lower warmup \(such as --warmup 2\) or raise steps"):
        parse_recipe(["hardened", "--steps", "50"], "mygpt train")
    assert parse_recipe(["hardened", "--steps", "50", "--warmup", "2"], "mygpt train")[0].schedule.warmup == 2


def test_replaced_keys_leave_the_others():
    """`replace` makes another recipe; `flat` gives every key that `of` takes, also an absent one."""
    recipe = Recipe.of(lr=0.5, micro_batch_size=2)
    changed = recipe.replace(steps=7, micro_batch_size=None)
    assert (changed.optimizer.lr, changed.train.steps, changed.train.micro_batch_size) == (0.5, 7, None)
    assert (recipe.train.steps, recipe.train.micro_batch_size) == (2000, 2)
    assert list(changed.flat()) == list(TABLE_OF_KEY)
    assert Recipe.of(**changed.flat()) == changed


def test_output_is_named_after_the_file(tmp_path):
    """A recipe without an output writes to checkpoints/ and its own name, also when it extends another."""
    write(tmp_path / "first.toml", "[train]\nsteps = 3")
    second = write(tmp_path / "second.toml", 'extends = "first.toml"\n[train]\nseq_len = 8')
    recipe = load_recipe(second)
    assert recipe.checkpoint.output == "checkpoints/second"
    assert (recipe.train.steps, recipe.train.seq_len) == (3, 8)


def test_extends_takes_a_shipped_name(tmp_path):
    """A recipe anywhere can start from one that comes with mygpt."""
    path = write(tmp_path / "mine.toml", 'extends = "hardened"\n[train]\nsteps = 200')
    assert load_recipe(path).schedule.schedule == "cosine"


def test_all_mistakes_are_reported_at_once(tmp_path):
    """One line per mistake, each with file, table, key, the value and what was expected."""
    path = write(
        tmp_path / "bad.toml",
        "[train]\nmax_gradnorm = 1.0\nsteps = true\n[optimiser]\nlr = 1\n[data]\nval_split = 1.5\nwarmup = 3\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = str(caught.value).splitlines()
    assert f"{path} [train]: unknown key 'max_gradnorm'; did you mean 'max_grad_norm'?" in lines
    assert f"{path} [train] steps: got true, expected a valid integer" in lines
    assert f"{path}: unknown table 'optimiser'; did you mean 'optimizer'?" in lines
    assert f"{path} [data] val_split: got 1.5, expected less than 1" in lines
    assert f"{path} [data]: key 'warmup' belongs in the table [schedule]" in lines
    assert len(lines) == 5


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("drive", ["C", "c"])
@pytest.mark.parametrize("folder", ["Users", "data", "new", "texts", "x"])
def test_windows_path_in_double_quotes_is_explained(tmp_path, folder, drive, extended):
    """Its backslashes are escapes in TOML: the message says how to write it, whether they are valid ones or not.

    It names the file that has the path, also where another one extends it.
    """
    path = write(tmp_path / "windows.toml", f'[data]\ncorpus = "{drive}:\\{folder}\\new.txt"\n')
    child = write(tmp_path / "child.toml", 'extends = "windows.toml"\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe(child if extended else path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("; write a Windows path in single quotes, or with /")
    good = write(tmp_path / "good.toml", f"[data]\ncorpus = 'C:\\{folder}\\new.txt'\n")
    assert load_recipe(good).data.corpus == f"C:\\{folder}\\new.txt"


def test_windows_path_of_an_output_is_explained(tmp_path):
    """It is no path that is read, and its backslash is an escape all the same."""
    path = write(tmp_path / "windows.toml", '[checkpoint]\noutput = "C:\\new"\n')
    with pytest.raises(RecipeError, match=r"output: got 'C:\\new', whose backslash is an escape"):
        load_recipe(path)


def test_other_broken_toml_has_no_hint_on_paths(tmp_path):
    """Nor where only another line has a backslash."""
    path = write(tmp_path / "bad.toml", "[data]\ncorpus = 'C:\\new.txt'\nval_split =\n")
    with pytest.raises(RecipeError, match=r"not valid TOML: [^;]*$"):
        load_recipe(path)


def test_mistake_in_a_parent_names_the_parent(tmp_path):
    """The file to correct is the one that holds the mistake."""
    parent = write(tmp_path / "parent.toml", "[train]\nsteps = -1")
    child = write(tmp_path / "child.toml", 'extends = "parent.toml"')
    with pytest.raises(RecipeError, match=r"parent\.toml \[train\] steps: got -1"):
        load_recipe(child)
    assert parent.exists()


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"warmup": 11, "steps": 10}, "warmup"),
        ({"val_every": 5}, "val_every"),
        ({"log_val_stderr": True}, "log_val_stderr"),
        ({"num_heads": 3}, "num_heads"),
        ({"seq_len": 65}, "seq_len"),
        ({"micro_batch_size": 3}, "micro_batch_size"),
        ({"min_lr": 1e-4}, "min_lr"),
        ({"min_lr": 1e-2, "schedule": "linear"}, "min_lr"),
        ({"eps": 9e-12, "reduction": "exact"}, "eps"),
        ({"wsd_decay": 3}, "wsd_decay"),
        ({"wsd_decay": 5, "schedule": "wsd", "warmup": 6, "steps": 10}, "wsd_decay"),
        ({"deterministic": False, "reduction": "exact"}, "deterministic"),
        ({"matmul": "onednn", "precision": "bf16"}, "matmul"),
        ({"val_split": 0.1, "val_corpus": "other.txt"}, "val_split"),
        ({"hold_out": "pieces", "val_corpus": "other.txt"}, "hold_out"),
        ({"patience": 2, "val_split": 0.1, "val_every": 5, "sampling": "shared-stream"}, "patience"),
        ({"expected_loss": ((5, 2.0, 0.1), (3, 2.1, 0.1)), "expected_seeds": 3}, "expected_loss"),
        ({"expected_val": (), "expected_seeds": 3}, "expected_val"),
        ({"expected_loss": ((5, 2.0, 0.1),)}, "expected_seeds"),
    ],
)
def test_relations_between_keys_are_checked(keys, key):
    """Each relation names the key to change, in the table where it stands."""
    with pytest.raises(RecipeError, match=rf"^here \[{TABLE_OF_KEY[key]}\] {key}: got "):
        check_recipe(Recipe.of(**keys), source="here")


def test_relations_between_keys_include_their_ends():
    """Warmup and decay may take all steps, a window all positions; the last rate may be the first."""
    check_recipe(Recipe.of(schedule="wsd", warmup=5, wsd_decay=5, steps=10, seq_len=32, max_seq_len=32))
    check_recipe(Recipe.of(schedule="cosine", warmup=10, steps=10, lr=1e-3, min_lr=1e-3))


def test_exact_sums_need_an_eps_above_their_rounding():
    """A gradient that rounds to zero would have moved a weight by less than a twentieth of the rate."""
    with pytest.raises(RecipeError) as caught:
        check_recipe(Recipe.of(eps=1e-12, reduction="exact"), source="here")
    assert str(caught.value) == (
        'here [optimizer] eps: got 1e-12, expected at least 1e-11 with reduction = "exact", which rounds gradients to '
        'multiples of 2**-40, about 1e-12; raise eps, or use reduction = "fast"'
    )
    check_recipe(Recipe.of(eps=MIN_EXACT_EPS, reduction="exact"))
    with pytest.raises(RecipeError, match="deterministic: got false, expected true with reduction"):
        check_recipe(Recipe.of(deterministic=False, reduction="exact"))
    check_recipe(Recipe.of(eps=1e-12, reduction="fast"))
    largest_lost = 0.5 / SCALE
    assert largest_lost / (largest_lost + MIN_EXACT_EPS) < 1 / 20


def test_plain_recipe_has_no_broken_relation():
    """The defaults are a valid run."""
    check_recipe(Recipe())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-1.0", '"1e-3"'])
def test_rates_are_finite_numbers(tmp_path, value):
    """TOML has nan and inf, and reads 1e400 as inf; a rate does not."""
    with pytest.raises(RecipeError, match=r"\[optimizer\] lr: got .*, expected"):
        load_recipe(write(tmp_path / "bad.toml", f"[optimizer]\nlr = {value}"))


def test_recipes_are_immutable():
    """A run cannot change its own recipe."""
    with pytest.raises(ValueError, match="frozen"):
        Recipe().train.steps = 3


def test_schema_knows_every_key():
    """Editors complete and check every key, and extends."""
    schema = json.loads(recipe_schema())
    assert set(schema["properties"]) == {*Recipe.model_fields, "extends"}
    assert schema["additionalProperties"] is False
    assert set(schema["$defs"]["TrainTable"]["properties"]) == set(type(Recipe().train).model_fields)


def test_folder_in_the_place_of_a_recipe_is_named(tmp_path):
    """As a run directory, for its recipe.toml."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path)
    assert str(caught.value) == f"{tmp_path}: not a regular file; expected a recipe in TOML"


def test_empty_path_is_a_mistake():
    """The message says what was expected, without the words that a library puts before it."""
    with pytest.raises(RecipeError) as caught:
        Recipe.of(corpus="")
    assert str(caught.value).endswith("corpus: got '', expected at least 1 character")


@pytest.mark.parametrize(("resume", "minutes"), [("auto", 5), ("never", 5), ("run/step-000004", None)])
def test_expected_minutes_are_those_of_a_run_from_its_beginning(resume, minutes):
    """A run that begins with a checkpoint takes less."""
    recipe = lay_over(Recipe.of(expected_minutes=5), {"resume": resume})
    assert recipe.expected.expected_minutes == minutes
