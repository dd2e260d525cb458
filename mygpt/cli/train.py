"""`mygpt train`, and `mygpt doctor`, which does the same up to the first step."""

from dataclasses import dataclass

from mygpt.cli.command import errors_reach_all_processes
from mygpt.recipe.flags import parse_recipe


@dataclass(frozen=True)
class Options:
    overwrite: bool = False
    """Replace the run that is already in the output directory."""
    allow_changes: bool = False
    """Continue a run though its recipe or corpus has changed since it was saved."""


def train(arguments: list[str]) -> None:
    with errors_reach_all_processes():
        recipe, options = parse_recipe(arguments, "mygpt train", Options)
    from mygpt.training.train import train

    train(recipe, overwrite=options.overwrite, allow_changes=options.allow_changes)


def doctor(arguments: list[str]) -> None:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["quickstart", *arguments]  # whose corpus needs no download
    with errors_reach_all_processes():
        recipe, _ = parse_recipe(arguments, "mygpt doctor")
    from mygpt.checks.doctor import diagnose

    for line in diagnose(recipe):
        print(line)
