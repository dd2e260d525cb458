"""The checks before step 1: device and corpus on each process, and that all processes agree."""

import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from mygpt.data.dataset import Dataset, is_prepared
from mygpt.data.formats import plain_json_note
from mygpt.errors import LaunchError
from mygpt.processes.channel import Channel
from mygpt.processes.environment import Launched, ignored_settings, is_sharded, launch_id, local_rank
from mygpt.processes.machine import choose_matmul, describe_environment, has_bf16_products, resolve_device, set_up
from mygpt.recipe.tables import TABLE_OF_KEY, Recipe
from mygpt.runs.initial import Initial, find_initial, open_dataset
from mygpt.runs.schemas import FORMAT, HASH_OF_PATH, Environment, RunInfo, Stretch

SLOWEST_READING = 20e6
"""Bytes a second from a disk that is slow, but works."""


class ProcessReport(NamedTuple):
    """One process's machine, corpus and recipe, as it reports them to the others."""

    node: str
    device: str
    backend: str
    inputs: dict[str, str | None]
    """Hashes of what the recipe's paths name, by key."""
    recipe: dict[str, Any]
    """Values by key."""
    environment: dict[str, Any]
    """What the last bits of its results depend on."""


class Preflight(NamedTuple):
    """The result of the checks, with which training starts."""

    device: torch.device
    dataset: Dataset
    info: RunInfo
    """Of a run that begins here and now. Its recipe names the model that `init_from` leads to, and its tokenizer."""
    reports: list[ProcessReport]
    """Of all processes, by rank."""
    notes: list[str]
    """Settings that may not be as the user meant them, a sentence each."""


def run_preflight(
    recipe: Recipe, launched: Launched, channel: Channel, micro_batch_size: int, *, continues: bool = True
) -> Preflight:
    """Find the device, read the corpus, set threads, and compare all processes. Every process has to call it.

    `continues`: a run that is there will be continued, and not replaced.

    Raises:
        CorpusError: the corpus cannot be used.
        LaunchError: the device or the compiler does not exist, or the processes do not fit together.
        PeerError: another process has ended with an error.
    """
    runtime, exact = recipe.runtime, recipe.runtime.reduction == "exact"
    device = resolve_device(runtime.device, runtime.precision, launched.local_processes)
    check_sharding(recipe, device)
    threads, is_deterministic = set_up(runtime, device, launched.local_processes)
    # One process of a machine hashes what all of them map.
    initial = find_initial(recipe, continues=continues)
    dataset = open_dataset(recipe, initial, verify=not local_rank())
    environment = Environment(
        **describe_environment(device),
        device=device.type,
        matmul=choose_matmul(runtime, device),
        compile=runtime.compile,
        threads=threads,
        processes=launched.processes,
        sharded=is_sharded(),
        micro_batch_size=micro_batch_size,
        deterministic=is_deterministic,
    )
    steps, patience = recipe.train.steps, recipe.validation.patience
    info = RunInfo(
        format=FORMAT,
        platform=platform.platform(),
        command=tuple(sys.argv),
        launch_id=launch_id(),
        corpus_sha256=dataset.sha256,
        held_out_sha256=dataset.held_out_sha256,
        init_sha256=initial and initial.sha256,
        recipe=resolved_recipe(recipe, initial, dataset),
        stretches=(Stretch(after_step=0, steps=steps, patience=patience, environment=environment),),
    )
    # Only the main process uses output and resume; what is read, and the threads, are compared by content and number.
    not_compared = ("output", "resume", "threads", *HASH_OF_PATH)
    own = ProcessReport(
        node=platform.node(),
        device=environment.accelerator or f"{device.type} ({environment.cpu}, {environment.cpu_capability})",
        backend="nccl" if device.type == "cuda" else "gloo",
        inputs=info.inputs,
        recipe={key: value for key, value in recipe.flat().items() if key not in not_compared},
        environment=environment.values(),
    )
    # While one process of each machine hashes a prepared corpus, the others wait.
    hashing = dataset.bytes / SLOWEST_READING if dataset.check_unchanged else 0.0
    reports = [ProcessReport(**report) for report in channel.exchange(own._asdict(), extra_seconds=hashing)]
    check_alike(reports, exact=exact)
    notes = ignored_settings(runtime.precision) + ([initial.note] if initial and initial.note else [])
    return Preflight(device, dataset, info, reports, [*notes, *doubtful_settings(info, device)])


def resolved_recipe(recipe: Recipe, initial: Initial | None, dataset: Dataset) -> Recipe:
    """The recipe with the path of the initial model, and with the tokenizer that this model or a prepared corpus has,
    whatever the recipe says."""
    if initial:
        recipe = recipe.replace(init_from=initial.path)
    if initial or is_prepared(recipe.data.corpus):
        recipe = recipe.replace(tokenizer=dataset.tokenizer.metadata.type)
    return recipe


def doubtful_settings(info: RunInfo, device: torch.device) -> Iterator[str]:
    """Settings of a run that may not be as the user meant them, a sentence each."""
    if info.held_out_sha256 == info.corpus_sha256:
        yield "val_corpus: is the text that is trained on: its loss says nothing about unseen text"
    data = info.recipe.data
    for path in dict.fromkeys([data.corpus, data.val_corpus]):
        if path and path.lower().endswith(".json") and not is_prepared(path):
            yield plain_json_note(path)
    if info.recipe.runtime.precision == "bf16" and device.type == "cpu" and not has_bf16_products():
        yield "precision: bf16 is slower than fp32 here: this processor has no instructions for it"
    environment = info.stretches[0].environment
    micro_batches = info.recipe.train.batch_size // environment.micro_batch_size
    if micro_batches < environment.processes:
        yield (
            f"{micro_batches} of {environment.processes} processes have a micro-batch in each step, the others nothing "
            "to do: lower micro_batch_size, which changes the last bits, or start fewer"
        )


def check_sharding(recipe: Recipe, device: torch.device) -> None:
    """If the launch configuration shards the weights, check that device and recipe allow it.

    Raises:
        LaunchError: they do not.
    """
    if not is_sharded():
        return
    if device.type != "cuda":
        raise LaunchError(
            f"the launch configuration asks for FSDP on {device.type}, where Accelerate would silently not shard; use "
            "recipes/launch/cpu2.yaml"
        )
    for key, value, remedy in (
        ("reduction", "exact", 'sums whole gradients; use recipes/launch/ddp.yaml, or reduction = "fast"'),
        ("compile", True, "has not been tried with FSDP; use recipes/launch/ddp.yaml, or compile = false"),
    ):
        if getattr(recipe.runtime, key) == value:
            raise LaunchError(f"[runtime] {key}: got {value!r}, which {remedy}")


def check_alike(reports: Sequence[ProcessReport], *, exact: bool) -> None:
    """Compare the reports of all processes.

    Raises:
        LaunchError: they have different texts, recipes or kinds of devices; or, with `exact` sums, different processors
            or versions, on which the last bits depend.
    """
    problems = []

    def compare(name: str, values: list[Any], remedy: str) -> None:
        if text := describe_mismatch(reports, values):
            problems.append(f"{name}: {text}; {remedy}")

    for key in HASH_OF_PATH:
        hashes = [(report.inputs[key] or "nothing")[:12] for report in reports]
        read = "weights" if key == "init_from" else "texts"
        compare(f"{key}: the processes read different {read}, by sha256", hashes, "give all of them the same file")
    for key in reports[0].recipe:
        values = [report.recipe[key] for report in reports]
        compare(f"[{TABLE_OF_KEY[key]}] {key}: differs", values, "start all processes with the same recipe and flags")
    machines = [report.environment for report in reports]
    kinds = [machine["device"] for machine in machines]
    compare("device: differs", kinds, "set device in the recipe, or mend the machine that has lost its own")
    if exact and len(set(kinds)) == 1:
        # With a GPU, the processor computes nothing.
        ignored = ("cpu", "cpu_capability", "threads") if kinds[0] == "cuda" else ()
        remedy = 'exact sums need machines that compute the same bits: make them alike, or use reduction = "fast"'
        for name in [name for name in machines[0] if name not in ignored]:
            compare(f"{name}: differs", [machine.get(name) for machine in machines], remedy)
    if problems:
        raise LaunchError("\n".join(problems))


def describe_mismatch(reports: Sequence[ProcessReport], values: Sequence[Any]) -> str:
    """The different values, each with the processes that have it; "" if all values, one per rank, are equal."""
    if all(value == values[0] for value in values):
        return ""
    texts = [str(value) for value in values]
    owners = {text: [rank for rank, other in enumerate(texts) if other == text] for text in dict.fromkeys(texts)}
    return ", ".join(f"{text} on {describe_ranks(reports, ranks)}" for text, ranks in owners.items())


def describe_ranks(reports: Sequence[ProcessReport], ranks: Sequence[int]) -> str:
    """Processes by machine: "rank 0, 1 on nodeA and rank 2, 3 on nodeB"."""
    nodes = {
        node: [str(rank) for rank in ranks if reports[rank].node == node]
        for node in dict.fromkeys(reports[rank].node for rank in ranks)
    }
    return " and ".join(f"rank {', '.join(own)} on {node}" for node, own in nodes.items())
