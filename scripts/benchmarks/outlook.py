"""Trains models of several sizes on several texts, and fits the formula by which `mygpt init` predicts losses.

    python scripts/benchmarks/outlook.py --texts a.txt b.txt --size 0 1 --millions 1 4
    python scripts/benchmarks/outlook.py

The first trains on each text with the recipes that `mygpt init` writes (sizes count from 0), and adds a line for each
run to outlook.csv. The second prints the constants for mygpt/planning/outlook.py, and how far predictions are off for a
text that the formula was not fitted to. Needs pip install tokenizers.
"""

import argparse
import csv
import itertools
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mygpt.model.gpt import GPT
from mygpt.planning.outlook import Constants, terms
from mygpt.planning.plan import DROPOUT, DROPOUT_FROM, SIZES, recipe_for
from mygpt.planning.text import look_at
from mygpt.runs.records import read_records
from mygpt.training.train import train

RUNS = Path(__file__).with_name("outlook.csv")
LEFT_OUT = ("languages",)
"""A text in hundreds of languages by their names: its end is unlike the rest, and no formula for texts that are alike
throughout fits it."""


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="text files to train on; absent: fit only")
    parser.add_argument("--size", type=int, nargs="+", default=[0], help="sizes of the model, from 0")
    parser.add_argument("--millions", type=float, nargs="+", default=[1.0], help="tokens to train on")
    options = parser.parse_args()
    for path, size, millions in itertools.product(options.texts, options.size, options.millions):
        add(measure(path, size, millions))
    if not options.texts:
        report(read())


def measure(path: Path, size: int, millions: float) -> Row:
    text = look_at(str(path), is_prepared=False)
    dropout = DROPOUT if millions * 1e6 > DROPOUT_FROM * 0.9 * text.tokens else 0.0
    recipe = recipe_for(SIZES[size], millions * 1e6, text, held_out=0.1, dropout=dropout)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe.replace(val_every=recipe.train.steps, save_every=0, save_best=False, output=f"{folder}/run")
        last = read_records(train(recipe))[-1]
    assert last.val_bits_per_byte is not None
    with torch.device("meta"):
        gpt = GPT(recipe.model, text.tokenizer.vocab_size)
    return Row(
        text=path.stem,
        ngram_bits=round(text.ngram_bits, 4),
        tokenizer=recipe.data.tokenizer,
        params=gpt.num_params(),
        trained_bytes=round(last.tokens * text.bytes / text.tokens),
        unique_bytes=round(0.9 * text.bytes),
        dropout=recipe.model.dropout,
        bits_per_byte=round(last.val_bits_per_byte, 4),
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
    """The constants with the least squared errors, relative to the losses.

    Raises:
        ValueError: one of them is not positive, so that the runs are too few or too much alike.
    """
    measured = torch.tensor([row.bits_per_byte / row.ngram_bits for row in rows], dtype=torch.float64)
    parts = torch.tensor([terms(row.params, row.trained_bytes, row.unique_bytes) for row in rows], dtype=torch.float64)
    solution = torch.linalg.lstsq(parts / measured[:, None], torch.ones(len(rows), 1, dtype=torch.float64)).solution
    constants = Constants(*solution[:, 0].tolist())
    if min(constants) <= 0:
        raise ValueError(f"{len(rows)} runs give {constants}: measure others, too")
    return constants


def error(row: Row, constants: Constants) -> float:
    """The logarithm of a run's loss over the predicted one."""
    parts = zip(constants, terms(row.params, row.trained_bytes, row.unique_bytes), strict=True)
    return math.log(row.bits_per_byte / row.ngram_bits / sum(constant * term for constant, term in parts))


def report(rows: Sequence[Row]) -> None:
    rows = [row for row in rows if row.text not in LEFT_OUT]
    print(f"CONSTANTS = Constants({', '.join(f'{value:.3f}' for value in fit(rows))})")
    errors = []
    for text in dict.fromkeys(row.text for row in rows):
        others = fit([row for row in rows if row.text != text])
        own = [error(row, others) for row in rows if row.text == text]
        errors += own
        print(f"{text:<14}" + " ".join(f"{value:+.3f}" for value in own))
    print(f"SPREAD = {math.sqrt(statistics.fmean(value**2 for value in errors)):.3f}")


if __name__ == "__main__":
    main()
