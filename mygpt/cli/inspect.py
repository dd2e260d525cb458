"""The commands that use a finished run: `mygpt generate`, `compare`, `verify`, `replay` and `plot`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from mygpt.cli.command import InputOptions, JsonOptions, command, errors_reach_all_processes, print_json
from mygpt.errors import MygptError, print_note
from mygpt.processes.environment import is_main_process
from mygpt.recipe.flags import Positional
from mygpt.recipe.tables import Count, CountOrOff, Table

if TYPE_CHECKING:
    from mygpt.checks.compare import Comparison, TensorComparison


class GenerateOptions(Table):
    run: Annotated[Path | None, Positional("RUN|CHECKPOINT")] = None
    """A run directory (its newest step), a step directory or a model.safetensors."""
    checkpoint: Path | None = None
    """Another way to name it."""
    prompt: str = "\n"
    """The text to continue."""
    max_new_tokens: CountOrOff = 200
    """Tokens to add."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Below 1 safer, above 1 wilder; 0: always the most likely token."""
    top_k: CountOrOff = 10
    """Choose among this many most likely tokens; 0: among all."""
    seed: CountOrOff = 0
    """Seed of the choices."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of matrix products."""


@command
def generate(options: GenerateOptions) -> None:
    """Continue a prompt."""
    if (options.run is None) == (options.checkpoint is None):
        got = "nothing" if options.run is None else f"both {options.run} and --checkpoint {options.checkpoint}"
        raise MygptError(f"generate: got {got}, expected one run or checkpoint: mygpt generate RUN")
    import torch

    from mygpt.compat import compute_fp32_in_fp32
    from mygpt.model.generation import stream_text
    from mygpt.processes.machine import resolve_device
    from mygpt.runs.loading import load_checkpoint

    model, tokenizer, _ = load_checkpoint(options.run or options.checkpoint or Path())
    device = resolve_device(options.device, options.precision)
    compute_fp32_in_fp32()
    generator = torch.Generator().manual_seed(options.seed)
    choice = options.max_new_tokens, options.temperature, options.top_k, generator
    pieces = stream_text(model.to(device), tokenizer, options.prompt, *choice)
    print(options.prompt, end="", flush=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        for piece in pieces:
            print(piece, end="", flush=True)
    print()


class CompareOptions(JsonOptions):
    a: Annotated[Path, Positional("A")]
    """A run directory (its newest step), a step directory or a model.safetensors."""
    b: Annotated[Path, Positional("B")]
    """Another."""
    tensors: bool = False
    """List the tensors that differ."""


@command
def compare(options: CompareOptions) -> int:
    """Whether two models are the same bit for bit; and if not, what differs, and which has the lower held-out loss."""
    from mygpt.checks.compare import compare, describe_held_out, table

    result = compare(options.a, options.b)
    if options.as_json:
        print_json(_comparison(result))
        return int(not result.identical)
    steps = "step {}".format(" and step ".join(map(str, dict.fromkeys(result.steps))))
    for name, compared in (("", result.weights), ("optimizer and generators ", result.state)):
        if compared is None:
            continue
        if compared.differences or (compared is result.weights and result.settings):
            hint = "" if options.tensors or not compared.differences else "; --tensors lists them"
            print(f"{name}different: {len(compared.differences)} of {compared.tensors} tensors ({steps}){hint}")
            if options.tensors:
                print("\n".join(table(compared.differences)))
        else:
            print(f"{name}identical: {compared.tensors} tensors, {compared.values:,} values ({steps})")
    if result.records is not None:
        count, (count_a, count_b), difference, _ = result.records
        of = "" if count == count_a == count_b else f", common of {count_a} and {count_b}"
        print(f"metrics different: {difference}" if difference else f"metrics identical: {count} records{of}")
    for kind, lines in (("model", result.settings), ("recipe", result.recipe), ("environment", result.environment)):
        for line in lines:
            print(f"{kind}: {line}")
    if result.identical:
        return 0
    if result.records and result.records.held_out:
        print(describe_held_out(*result.records.held_out))
    for line in result.verdict_lines():
        print(line)
    return 1


def _comparison(result: "Comparison") -> dict[str, Any]:
    """A comparison for JSON."""
    state, records, held_out = result.state, result.records, result.held_out
    evaluated = records.held_out if records else None
    document: dict[str, Any] = {
        "identical": result.identical,
        "steps": result.steps,
        "weights": _tensors(result.weights),
        "state": state and _tensors(state),
        "records": records
        and {"compared": records.steps, "of": records.totals, "difference": records.difference or None},
        "differences": {name: list(getattr(result, name)) for name in ("settings", "recipe", "environment")},
        "last_evaluations": evaluated and [record.model_dump() for record in evaluated],
        "held_out": None,
        "no_verdict": result.no_verdict,
    }
    if held_out and held_out.difference:
        nats, bits, manner = held_out.difference
        document["held_out"] = {
            "steps": held_out.steps,
            "b_minus_a": {"nats_per_token": nats and nats.document(), "bits_per_byte": bits and bits.document()},
            "manner": manner,
            "population": held_out.population,
            "verdict": None if result.no_verdict else held_out.verdict,
        }
    return document


def _tensors(compared: "TensorComparison") -> dict[str, Any]:
    different = [difference._asdict() for difference in compared.differences]
    return {"tensors": compared.tensors, "values": compared.values, "different": different}


class VerifyOptions(InputOptions):
    run: Annotated[Path, Positional("RUN")]
    """A run directory."""
    steps: Count | None = None
    """Run only this many of its steps again."""


@command
def verify(options: VerifyOptions) -> int:
    """Run a recorded run again, and say whether it is the same."""
    from mygpt.checks.compare import table
    from mygpt.checks.verify import verify

    with errors_reach_all_processes():
        result = verify(options.run, options.steps, options.inputs)
    if not is_main_process():
        return 0
    if options.as_json:
        tensors = [difference._asdict() for difference in result.tensors]
        difference = result.difference or None
        print_json({"identical": result.identical, **result._asdict(), "difference": difference, "tensors": tensors})
        return int(not result.identical)
    if result.identical:
        print(f"identical: {result.records} records and {result.checkpoints} checkpoints up to step {result.until}")
    if result.difference:
        print(f"different: the first record that differs is that of {result.difference}")
    if result.tensors:
        print(f"different: the first checkpoint that differs is that of step {result.step}")
        print("\n".join(table(result.tensors)))
    for change in result.changes:
        print(f"changed since: {change}")
    if not (result.identical or result.is_repeatable):
        print("the run had deterministic = false: no two runs of it have the same last bits")
    return int(not result.identical)


class ReplayOptions(JsonOptions):
    run: Annotated[Path, Positional("RUN")]
    """A run directory (its last step that failed), or a failed-step directory."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


@command
def replay(options: ReplayOptions) -> int:
    """Run a failed step again, and say which value became non-finite first."""
    from mygpt.checks.replay import replay
    from mygpt.processes.machine import resolve_device

    failed, lines, broken, not_repeated = replay(options.run, resolve_device(options.device, "fp32"))
    if options.as_json:
        found = {"first_non_finite": broken, "seen": lines, "not_repeated": not_repeated}
        print_json({"step": failed.step, "problem": failed.problem, **found})
        return int(not broken)
    print(f"step {failed.step}: {failed.problem}")
    print("\n".join([*lines, *not_repeated]))
    if broken:
        print(f"first non-finite: {broken}")
        return 0
    print("all numbers are finite this time: not reproduced" + ", with the differences above" * bool(not_repeated))
    return 1


class PlotOptions(Table):
    runs: Annotated[tuple[Path, ...], Positional("RUN")]
    """Run directories, or folders of them."""
    out: Path = Path("loss.png")
    """The picture to write, over a picture of mygpt at most; its ending (.png, .svg, .pdf) chooses the format."""
    unit: Literal["nats-per-token", "bits-per-byte", "perplexity"] = "nats-per-token"
    """Of the loss. Bits per byte can be compared between tokenizers; they are known of the held-out loss alone."""
    x: Literal["step", "tokens", "minutes"] = "step"
    """What the losses are drawn against."""
    y_min: float | None = None
    """The lower end of the loss; absent: chosen by the losses."""
    y_max: float | None = None
    """The upper end."""
    log: bool = False
    """Draw the loss on a logarithmic scale."""
    smooth: int = 0
    """Average training losses over so many steps, at most over a quarter of the steps so far; 0: not."""
    grad_norm: bool = False
    """Draw the gradient's norm before clipping, too."""
    merge_seeds: bool = True
    """Draw runs that differ by their seeds alone as their mean, with a band of their deviation."""


@command
def plot(options: PlotOptions) -> None:
    """Draw loss and learning rate of runs."""
    from mygpt.reports.plot import plot

    plot(warn=print_note, **dict(options))
    print_note(f"wrote {options.out}")
