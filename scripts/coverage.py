"""Measures how often the 95% interval of a held-out loss contains the true loss.

    mygpt train hardened --val-split 0.9 --lr 3e-3 --output checkpoints/little
    python scripts/coverage.py checkpoints/little

The true loss is that over all of a run's held-out text, so hold out much of it. Stretches of that text are evaluated
in full, and random batches are drawn from it; each gives an interval, as mygpt prints it. For comparison, stretches are
also evaluated as if their windows were independent, which they are not.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from scipy.stats import t as student

from mygpt.data.batches import consecutive_windows
from mygpt.data.dataset import load_dataset
from mygpt.errors import MygptError
from mygpt.runs.loading import load_checkpoint
from mygpt.runs.run import Run
from mygpt.training.evaluate import HeldOutLoss, ratio_estimate, window_losses

STRETCHES = (100, 400, 1742)
"""Windows in a stretch; the last is the number that val_split = 0.1 holds out of Tiny Shakespeare."""
DRAWS = 2000
BATCH = 16


def main() -> None:
    for run in map(Path, sys.argv[1:]):
        loss_N, seq_len = held_out_losses(run)
        truth = loss_N.mean().item() / seq_len
        print(f"{run}: held-out loss {truth:.4f} over {len(loss_N):,} windows")
        for name, results in estimates(loss_N, seq_len):
            held = [abs(result.mean - truth) <= interval(result) for result in results]
            error = sum(result.stderr or 0 for result in results) / len(results)
            print(f"  {name:<42} {sum(held) / len(held):6.1%} of {len(held):5}   mean standard error {error:.4f}")


def held_out_losses(run: Path) -> tuple[torch.Tensor, int]:
    """The total loss of each whole window of a run's held-out text, in order, and the tokens in a window."""
    recipe, (model, _, _) = Run(run).recipe, load_checkpoint(run)
    seq_len = recipe.train.seq_len
    val = load_dataset(recipe.data, seq_len).val
    if len(val) < 2 * STRETCHES[-1] * seq_len:
        raise MygptError(f"{run}: holds out {len(val):,} tokens; expected {2 * STRETCHES[-1] * seq_len:,} or more")
    return window_losses(model, val, consecutive_windows(val, seq_len)[0], 256).double(), seq_len


def estimates(loss_N: torch.Tensor, seq_len: int) -> Iterator[tuple[str, list[HeldOutLoss]]]:
    """Each kind of estimate by name, with its results on many stretches or draws."""

    def estimate(losses: torch.Tensor, *, consecutive: bool) -> HeldOutLoss:
        return ratio_estimate(losses, torch.full_like(losses, seq_len), consecutive=consecutive)

    for windows in STRETCHES:
        starts = range(0, len(loss_N) - windows + 1, max(1, windows // 4))
        stretches = [loss_N[start : start + windows] for start in starts]
        for consecutive, manner in ((True, "batches"), (False, "as if independent")):
            yield f"{windows} consecutive windows, {manner}", [estimate(s, consecutive=consecutive) for s in stretches]
    generator = torch.Generator().manual_seed(0)
    for batches in (1, 10, 50):
        draws = (torch.randint(len(loss_N), (batches * BATCH,), generator=generator) for _ in range(DRAWS))
        yield f"{batches} random batches of {BATCH}", [estimate(loss_N[draw], consecutive=False) for draw in draws]


def interval(result: HeldOutLoss) -> float:
    """Half the width of the 95% interval."""
    return float(student.ppf(0.975, result.dof)) * (result.stderr or 0)


if __name__ == "__main__":
    main()
