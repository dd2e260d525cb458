"""Recipes: the TOML tables as frozen models, how they are read, checked and written.

A recipe file has the tables below; every key is unique across them, so each is also a flag of `mygpt train`
(`val_split` is `--val-split`). A key that is left out has the default given here, and the defaults together are
the plain run: constant rate, no held-out text, no clipping. `extends = "other.toml"` starts from another recipe.
"""

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from mygpt.errors import RecipeError
from mygpt.recipe.tables import NAMED_CORPORA, Recipe, _show, build_recipe

RECIPE_FILE = "recipe.toml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
"""A recipe of that name beside one of the others is the record of the run in its directory."""


MAX_EXTENDS = 20
"""Recipes in one chain of `extends`."""


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file, or a shipped recipe by its bare name ("hardened").

    Unknown keys, wrong types and values out of range are all reported at once. Relations between keys are not
    looked at, since flags may still change them: see `check_recipe`.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or holds anything that a recipe may not.
    """
    path = shipped_recipes().get(str(path), Path(path))
    if path.is_symlink() and _is_of_a_run(target := Path(os.path.realpath(path))):
        path = target
    tables = _read_with_parents(path, ())
    output = str(path.parent) if _is_of_a_run(path) else f"checkpoints/{path.stem}"
    tables["checkpoint"] = {"output": output} | tables.get("checkpoint", {})
    return build_recipe(tables, source=str(path))


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with mygpt, by bare name: those of the wheel, else of the source checkout."""
    package = Path(__file__).parents[1]
    folder = next((path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.toml"))} if folder else {}


def recipe_schema() -> str:
    """The recipe's JSON Schema, which editors use to complete and check recipe files."""
    schema = Recipe.model_json_schema()
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Another recipe to start from: a path relative to this file, or a shipped recipe's name.",
    }
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=2) + "\n"


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    """The tables of a recipe file laid over those of the recipes that it extends; each file is checked alone."""
    document = _read_toml(path)
    parent = document.pop("extends", None)
    build_recipe(document, source=str(path))
    if _is_of_a_run(path):
        # A run's output is where its recipe.toml lies now: a copy, or a recipe that extends it, has another.
        document.get("checkpoint", {}).pop("output", None)
        if children:
            document.get("checkpoint", {}).pop("resume", None)  # an extending recipe is a new run
    corpus = document.get("data", {}).get("corpus", NAMED_CORPORA[0])
    if corpus not in NAMED_CORPORA and os.path.isfile(path.parent / corpus):
        document["data"]["corpus"] = str(path.parent / corpus)
    if parent is None:
        return document
    parent_path = shipped_recipes().get(parent, path.parent / parent) if isinstance(parent, str) else None
    if parent_path is None or not parent_path.is_file():
        raise RecipeError(f"{path}: extends: got {_show(parent)}, expected the path of a recipe, {_recipe_names()}")
    # Compared as files, so that a circle is found through links, too.
    chain = (*children, path)
    if any(parent_path.samefile(child) for child in chain):
        names = " -> ".join(child.name for child in (*chain, parent_path))
        raise RecipeError(f"{path}: extends goes in a circle: {names}")
    if len(chain) == MAX_EXTENDS:
        raise RecipeError(f"{path}: extends goes deeper than {MAX_EXTENDS} recipes")
    tables = _read_with_parents(parent_path, chain)
    return {name: tables.get(name, {}) | document.get(name, {}) for name in {**tables, **document}}


def _is_of_a_run(path: Path) -> bool:
    """Whether a recipe file is the record of a run, also of one that has lost some of its other files."""
    return path.name == RECIPE_FILE and any(os.path.lexists(path.parent / name) for name in (RUN_FILE, METRICS_FILE))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"{path}: not a regular file; expected a recipe in TOML")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; expected a TOML file, {_recipe_names()}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error.strerror}") from None
    if raw.startswith(b"\xef\xbb\xbf"):
        raise RecipeError(f"{path}: starts with a byte order mark, which TOML does not allow; save it without one")
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply; a recipe has tables of plain values") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise RecipeError(f"{path}: not valid TOML: {error}") from None


def _recipe_names() -> str:
    return f"or one of: {', '.join(shipped_recipes())}"
