"""The held-out loss, with its standard error."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from mygpt.data.batches import WindowSet, held_out_windows, random_windows, windows
from mygpt.errors import NonFiniteError
from mygpt.processes.workers import ALONE, Workers
from mygpt.runs.records import perplexity
from mygpt.training.failed_step import REMEDY
from mygpt.training.parts import Parts


class HeldOutLoss(NamedTuple):
    """Mean cross-entropy per token, and the standard error of that mean, both in nats; and the same per byte."""

    mean: float
    stderr: float | None
    """See `ratio_estimate`; None for a single window, which has no variance."""
    dof: int | None = None
    """Degrees of freedom of the standard errors: of Student's t, for an interval."""
    bits_per_byte: float | None = None
    """The total loss in bits over the bytes of the text that was predicted: it does not depend on what a token is."""
    bits_per_byte_stderr: float | None = None


LN_2 = math.log(2)
BYTES_AT_A_TIME = 4096
"""Windows whose bytes are counted together."""
MAX_BATCHES = 10
"""Batches for the standard error of consecutive windows: few, so that each is long beside the distance over which
losses are correlated, and enough for Student's t. Schmeiser finds 10 to 30 to be a good number."""
MIN_BATCH = 10
"""Windows in a batch, where there are enough for two: with fewer the batches themselves are correlated."""


def estimate_val_loss(
    model: torch.nn.Module, val_data: torch.Tensor, batch_size: int, seq_len: int, n_eval_batches: int = 10
) -> float:
    """The mean loss over random batches of `val_data` (n,), drawn from torch's global generator.

    No gradients are kept, and the model is left in the mode in which it was.
    """
    places = random_windows(val_data, batch_size, seq_len, n_eval_batches, None)
    return held_out_loss(model, val_data, places, batch_size).mean


def evaluate(parts: Parts, step: int) -> dict[str, Any]:
    """The held-out loss after a step, with its standard error, as a record has them. Every process has to call this.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    held_out = held_out_windows(parts.dataset.val, parts.recipe.validation, parts.stream)
    size = parts.gradient_sum.micro_batch_size
    workers, dataset = parts.gradient_sum.workers, parts.dataset
    lengths_V = torch.from_numpy(dataset.tokenizer.byte_lengths)
    check = dataset.check_unchanged
    loss = held_out_loss(parts.model, dataset.val, held_out, size, parts.accelerator, workers, lengths_V, check)
    if not math.isfinite(loss.mean):
        raise NonFiniteError(f"step {step}: the held-out loss is {loss.mean}; {REMEDY}")
    return {
        "val": loss.mean,
        "val_stderr": loss.stderr,
        "val_dof": loss.dof,
        "val_perplexity": value if math.isfinite(value := perplexity(loss.mean)) else None,
        "val_bits_per_byte": loss.bits_per_byte,
        "val_bits_per_byte_stderr": loss.bits_per_byte_stderr,
    }


def held_out_loss(
    model: torch.nn.Module,
    data: torch.Tensor,
    places: Iterable[WindowSet],
    micro_batch_size: int,
    accelerator: Accelerator | None = None,
    workers: Workers = ALONE,
    byte_lengths_V: torch.Tensor | None = None,
    check: Callable[[], None] | None = None,
) -> HeldOutLoss:
    """The loss over the windows of `data` (n,) at `places`, in eval mode.

    With an accelerator its processes share them, and the `workers` of each its part. `micro_batch_size` windows go
    through the model at a time. Every token counts the same. With the bytes of each token also per byte: exact though
    windows begin and end within a character, since every byte belongs to one token. `check` is called before windows
    are read.
    """
    groups = list(places)
    was_training = model.training
    model.eval()
    try:
        losses = [window_losses(model, data, group, micro_batch_size, accelerator, workers, check) for group in groups]
    finally:
        model.train(was_training)
    # On the CPU, since mps has no float64.
    loss_N = torch.cat([loss_B.cpu().double() for loss_B in losses])
    length_N = torch.cat([torch.full((len(g.starts),), g.seq_len, dtype=torch.float64) for g in groups])
    consecutive = any(group.consecutive for group in groups)
    loss = ratio_estimate(loss_N, length_N, consecutive=consecutive)
    if byte_lengths_V is None:
        return loss
    if check:
        check()
    bytes_N = torch.cat([window_bytes(data, group, byte_lengths_V) for group in groups]).double()
    if not bytes_N.any():
        return loss
    nats, stderr, *_ = ratio_estimate(loss_N, bytes_N, consecutive=consecutive)
    return loss._replace(bits_per_byte=nats / LN_2, bits_per_byte_stderr=stderr and stderr / LN_2)


def window_bytes(data: torch.Tensor, places: WindowSet, byte_lengths_V: torch.Tensor) -> torch.Tensor:
    """How many bytes the targets of each window stand for, int64 (windows,)."""
    pieces = places.starts.split(BYTES_AT_A_TIME)
    return torch.cat([byte_lengths_V[windows(data, starts, places.seq_len).targets.cpu()].sum(1) for starts in pieces])


def ratio_estimate(loss_N: torch.Tensor, length_N: torch.Tensor, *, consecutive: bool) -> HeldOutLoss:
    """The mean loss per token of windows with these total losses and lengths, both float64 (windows,).

    Lengths are in tokens, or in bytes for a loss per byte.

    Its standard error is that of a ratio (total loss over total tokens), so that a short window counts by its length.
    Windows that were drawn at random are independent: it is the error of the loss over the text that they come from.
    `consecutive` windows are all of a text, whose loss they give without error: it is the error of that loss as one of
    text like it. Neighbours are correlated, so that it comes from the means of up to `MAX_BATCHES` batches of them, as
    if each batch were one long window. It does not include how the whole text differs from the rest of its source.
    Sources: Cochran, "Sampling Techniques" (1977), section 2.11; Schmeiser, "Batch size effects in the analysis of
    simulation output" (Operations Research 30, 1982); Ibragimov & Mueller, "t-statistic based correlation and
    heterogeneity robust inference" (Journal of Business & Economic Statistics 28, 2010).
    """
    total = length_N.sum().item()
    mean = loss_N.sum().item() / total
    residual_N = loss_N - mean * length_N
    if consecutive:
        batches = min(len(loss_N), max(2, min(MAX_BATCHES, len(loss_N) // MIN_BATCH)))
        residual_N = torch.stack([batch.sum() for batch in residual_N.tensor_split(batches)])
    count = len(residual_N)
    if count == 1:
        return HeldOutLoss(mean, None)
    return HeldOutLoss(mean, math.sqrt(residual_N.square().sum().item() * count / (count - 1)) / total, count - 1)


def window_losses(
    model: torch.nn.Module,
    data: torch.Tensor,
    places: WindowSet,
    micro_batch_size: int,
    accelerator: Accelerator | None = None,
    workers: Workers = ALONE,
    check: Callable[[], None] | None = None,
) -> torch.Tensor:
    """The total loss of each window (batch,), known to every process."""
    device = next(model.parameters()).device
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    pieces = places.starts.split(micro_batch_size)
    dtype = next(model.parameters()).dtype
    losses_N = torch.zeros(len(places.starts), dtype=dtype, device=device)

    @torch.no_grad()
    def compute(first: int) -> None:
        # Where pieces run out a process repeats the last, since gathering sharded weights needs them all.
        own = min(first + process, len(pieces) - 1)
        if check:
            check()
        inputs_BT, targets_BT = (rows.to(device) for rows in windows(data, pieces[own], places.seq_len))
        logits_BTV = model(inputs_BT)
        losses_BT = F.cross_entropy(logits_BTV.to(losses_N.dtype).flatten(0, 1), targets_BT.flatten(), reduction="none")
        if own == first + process:
            losses_N[own * micro_batch_size :][: len(inputs_BT)] = losses_BT.view(targets_BT.shape).sum(1)

    workers.map(compute, range(0, len(pieces), processes))
    # Every window has its loss from one process and zeros from the others: the sum is exact in any order.
    return accelerator.reduce(losses_N, "sum") if accelerator and processes > 1 else losses_N
