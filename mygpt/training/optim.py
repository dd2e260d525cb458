"""The learning rate as a pure function of the step, the optimizer and the scheduler."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from mygpt.compat import AdamW
from mygpt.recipe.tables import OptimizerTable, ScheduleTable


def cosine_warmup_lr(step: int, warmup: int, total: int, max_lr: float, min_lr: float = 0.0) -> float:
    """The rate of 1-based `step`: `max_lr * step / warmup` before step `warmup`, then half a cosine from `max_lr`
    at `warmup` down to `min_lr` at `total`, and `min_lr` from there on.

    Source: Loshchilov & Hutter, "SGDR" (https://arxiv.org/abs/1608.03983), one cycle.
    """
    if step < warmup:
        return max_lr * step / warmup
    if step >= total:
        return min_lr
    progress = (step - warmup) / (total - warmup)
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * progress))


def learning_rate(step: int, table: ScheduleTable, peak_lr: float, steps: int) -> float:
    """The rate of 1-based `step` in a run of `steps` optimizer steps."""
    if table.schedule == "cosine":
        return cosine_warmup_lr(step, table.warmup, steps, peak_lr, table.min_lr)
    if step < table.warmup:
        return peak_lr * step / table.warmup
    if table.schedule == "constant":
        return peak_lr
    if table.schedule == "wsd":
        start = table.decay_starts(steps)
        return peak_lr if step <= start else straight_line(step, start, steps, peak_lr, table.min_lr)
    # Linear: a straight line in place of the half cosine, with the same area under it.
    return straight_line(step, table.warmup, steps, peak_lr, table.min_lr)


def straight_line(step: int, start: int, end: int, max_lr: float, min_lr: float) -> float:
    """The rate at `step` of a line from `max_lr` at step `start` to `min_lr` at step `end`, and on."""
    if step >= end:
        return min_lr
    progress = (step - start) / (end - start)
    return max_lr + (min_lr - max_lr) * progress


def build_optimizer(model: torch.nn.Module, table: OptimizerTable) -> torch.optim.Optimizer:
    """Fused AdamW over every parameter of `model`, those that decay first.

    Its rate is 1, so that the scheduler's factor is the rate, to the last bit. Any optimizer can take its place whose
    state is numbers and tensors, of parameters (`state`) or of groups, and whose `step` needs no closure.
    """
    decaying, others = (list(part.values()) for part in split_by_decay(dict(model.named_parameters()), table))
    groups: list[dict[str, Any]] = [{"params": decaying}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return AdamW(
        groups,
        lr=1.0,
        betas=(table.beta1, table.beta2),
        eps=table.eps,
        weight_decay=table.weight_decay,
        fused=True,
    )


def split_by_decay(
    weights: Mapping[str, torch.Tensor], table: OptimizerTable
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights that decay, and the others, by name: the optimizer's order."""
    decaying = {name: weight for name, weight in weights.items() if table.decay == "all" or weight.dim() > 1}
    return decaying, {name: weight for name, weight in weights.items() if name not in decaying}


def build_scheduler(
    optimizer: torch.optim.Optimizer, table: ScheduleTable, peak_lr: float, steps: int, steps_done: int = 0
) -> LambdaLR:
    """Sets `learning_rate(t)` before optimizer step t; to be stepped once after each optimizer step.

    The rate is a function of the step, so that the number of `steps_done` is all there is to restore.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1.0
    return LambdaLR(optimizer, lambda done: learning_rate(done + 1, table, peak_lr, steps), last_epoch=steps_done - 1)
