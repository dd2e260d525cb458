"""Command-line flags: one for every recipe key, and one for every other option of a command."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Callable, Container
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mygpt.errors import MygptError, RecipeError
from mygpt.recipe.files import RECIPE_FILE, RUN_FILE, load_recipe, shipped_recipes, with_own_output
from mygpt.recipe.names import KEY_OF_FOREIGN_NAME, NOTES, closest, unit_note
from mygpt.recipe.tables import (
    NAMED_CORPORA,
    SEED_KEYS,
    STUDY_KEYS,
    TABLE_OF_KEY,
    Recipe,
    build_recipe,
    check_recipe,
    lay_over,
    seed_keys,
)

TARGET_HELP = "A recipe, a shipped recipe's name, or a text to train on with the plain run's settings."
SEED_HELP = "Sets init_seed and data_seed, for a run that differs only by chance."


def parse_recipe(arguments: list[str], prog: str, options: type | None = None) -> tuple[Recipe, Any]:
    """The recipe that the arguments give: a recipe or text file, with flags laid over it.

    `options` is a dataclass of further flags; an instance of it is returned beside the recipe.

    Raises:
        MygptError: the recipe or a flag cannot be used.
        SystemExit: help was asked for, and has been printed.
    """
    arguments = _spell_output(arguments, TABLE_OF_KEY)
    # The recipe's values are the defaults of the flags, so it must be loaded before the flags are parsed.
    has_target_first = bool(arguments) and not arguments[0].startswith("-")
    target = arguments[0] if has_target_first else _parse_flags(arguments, prog, Recipe(), options).target
    loaded = load_target(target)
    flags = _parse_flags(arguments, prog, loaded, options)
    recipe = _lay_over(loaded, flags, arguments, source=target)
    recipe = with_own_output(target, loaded, recipe, keys_given(arguments) | SEED_KEYS)
    return recipe, getattr(flags, "run", None)


def parse_changes(arguments: list[str], prog: str, options: type, load: Callable[[Any], Recipe]) -> tuple[Recipe, Any]:
    """The recipe that `load` finds by an instance of the dataclass `options`, with flags laid over it; and that.

    The fields of `options` are what else is on the command line. Raises as `parse_recipe` does.
    """
    arguments = _spell_output(arguments, TABLE_OF_KEY)
    loaded = load(_parse_flags(arguments, prog, Recipe(), options, has_target=False).run)
    flags = _parse_flags(arguments, prog, loaded, options, has_target=False)
    return _lay_over(loaded, flags, arguments, source="recipe"), flags.run


def _lay_over(loaded: Recipe, flags: Any, arguments: list[str], source: str) -> Recipe:
    """The loaded recipe with the values of the parsed flags, checked."""
    given = keys_given(arguments)
    keys = {key: vars(getattr(flags, TABLE_OF_KEY[key]))[key] for key in given}
    if flags.seed is not None:
        for key in SEED_KEYS:
            if key in given:
                raise MygptError(f"--seed sets {key}, too; give --seed alone, or --init-seed and --data-seed")
        keys |= seed_keys(flags.seed, "--seed")
    recipe = lay_over(loaded, keys)
    check_recipe(recipe, source=source)
    return recipe


def keys_given(arguments: list[str]) -> set[str]:
    """The recipe keys for which there is a flag of their own among the arguments."""
    flags = (argument.split("=")[0] for argument in _spell_output(arguments, TABLE_OF_KEY))
    names = {flag.removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}
    return {name.removeprefix("no_") if name not in TABLE_OF_KEY else name for name in names} & TABLE_OF_KEY.keys()


def load_target(target: str) -> Recipe:
    """A recipe file or a shipped recipe by its name; otherwise the plain run on a text file or a named corpus.

    Raises:
        RecipeError: the recipe cannot be used.
    """
    recipes = shipped_recipes()
    if target.lower().endswith(".toml") or target in recipes:
        return load_recipe(target)
    is_bare_name = os.path.splitext(os.path.basename(target))[0] == target
    close = difflib.get_close_matches(target, recipes, n=1) if is_bare_name else []
    if is_bare_name and target not in NAMED_CORPORA and not os.path.lexists(target):
        known = f"expected a recipe (one of {', '.join(recipes)}), a text or one of {', '.join(NAMED_CORPORA)}"
        raise RecipeError(f"{target}: no such recipe or text; {f'did you mean {close[0]!r}?' if close else known}")
    if target not in NAMED_CORPORA:
        _check_is_no_run(Path(target))
    return build_recipe({"data": {"corpus": target}, "checkpoint": {"output": f"checkpoints/{Path(target).stem}"}})


def _check_is_no_run(target: Path) -> None:
    """Say what to do with a run or one of its checkpoints, which are neither recipes nor texts.

    Raises:
        RecipeError: the target is one.
    """
    folders = (target, target.parent, target.parent.parent)
    run = next((folder for folder in folders if os.path.lexists(folder / RUN_FILE)), None)
    is_named = target.name in ("best", "latest") or target.suffix in (".safetensors", ".json", ".jsonl")
    is_prepared = os.path.lexists(target / "manifest.json")
    of_many = next(target.glob(f"*/{RUN_FILE}"), None) if os.path.isdir(target) and not is_prepared else None
    if run is None and of_many:
        way = f"`mygpt train {of_many.with_name(RECIPE_FILE)}` continues one of them"
        raise RecipeError(f"{target}: a folder of runs, not a recipe; {way}")
    if run is None or not (os.path.isdir(target) or is_named):
        return
    if run == target:
        way = f"`mygpt train {run / RECIPE_FILE}` continues it, with --steps for more steps"
        raise RecipeError(f"{target}: a run, not a recipe; {way}")
    way = f"`mygpt train {run / RECIPE_FILE}` continues the run, and --init-from {target} trains its weights on"
    kind = "a file of a run" if target.suffix in (".json", ".jsonl") else "a checkpoint"
    raise RecipeError(f"{target}: {kind}, not a recipe; {way}")


def parse_command(kind: type, arguments: list[str], prog: str, description: str) -> Any:
    """As `parse_options`, for a command whose flags are not those of a recipe."""
    names = _names_of(kind)
    arguments = _spell_output(arguments, names)
    _check_names(arguments, prog, names)
    return parse_options(kind, arguments, prog, description)


def parse_options(kind: type, arguments: list[str], prog: str, description: str) -> Any:
    """An instance of the dataclass `kind` from flags.

    Raises:
        MygptError: a flag cannot be used; with tyro's explanation on one line.
        SystemExit: help was asked for, and has been printed.
    """
    box = io.StringIO()  # in which tyro draws its explanation
    try:
        with contextlib.redirect_stderr(box):
            settings = (tyro.conf.OmitArgPrefixes,)
            return tyro.cli(kind, args=arguments, prog=prog, description=description, config=settings)
    except SystemExit as stop:
        if not stop.code:
            raise
    # The first line is the box's title; lines of dashes separate its paragraphs.
    paragraphs = re.split(r"\n\W*\n", "\n".join(box.getvalue().splitlines()[1:]))
    raise MygptError("; ".join(" ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split()) for text in paragraphs))


def _parse_flags(
    arguments: list[str], prog: str, recipe: Recipe, options: type | None, *, has_target: bool = True
) -> Any:
    """Parse the target if there is to be one, --seed, the further `options` and one flag per recipe key.

    The result has an attribute for each table, which holds the table's keys. Flags have the plain types of the keys:
    the recipe checks the values, so that files and flags get the same messages.
    """
    _check_names(arguments, prog, {*TABLE_OF_KEY, "seed", *(_names_of(options) if options else ())})
    target = ("target", _explained(tyro.conf.Positional[str], TARGET_HELP, metavar="RECIPE|TEXT"), field())
    further = field(default_factory=options) if options and has_target else field()
    fields: list[tuple[str, Any, Any]] = [
        *([target] if has_target else []),
        *([("run", options, further)] if options else []),
        ("seed", _explained(int | None, SEED_HELP), field(default=None)),
    ]
    for name, table in recipe:
        keys = [
            (key, _explained(info.annotation, info.description or ""), field(default=getattr(table, key)))
            for key, info in type(table).model_fields.items()
        ]
        flags = make_dataclass(name, keys, namespace={"__doc__": type(table).__doc__})
        fields.append((name, flags, field(default_factory=flags)))
    return parse_options(make_dataclass("Command", fields), arguments, prog, "Every key of the recipe is a flag.")


def _check_names(arguments: list[str], prog: str, names: set[str]) -> None:
    """Check that all flags have one of the `names`, before tyro does, which knows no names of other programs.

    Raises:
        MygptError: one is not; with what may have been meant.
    """
    flags = [argument.split("=")[0] for argument in arguments]
    for flag in (flag for flag in flags if re.fullmatch(r"--(?!tyro-)[a-z][\w-]*", flag)):
        name = flag.removeprefix("--").replace("-", "_")
        if not {name, name.removeprefix("no_")} & {*names, "help"}:
            hint = f"`{prog} --help` lists all"
            key = KEY_OF_FOREIGN_NAME.get(name, name)
            if "set" in names and key in TABLE_OF_KEY.keys() - STUDY_KEYS:
                hint = f"give the values of a recipe's key with --set {key}=VALUE,VALUE{unit_note(name)}"
            elif name in NOTES:
                hint = NOTES[name]
            elif close := closest(name, names):
                hint = f"did you mean --{close.replace('_', '-')}{unit_note(name)}?"
            raise MygptError(f"unknown flag {flag}; {hint}")


def _names_of(options: type) -> set[str]:
    """The names of the flags that a dataclass stands for."""
    return {option.name for option in dataclasses.fields(options)}


def _spell_output(arguments: list[str], names: Container[str]) -> list[str]:
    """The arguments with --out and --output, which mean one thing, spelled as in `names`."""
    for own, other in (("out", "output"), ("output", "out")):
        if own in names and other not in names:
            return [re.sub(rf"^--{other}(?==|$)", f"--{own}", argument) for argument in arguments]
    return arguments


def _explained(kind: Any, text: str, **settings: Any) -> Any:
    """A flag's type with its help text."""
    return Annotated[kind, tyro.conf.arg(help=" ".join(text.split()), **settings)]
