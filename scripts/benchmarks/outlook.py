"""Trains models of several sizes on several texts, and fits the formula by which `mygpt init` predicts losses.

    python scripts/benchmarks/outlook.py --texts a.txt b.txt --size 0 1 --millions 1 4
    python scripts/benchmarks/outlook.py

The first trains on each text with the recipes that `mygpt init` writes (sizes count from 0), and adds a line for each
run to outlook.csv. The second prints the constants for mygpt/planning/outlook.py, and how far predictions are off for a
text that the formula was not fitted to. Needs pip install 'mygpt[text]'.
"""

import csv
import itertools
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from mygpt.data.dataset import load_dataset
from mygpt.model.gpt import GPT
from mygpt.planning.outlook import CONSTANTS, Constants, ratio
from mygpt.planning.plan import SIZES, recipe_for
from mygpt.planning.text import look_at, tokenizer_keys
from mygpt.runs.records import read_records
from mygpt.training.train import train

RUNS = Path(__file__).with_name("outlook.csv")


class Row(NamedTuple):
    """A run: its text, its size, and the loss that it reached."""

    text: str
    ngram_bits: float
    tokenizer: str
    params: int
    trained_bytes: int
    unique_bytes: int
    dropout: float
    bits_per_byte: float


@dataclass(frozen=True)
class Options:
    texts: tuple[Path, ...] = ()
    """Text files to train on; absent: fit only."""
    size: tuple[int, ...] = (0,)
    millions: tuple[float, ...] = (1.0,)
    """Tokens to train on."""
    tokenizer: str | None = None
    """Absent: the one that `mygpt init` chooses."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    for path, size, millions in itertools.product(options.texts, options.size, options.millions):
        add(measure(path, size, millions, options.tokenizer))
    if not options.texts:
        report(read())


def measure(path: Path, size: int, millions: float, tokenizer: str | None) -> Row:
    text = look_at(str(path), is_prepared=False)
    keys = {"tokenizer": tokenizer} if tokenizer else tokenizer_keys(text.bytes, text.sample)
    with tempfile.TemporaryDirectory() as folder:
        keys |= {"corpus": str(path), "output": f"{folder}/run"}
        dataset = load_dataset(recipe_for(SIZES[size], 1e6, 1, 0.1, keys).data, SIZES[size].seq_len)
        tokens = len(dataset.train) + len(dataset.val)
        recipe = recipe_for(SIZES[size], millions * 1e6, tokens, 0.1, keys)
        last = read_records(train(recipe.replace(val_every=recipe.train.steps, save_best=False)))[-1]
        with torch.device("meta"):
            gpt = GPT(recipe.model, dataset.tokenizer.vocab_size)
    assert last.val_bits_per_byte is not None
    bytes_per_token = text.bytes / tokens
    return Row(
        path.stem,
        round(text.bits_per_byte, 4),
        keys["tokenizer"],
        gpt.num_params(),
        round(last.tokens * bytes_per_token),
        round(len(dataset.train) * bytes_per_token),
        recipe.model.dropout,
        round(last.val_bits_per_byte, 4),
    )


def add(row: Row) -> None:
    with RUNS.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(row)
    print(*row, flush=True)


def read() -> list[Row]:
    """The rows of outlook.csv, without its first line, which has their names."""
    kinds = list(Row.__annotations__.values())
    with RUNS.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))[1:]
    return [Row(*(kind(value) for kind, value in zip(kinds, line, strict=True))) for line in lines]


def fit(rows: Sequence[Row]) -> Constants:
    """The constants with the least squared errors."""
    logs = torch.tensor(CONSTANTS, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        constants = Constants(*logs.exp())
        total = torch.stack([error(row, constants) for row in rows]).square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return Constants(*logs.detach().exp().tolist())


def error(row: Row, constants: Any) -> Any:
    """The logarithm of a run's loss over the predicted one; a tensor if the constants are."""
    predicted = row.ngram_bits * ratio(row.params, row.trained_bytes, row.unique_bytes, constants)
    log = torch.log if isinstance(predicted, torch.Tensor) else math.log
    return math.log(row.bits_per_byte) - log(predicted)


def report(rows: Sequence[Row]) -> None:
    print(f"CONSTANTS = Constants({', '.join(f'{value:.4g}' for value in fit(rows))})")
    errors = []
    for text in dict.fromkeys(row.text for row in rows):
        others = fit([row for row in rows if row.text != text])
        own = [error(row, others) for row in rows if row.text == text]
        errors += own
        print(f"{text:<14} of {len(own)} runs: " + " ".join(f"{value:+.3f}" for value in own))
    print(f"SPREAD = {math.sqrt(statistics.fmean(value**2 for value in errors)):.3f}")


if __name__ == "__main__":
    main()
