"""Measures how often the 95% interval of a held-out loss contains the true loss, and that of a difference the true one.

    mygpt train hardened --val-split 0.9 --lr 3e-3 --output checkpoints/little
    mygpt train hardened --val-split 0.9 --lr 3e-3 --seed 5 --output checkpoints/other
    python scripts/coverage.py checkpoints/little checkpoints/other

The truth is the loss over all of a run's held-out text, so hold out much of it. For runs that hold out the same text it
is also the difference between their losses, and estimates are made from the differences between the same windows.

Estimates are made in four ways, each of which is a sample of the held-out text:

random batches: windows drawn at random, as with sampling = "own-stream".
in the order of the text: stretches of consecutive windows, as sampling = "full" evaluates them. How a stretch differs
    from the rest of the text cannot be seen within it, so that many of these intervals are too narrow.
in random order: the same, after the text was cut into pieces of the length of a short document, and these were
    shuffled. That is a text whose documents come in no order.
random pieces: some of these pieces, drawn at random, and the loss of each counts as one number. So would be a held-out
    text that is made of pieces from all over the source.

Of each it prints how many intervals contain the truth; how many estimates there are, and how many of them share no
window; the mean half width of the intervals; and this relative to the narrowest that would do, which is
1.96 times the root mean square of the errors.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mygpt.data.batches import consecutive_windows
from mygpt.data.dataset import load_dataset
from mygpt.errors import MygptError
from mygpt.estimates import Estimate, ratio_estimate
from mygpt.recipe.tables import DataTable
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.run import RunDirectory
from mygpt.training.evaluate import window_losses

STRETCHES = (50, 100, 200, 400, 800, 1742, 3484)
"""Windows in a stretch; 1742 is the number that val_split = 0.1 holds out of Tiny Shakespeare."""
MIN_STRETCHES = 8
"""A text is long enough for stretches of which it has so many."""
PIECE = 60
"""Windows in a piece; with 64 characters in a window, the length of a film review."""
PIECES = (8, 16, 30, 60)
SHUFFLES = 20
BATCHES = (1, 10, 50)
BATCH = 16
DRAWS = 2000


class Losses(NamedTuple):
    """Losses of the whole windows of a held-out text, in order, or differences between such losses."""

    name: str
    data: DataTable
    seq_len: int
    totals: torch.Tensor
    """The total over each window, float64 (windows,)."""


def main() -> None:
    runs = [held_out_losses(run) for run in map(Path, sys.argv[1:])]
    for losses in [*runs, *differences(runs)]:
        truth = losses.totals.mean().item() / losses.seq_len
        print(f"{losses.name}: {truth:.4f} over {len(losses.totals):,} windows")
        print(f"  {'':<44} held     of  apart  half width  relative")
        for name, apart, results in estimates(losses):
            errors = [abs(result.mean - truth) for result in results]
            widths = [result.margin for result in results]
            held = sum(error <= width for error, width in zip(errors, widths, strict=True)) / len(results)
            width = sum(widths) / len(widths)
            ideal = 1.96 * math.sqrt(sum(error**2 for error in errors) / len(errors))
            print(f"  {name:<44} {held:5.1%} {len(results):6} {apart:6}  {width:10.4f}  {width / ideal:8.2f}")


def held_out_losses(run: Path) -> Losses:
    """The losses of a run over its held-out text."""
    recipe, (model, _, _) = RunDirectory(run).recipe, load_checkpoint(run)
    seq_len = recipe.train.seq_len
    val = load_dataset(recipe.data, seq_len).val
    needed = MIN_STRETCHES * STRETCHES[1] * seq_len
    if len(val) <= needed:
        raise MygptError(f"{run}: holds out {len(val):,} tokens; expected more than {needed:,}")
    loss_N = window_losses(model, val, consecutive_windows(val, seq_len)[0], 256).double()
    return Losses(str(run), recipe.data, seq_len, loss_N)


def differences(runs: list[Losses]) -> Iterator[Losses]:
    """The differences between the losses of every two runs that hold out the same tokens."""
    for first, second in itertools.combinations(runs, 2):
        if (first.data, first.seq_len) == (second.data, second.seq_len):
            yield first._replace(name=f"{first.name} less {second.name}", totals=first.totals - second.totals)


def estimates(losses: Losses) -> Iterator[tuple[str, int, list[Estimate]]]:
    """Each kind of estimate by name, how many of its samples share no window, and its results."""
    loss_N, seq_len = losses.totals, losses.seq_len
    generator = torch.Generator().manual_seed(0)

    def estimate(sample_N: torch.Tensor, windows: int = 1, *, consecutive: bool = False) -> Estimate:
        lengths_N = np.full(len(sample_N), float(windows * seq_len))
        return ratio_estimate(sample_N.numpy(), lengths_N, consecutive=consecutive)

    for batches in BATCHES:
        draws = [torch.randint(len(loss_N), (batches * BATCH,), generator=generator) for _ in range(DRAWS)]
        yield f"{batches} random batches of {BATCH}", DRAWS, [estimate(loss_N[draw]) for draw in draws]

    piece_KP = loss_N[: len(loss_N) // PIECE * PIECE].view(-1, PIECE)
    shuffled = [piece_KP[torch.randperm(len(piece_KP), generator=generator)].flatten() for _ in range(SHUFFLES)]
    for order, texts, overlap in (("the order of the text", [loss_N], 4), ("random order", shuffled, 1)):
        for windows in STRETCHES:
            apart = [text.unfold(0, windows, windows) for text in texts]
            if len(apart[0]) >= MIN_STRETCHES:
                stretches = [stretch for text in texts for stretch in text.unfold(0, windows, windows // overlap)]
                results = [estimate(stretch, consecutive=True) for stretch in stretches]
                yield f"{windows} windows, in {order}", sum(map(len, apart)), results

    piece_K = piece_KP.sum(1)
    for pieces in PIECES:
        if len(piece_K) >= MIN_STRETCHES * pieces:
            draws = [torch.randperm(len(piece_K), generator=generator)[:pieces] for _ in range(DRAWS)]
            results = [estimate(piece_K[draw], PIECE) for draw in draws]
            yield f"{pieces} random pieces of {PIECE} windows", DRAWS, results


if __name__ == "__main__":
    main()
