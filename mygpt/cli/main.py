"""The `mygpt` command. Each command imports what it needs when it runs, so that help answers at once."""

import contextlib
import difflib
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mygpt.errors import InterruptedRunError, MygptError, PeerError

USAGE = """\
usage: mygpt COMMAND [ARGUMENTS]

Trains small GPTs from one TOML recipe; the same recipe gives the same numbers.

  train RECIPE.toml|TEXT_FILE   train, with any recipe key as a flag (--steps 500)
  generate --checkpoint RUN     continue a prompt with a trained model
  compare A B                   whether two models or runs are the same, bit for bit
  verify RUN                    whether running a recorded run again gives the same, bit for bit
  replay RUN                    where the numbers of a step that failed broke first
  plot RUN...                   draw loss and learning rate
  doctor [RECIPE]               what a launch would train on: devices, processes, their shares of the work
  recipe show|list|schema       the resolved recipe, the recipes that come with mygpt, the JSON Schema

mygpt COMMAND --help tells more. On several devices: accelerate launch -m mygpt train RECIPE.toml
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 the world failed (or `compare` found a difference), 2 a mistake in the call."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _make_streams_safe()
    try:
        code = _dispatch(arguments, "mygpt", COMMANDS, USAGE)
        sys.stdout.flush()
    except MygptError as error:
        code = error.exit_code
        # All processes stop for a signal together; one says so.
        if not isinstance(error, InterruptedRunError) or os.environ.get("RANK", "0") == "0":
            _complain(str(error), is_of_other=isinstance(error, PeerError))
    except BrokenPipeError:
        # Whoever read our output has gone, as in `mygpt generate ... | head`; nothing more can be written there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        code = 1
        _complain(f"{error.filename or 'output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _dispatch(arguments: list[str], prog: str, commands: Mapping[str, Callable[[list[str]], int]], usage: str) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage, end="")
        return 0
    if name == "--version":
        from mygpt import __version__

        print(f"mygpt {__version__}")
        return 0
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(commands)}"
        raise MygptError(f"unknown command '{prog} {name}'; {hint}")
    return commands[name](rest)


def _train(arguments: list[str]) -> int:
    from mygpt.recipe.flags import parse_recipe

    @dataclass(frozen=True)
    class Options:
        overwrite: bool = False
        """Replace the run that is already in the output directory."""
        allow_changes: bool = False
        """Continue a run though its recipe or corpus has changed since it was saved."""

    with _telling_other_processes():
        recipe, options = parse_recipe(arguments, "mygpt train", Options)
    # Kernels that mps lacks run on the CPU; torch reads this when it is imported.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    from mygpt.training.train import train

    train(recipe, overwrite=options.overwrite, allow_changes=options.allow_changes)
    return 0


def _doctor(arguments: list[str]) -> int:
    from mygpt.recipe.flags import parse_recipe

    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["quickstart", *arguments]  # its corpus is there without a download
    with _telling_other_processes():
        recipe, _ = parse_recipe(arguments, "mygpt doctor")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    from mygpt.checks.doctor import diagnose

    lines = diagnose(recipe)
    if lines:
        print("\n".join(lines))
    return 0


def _generate(arguments: list[str]) -> int:
    from mygpt.recipe.flags import parse_options

    @dataclass(frozen=True)
    class Options:
        checkpoint: Path
        """A run directory (its newest step), a step directory or a model.safetensors."""
        prompt: str = "\n"
        """The text to continue."""
        max_new_tokens: int = 200
        """Characters to add."""
        temperature: float = 1.0
        """Below 1 safer, above 1 wilder; 0: always the most likely character."""
        top_k: int = 10
        """Choose among this many most likely characters; 0: among all."""
        seed: int = 0
        """Seed of the choices."""
        device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
        """Where to compute."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Of matrix products."""

    options = parse_options(Options, arguments, "mygpt generate", "Continue a prompt.")
    for name, value in (("max-new-tokens", options.max_new_tokens), ("top-k", options.top_k), ("seed", options.seed)):
        if not 0 <= value < 2**31:
            raise MygptError(f"--{name}: got {value}, expected an integer from 0 to {2**31 - 1}")
    if not 0 <= options.temperature < float("inf"):
        raise MygptError(f"--temperature: got {options.temperature}, expected a number from 0 up")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    import torch

    from mygpt.model.generation import stream_text
    from mygpt.processes.machine import resolve_device
    from mygpt.runs.loading import load_checkpoint

    model, tokenizer, _ = load_checkpoint(options.checkpoint)
    device = resolve_device(options.device, options.precision)
    generator = torch.Generator().manual_seed(options.seed)
    characters = stream_text(
        model.to(device),
        tokenizer,
        options.prompt,
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        generator,
    )
    print(options.prompt, end="", flush=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        for character in characters:
            print(character, end="", flush=True)
    print()
    return 0


def _compare(arguments: list[str]) -> int:
    import tyro

    from mygpt.recipe.flags import parse_options

    @dataclass(frozen=True)
    class Options:
        a: tyro.conf.Positional[Path]
        """A run directory (its newest step), a step directory or a model.safetensors."""
        b: tyro.conf.Positional[Path]
        """Another."""

    options = parse_options(Options, arguments, "mygpt compare", "Compare two models bit for bit.")
    from mygpt.checks.compare import compare, table

    result = compare(options.a, options.b)
    steps = "step {}".format(" and step ".join(map(str, dict.fromkeys(result.steps))))
    for what, parts in (("", result.weights), ("optimizer and generators ", result.state)):
        if parts is None:
            continue
        if not parts.differences and (what or not result.settings):
            print(f"{what}identical: {parts.tensors} tensors, {parts.values:,} values ({steps})")
        else:
            print(f"{what}different: {len(parts.differences)} of {parts.tensors} tensors ({steps})")
            print("\n".join([*([] if what else result.settings), *table(parts.differences)]))
    if result.records is not None:
        count, (count_a, count_b), difference = result.records
        of = "" if count == count_a == count_b else f", common of {count_a} and {count_b}"
        print(f"metrics different: {difference}" if difference else f"metrics identical: {count} records{of}")
    return 0 if result.identical else 1


def _verify(arguments: list[str]) -> int:
    import tyro

    from mygpt.recipe.flags import parse_options

    @dataclass(frozen=True)
    class Options:
        run: tyro.conf.Positional[Path]
        """A run directory."""
        steps: int | None = None
        """Run only this many of its steps again."""

    options = parse_options(
        Options, arguments, "mygpt verify", "Run a recorded run again, and say whether it is the same."
    )
    if options.steps is not None and options.steps < 1:
        raise MygptError(f"--steps: got {options.steps}, expected at least 1")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    from mygpt.checks.compare import table
    from mygpt.checks.verify import verify

    with _telling_other_processes():
        result = verify(options.run, options.steps)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if result.identical:
        print(f"identical: {result.records} records and {result.checkpoints} checkpoints up to step {result.until}")
    else:
        if result.difference:
            print(f"different: the first record that differs is that of {result.difference}")
        if result.tensors:
            print(f"different: the first checkpoint that differs is that of step {result.step}")
            print("\n".join(table(result.tensors)))
    for change in result.changes:
        print(f"changed since: {change}")
    return 0 if result.identical else 1


def _replay(arguments: list[str]) -> int:
    import tyro

    from mygpt.recipe.flags import parse_options

    @dataclass(frozen=True)
    class Options:
        run: tyro.conf.Positional[Path]
        """A run directory (its last step that failed), or a failed-step directory."""
        device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
        """Where to compute."""

    options = parse_options(Options, arguments, "mygpt replay", "Run the step at which a run's numbers broke again.")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    from mygpt.processes.machine import resolve_device
    from mygpt.training.failed_step import replay

    failed, lines, broken, not_repeated = replay(options.run, resolve_device(options.device, "fp32"))
    print(f"step {failed.step}: {failed.problem}")
    print("\n".join([*lines, *not_repeated]))
    not_reproduced = "all numbers are finite this time: not reproduced"
    if not_repeated:
        not_reproduced += ", with the differences above"
    print(f"first non-finite: {broken}" if broken else not_reproduced)
    return 0 if broken else 1


def _plot(arguments: list[str]) -> int:
    import tyro

    from mygpt.recipe.flags import parse_options

    @dataclass(frozen=True)
    class Options:
        runs: tyro.conf.Positional[tuple[Path, ...]]
        """Run directories."""
        out: Path = Path("loss.png")
        """The picture to write; its ending (.png, .svg, .pdf) chooses the format."""

    options = parse_options(Options, arguments, "mygpt plot", "Draw loss and learning rate of runs.")
    if not options.runs:
        raise MygptError("plot: expected at least one run directory")
    from mygpt.reports.plot import plot

    plot(options.runs, options.out)
    print(f"wrote {options.out}", file=sys.stderr)
    return 0


def _recipe(arguments: list[str]) -> int:
    usage = """\
usage: mygpt recipe show RECIPE.toml|TEXT_FILE [FLAGS]   print the resolved recipe
       mygpt recipe list                                 print the recipes that come with mygpt
       mygpt recipe schema                               print the JSON Schema of recipes
"""
    return _dispatch(arguments, "mygpt recipe", RECIPE_COMMANDS, usage)


def _recipe_show(arguments: list[str]) -> int:
    from mygpt.recipe.flags import parse_recipe

    recipe, _ = parse_recipe(arguments, "mygpt recipe show")
    print(recipe.to_toml(), end="")
    return 0


def _recipe_list(arguments: list[str]) -> int:
    from mygpt.recipe.files import shipped_recipes

    _expect_no_arguments(arguments, "mygpt recipe list")
    for name, path in shipped_recipes().items():
        print(f"{name:<12} {path}")
    return 0


def _recipe_schema(arguments: list[str]) -> int:
    from mygpt.recipe.files import recipe_schema

    _expect_no_arguments(arguments, "mygpt recipe schema")
    print(recipe_schema(), end="")
    return 0


COMMANDS = {
    "train": _train,
    "generate": _generate,
    "compare": _compare,
    "verify": _verify,
    "replay": _replay,
    "plot": _plot,
    "doctor": _doctor,
    "recipe": _recipe,
}
RECIPE_COMMANDS = {"show": _recipe_show, "list": _recipe_list, "schema": _recipe_schema}


def _expect_no_arguments(arguments: list[str], prog: str) -> None:
    if arguments not in ([], ["-h"], ["--help"]):
        raise MygptError(f"{prog} takes no arguments; got {arguments[0]!r}")


@contextlib.contextmanager
def _telling_other_processes() -> Iterator[None]:
    """Tell a mistake to the other processes of a launch, which may have made none and would wait for this one."""
    try:
        yield
    except MygptError:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        from mygpt.processes.channel import peers_of
        from mygpt.processes.environment import launched_processes

        with peers_of(launched_processes()):
            raise


def _make_streams_safe() -> None:
    """Have printing succeed where output is closed, and where its encoding lacks a character of the corpus."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - it lives as long as we do
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _complain(message: str, *, is_of_other: bool = False) -> None:
    """Print an error, with what a terminal would act on escaped.

    Under a launcher every process usually finds the same mistake, and the launcher ends them all when one fails: the
    first of each machine speaks at once, the others only if they are still there after it would have.
    """
    rank = ""
    several_machines = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not is_of_other and (several_machines or os.environ.get("LOCAL_RANK", "0") != "0"):
        rank = f"rank {os.environ.get('RANK', '?')} on {platform.node()}: "
    lines = [f"{rank}{''.join(c if c.isprintable() else repr(c)[1:-1] for c in line)}" for line in message.splitlines()]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"{rank}and {len(lines) - MAX_LINES} more"]
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)
    _write_error_file("\n".join(lines))
    for line in lines:
        print(f"mygpt: {line}", file=sys.stderr)


def _write_error_file(message: str) -> None:
    """Give the message to torchrun or accelerate launch, whose last lines then show it as the root cause.

    The format is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler, without a traceback.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": told}), encoding="utf-8")


MAX_LINES = 20
"""Mistakes printed of one recipe."""
