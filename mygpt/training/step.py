"""One optimizer step."""

from typing import NamedTuple

import torch
from torch.nn.utils import get_total_norm

from mygpt.compat import full_tensor, update_unless
from mygpt.data.batches import Batch
from mygpt.training.parts import Parts


class Update(NamedTuple):
    """What an optimizer step measured: scalars on the device, which the host reads when it needs them."""

    loss: torch.Tensor
    """Mean loss before the update, of this process's share of the global batch or, summed exactly, of all of it."""
    grad_norm: torch.Tensor
    """Global L2 norm of the global batch's gradient, before clipping."""
    out_of_range: torch.Tensor
    """Micro-batches that an exact sum could not hold."""


def train_step(parts: Parts, batch: Batch, step: int) -> Update:
    """Optimizer step number `step` (1-based), on this process's share of the global batch.

    Gradients are averaged over micro-batches and processes, and clipped to a global L2 norm of the recipe's
    max_grad_norm (0: not clipped). Once a loss or norm is not finite nothing is updated any more; the host does not
    wait to know.
    """
    accelerator, max_grad_norm = parts.accelerator, parts.recipe.train.max_grad_norm
    loss, out_of_range = parts.gradient_sum.backward(accelerator, parts.model, batch, step)
    if max_grad_norm:
        grad_norm = accelerator.clip_grad_norm_(parts.parameters, max_grad_norm)
    else:
        grad_norm = get_total_norm(p.grad for p in parts.parameters if p.grad is not None)
    grad_norm = full_tensor(grad_norm)
    update_unless(parts.optimizer, ~torch.isfinite(grad_norm) | (out_of_range > 0))
    return Update(loss, grad_norm, out_of_range)
