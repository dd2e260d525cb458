"""The commands that take a recipe: `mygpt train`, `doctor`, which does the same up to the first step, and `recipe`."""

import os
import sys
from typing import Annotated

from mygpt.cli.command import JsonOptions, errors_reach_all_processes, print_json
from mygpt.cli.main import choose
from mygpt.errors import MygptError
from mygpt.processes.environment import choose_threads, read_launched
from mygpt.recipe.files import recipe_schema, shipped_recipes
from mygpt.recipe.flags import Positional, RecipeOptions, parse_recipe
from mygpt.recipe.tables import Recipe

USAGE = """\
usage: mygpt recipe show RECIPE.toml|TEXT_FILE [FLAGS]   print the resolved recipe
       mygpt recipe list                                 print the recipes that come with mygpt
       mygpt recipe schema                               print the JSON Schema of recipes
"""


class TrainOptions(RecipeOptions):
    overwrite: bool = False
    """Replace the run that is already in the output directory, which stays there until the first checkpoint."""


class DoctorOptions(RecipeOptions, JsonOptions):
    target: Annotated[str, Positional("RECIPE|TEXT")] = "quickstart"
    """A recipe, a shipped recipe's name, or a text; absent: quickstart, whose corpus needs no download."""
    speed: bool = False
    """Run a few steps, too, and say which settings would be faster (about 20 seconds)."""


def train(arguments: list[str]) -> None:
    with errors_reach_all_processes():
        recipe, options = parse_recipe(arguments, "mygpt train", TrainOptions)
    announce_threads(recipe)
    from mygpt.training.train import train

    train(recipe, overwrite=options.overwrite)


def doctor(arguments: list[str]) -> None:
    with errors_reach_all_processes():
        recipe, options = parse_recipe(arguments, "mygpt doctor", DoctorOptions)
    announce_threads(recipe)
    from mygpt.checks.doctor import diagnose

    found = diagnose(recipe, speed=options.speed)
    if options.as_json:
        findings = [{"topic": topic, "text": text} for topic, text in found]
        if findings:  # the other processes of a launch find nothing
            print_json({"findings": findings})
        return
    for topic, text in found:
        label = topic if topic.startswith("rank ") else f"{topic}:"
        print(f"{label:<14}{text}", flush=True)


def announce_threads(recipe: Recipe) -> None:
    """Set the threads where torch finds them when it is imported; see `set_threads` in processes/machine.py."""
    if "torch" in sys.modules:
        return
    runtime = recipe.runtime
    pinned = runtime.reduction == "exact" and runtime.device == "cpu"
    threads = choose_threads(runtime.threads, read_launched().local_processes, pinned=pinned)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def recipe(arguments: list[str]) -> int | None:
    commands = {"show": _show, "list": _list, "schema": _schema}
    name = choose(arguments, "mygpt recipe", commands, USAGE)
    return commands[name](arguments[1:]) if name else None


def _show(arguments: list[str]) -> None:
    print(parse_recipe(arguments, "mygpt recipe show")[0].to_toml(), end="")


def _list(arguments: list[str]) -> None:
    _expect_no_arguments(arguments, "mygpt recipe list")
    for name, path in shipped_recipes().items():
        print(f"{name:<16} {path}")


def _schema(arguments: list[str]) -> None:
    _expect_no_arguments(arguments, "mygpt recipe schema")
    print(recipe_schema(), end="")


def _expect_no_arguments(arguments: list[str], prog: str) -> None:
    if arguments not in ([], ["-h"], ["--help"]):
        raise MygptError(f"{prog} takes no arguments; got {arguments[0]!r}")
