"""Try out which settings would make a recipe faster on this machine."""

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
import torch

from mygpt.cores import available_cores
from mygpt.data.dataset import Dataset
from mygpt.errors import LaunchError
from mygpt.processes.environment import choose_workers
from mygpt.processes.machine import choose_matmul, has_matmul, peak_flops, set_up
from mygpt.recipe.tables import Recipe
from mygpt.training.gradient_sum import gradient_sum_for
from mygpt.training.loop import train_step
from mygpt.training.parts import build_parts, open_accelerator
from mygpt.training.train import explain_out_of_memory

WORTH_NAMING = 0.95
"""A setting is named if a step takes at most this share of the time."""


BUSY_SECONDS, BUSY_CORES = 0.5, 0.3
"""For how long to watch what other programs use, and from how many cores on it is named."""


class Alternative(NamedTuple):
    """Other values of some keys, and what else they change."""

    keys: dict[str, Any]
    effect: str


def alternatives(recipe: Recipe, device: torch.device) -> Iterator[Alternative]:
    """Settings that differ from the recipe's and may be faster."""
    runtime, table = recipe.runtime, recipe.train
    last_bits, more_memory = "the last bits differ", "needs more memory"
    if runtime.precision == "fp32":
        yield Alternative({"precision": "bf16"}, "products are less precise")
    if not runtime.compile:
        yield Alternative({"compile": True}, last_bits + "; takes longer to start")
    if runtime.activation_checkpointing:
        yield Alternative({"activation_checkpointing": False}, more_memory)
    if runtime.reduction == "exact":
        yield Alternative({"reduction": "fast"}, "the last bits depend on the number of processes")
    elif table.micro_batch_size not in (None, table.batch_size):
        yield Alternative({"micro_batch_size": None}, f"{last_bits}; {more_memory}")
    if device.type == "cuda" and runtime.deterministic:
        yield Alternative({"deterministic": False}, "no two runs have the same last bits")
    yield Alternative({"batch_size": 4 * table.batch_size}, "changes the training: each step has four times the tokens")
    if has_matmul("onednn", device) and runtime.precision == "fp32":
        yield Alternative({"matmul": "blas" if choose_matmul(runtime, device) == "onednn" else "onednn"}, last_bits)
    # Last, since setting other threads slows down what is timed after it: see `set_threads`.
    if device.type == "cpu":
        own = torch.get_num_threads()
        for threads in sorted({1, max(1, own // 2), 2 * own} - {own}):
            yield Alternative({"threads": threads}, last_bits)


def measure_speed(
    recipe: Recipe, device: torch.device, dataset: Dataset, seconds: float = 1.5
) -> Iterator[tuple[str, str]]:
    """Lines that say how fast the recipe is, and with which settings it would be faster.

    Each alternative takes its turn beside the recipe as it is, since the speed of a machine drifts. For one process.

    Raises:
        OutOfMemoryError: the recipe as it is does not fit into memory.
    """
    table = recipe.train
    # Before this process computes anything itself.
    cores = available_cores()
    used = dict(enumerate(psutil.cpu_percent(BUSY_SECONDS, percpu=True)))
    if (busy := sum(used.get(core, 0.0) for core in cores) / 100) > BUSY_CORES:
        yield "busy", f"other programs use {busy:.1f} of {len(cores)} cores: end them, or the times are too long"
    with explain_out_of_memory(table):
        base = time_step(recipe, device, dataset, seconds)
    tokens = table.batch_size * table.seq_len
    milliseconds = base.seconds * 1e3
    shown = f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"  # .3g writes 7.41e+03
    yield "speed", f"{shown} ms a step, {tokens / base.seconds:,.0f} tokens/s"
    if peak := peak_flops(device, recipe.runtime.precision):
        share = base.flops / base.seconds / peak
        yield (
            "peak",
            f"a step reaches {share:.0%} of this GPU's {peak / 1e12:,.0f} TFLOP/s in {recipe.runtime.precision}",
        )
    for keys, effect in alternatives(recipe, device):
        name = ", ".join(
            f"{key} left out" if value is None else f"{key} = {json.dumps(value)}" for key, value in keys.items()
        )
        try:
            other = time_step(recipe.replace(**keys), device, dataset, seconds)
        except (LaunchError, RuntimeError) as error:  # it does not fit into memory, or there is no compiler
            yield "not possible", f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            continue
        again = time_step(recipe, device, dataset, seconds)
        of_tokens = keys.get("batch_size", table.batch_size) / table.batch_size
        ratio = other.seconds / of_tokens / statistics.mean((base.seconds, again.seconds))
        base = again
        if ratio <= WORTH_NAMING:
            yield "faster", f"{name}: {1 / ratio:.3g} times as fast; {effect}"


class Timed(NamedTuple):
    """The duration of a step and its floating-point operations."""

    seconds: float
    flops: float


def time_step(recipe: Recipe, device: torch.device, dataset: Dataset, seconds: float) -> Timed:
    """The median duration of a step, from about so many seconds of steps after the first few."""
    set_up(recipe.runtime, device)
    gradient_sum = gradient_sum_for(recipe, max_workers=choose_workers(recipe.runtime.threads, 1))
    with open_accelerator(recipe.runtime, device, gradient_sum.accumulation_steps) as accelerator:
        parts, step = build_parts(recipe, accelerator, dataset, gradient_sum), 0
        durations: list[float] = []
        warm_at = None
        while warm_at is None or time.perf_counter() - warm_at < seconds or len(durations) < 3:
            if step == 3:
                warm_at = time.perf_counter()
            started_at = time.perf_counter()
            step += 1
            loss, *_ = train_step(parts, parts.stream.batch(), step)
            parts.scheduler.step()
            loss.item()  # waits for the device
            if warm_at is not None:
                durations.append(time.perf_counter() - started_at)
        per_token = parts.gpt.flops_per_token(recipe.train.seq_len)
        return Timed(statistics.median(durations), per_token * recipe.train.batch_size * recipe.train.seq_len)
