"""The held-out loss, with its standard error."""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from mygpt.data import Batch, Rows, random_batches


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
    batches = random_batches(val_data, batch_size, seq_len, n_eval_batches, None, Rows())
    return held_out_loss(model, batches).mean


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    micro_batch_size: int | None = None,
    accelerator: Accelerator | None = None,
) -> HeldOutLoss:
    """The loss over `batches` in eval mode; with an accelerator, over those of all processes together.

    At most `micro_batch_size` windows go through the model at a time. Every token counts the same. The standard error
    is that of a ratio estimate (total loss over total tokens), so that a shorter window is weighed by its length.
    Source: Cochran, "Sampling Techniques" (1977), section 2.11.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # Number of windows, and the sums of their losses, lengths, and products of these; in float64, so that sums of many
    # windows keep their last digits in any order, and so on the CPU, since mps has none.
    sums = torch.zeros(6, dtype=torch.float64)
    try:
        pieces = (zip(*(rows.split(micro_batch_size or len(rows)) for rows in b), strict=True) for b in batches)
        for inputs, targets in itertools.chain.from_iterable(pieces):
            if len(inputs):
                logits_BTV = model(inputs.to(device))
                losses_BT = F.cross_entropy(
                    logits_BTV.flatten(0, 1), targets.to(device).flatten(), reduction="none"
                ).view(targets.shape)
                loss_B = losses_BT.sum(1).cpu().double()
                length_B = torch.full_like(loss_B, targets.shape[1])
                products = (torch.ones_like(loss_B), loss_B, length_B, loss_B**2, loss_B * length_B, length_B**2)
                sums += torch.stack([product.sum() for product in products])
    finally:
        model.train(was_training)
    if accelerator is not None and accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), "sum")
    count, loss, length, loss_loss, loss_length, length_length = sums.tolist()
    mean = loss / length
    residual = max(0.0, loss_loss - 2 * mean * loss_length + mean**2 * length_length)
    stderr = math.sqrt(residual * count / (count - 1)) / length if count > 1 else None
    return HeldOutLoss(mean, stderr)
