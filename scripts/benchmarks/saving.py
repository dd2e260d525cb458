"""What a checkpoint costs: mygpt's and Accelerate's save_state, in turns in one process.

    python scripts/benchmarks/saving.py recipes/default.toml --rounds 5
    python scripts/benchmarks/saving.py recipes/default.toml --embed-dim 768 --num-heads 12 --num-layers 12 \
        --max-seq-len 1024 --seq-len 64 --batch-size 1 --vocab 50257 --rounds 3   # 124 million weights

Both save the weights and AdamW's moments of a model that has made a step. "stall" is how long training waits. After
each save the loop trains for a few steps, whose time tells what writing beside it costs. "whole" is when the save is
done: mygpt's is then hashed and synced to the disk, the other's is with the system.
"""

import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from mygpt.data.dataset import Dataset
from mygpt.data.tokenizer import CharTokenizer
from mygpt.processes.machine import resolve_device, set_up
from mygpt.recipe.flags import RecipeOptions, parse_recipe
from mygpt.recipe.tables import Recipe
from mygpt.runs.saver import Saver
from mygpt.training.gradient_sum import gradient_sum_for
from mygpt.training.loop import train_step
from mygpt.training.parts import build_parts, open_accelerator


class Options(RecipeOptions):
    rounds: int = 5
    """Saves by each; the medians are printed."""
    vocab: int = 65
    """Size of the vocabulary."""
    steps_after: int = 3
    """Steps trained after each save."""
    folder: Path | None = None
    """Where to write; absent: a temporary directory."""


def main() -> None:
    recipe, options = parse_recipe(sys.argv[1:], "saving.py", Options)
    device = resolve_device(recipe.runtime.device, recipe.runtime.precision)
    set_up(recipe.runtime, device)
    with open_accelerator(recipe.runtime, device, gradient_sum_for(recipe).accumulation_steps) as accelerator:
        measure(recipe, options, accelerator, device)


def measure(recipe: Recipe, options: Options, accelerator: Accelerator, device: torch.device) -> None:
    tokenizer = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + options.vocab))))
    tokens = torch.randint(0, options.vocab, (100_000,))
    dataset = Dataset(tokenizer, tokens, tokens.new_empty(0), "0" * 64)
    parts, steps = build_parts(recipe, accelerator, dataset, gradient_sum_for(recipe)), itertools.count(1)

    def train(count: int) -> float:
        started_at = time.perf_counter()
        for _ in range(count):
            train_step(parts, parts.stream.batch(), 1)
        return time.perf_counter() - started_at

    train(3)
    root = Path(tempfile.mkdtemp(prefix="mygpt-saving-", dir=options.folder))
    saver = Saver(root, recipe.replace(keep_last=1), tokenizer)

    def save_mygpt() -> Callable[[], None]:
        saver.save(*parts.capture(next(steps)))
        return saver.wait

    def save_accelerate() -> Callable[[], None]:
        accelerator.save_state(str(root / "accelerate"))
        return lambda: None

    contenders = {"mygpt": save_mygpt, "save_state": save_accelerate}
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    alone = []
    try:
        for _ in range(options.rounds + 1):
            alone.append(train(options.steps_after))
            for name, save in contenders.items():
                shutil.rmtree(root / "accelerate", ignore_errors=True)
                started_at = time.perf_counter()
                finish = save()
                stall = time.perf_counter() - started_at
                trained = train(options.steps_after)
                finish()
                figures[name].append((stall, trained, time.perf_counter() - started_at if name == "mygpt" else stall))
    finally:
        saver.wait()
        shutil.rmtree(root)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {parts.gpt.num_params():,} parameters")
    # The first round fills the page cache, and mygpt's copies.
    without = statistics.median(alone[1:]) / options.steps_after
    print(f"{'no save':<12}{'':>24}  {without * 1e3:9.1f} ms/step")
    for name, rows in figures.items():
        stall, trained, whole = (statistics.median(column) for column in zip(*rows[1:], strict=True))
        first = rows[0][0]
        print(
            f"{name:<12}stall {stall * 1e3:8.1f} ms (first {first * 1e3:.0f})  "
            f"{trained / options.steps_after * 1e3:9.1f} ms/step after it, whole after {whole * 1e3:9.1f} ms"
        )


if __name__ == "__main__":
    main()
