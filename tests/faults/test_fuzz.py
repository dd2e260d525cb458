"""Any recipe document and any damaged file load, or give a MygptError, never a traceback."""

import contextlib
import shutil

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import fit_manifest
from support.runs import TINY

from mygpt.checks.compare import compare
from mygpt.errors import MygptError, RecipeError
from mygpt.recipe.files import load_recipe
from mygpt.recipe.tables import TABLE_OF_KEY, Recipe, check_recipe
from mygpt.runs.loading import load_checkpoint
from mygpt.training.train import train

KEYS = st.sampled_from([*TABLE_OF_KEY, *Recipe.model_fields, "extends"]) | st.text(max_size=8)
VALUES = st.recursive(
    st.integers() | st.floats() | st.booleans() | st.text(max_size=20) | st.dates() | st.just("cosine"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
MANY = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path, content: bytes):
    path.write_bytes(content)
    with contextlib.suppress(RecipeError):
        recipe = load_recipe(path)
        assert isinstance(recipe, Recipe)
        check_recipe(recipe)


@MANY
@given(document=st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=6), max_size=6))
def test_any_toml_document_is_a_recipe_or_an_error(tmp_path, document):
    """Known and unknown tables and keys, with values of every type."""
    read(tmp_path / "any.toml", tomli_w.dumps(document).encode("utf-8", "surrogatepass"))


@MANY
@given(
    content=st.binary(max_size=200)
    | st.text(alphabet="[]{}=\"'\\\n.,#eE+-_0123456789truefalsx\u0000", max_size=80).map(str.encode)
)
def test_any_bytes_are_a_recipe_or_an_error(tmp_path, content):
    """Also bytes that are not TOML."""
    read(tmp_path / "any.toml", content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, text_file):
    """A run with checkpoints at steps 2 and 4."""
    run = tmp_path_factory.mktemp("fuzz") / "saved"
    train(Recipe.of(**TINY | {"corpus": str(text_file), "output": str(run), "save_every": 2}), last_step=4)
    return run


FILES = [
    *("run.json", "recipe.toml", "metrics.jsonl", "timing.jsonl", "latest"),
    *(f"step-000004/{name}" for name in ("model.safetensors", "state.safetensors", "manifest.json")),
]


@st.composite
def damages(draw):
    """A function from a file's bytes to damaged ones."""
    place, length = draw(st.integers(0, 2**32)), draw(st.integers(0, 64))
    patch = draw(st.binary(max_size=64) | st.sampled_from([b"-1", b"null", b"[]", b"{}", b"1e999", b'""', b"9" * 30]))

    def damage(raw):
        # Half of the places are near the start, where headers are.
        at = place % (len(raw) + 1) if place % 2 else place % 400
        return raw[:at] + patch + raw[at + length :]

    return damage


@settings(MANY, max_examples=40)
@given(name=st.sampled_from(FILES), damage=damages(), rehash=st.booleans())
def test_any_damaged_file_loads_or_is_an_error(saved, text_file, tmp_path, name, damage, rehash):
    """Loading, comparing and continuing; also where the manifest has the damaged file's hash."""
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(saved, run)
    file = run / name
    file.write_bytes(damage(file.read_bytes()))
    if rehash and name.endswith(".safetensors"):
        fit_manifest(file)
    recipe = Recipe.of(**TINY | {"corpus": str(text_file), "output": str(run), "save_every": 2})
    for job in (lambda: load_checkpoint(run), lambda: compare(run, saved), lambda: train(recipe)):
        with contextlib.suppress(MygptError):
            job()
