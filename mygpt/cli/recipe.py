"""`mygpt recipe`: show a resolved recipe, list the shipped ones, print the schema."""

from mygpt.cli.command import dispatch
from mygpt.errors import MygptError
from mygpt.recipe.files import recipe_schema, shipped_recipes
from mygpt.recipe.flags import parse_recipe

USAGE = """\
usage: mygpt recipe show RECIPE.toml|TEXT_FILE [FLAGS]   print the resolved recipe
       mygpt recipe list                                 print the recipes that come with mygpt
       mygpt recipe schema                               print the JSON Schema of recipes
"""


def recipe(arguments: list[str]) -> int | None:
    return dispatch(arguments, "mygpt recipe", {"show": _show, "list": _list, "schema": _schema}, USAGE)


def _show(arguments: list[str]) -> None:
    recipe, _ = parse_recipe(arguments, "mygpt recipe show")
    print(recipe.to_toml(), end="")


def _list(arguments: list[str]) -> None:
    _expect_no_arguments(arguments, "mygpt recipe list")
    for name, path in shipped_recipes().items():
        print(f"{name:<12} {path}")


def _schema(arguments: list[str]) -> None:
    _expect_no_arguments(arguments, "mygpt recipe schema")
    print(recipe_schema(), end="")


def _expect_no_arguments(arguments: list[str], prog: str) -> None:
    if arguments not in ([], ["-h"], ["--help"]):
        raise MygptError(f"{prog} takes no arguments; got {arguments[0]!r}")
