"""The sum of a step's gradients over micro-batches and processes, the same bits whoever computed which.

Adding floats rounds, so that a sum depends on its order; adding integers does not. The loss and gradients of each
micro-batch are rounded once, to multiples of 2**-40, and summed as int64.
Source: the idea of pre-rounding, Demmel & Nguyen, "Fast Reproducible Floating-Point Summation" (ARITH 2013).
"""

from collections.abc import Callable, Iterable

import torch

SCALE = 2.0**40
RANGE = 2.0**22
"""What no loss or gradient, and no sum of them, may exceed, so that it fits: half of 2**63 / SCALE."""


class ExactSum:
    """The mean over the `micro_batches` of a step, on all processes together, of the loss and of the gradients.

    `add` after each backward pass of this process, then `mean_over` the processes, once.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], micro_batches: int):
        self._parameters = list(parameters)
        self._micro_batches = micro_batches
        first = self._parameters[0]
        values = sum(parameter.numel() for parameter in self._parameters)
        # Of all gradients, the loss, and the number of micro-batches with a value that is out of range.
        self._sum = torch.zeros(values + 2, dtype=torch.int64, device=first.device)

    def add(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss (a scalar) and gradients, and set these to None."""
        gradients = [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in self._parameters]
        values = torch.cat([*gradients, loss[None]])
        for parameter in self._parameters:
            parameter.grad = None
        least, largest = torch.aminmax(values)
        limit = RANGE / self._micro_batches
        # True also of what is not a number.
        is_out = ~((-limit <= least) & (largest <= limit))
        # Exact but for the rounding: the scale is a power of two.
        self._sum[:-1] += values.mul_(SCALE).round_().long()
        self._sum[-1] += is_out

    def mean_over(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Set the gradients to their mean; returns the mean loss, and how many micro-batches were out of range.

        `reduce` sums an int64 tensor over the processes. If any micro-batch was out of range the means are garbage.
        """
        total = self._sum if reduce is None else reduce(self._sum)
        dtype = self._parameters[0].dtype
        means = total[:-1].to(dtype).div_(SCALE * self._micro_batches)
        *gradients, loss = torch.split(means, [*(parameter.numel() for parameter in self._parameters), 1])
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return loss[0], total[-1]


def fixed_micro_batch(batch_size: int) -> int:
    """The windows of a micro-batch that a recipe leaves open, the same on any number of processes: for four of them to
    share the batch, the largest divisor that is at most a quarter of it."""
    return next(size for size in range(max(1, batch_size // 4), 0, -1) if batch_size % size == 0)
