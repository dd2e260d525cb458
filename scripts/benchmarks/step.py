"""Time per training step: mygpt's loop, a plain PyTorch loop around the same model, and the plainest implementation.

    python scripts/benchmarks/step.py recipes/default.toml [--any-recipe-flag]

The contenders take turns, a block of steps each, in one process: read the ratios, since a machine's speed drifts. MFU
is the model FLOPs utilisation; see `GPT.flops_per_token` and `peak_flops`.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable

import reference
import torch
from accelerate import Accelerator

from mygpt.data.batches import BatchStream, Share
from mygpt.data.dataset import Dataset, load_dataset
from mygpt.model.gpt import GPT
from mygpt.processes.machine import peak_flops, resolve_device, set_up
from mygpt.recipe.flags import RecipeOptions, parse_recipe
from mygpt.recipe.tables import Recipe
from mygpt.training.gradient_sum import gradient_sum_for
from mygpt.training.loop import train_step
from mygpt.training.parts import build_parts, open_accelerator


class Options(RecipeOptions):
    rounds: int = 12
    """Turns of each contender; the median is printed."""
    steps_per_round: int = 40
    """Steps in one turn."""


def main() -> None:
    recipe, options = parse_recipe(sys.argv[1:], "step.py", Options)
    device = resolve_device(recipe.runtime.device, recipe.runtime.precision)
    threads = set_up(recipe.runtime, device).threads
    dataset = load_dataset(recipe.data, recipe.train.seq_len).to(device)
    with open_accelerator(recipe.runtime, device, gradient_sum_for(recipe).accumulation_steps) as accelerator:
        contenders = {
            "mygpt": mygpt_step(recipe, accelerator, dataset),
            "plain": plain_step(recipe, dataset, device),
        }
        if recipe.runtime.precision == "fp32":
            contenders["straightforward"] = straightforward_step(recipe, dataset, device)
        for step in contenders.values():
            time_steps(step, device, options.steps_per_round)
        rounds = [
            {name: time_steps(step, device, options.steps_per_round) for name, step in contenders.items()}
            for _ in range(options.rounds)
        ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {threads} threads"
    print(f"{name}, torch {torch.__version__}, {recipe.runtime.precision}, compile={recipe.runtime.compile}")
    tokens = recipe.train.batch_size * recipe.train.seq_len
    flops_per_token = GPT(recipe.model, dataset.tokenizer.vocab_size).flops_per_token(recipe.train.seq_len)
    peak = peak_flops(device, recipe.runtime.precision)
    for contender in contenders:
        seconds = statistics.median(r[contender] for r in rounds)
        ratio = statistics.median(r["mygpt"] / r[contender] for r in rounds)
        line = f"{contender:<16}{seconds * 1e3:8.2f} ms/step {tokens / seconds:12,.0f} tokens/s   mygpt/it {ratio:.3f}"
        if peak:
            line += f"   MFU {flops_per_token * tokens / seconds / peak:.3f}"
        print(line)


def mygpt_step(recipe: Recipe, accelerator: Accelerator, dataset: Dataset) -> Callable[[], None]:
    parts, steps = build_parts(recipe, accelerator, dataset, gradient_sum_for(recipe)), itertools.count(1)

    def step() -> None:
        train_step(parts, parts.stream.batch(), next(steps))
        parts.scheduler.step()

    return step


def plain_step(recipe: Recipe, dataset: Dataset, device: torch.device) -> Callable[[], None]:
    """The same model, batches and optimizer without Accelerate: what a careful user would write by hand."""
    model = GPT(recipe.model, dataset.tokenizer.vocab_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr, fused=True)
    table = recipe.train
    stream = BatchStream(dataset.train, table.batch_size, table.seq_len, seed=42, share=Share(table.batch_size))
    forward = torch.compile(model) if recipe.runtime.compile else model

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.runtime.precision == "bf16"):
            loss = forward(*stream.batch())
        loss.backward()
        if recipe.train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def straightforward_step(recipe: Recipe, dataset: Dataset, device: torch.device) -> Callable[[], None]:
    """reference.py, the program in the plainest PyTorch."""
    known = reference.Settings.__dataclass_fields__
    settings = {key: value for key, value in recipe.flat().items() if key in known}
    text = dataset.tokenizer.decode(torch.cat([dataset.train, dataset.val]).tolist())
    steps = reference.run(text, reference.Settings(**settings | {"steps": 10**9, "val_every": 0}), device=device)

    def step() -> None:
        next(steps)

    return step


def time_steps(step: Callable[[], None], device: torch.device, steps: int) -> float:
    """Seconds per step."""
    started_at = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started_at) / steps


if __name__ == "__main__":
    main()
