"""How a step sums its gradients over micro-batches and processes: as floats, or exactly.

Adding floats rounds, so that a sum depends on its order; adding integers does not. An exact sum rounds the loss and
gradients of each micro-batch once, to multiples of 2**-40, and adds int64.
Source: the idea of pre-rounding, Demmel & Nguyen, "Fast Reproducible Floating-Point Summation" (ARITH 2013).
"""

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from accelerate import Accelerator
from torch.distributed import all_reduce
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mygpt.compat import autocast_forward
from mygpt.data.batches import Batch, Share
from mygpt.errors import RecipeError
from mygpt.model.gpt import GPT
from mygpt.processes.workers import ALONE, Workers
from mygpt.recipe.seeds import micro_batch_dropout_seed
from mygpt.recipe.tables import Recipe, TrainTable

SCALE = 2.0**40
RANGE = 2.0**22
"""What no loss or gradient, and no sum of them, may exceed, so that it fits: half of 2**63 / SCALE."""


Prepared = tuple[torch.nn.Module, Optimizer, LambdaLR]
LossAndOutOfRange = tuple[torch.Tensor, torch.Tensor]
"""What `backward` returns."""


class GradientSum:
    """How the gradients of a step are summed: `FastSum` or `ExactSum`, chosen once by `gradient_sum_for`.

    The global batch is cut into micro-batches of `micro_batch_size` windows; each process computes its `share` of them.
    """

    is_exact: bool
    """Whether all processes have the same bits. Dropout then has a seed for each micro-batch; else it draws from a
    generator of each process, which a checkpoint has to keep."""
    accumulation_steps: int
    """Backward passes over which Accelerate is to average the gradients."""
    workers = ALONE
    """Threads for computations that do not depend on their number."""

    def __init__(self, table: TrainTable, micro_batch_size: int, rank: int, processes: int):
        self.micro_batch_size = micro_batch_size
        self.micro_batches = table.batch_size // micro_batch_size  # of the global batch
        self.share = Share(micro_batch_size, rank, processes)
        self._table = table

    def prepare(self, accelerator: Accelerator, gpt: GPT, optimizer: Optimizer, scheduler: LambdaLR) -> Prepared:
        """Have Accelerate wrap the parts of a run."""
        raise NotImplementedError

    def backward(self, accelerator: Accelerator, model: torch.nn.Module, batch: Batch, step: int) -> LossAndOutOfRange:
        """Give the model the gradient of 1-based `step`, averaged over the micro-batches of all processes.

        `batch` is this process's share of the global batch. Returns scalars on the device: the mean loss of this share
        or, summed exactly, of the whole batch; and how many micro-batches an exact sum could not hold.
        """
        raise NotImplementedError

    def dropout_seeds(self, step: int, micro_batches: Iterable[int]) -> tuple[int, ...]:
        """The seed of dropout in each micro-batch of a step; none unless `is_exact`."""
        return ()

    def _pieces(self, batch: Batch) -> list[Batch]:
        splits = (rows.split(self.micro_batch_size) for rows in batch)
        return [Batch(*pair) for pair in zip(*splits, strict=True)] if len(batch.inputs) else []


class FastSum(GradientSum):
    """Sums floats, on GPUs by DistributedDataParallel or FSDP2: the last bits depend on the number of processes.

    Raises:
        RecipeError: the processes cannot share the batch.
    """

    is_exact = False

    def __init__(self, table: TrainTable, rank: int = 0, processes: int = 1):
        if table.batch_size % processes:
            raise RecipeError(
                f"batch_size: got {table.batch_size}, expected a multiple of the {processes} processes (or none, with "
                'reduction = "exact")'
            )
        rows = table.batch_size // processes
        size = table.micro_batch_size or rows
        if rows % size:
            raise RecipeError(
                f"micro_batch_size: got {size}, expected a divisor of the {rows} windows that each of the {processes} "
                f"processes has of batch_size = {table.batch_size}"
            )
        super().__init__(table, size, rank, processes)
        self.accumulation_steps = rows // size

    def prepare(self, accelerator: Accelerator, gpt: GPT, optimizer: Optimizer, scheduler: LambdaLR) -> Prepared:
        if accelerator.is_fsdp2 and accelerator.mixed_precision == "bf16":
            autocast_forward(gpt, accelerator.device)
        return accelerator.prepare(gpt, optimizer, scheduler)

    def backward(self, accelerator: Accelerator, model: torch.nn.Module, batch: Batch, step: int) -> LossAndOutOfRange:
        losses = []
        for inputs, targets in self._pieces(batch):
            # On all but the last micro-batch this keeps the processes from averaging their gradients.
            with accelerator.accumulate(model):
                loss = model(inputs, targets)
                losses.append(loss.detach())
                # An infinite loss can have finite gradients. So the loss is multiplied by 1, which changes no bit, or,
                # if it is infinite or nan, by nan, which the gradients of all processes then are, too.
                accelerator.backward(loss * (losses[-1] * 0 + 1))
        mean = torch.stack(losses).mean() if len(losses) > 1 else losses[0]
        return mean, torch.zeros_like(mean)


class ExactSum(GradientSum):
    """Sums integers: the same bits on any number of processes, which need not divide the batch.

    Nor do they depend on the number of workers, up to `max_workers` on a CPU, which compute micro-batches side by side.
    More than one need a model without dropout, whose generator they would share.
    """

    accumulation_steps = 1  # the sum is divided once, at its end
    is_exact = True

    def __init__(self, table: TrainTable, rank: int = 0, processes: int = 1, max_workers: int = 1):
        super().__init__(table, table.micro_batch_size or fixed_micro_batch(table.batch_size), rank, processes)
        self._max_workers = min(max_workers, len(self.share.micro_batches(table.batch_size)) or 1)

    def prepare(self, accelerator: Accelerator, gpt: GPT, optimizer: Optimizer, scheduler: LambdaLR) -> Prepared:
        if accelerator.device.type == "cpu":
            self.workers = Workers(self._max_workers)
        self._parameters = list(gpt.parameters())
        # As for evaluation: the precision, and nothing that would sum gradients by itself.
        return accelerator.prepare_model(gpt, evaluation_mode=True), *accelerator.prepare(optimizer, scheduler)

    def backward(self, accelerator: Accelerator, model: torch.nn.Module, batch: Batch, step: int) -> LossAndOutOfRange:
        seeds = self.dropout_seeds(step, self.share.micro_batches(self._table.batch_size))
        total = FixedPointSum(self._parameters, self.micro_batches)

        def add(piece: tuple[Batch, int]) -> None:
            (inputs, targets), seed = piece
            if self.workers.count == 1:  # with more there is no dropout, and threads share the generator
                torch.manual_seed(seed)
            loss = model(inputs, targets)
            total.add(loss.detach(), torch.autograd.grad(loss, self._parameters))

        self.workers.map(add, zip(self._pieces(batch), seeds, strict=True))
        return total.mean_over(all_reduce if accelerator.num_processes > 1 else None)

    def dropout_seeds(self, step: int, micro_batches: Iterable[int]) -> tuple[int, ...]:
        return tuple(micro_batch_dropout_seed(self._table.data_seed, step, index) for index in micro_batches)


def gradient_sum_for(recipe: Recipe, rank: int = 0, processes: int = 1, max_workers: int = 1) -> GradientSum:
    """The way to sum gradients that the recipe's `reduction` names, on one of so many processes.

    Raises:
        RecipeError: the processes cannot share the batch.
    """
    if recipe.runtime.reduction == "fast":
        return FastSum(recipe.train, rank, processes)
    # torch compiles for one thread at a time.
    one = recipe.model.dropout or recipe.runtime.compile
    return ExactSum(recipe.train, rank, processes, 1 if one else max_workers)


def fixed_micro_batch(batch_size: int) -> int:
    """The windows of a micro-batch that a recipe leaves open, the same on any number of processes: for four of them to
    share the batch, the largest divisor that is at most a quarter of it."""
    return next(size for size in range(max(1, batch_size // 4), 0, -1) if batch_size % size == 0)


class FixedPointSum:
    """The mean over the `micro_batches` of a step, on all processes together, of the loss and of the gradients.

    `add` after each backward pass of this process, in any of its threads, then `mean_over` the processes, once.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], micro_batches: int):
        self._parameters = parameters
        self._micro_batches = micro_batches
        self._lock = threading.Lock()
        values = sum(parameter.numel() for parameter in parameters)
        # Of all gradients, the loss, and the number of micro-batches with a value that is out of range.
        self._sum = torch.zeros(values + 2, dtype=torch.int64, device=parameters[0].device)

    def add(self, loss: torch.Tensor, gradients: Sequence[torch.Tensor]) -> None:
        """Add a micro-batch's loss (a scalar) and its gradients, one for each parameter."""
        values = torch.cat([*(gradient.flatten() for gradient in gradients), loss[None]])
        least, largest = torch.aminmax(values)
        limit = RANGE / self._micro_batches
        # True also of nan.
        is_out = ~((-limit <= least) & (largest <= limit))
        # Exact but for the rounding: the scale is a power of two.
        integers = values.mul_(SCALE).round_().long()
        with self._lock:
            self._sum[:-1] += integers
            self._sum[-1] += is_out

    def mean_over(self, sum_over_processes: Callable[[torch.Tensor], object] | None) -> LossAndOutOfRange:
        """Set the gradients to their mean over the processes. If there are several, all have to call this, with a
        function that replaces a vector (n,) by its sum over all of them.

        Returns the mean loss, and how many micro-batches were out of range; if any was, the means are garbage.
        """
        if sum_over_processes:
            sum_over_processes(self._sum)
        means = self._sum[:-1].to(self._parameters[0].dtype).div_(SCALE * self._micro_batches)
        set_gradients(self._parameters, means[:-1])
        return means[-1], self._sum[-1]


def set_gradients(parameters: Sequence[torch.nn.Parameter], gradients: torch.Tensor) -> None:
    """Make the parameters' gradients parts of a vector that holds them all, one after the other."""
    parts = gradients.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)
