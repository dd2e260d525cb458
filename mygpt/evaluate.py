"""The held-out loss, with its standard error."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from mygpt.data import Places, random_places, windows


class HeldOutLoss(NamedTuple):
    """Mean cross-entropy per token, and the standard error of that mean; both in nats."""

    mean: float
    stderr: float | None
    """Taking the windows as the independent sample; None for a single window, which has no spread to tell it from."""


def estimate_val_loss(
    model: torch.nn.Module, val_data: torch.Tensor, batch_size: int, seq_len: int, n_eval_batches: int = 10
) -> float:
    """The mean loss over random batches of `val_data` (n,), drawn from torch's global generator.

    No gradients are kept, and the model is left in the mode in which it was.
    """
    places = random_places(val_data, batch_size, seq_len, n_eval_batches, None)
    return held_out_loss(model, val_data, places, batch_size).mean


def held_out_loss(
    model: torch.nn.Module,
    data: torch.Tensor,
    places: Iterable[Places],
    micro_batch_size: int,
    accelerator: Accelerator | None = None,
) -> HeldOutLoss:
    """The loss over the windows of `data` (n,) at `places`, in eval mode.

    With an accelerator its processes share them. `micro_batch_size` windows go through the model at a time. Every token
    counts the same. The standard error is that of a ratio estimate (total loss over total tokens), so that a shorter
    window is weighed by its length.
    Source: Cochran, "Sampling Techniques" (1977), section 2.11.
    """
    was_training = model.training
    model.eval()
    try:
        losses = [window_losses(model, data, group, micro_batch_size, accelerator) for group in places]
    finally:
        model.train(was_training)
    # On the CPU, since mps has no float64.
    loss_N = torch.cat([loss_B.cpu().double() for loss_B in losses])
    length_N = torch.cat([torch.full((len(g.starts),), g.seq_len, dtype=torch.float64) for g in places])
    count, mean, length = len(loss_N), (loss_N.sum() / length_N.sum()).item(), length_N.sum().item()
    residual = (loss_N - mean * length_N).square().sum().item()
    stderr = math.sqrt(residual * count / (count - 1)) / length if count > 1 else None
    return HeldOutLoss(mean, stderr)


@torch.no_grad()
def window_losses(
    model: torch.nn.Module, data: torch.Tensor, places: Places, micro_batch_size: int, accelerator: Accelerator | None
) -> torch.Tensor:
    """The total loss of each window (batch,), known to every process."""
    device = next(model.parameters()).device
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    pieces = places.starts.split(micro_batch_size)
    dtype = next(model.parameters()).dtype
    losses_N = torch.zeros(len(places.starts), dtype=dtype, device=device)
    for first in range(0, len(pieces), processes):
        # Where pieces run out a process repeats the last, since gathering sharded weights needs them all.
        own = min(first + process, len(pieces) - 1)
        inputs_BT, targets_BT = (rows.to(device) for rows in windows(data, pieces[own], places.seq_len))
        logits_BTV = model(inputs_BT)
        losses_BT = F.cross_entropy(logits_BTV.to(losses_N.dtype).flatten(0, 1), targets_BT.flatten(), reduction="none")
        if own == first + process:
            losses_N[own * micro_batch_size :][: len(inputs_BT)] = losses_BT.view(targets_BT.shape).sum(1)
    # Every window has its loss from one process and zeros from the others: the sum is exact in any order.
    return accelerator.reduce(losses_N, "sum") if accelerator and processes > 1 else losses_N
