"""Command-line flags: one for every recipe key, and one for every other option of a command."""

import argparse
import difflib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, NoReturn, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from mygpt.errors import MygptError, RecipeError
from mygpt.recipe.files import RECIPE_FILE, RUN_FILE, load_recipe, shipped_recipes, with_own_output
from mygpt.recipe.names import KEY_OF_FOREIGN_NAME, NOTES, closest, unit_note
from mygpt.recipe.tables import (
    NAMED_CORPORA,
    SEED_KEYS,
    STUDY_KEYS,
    TABLE_OF_KEY,
    Recipe,
    Table,
    build_recipe,
    check_recipe,
    describe_problem,
    lay_over,
    seed_keys,
)

MAX_WIDTH = 100
"""Columns of help."""

TABLES = {name: type(info.default) for name, info in Recipe.model_fields.items()}
SAME_FLAGS = {"out": ("--out", "--output"), "output": ("--output", "--out")}


class Positional(str):
    """Annotates a field that is given without a flag, with what stands for it in help."""


class Repeated(str):
    """Annotates a tuple whose flag adds one value each time it is given, with what stands for the value in help."""


class SeedOptions(Table):
    seed: int | None = None
    """Sets init_seed and data_seed, for a run that differs only by chance."""


class RecipeOptions(SeedOptions):
    target: Annotated[str, Positional("RECIPE|TEXT")]
    """A recipe, a shipped recipe's name, or a text to train on with the plain run's settings."""


def parse_recipe(arguments: list[str], prog: str, options: type[RecipeOptions] = RecipeOptions) -> tuple[Recipe, Any]:
    """The recipe that the arguments give, a recipe or text file with flags laid over it; and an instance of `options`.

    Raises as `parse_options` does, and if the recipe cannot be used.
    """
    recipe, chosen, _ = parse_changes(arguments, prog, options, lambda chosen: load_target(chosen.target))
    return recipe, chosen


def parse_changes(
    arguments: list[str], prog: str, options: type[SeedOptions], load: Callable[[Any], Recipe]
) -> tuple[Recipe, Any, set[str]]:
    """The recipe that `load` finds by an instance of `options`, with flags laid over it; the instance; the keys given.

    Raises as `parse_recipe` does.
    """
    chosen, loaded, keys = parse_options(arguments, prog, options, "Every key of the recipe is a flag.", TABLES, load)
    given = set(keys)
    if chosen.seed is not None:
        if both := sorted(given & SEED_KEYS):
            raise MygptError(f"--seed sets {both[0]}, too; give --seed alone, or --init-seed and --data-seed")
        keys |= seed_keys(chosen.seed, "--seed")
    recipe, target = lay_over(loaded, keys), getattr(chosen, "target", None)
    check_recipe(recipe, source=target or "recipe")
    return with_own_output(target, loaded, recipe, keys.keys()) if target else recipe, chosen, given


def parse_options(
    arguments: list[str],
    prog: str,
    options: type[Table],
    about: str,
    tables: Mapping[str, type[Table]] = {},
    load: Callable[[Any], Recipe] = lambda _: Recipe(),
) -> tuple[Any, Recipe, dict[str, Any]]:
    """An instance of `options`; the recipe that `load` finds by it; and the values that are given for keys of `tables`.

    A value that has not the type of its key is left as it was given, for the recipe to refuse. `about` begins the help,
    in which the recipe's values are the defaults.

    Raises:
        MygptError: a flag is unknown, or something is missing or has a value that it may not have.
        SystemExit: help was asked for, and has been printed.
    """
    words = list[str]()
    for word in arguments:
        if words and re.fullmatch(r"--[^=]+", words[-1]) and re.match(r"-\.?\d", word):
            words[-1] += f"={word}"  # argparse takes -1e-3 for a flag
        else:
            words.append(re.sub(r"^--[a-zA-Z][\w-]*(?==|$)", lambda flag: flag[0].replace("_", "-"), word))
    namespace, rest = _build_parser(prog, options, about, tables).parse_known_intermixed_args(words)
    given, own = vars(namespace), _fields_of(options)
    fields = own | {name: info for table in tables.values() for name, info in table.model_fields.items()}
    if unknown := [word for word in rest if word.startswith("-")]:
        raise MygptError(f"unknown flag {unknown[0].split('=')[0]}; {_hint(unknown[0].split('=')[0], prog, fields)}")
    if rest:
        raise MygptError(f"unexpected argument {rest[0]!r}; usage: {_usage(prog, options)}")
    wants_help = given.pop("help", False)
    values = {name: _typed(value, fields[name].annotation) for name, value in given.items()}
    chosen = {name: values.pop(name) for name in own if name in values}
    if wants_help:
        recipe = Recipe()
        with suppress(MygptError, ValidationError):
            recipe = load(options.model_validate(chosen))
        _build_parser(prog, options, about, tables, recipe.flat()).print_help()
        raise SystemExit(0)
    try:
        instance = options.model_validate(chosen)
    except ValidationError as error:
        problems = {str(problem["loc"][0]): problem for problem in error.errors()}
        shown = {name: _marked(own[name], Positional) or _flag(name) for name in problems}
        if missing := [shown[name] for name in problems if problems[name]["type"] == "missing"]:
            usage = f"usage: {_usage(prog, options)}; `{prog} --help` tells more"
            raise MygptError(f"{' and '.join(missing)} missing; {usage}") from None
        lines = (f"{shown[name]}: {describe_problem(problem)}" for name, problem in problems.items())
        raise MygptError("\n".join(lines)) from None
    return instance, load(instance), values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if "ignored explicit argument" in message:
            flag = message.partition(":")[0]
            raise MygptError(f"{flag}: takes no value; expected {flag} or --no-{flag.removeprefix('--')}")
        way = "; a value that begins with a dash is given as --FLAG=VALUE" if "expected" in message else ""
        raise MygptError(f"{message}{way}")


def _build_parser(
    prog: str, options: type[Table], about: str, tables: Mapping[str, type[Table]], values: Mapping[str, Any] = {}
) -> _Parser:
    """A parser of the fields of `options` and `tables`; help shows `values` as the defaults of those of tables."""
    width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)
    notes = "In brackets: the default. --no-FLAG turns off a FLAG that takes no value."
    parser = _Parser(
        prog,
        _usage(prog, options),
        about,
        f"{notes} `mygpt recipe schema` explains each key in full." if tables else notes,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=28, width=width),
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
    )
    for name, info in _fields_of(options).items():
        _add_flag(parser, name, info, info.description or "", info.default)
    parser.add_argument("-h", "--help", action="store_true", help="Show this help.")
    for table, model in tables.items():
        group = parser.add_argument_group(f"[{table}] {_first_sentence(model.__doc__)}")
        for name, info in model.model_fields.items():
            _add_flag(group, name, info, _first_sentence(info.description), values.get(name))
    return parser


def _add_flag(group: Any, name: str, info: FieldInfo, text: str, default: Any) -> None:
    """Add the flag of a field, or its place among the arguments, to a group of a parser."""
    flag, parts = _flag(name), _parts(info.annotation)
    nargs = "*" if any(get_origin(part) is tuple for part in parts) else None
    if default is not False and isinstance(default, (str, int, float, Path)):
        shown = "on" if default is True else str(default)
        text += f" [{shown if shown.isprintable() else repr(shown)}]"
    text = text.replace("%", "%%")
    if metavar := _marked(info, Positional):
        group.add_argument(name, metavar=metavar, nargs=nargs or "?", help=text)
    elif metavar := _marked(info, Repeated):
        group.add_argument(flag, metavar=metavar, action="append", help=text)
    elif info.annotation is bool:
        group.add_argument(flag, action="store_true", help=text)
        group.add_argument(f"--no-{flag[2:]}", dest=name, action="store_false", help=argparse.SUPPRESS)
    else:
        choices = [part for part in parts if isinstance(part, str)]
        kinds = [kind.__name__.upper() for kind in (float, int, Path, str) if kind in parts]
        metavar = f"{{{','.join(choices)}}}" if choices else kinds[0]
        group.add_argument(*SAME_FLAGS.get(name, (flag,)), metavar=metavar, nargs=nargs, help=text)


def _typed(value: Any, kind: Any) -> Any:
    """A value as the type wants it, if the text stands for one; else the text, which the type then refuses."""
    parts = _parts(kind)
    if isinstance(value, list):
        values = tuple(_typed(text, kind) for text in value)
        rows = [len(get_args(part)) for part in parts if get_origin(part) is tuple][1:]
        return tuple(values[at : at + rows[0]] for at in range(0, len(values), rows[0])) if rows else values
    if value == "None" and NoneType in parts:
        return None
    for number in (int, float, Path):
        if number in parts and isinstance(value, str):
            with suppress(ValueError):
                return number(value)
    return value


def _hint(flag: str, prog: str, fields: Mapping[str, FieldInfo]) -> str:
    """What may have been meant by an unknown flag."""
    name = flag.strip("-").replace("-", "_").lower()
    key = KEY_OF_FOREIGN_NAME.get(name, name)
    if "set" in fields and key in TABLE_OF_KEY.keys() - STUDY_KEYS:
        return f"give the values of a recipe's key with --set {key}=VALUE,VALUE{unit_note(name)}"
    if name in NOTES:
        return NOTES[name]
    switches = [f"no_{name}" for name, info in fields.items() if info.annotation is bool]
    if close := closest(name, [*fields, *switches]):
        return f"did you mean {_flag(close)}{unit_note(name) if close in TABLE_OF_KEY else ''}?"
    return f"`{prog} --help` lists all"


def load_target(target: str) -> Recipe:
    """A recipe file or a shipped recipe by its name; otherwise the plain run on a text file or a named corpus.

    Raises:
        RecipeError: the recipe cannot be used.
    """
    recipes = shipped_recipes()
    if target.lower().endswith(".toml") or target in recipes:
        return load_recipe(target)
    if target not in NAMED_CORPORA:
        if os.path.splitext(os.path.basename(target))[0] == target and not os.path.lexists(target):
            known = f"expected a recipe (one of {', '.join(recipes)}), a text or one of {', '.join(NAMED_CORPORA)}"
            close = [f"did you mean {name!r}?" for name in difflib.get_close_matches(target, recipes, n=1)]
            raise RecipeError(f"{target}: no such recipe or text; {(close or [known])[0]}")
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
        kind, recipe, way = "a folder of runs", of_many.with_name(RECIPE_FILE), "one of them"
    elif run is None or not (os.path.isdir(target) or is_named):
        return
    elif run == target:
        kind, recipe, way = "a run", run / RECIPE_FILE, "it, with --steps for more steps"
    else:
        kind = "a file of a run" if target.suffix in (".json", ".jsonl") else "a checkpoint"
        recipe, way = run / RECIPE_FILE, f"the run, and --init-from {target} trains its weights on"
    raise RecipeError(f"{target}: {kind}, not a recipe; `mygpt train {recipe}` continues {way}")


def _usage(prog: str, options: type[Table]) -> str:
    """How a command is called: the arguments, the flags that it needs, and whether there are more."""
    words = [prog]
    for name, info in _fields_of(options).items():
        if metavar := _marked(info, Positional):
            word = metavar + "..." * (get_origin(info.annotation) is tuple)
            words.append(word if info.is_required() else f"[{word}]")
        elif info.is_required():
            words.append(f"{_flag(name)} PATH")
    return " ".join([*words, "[FLAGS]"])


def _flag(name: str) -> str:
    return f"--{name}".replace("_", "-")


def _fields_of(model: type[Table]) -> dict[str, FieldInfo]:
    """The fields of a model by the names of their flags."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _marked(info: FieldInfo, kind: type[str]) -> str | None:
    """The mark of this kind that annotates a field."""
    return next((mark for mark in info.metadata if isinstance(mark, kind)), None)


def _parts(kind: Any) -> list[Any]:
    """A type, and all types that it is made of."""
    return [kind, *(part for argument in get_args(kind) for part in _parts(argument))]


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split()).split(". ")[0].removesuffix(".")
