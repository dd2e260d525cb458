"""What decides the speed of a step on a GPU: each setting beside the base, and where the time of a step goes.

    python scripts/benchmarks/gpu.py scripts/benchmarks/gpt2.toml [--any-recipe-flag]

The text is 50,304 kinds of tokens at random. Every line is timed with the base before and after it, in one process:
read the ratios. MFU is the share of the peak of `peak_flops` that the model's products take. `peers.py --sizes 124M`
compares with other programs.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from mygpt.checks.speed import time_step
from mygpt.data.dataset import Dataset
from mygpt.data.tokenizer import CharTokenizer
from mygpt.errors import MygptError
from mygpt.model.gpt import GPT
from mygpt.processes.machine import peak_flops, resolve_device
from mygpt.recipe.flags import parse_recipe
from mygpt.recipe.tables import Recipe, check_recipe

VOCABULARY = 50304
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


class Variant(NamedTuple):
    """A change of the base."""

    name: str
    keys: dict[str, Any]
    context: AbstractContextManager[Any] = nullcontext()


def variants(base: Recipe) -> Iterator[Variant]:
    table, runtime = base.train, base.runtime
    for size in (4, 8, 16, 32, 64, 128):
        if size != table.batch_size:
            yield Variant(f"batch_size = {size}", {"batch_size": size})
    for key in ("compile", "deterministic"):
        value = not getattr(runtime, key)
        yield Variant(f"{key} = {value}", {key: value})
    both = {"compile": not runtime.compile, "deterministic": not runtime.deterministic}
    yield Variant(", ".join(f"{key} = {value}" for key, value in both.items()), both)
    other = "fp32" if runtime.precision == "bf16" else "bf16"
    yield Variant(f"precision = {other}", {"precision": other})
    for head_size in (32, 64, 128):
        if base.model.embed_dim % head_size == 0 and base.model.embed_dim // head_size != base.model.num_heads:
            yield Variant(f"heads {head_size} wide", {"num_heads": base.model.embed_dim // head_size})
    for backend in BACKENDS:
        yield Variant(f"attention by {backend.name.lower()}", {}, sdpa_kernel(backend))
    yield Variant("no clipping", {"max_grad_norm": 0.0})
    yield Variant("exact sums of two micro-batches", {"reduction": "exact", "micro_batch_size": table.batch_size // 2})


def main() -> None:
    base = parse_recipe(sys.argv[1:], "gpu.py")[0]
    device = resolve_device(base.runtime.device, base.runtime.precision)
    tokenizer = CharTokenizer("".join(chr(0x100 + token) for token in range(VOCABULARY)))
    tokens = torch.randint(VOCABULARY, (2**20,), generator=torch.Generator().manual_seed(0))
    dataset = Dataset(tokenizer, tokens, tokens[:0], "")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}; {base.flat()}")
    before = measure(base, device, dataset)
    report("base", base, before, before, device)
    for variant in variants(base):
        torch.compiler.reset()
        try:
            recipe = base.replace(**variant.keys)
            check_recipe(recipe)
            with variant.context:
                seconds = measure(recipe, device, dataset)
        except (RuntimeError, MygptError) as error:
            print(f"{variant.name:<40} not possible: {(str(error).splitlines() or [''])[0][:80]}", flush=True)
            continue
        torch.compiler.reset()
        after = measure(base, device, dataset)
        report(variant.name, recipe, seconds, math.sqrt(before * after), device)
        before = after
    for recipe in (base, base.replace(compile=not base.runtime.compile)):
        torch.compiler.reset()
        print(f"\nkernels of a few steps, with the first, compile = {recipe.runtime.compile}:")
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            time_step(recipe, device, dataset, 0)
        times: Counter[str] = Counter()
        for event in profiler.key_averages():
            # On a GPU the operators have the time of their kernels, too.
            if device.type == "cpu" or event.device_type.name == "CUDA":
                times[event.key] += event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
        total = sum(times.values())
        for kernel, time in times.most_common(25):
            print(f"{time / total:7.1%}  {kernel[:110]}")


def measure(recipe: Recipe, device: torch.device, dataset: Dataset) -> float:
    """Seconds a token."""
    seconds = time_step(recipe, device, dataset, 3).seconds / (recipe.train.batch_size * recipe.train.seq_len)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return seconds


def report(name: str, recipe: Recipe, seconds: float, base: float, device: torch.device) -> None:
    with torch.device("meta"):
        flops = GPT(recipe.model, VOCABULARY).flops_per_token(recipe.train.seq_len)
    peak = peak_flops(device, recipe.runtime.precision)
    mfu = f"   MFU {flops / seconds / peak:.3f}" if peak else ""
    print(f"{name:<40} {1 / seconds:>12,.0f} tokens/s   ratio {seconds / base:.3f}{mfu}", flush=True)


if __name__ == "__main__":
    main()
