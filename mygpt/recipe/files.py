"""Recipe files: how they are found and read, what `extends` means, and their JSON Schema."""

import json
import os
import re
import tomllib
from collections.abc import Set
from pathlib import Path
from typing import Any

from mygpt.errors import RecipeError
from mygpt.recipe.names import named_after
from mygpt.recipe.reading import decode_utf8, read_file
from mygpt.recipe.tables import (
    NAMED_CORPORA,
    PATH_KEYS,
    TABLE_OF_KEY,
    UNNAMED_KEYS,
    Recipe,
    build_recipe,
    refinements_to_drop,
    show_value,
)

RECIPE_FILE = "recipe.toml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
"""A recipe.toml beside one of the two other files is the record of the run in its directory."""

WINDOWS_PATH = "; write a Windows path in single quotes, or with /"

MAX_EXTENDS = 20
"""Recipes in one chain of `extends`."""


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file, or a shipped recipe by its bare name ("hardened").

    Unknown keys, wrong types and values out of range are all reported at once. Relations between keys are not
    checked, since flags may still change them: see `check_recipe`.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or holds something that a recipe may not.
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


def with_own_output(target: str, loaded: Recipe, recipe: Recipe, given: Set[str]) -> Recipe:
    """The recipe with an output named after its changes, if it is a shipped one in which `given` keys change numbers.

    So it does not collide with the run of the recipe as it is. `loaded` is that recipe.
    """
    shipped = shipped_recipes()
    real = os.path.realpath(shipped.get(target, target))
    if "output" in given or real not in map(os.path.realpath, shipped.values()):
        return recipe
    output = loaded.checkpoint.output
    return recipe.replace(output=named_after(output, loaded.flat(), recipe.flat(), given - UNNAMED_KEYS))


def recipe_schema() -> str:
    """The recipe's JSON Schema, which editors use to complete and check recipe files."""
    schema = Recipe.model_json_schema()
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Another recipe to start from: a path relative to this file, or a shipped recipe's name.",
    }
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    """The tables of a recipe file laid over those of the recipe that it extends; each file is checked alone.

    `children` are the recipes that led here by `extends`.
    """
    document = _read_toml(path)
    parent = document.pop("extends", None)
    build_recipe(document, source=str(path))
    if _is_of_a_run(path):
        # Its output is its directory, wherever that is now. A recipe that extends it starts a new run elsewhere.
        for key in ("output", "resume") if children else ("output",):
            document.get("checkpoint", {}).pop(key, None)
    for key in (*PATH_KEYS, "output"):
        table = document.get(TABLE_OF_KEY[key], {})
        if re.match(r"[A-Za-z]:[\b\f\n\r\t]", table.get(key) or ""):
            raise RecipeError(
                f"{path}: {key}: got {show_value(table[key])}, whose backslash is an escape{WINDOWS_PATH}"
            )
    for key in PATH_KEYS:
        table = document.get(TABLE_OF_KEY[key], {})
        if key in table and table[key] not in NAMED_CORPORA and os.path.exists(path.parent / table[key]):
            table[key] = str(path.parent / table[key])
    if parent is None:
        return document
    parent_path = shipped_recipes().get(parent, path.parent / parent) if isinstance(parent, str) else None
    if parent_path is None or not parent_path.is_file():
        expected = f"the path of a recipe, {_or_shipped()}"
        raise RecipeError(f"{path}: extends: got {show_value(parent)}, expected {expected}")
    chain = (*children, path)
    if any(parent_path.samefile(child) for child in chain):  # also through links
        names = " -> ".join(child.name for child in (*chain, parent_path))
        raise RecipeError(f"{path}: extends goes in a circle: {names}")
    if len(chain) == MAX_EXTENDS:
        raise RecipeError(f"{path}: extends goes deeper than {MAX_EXTENDS} recipes")
    tables = _read_with_parents(parent_path, chain)
    tables.pop("expected", None)  # of the parent as it stands
    given = {key: value for table in document.values() for key, value in table.items()}
    for key in refinements_to_drop(given):
        tables.get(TABLE_OF_KEY[key], {}).pop(key, None)
    return {name: tables.get(name, {}) | document.get(name, {}) for name in {**tables, **document}}


def _is_of_a_run(path: Path) -> bool:
    """Whether a recipe file is the record of a run, even one that has lost some of its other files."""
    return path.name == RECIPE_FILE and any(os.path.lexists(path.parent / name) for name in (RUN_FILE, METRICS_FILE))


def _read_toml(path: Path) -> dict[str, Any]:
    raw = read_file(
        path,
        RecipeError,
        expected="a recipe in TOML",
        missing=f"no such recipe; expected a TOML file, {_or_shipped()}",
        unreadable="cannot be read as a recipe",
    )
    if raw.startswith(b"\xef\xbb\xbf"):
        raise RecipeError(f"{path}: starts with a byte order mark, which TOML does not allow; save it without one")
    text = decode_utf8(raw, path, RecipeError)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply; a recipe has tables of plain values") from None
    except ValueError as error:  # not TOML, or an integer of more digits than Python converts
        line = re.search(r"at line (\d+)", str(error))
        has_backslash = line and "\\" in text.split("\n")[int(line[1]) - 1]
        raise RecipeError(f"{path}: not valid TOML: {error}{WINDOWS_PATH if has_backslash else ''}") from None


def _or_shipped() -> str:
    return f"or one of: {', '.join(shipped_recipes())}"
