"""Every recipe key as a command-line flag; and flags of a dataclass's own, as the commands have them."""

import contextlib
import difflib
import io
import os
import re
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mygpt.errors import MygptError, RecipeError
from mygpt.recipe.files import load_recipe, shipped_recipes
from mygpt.recipe.tables import Recipe, build_recipe, check_recipe


def parse_recipe(arguments: list[str], prog: str, options: type | None = None) -> tuple[Recipe, Any]:
    """The recipe that the arguments mean: a recipe or text file, with flags laid over it.

    `options` is a dataclass of further flags; returns them beside the recipe.

    Raises:
        MygptError: the recipe or a flag cannot be used.
        SystemExit: help was asked for, and has been printed.
    """

    # The flags' defaults are the recipe's own values, so it has to be known before flags are read.
    has_target_first = bool(arguments) and not arguments[0].startswith("-")
    target = arguments[0] if has_target_first else _parse_flags(arguments, prog, Recipe(), options).target
    flags = _parse_flags(arguments, prog, load_target(target), options)
    tables = {name: vars(getattr(flags, name)) for name in Recipe.model_fields}
    if flags.seed is not None:
        for key in ("init_seed", "data_seed"):
            if any(argument.split("=")[0].replace("_", "-") == f"--{key}".replace("_", "-") for argument in arguments):
                raise MygptError(f"--seed sets {key}, too; give --seed alone, or --init-seed and --data-seed")
            tables["train"][key] = flags.seed
    recipe = build_recipe(tables)
    check_recipe(recipe, source=target)
    return recipe, getattr(flags, "run", None)


def load_target(target: str) -> Recipe:
    """A recipe file or a shipped recipe's name; else the plain run on a text file or a named corpus.

    Raises:
        RecipeError: the recipe cannot be used.
    """
    recipes = shipped_recipes()
    if target.endswith(".toml") or target in recipes:
        return load_recipe(target)
    close = difflib.get_close_matches(target, recipes, n=1)
    if close and not os.path.exists(target):
        raise RecipeError(f"{target}: no such recipe or text; did you mean '{close[0]}'?")
    return build_recipe({"data": {"corpus": target}, "checkpoint": {"output": f"checkpoints/{Path(target).stem}"}})


def _parse_flags(arguments: list[str], prog: str, recipe: Recipe, options: type | None) -> Any:
    """Parse with one flag per recipe key; each table comes back as an attribute that holds its keys.

    The flags have the keys' plain types: the recipe itself judges the values, for files and flags alike.
    """
    fields: list[tuple[str, Any, Any]] = [
        (
            "target",
            Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE|TEXT", help=TARGET_HELP)],
            field(),
        )
    ]
    if options is not None:
        fields.append(("run", options, field(default_factory=options)))
    fields.append(("seed", Annotated[int | None, tyro.conf.arg(help=SEED_HELP)], field(default=None)))
    for name, recipe_table in recipe:
        keys = []
        for key, info in type(recipe_table).model_fields.items():
            text = " ".join((info.description or "").split())
            kind: Any = info.annotation
            value = getattr(recipe_table, key)
            keys.append((key, Annotated[kind, tyro.conf.arg(help=text)], field(default=value)))
        flags = make_dataclass(name, keys)
        flags.__doc__ = type(recipe_table).__doc__
        fields.append((name, flags, field(default_factory=flags)))
    return parse_options(make_dataclass("Command", fields), arguments, prog, "Every key of the recipe is a flag.")


SEED_HELP = "Sets init_seed and data_seed, for a run that differs in chance alone."
TARGET_HELP = "A recipe, a shipped recipe's name, or a text to train on with the plain run's settings."


def parse_options(kind: type, arguments: list[str], prog: str, description: str) -> Any:
    """An instance of `kind` from flags.

    Raises:
        MygptError: with tyro's explanation, which it draws in a box, on one line.
        SystemExit: help was asked for, and has been printed.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                kind, args=arguments, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    # The first line is the box's title; lines of dashes part its paragraphs.
    paragraphs = re.split(r"\n\W*\n", "\n".join(box.getvalue().splitlines()[1:]))
    raise MygptError("; ".join(" ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split()) for text in paragraphs))
