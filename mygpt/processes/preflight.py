"""What has to hold before step 1, on every process and between them."""

import platform
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from mygpt.data.dataset import Dataset, load_dataset
from mygpt.errors import LaunchError, RecipeError
from mygpt.processes.channel import Peers
from mygpt.processes.environment import Launched, ignored_settings, is_sharded
from mygpt.processes.machine import describe_environment, make_deterministic, resolve_device, set_threads
from mygpt.recipe.tables import TABLE_OF_KEY, Recipe, TrainTable
from mygpt.runs.schemas import RunInfo
from mygpt.training.gradient_sum import fixed_micro_batch


class Setup(NamedTuple):
    """What a process begins with."""

    device: torch.device
    dataset: Dataset
    info: RunInfo
    facts: list["Facts"]
    """Of all processes, by rank."""
    notes: list[str]
    """What is not as it may have been meant."""


class Facts(NamedTuple):
    """What a process tells the others of itself."""

    node: str
    device: str
    backend: str
    corpus_sha256: str
    recipe: dict[str, Any]
    """Values by key."""
    environment: dict[str, Any]
    """What the last bits of its results depend on."""


def set_up(recipe: Recipe, launched: Launched, peers: Peers) -> Setup:
    """Find the device, read the corpus, set threads, and hold all processes against each other.

    Raises:
        RecipeError: the processes cannot share the batch.
        CorpusError: the corpus cannot be used.
        LaunchError: the device is not there, or the processes do not fit together.
        PeerError: another process has raised one of these.
    """
    runtime, exact = recipe.runtime, recipe.runtime.reduction == "exact"
    micro_batch_size = resolve_micro_batch(recipe.train, launched.processes, exact=exact)
    device = resolve_device(runtime.device, runtime.precision, launched.local_processes)
    check_sharding(recipe, device)
    dataset = load_dataset(recipe.data, recipe.train.seq_len)
    threads = set_threads(runtime.threads, launched.local_processes, pinned=exact and device.type == "cpu")
    make_deterministic(device)
    info = RunInfo(
        **describe_environment(device),
        device=device.type,
        compile=runtime.compile,
        threads=threads,
        processes=launched.processes,
        sharded=is_sharded(),
        micro_batch_size=micro_batch_size,
        reduction=runtime.reduction,
        corpus_sha256=dataset.sha256,
    )
    own = Facts(
        node=platform.node(),
        device=info.accelerator or f"{device.type} ({info.cpu}, {info.cpu_capability})",
        backend="nccl" if device.type == "cuda" else "gloo",
        corpus_sha256=dataset.sha256,
        recipe={
            key: getattr(getattr(recipe, table), key)
            for key, table in TABLE_OF_KEY.items()
            # The main process alone looks at the first two; content and meaning of the others are told apart.
            if key not in ("output", "resume", "corpus", "threads")
        },
        environment=info.environment(),
    )
    facts = [Facts(**told) for told in peers.exchange(own._asdict())]
    check_alike(facts, exact=exact)
    notes = ignored_settings(runtime.precision)
    micro_batches = recipe.train.batch_size // micro_batch_size
    if micro_batches < launched.processes:
        notes.append(
            f"{micro_batches} of {launched.processes} processes have a micro-batch in each step, the others nothing to "
            "do: lower micro_batch_size, which changes the last bits, or start fewer"
        )
    return Setup(device, dataset, info, facts, notes)


def check_sharding(recipe: Recipe, device: torch.device) -> None:
    """See that what the recipe asks for can be had where the launch configuration shards the weights.

    Raises:
        LaunchError: it cannot.
    """
    if not is_sharded():
        return
    if device.type != "cuda":
        raise LaunchError(
            f"the launch configuration asks for FSDP on {device.type}, where Accelerate would silently not shard; use "
            "recipes/launch/cpu2.yaml"
        )
    for key, value, way_out in (
        ("reduction", "exact", 'sums whole gradients; use recipes/launch/ddp.yaml, or reduction = "fast"'),
        ("compile", True, "has not been tried with FSDP; use recipes/launch/ddp.yaml, or compile = false"),
    ):
        if getattr(recipe.runtime, key) == value:
            raise LaunchError(f"[runtime] {key}: got {value!r}, which {way_out}")


def check_alike(facts: list[Facts], *, exact: bool) -> None:
    """Hold what the processes told against each other.

    Raises:
        LaunchError: they would train on different texts or recipes or on different kinds of devices; or, with `exact`
            sums, where the same step has other bits.
    """
    problems = list(_differences(facts, exact=exact))
    if problems:
        raise LaunchError("\n".join(problems))


def _differences(facts: list[Facts], *, exact: bool) -> Iterator[str]:
    if text := _told_apart(facts, [entry.corpus_sha256[:12] for entry in facts]):
        yield f"corpus: the processes read different texts, by sha256: {text}; give all of them the same file"
    for key in facts[0].recipe:
        if text := _told_apart(facts, [entry.recipe[key] for entry in facts]):
            yield f"[{TABLE_OF_KEY[key]}] {key}: differs: {text}; start all processes with the same recipe and flags"
    kinds = [entry.environment["device"] for entry in facts]
    if text := _told_apart(facts, kinds):
        yield f"device: differs: {text}; set device in the recipe, or mend the machine that has lost its own"
    elif exact:
        # The processor computes nothing where there is a GPU.
        left_out = {"device", "git_commit", *(("cpu", "cpu_capability", "threads") if kinds[0] == "cuda" else ())}
        for name in facts[0].environment:
            if name in left_out:
                continue
            if text := _told_apart(facts, [entry.environment.get(name) for entry in facts]):
                yield (
                    f"{name}: differs: {text}; exact sums need machines that compute the same bits: make them alike, "
                    'or use reduction = "fast"'
                )


def _told_apart(facts: list[Facts], values: list[Any]) -> str:
    """Which processes have which of the values; "" if all have the same."""
    if all(value == values[0] for value in values):
        return ""
    owners: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        owners.setdefault(str(value), []).append(rank)
    return ", ".join(f"{value} on {name_ranks(facts, ranks)}" for value, ranks in owners.items())


def name_ranks(facts: list[Facts], ranks: list[int]) -> str:
    """Processes by machine: "rank 2, 3 on nodeB"."""
    nodes: dict[str, list[int]] = {}
    for rank in ranks:
        nodes.setdefault(facts[rank].node, []).append(rank)
    return " and ".join(f"rank {', '.join(map(str, own))} on {node}" for node, own in nodes.items())


def resolve_micro_batch(table: TrainTable, processes: int, *, exact: bool = False) -> int:
    """The windows of one forward pass on one of `processes`; for `exact` sums the same on any number of them.

    Raises:
        RecipeError: the batch cannot be divided so.
    """
    if exact:
        return table.micro_batch_size or fixed_micro_batch(table.batch_size)
    if table.batch_size % processes:
        raise RecipeError(
            f"batch_size: got {table.batch_size}, expected a multiple of the {processes} processes (or none, with "
            'reduction = "exact")'
        )
    rows = table.batch_size // processes
    size = table.micro_batch_size or rows
    if rows % size:
        raise RecipeError(
            f"micro_batch_size: got {size}, expected a divisor of the {rows} windows that each of the {processes} "
            f"processes has of batch_size = {table.batch_size}"
        )
    return size
