"""How commands are declared, and what they share. Imports neither torch nor pydantic, so that help answers at once."""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mygpt import __version__
from mygpt.errors import MygptError
from mygpt.processes.environment import launched_processes, read_launched
from mygpt.recipe.names import CLOSE

Command = Callable[[list[str]], int | None]
"""Takes the arguments after the command's name, and returns the exit code; None: 0."""


def command(function: Callable[[Any], int | None], group: str = "mygpt") -> Command:
    """Make a command of a function of `options`, a dataclass whose fields are the flags. Docstrings are the help.

    `group` is what is typed before the function's name.
    """

    def run(arguments: list[str]) -> int | None:
        from mygpt.recipe.flags import parse_command

        kind, prog = function.__annotations__["options"], f"{group} {function.__name__}"
        return function(parse_command(kind, arguments, prog, function.__doc__ or ""))

    return run


@dataclass(frozen=True, kw_only=True)
class InputOptions:
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
        given = {"corpus": self.corpus, "val_corpus": self.val_corpus, "init_from": self.init_from}
        return {key: path for key, path in given.items() if path is not None}


def print_json(document: Mapping[str, Any]) -> None:
    """Print the answer of a command with --json; what is not finite is null, since JSON has no such numbers."""
    print(json.dumps(_plain(document), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def dispatch(
    arguments: list[str], prog: str, commands: Mapping[str, Command], usage: str, other_names: Mapping[str, str] = {}
) -> int | None:
    """Run the command that the first argument names, or print `usage`.

    `other_names` says what to do instead of a command that other programs have.

    Raises:
        MygptError: there is no such command.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        return print(usage, end="")
    if name == "--version":
        return print(f"mygpt {__version__}")
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1, cutoff=CLOSE)
        hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(commands)}"
        hint = other_names.get(name.replace("-", "").lower(), hint)
        raise MygptError(f"unknown command '{prog} {name}'; {hint}")
    return commands[name](rest)


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
