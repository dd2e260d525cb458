"""The commands that look at finished runs: `mygpt compare`, `verify`, `replay` and `plot`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mygpt.cli.command import command, errors_reach_all_processes
from mygpt.errors import MygptError
from mygpt.processes.environment import is_main_process


@dataclass(frozen=True)
class CompareOptions:
    a: Positional[Path]
    """A run directory (its newest step), a step directory or a model.safetensors."""
    b: Positional[Path]
    """Another."""


@command
def compare(options: CompareOptions) -> int:
    """Compare two models bit for bit."""
    from mygpt.checks.compare import compare, table

    result = compare(options.a, options.b)
    steps = "step {}".format(" and step ".join(map(str, dict.fromkeys(result.steps))))
    for name, tensors, settings in (
        ("", result.weights, result.settings),
        ("optimizer and generators ", result.state, []),
    ):
        if tensors is None:
            continue
        if settings or tensors.differences:
            print(f"{name}different: {len(tensors.differences)} of {tensors.tensors} tensors ({steps})")
            print("\n".join([*settings, *table(tensors.differences)]))
        else:
            print(f"{name}identical: {tensors.tensors} tensors, {tensors.values:,} values ({steps})")
    if result.records is not None:
        count, (count_a, count_b), difference = result.records
        of = "" if count == count_a == count_b else f", common of {count_a} and {count_b}"
        print(f"metrics different: {difference}" if difference else f"metrics identical: {count} records{of}")
    return int(not result.identical)


@dataclass(frozen=True)
class VerifyOptions:
    run: Positional[Path]
    """A run directory."""
    steps: int | None = None
    """Run only this many of its steps again."""


@command
def verify(options: VerifyOptions) -> int:
    """Run a recorded run again, and say whether it is the same."""
    if options.steps is not None and options.steps < 1:
        raise MygptError(f"--steps: got {options.steps}, expected at least 1")
    from mygpt.checks.compare import table
    from mygpt.checks.verify import verify

    with errors_reach_all_processes():
        result = verify(options.run, options.steps)
    if not is_main_process():
        return 0
    if result.identical:
        print(f"identical: {result.records} records and {result.checkpoints} checkpoints up to step {result.until}")
    if result.difference:
        print(f"different: the first record that differs is that of {result.difference}")
    if result.tensors:
        print(f"different: the first checkpoint that differs is that of step {result.step}")
        print("\n".join(table(result.tensors)))
    for change in result.changes:
        print(f"changed since: {change}")
    return int(not result.identical)


@dataclass(frozen=True)
class ReplayOptions:
    run: Positional[Path]
    """A run directory (its last step that failed), or a failed-step directory."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


@command
def replay(options: ReplayOptions) -> int:
    """Run a failed step again, and say which value became non-finite first."""
    from mygpt.checks.replay import replay
    from mygpt.processes.machine import resolve_device

    failed, lines, broken, not_repeated = replay(options.run, resolve_device(options.device, "fp32"))
    print(f"step {failed.step}: {failed.problem}")
    print("\n".join([*lines, *not_repeated]))
    if broken:
        print(f"first non-finite: {broken}")
        return 0
    print("all numbers are finite this time: not reproduced" + ", with the differences above" * bool(not_repeated))
    return 1


@dataclass(frozen=True)
class PlotOptions:
    runs: Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path = Path("loss.png")
    """The picture to write; its ending (.png, .svg, .pdf) chooses the format."""


@command
def plot(options: PlotOptions) -> None:
    """Draw loss and learning rate of runs."""
    if not options.runs:
        raise MygptError("plot: expected at least one run directory")
    from mygpt.reports.plot import plot

    plot(options.runs, options.out)
    print(f"wrote {options.out}", file=sys.stderr)
