"""Steps whose numbers the host has not read yet, so that it can run ahead of the device."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from mygpt.training.state import GeneratorStates
from mygpt.training.step import Update

MAX_UNREAD_SECONDS = 1.0
"""Seconds of training after which a signal to another process, or a non-finite number, is noticed at the latest."""


class Measured(NamedTuple):
    """An `Update` as the host has read it; the same on all processes."""

    loss: float
    """Mean loss of the global batch."""
    grad_norm: float
    out_of_range: float

    @property
    def is_finite(self) -> bool:
        """Whether the loss and the norm are finite; if not, there was no update."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm) and not self.out_of_range


class NonFiniteStep(NamedTuple):
    """A step with a loss or gradient that is not finite: it and those after it updated nothing."""

    step: int
    measured: Measured
    before: GeneratorStates
    """The generators as they were before the step."""


class Reading(NamedTuple):
    """What the host has read; the same on all processes."""

    last: Measured
    """Of the newest step."""
    non_finite: NonFiniteStep | None
    """The first step that was not finite."""
    stop: int
    """The signal that asked some process to stop; 0: none did."""
    save: bool
    """Whether some process has found that it is time for a checkpoint."""


class PendingSteps:
    """Collects the updates of steps and reads them together, with one wait for the device and one message.

    All processes read after the same steps: when something is due, or after about `MAX_UNREAD_SECONDS` of training.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._steps: list[tuple[int, GeneratorStates, Update]] = []
        self._max_steps = 1
        self._started_at = time.perf_counter()

    def add(self, step: int, before: GeneratorStates, update: Update) -> None:
        self._steps.append((step, before, update))

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
        measured = [Measured(*three) for three in zip(values[::3], values[1::3], values[2::3], strict=True)]
        read = zip(self._steps, measured, strict=True)
        non_finite = (NonFiniteStep(step, now, before) for (step, before, _), now in read if not now.is_finite)
        self._steps, self._max_steps = [], max(1, int(MAX_UNREAD_SECONDS / mean(seconds_each)))
        # The smallest: SIGINT, from a user, makes a launcher send SIGTERM to the other processes.
        stop = int(min(filter(None, stops), default=0))
        return Reading(measured[-1], next(non_finite, None), stop, any(saves))

    def restart_clock(self) -> None:
        """Leave the time since the last reading, which went into evaluation and saving, out of the time per step."""
        self._started_at = time.perf_counter()


def mean(values: Sequence[float]) -> float:
    """The mean, rounded once; nan if one of them is nan, or if they are infinite both ways."""
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):
        return math.nan
