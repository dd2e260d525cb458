"""How commands are declared, and what they share."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field

from mygpt.errors import MygptError
from mygpt.processes.environment import launched_processes, read_launched
from mygpt.recipe.flags import parse_options
from mygpt.recipe.tables import Table


def command(function: Callable[[Any], int | None], group: str = "mygpt") -> Callable[[list[str]], int | None]:
    """Make a command of a function of `options`, a `Table` whose fields are the flags. Docstrings are the help.

    `group` is what is typed before the function's name.
    """

    def run(arguments: list[str]) -> int | None:
        kind, prog = function.__annotations__["options"], f"{group} {function.__name__}"
        return function(parse_options(arguments, prog, kind, function.__doc__ or "")[0])

    return run


class JsonOptions(Table):
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print the answer as JSON."""


class InputOptions(JsonOptions):
    """Flags of commands that run a recorded run again, and so need what it read."""

    corpus: str | None = None
    """Where the run's text is now, if it has been moved; its sha256 must be the recorded one."""
    val_corpus: str | None = None
    """The same for the text that the run held out."""
    init_from: str | None = None
    """The same for the model with whose weights the run began."""

    @property
    def inputs(self) -> dict[str, str]:
        """What is given, by its key."""
        return self.model_dump(include=set(InputOptions.model_fields) - {"as_json"}, exclude_none=True)


def print_json(document: Mapping[str, Any]) -> None:
    """Print the answer of a command with --json; what is not finite is null, since JSON has no such numbers."""
    with_nan = json.dumps(document, default=os.fspath)
    print(json.dumps(json.loads(with_nan, parse_constant=lambda _: None), indent=2))


@contextmanager
def errors_reach_all_processes() -> Iterator[None]:
    """Report an error inside to the other processes of a launch, which may have none and would wait for this one."""
    try:
        yield
    except MygptError:
        if read_launched().processes == 1:
            raise
        from mygpt.processes.channel import connect

        with connect(launched_processes()):
            raise
