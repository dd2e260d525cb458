"""The entry of the `mygpt` command: help, the choice of a command, and how errors are printed.

Each command is imported when it runs, so that help answers at once.
"""

import difflib
import errno
import importlib
import io
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mygpt import __version__
from mygpt.errors import InterruptedRunError, MygptError, PeerError, printable
from mygpt.processes.environment import is_main_process, local_rank, read_launched, set_before_torch
from mygpt.recipe.names import CLOSE

Command = Callable[[list[str]], int | None]
"""Takes the arguments after the command's name, and returns the exit code; None: 0."""

USAGE = """\
usage: mygpt COMMAND [ARGUMENTS]

Trains small GPTs from one TOML recipe; the same recipe gives the same numbers.

  init TEXT... [--minutes 30]   look at a text, time this machine, and write a recipe that fits the time
  train RECIPE.toml|TEXT_FILE   train, with any recipe key as a flag (--steps 500)
  study RECIPE... --seeds 5     run recipes with several seeds: which is better, by how much, how sure that is;
                                with the folder of a study: show it again
  generate RUN                  continue a prompt with a trained model
  eval RUN [--corpus TEXT]      the loss of a model on held-out text, and its error
  compare A B                   whether two models or runs are the same, bit for bit; and which has the lower loss
  check RUN                     whether its losses are normal, and whether it was still improving
  verify RUN                    whether running a recorded run again gives the same, bit for bit
  at RUN STEP --out DIR         make the run again as it was after any of its steps, bit for bit
  fork RUN STEP [FLAGS]         train on from any step of a run, with other values of some keys
  bisect A B                    the first step, and in it the first value, at which two runs differ
  replay RUN                    which value of a failed step became non-finite first
  plot RUN...                   draw loss and learning rate
  data prepare|info             texts of any size as tokens, for --corpus
  doctor [RECIPE]               what a launch would train on: devices, processes, their shares of the work
  recipe show|list|schema       the resolved recipe, the recipes that come with mygpt, the JSON Schema

mygpt COMMAND --help tells more. On several devices: accelerate launch -m mygpt train RECIPE.toml
"""

COMMANDS = {"init": "init", "train": "train", "study": "study", "data": "data"}
COMMANDS |= dict.fromkeys(("generate", "compare", "verify", "replay", "plot"), "inspect")
COMMANDS |= dict.fromkeys(("eval", "check"), "evaluate") | dict.fromkeys(("at", "fork", "bisect"), "steps")
COMMANDS |= dict.fromkeys(("doctor", "recipe"), "train")
"""The module of mygpt.cli that has the function of a command."""

OTHER_NAMES = {
    **dict.fromkeys(("chat", "predict", "sample"), "`mygpt generate RUN --prompt TEXT` continues a text"),
    **dict.fromkeys(("continue", "resume"), "`mygpt train RUN/recipe.toml` continues a run, as its own command does"),
    "export": "RUN/step-NNNNNN/model.safetensors has the weights, and its metadata the architecture and the vocabulary",
    "finetune": "`mygpt train TEXT --init-from RUN` begins with the weights of a run",
    "help": "`mygpt --help` lists the commands",
    "list": "`mygpt recipe list` lists the recipes, and `ls checkpoints` the runs",
    "prepare": "`mygpt data prepare TEXT... --out FOLDER` does this",
    "run": "`mygpt train RECIPE` trains",
    "show": "`mygpt recipe show RECIPE` prints a recipe, and `mygpt check RUN` says what a run came to",
    "sweep": "`mygpt study RECIPE --set lr=3e-4,1e-3` runs a recipe with each value",
    "test": "`mygpt eval RUN` prints the held-out loss",
}
"""What to do instead, for commands of other programs."""

MAX_LINES = 20
"""Mistakes of one recipe that are printed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 the world failed (or `compare` found a difference), 2 a mistake in the call."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Kernels that mps lacks run on the CPU; torch reads this when it is imported.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    set_before_torch()
    _make_streams_safe()
    try:
        name = choose(arguments, "mygpt", COMMANDS, USAGE, OTHER_NAMES)
        code = _command(name)(arguments[1:]) or 0 if name else 0
        sys.stdout.flush()
    except MygptError as error:
        code = error.exit_code
        # All processes stop for a signal together; one says so.
        if is_main_process() or not isinstance(error, InterruptedRunError):
            message = str(error)
            # Lines are mistakes: a line break in a path that was given is no end of one.
            for part in re.split("[/=]", "/".join(arguments)):
                message = message.replace(part, printable(part)) if "\n" in part else message
            print_error(message, is_of_other=isinstance(error, PeerError))
    except BrokenPipeError:
        # The reader of our output has gone, as in `mygpt generate ... | head`; nothing more can be written there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        code = 2 if error.errno == errno.ENAMETOOLONG else 1
        print_error(f"{error.filename or 'output'}: {error.strerror or error}")
    except (KeyboardInterrupt, SystemExit) as stop:
        # Help has been printed; or a signal came while there was nothing to save.
        code = 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
        if code > 128 and is_main_process():
            print_error(f"stopped by {signal.Signals(code - 128).name}")
    sys.exit(code)


def choose(
    arguments: list[str], prog: str, names: Collection[str], usage: str, other_names: Mapping[str, str] = {}
) -> str | None:
    """Which of the `names` of commands the first argument is; None: none is needed, and what it asks for is printed.

    `other_names` says what to do instead of a command that other programs have.

    Raises:
        MygptError: there is no such command.
    """
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        return print(usage, end="")
    if name == "--version":
        return print(f"mygpt {__version__}")
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1, cutoff=CLOSE)
        hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(names)}"
        hint = other_names.get(name.replace("-", "").lower(), hint)
        raise MygptError(f"unknown command '{prog} {name}'; {hint}")
    return name


def _command(name: str) -> Command:
    try:
        os.getcwd()
    except FileNotFoundError:  # torch would end the process
        raise MygptError("the working directory has been removed; change to another one") from None
    command: Command = getattr(importlib.import_module(f"mygpt.cli.{COMMANDS[name]}"), name)
    return command


def _make_streams_safe() -> None:
    """Let printing succeed where output is closed, and where its encoding lacks a character of the corpus."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_error(message: str, *, is_of_other: bool = False) -> None:
    """Print an error, with control characters escaped, and give it to the launcher for its summary."""
    launched = read_launched()
    prefix = ""
    if not is_of_other and (launched.processes > launched.local_processes or local_rank()):
        prefix = f"rank {os.environ.get('RANK', '?')} on {platform.node()}: "
    lines = [prefix + printable(line) for line in message.splitlines()]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"{prefix}and {len(lines) - MAX_LINES} more"]
    if local_rank():
        # Usually every process finds the same mistake. The launcher ends the other processes of a machine as soon as
        # one exits: the wait lets the first print, and only if it did not end the others print, too.
        time.sleep(5)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # In the format of torch.distributed.elastic.multiprocessing.errors.ErrorHandler, without a traceback.
        details = {"message": "\n".join(lines), "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": details}), encoding="utf-8")
    for line in lines:
        print(f"mygpt: {line}", file=sys.stderr)
