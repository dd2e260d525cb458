"""Steps whose numbers the host has not read yet, so that it can run ahead of the device."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from mygpt.training.state import GeneratorStates

MAX_UNREAD_SECONDS = 1.0
"""Seconds of training after which a signal to another process, or a non-finite number, is noticed at the latest."""


class Update(NamedTuple):
    """What an optimizer step measured: scalars on the device, which the host reads when it needs them."""

    loss: torch.Tensor
    """Mean loss before the update, of this process's share of the global batch or, summed exactly, of all of it."""
    grad_norm: torch.Tensor
    """Global L2 norm of the global batch's gradient, before clipping."""
    out_of_range: torch.Tensor
    """Micro-batches that an exact sum could not hold."""


class Reading(NamedTuple):
    """What the host has read of the newest step, or of the first one that was not finite; the same on all processes."""

    step: int
    generators: GeneratorStates
    """As they were before the step."""
    loss: float
    """Mean loss of the global batch."""
    grad_norm: float
    out_of_range: float
    stop: int
    """The signal that asked some process to stop; 0: none did."""
    save: bool
    """Whether some process has found that it is time for a checkpoint."""

    @property
    def is_finite(self) -> bool:
        """Whether the step updated the weights; if not, those after it did not, either."""
        return is_finite(self.loss, self.grad_norm, self.out_of_range)


def is_finite(loss: float, grad_norm: float, out_of_range: float) -> bool:
    """Whether an update with these numbers is made."""
    return math.isfinite(loss) and math.isfinite(grad_norm) and not out_of_range


class PendingSteps:
    """Collects the updates of steps and reads them together, with one wait for the device and one message.

    All processes read after the same steps: when something is due, or after about `MAX_UNREAD_SECONDS` of training.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._steps: list[tuple[int, GeneratorStates, Update]] = []
        self._max_steps = 1
        self._started_at = time.perf_counter()

    def add(self, step: int, generators: GeneratorStates, update: Update) -> None:
        self._steps.append((step, generators, update))

    def must_be_read(self, stop: bool) -> bool:
        """Whether it is time to read; a process alone reads at once when it is asked to `stop`."""
        return len(self._steps) >= self._max_steps or (stop and self._accelerator.num_processes == 1)

    def read(self, stop: int, *, save: bool = False) -> Reading:
        """Wait for the device, and average over the processes what the pending steps measured.

        `stop` is the signal that asked this process to stop; 0: none did. `save`: it is time for a checkpoint.
        """
        own = torch.stack([value for _, _, update in self._steps for value in update])
        own[-1].item()  # so that the time is that of the steps, not of asking for them
        seconds = (time.perf_counter() - self._started_at) / len(self._steps)
        own = torch.cat([own, own.new_tensor([stop, save, seconds])])
        processes = self._accelerator.num_processes
        shared = self._accelerator.gather(own) if processes > 1 else own
        *columns, stops, saves, seconds_each = zip(*shared.view(processes, -1).tolist(), strict=True)
        # Correctly rounded, so that a mean does not depend on the order, and that of equal values is the value.
        values = list(map(mean, columns))
        measured = list(zip(values[::3], values[1::3], values[2::3], strict=True))
        chosen = next((index for index, three in enumerate(measured) if not is_finite(*three)), -1)
        step, generators, _ = self._steps[chosen]
        self._steps, self._max_steps = [], max(1, int(MAX_UNREAD_SECONDS / mean(seconds_each)))
        # The smallest: SIGINT, from a user, makes a launcher send SIGTERM to the other processes.
        stop = int(min(filter(None, stops), default=0))
        return Reading(step, generators, *measured[chosen], stop, any(saves))

    def restart_clock(self) -> None:
        """Leave the time since the last reading, which went into evaluation and saving, out of the time per step."""
        self._started_at = time.perf_counter()


def mean(values: Sequence[float]) -> float:
    """The mean, rounded once; nan if one of them is nan, or if they are infinite both ways."""
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):
        return math.nan
