"""The held-out loss: evaluated over windows that all processes share."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from mygpt.data.batches import WindowSet, held_out_windows, random_windows, windows
from mygpt.errors import NonFiniteError
from mygpt.processes.workers import ALONE, Workers
from mygpt.runs.held_out import Evaluation, Windows
from mygpt.runs.records import perplexity
from mygpt.training.failed_step import REMEDY
from mygpt.training.parts import Parts

BYTES_AT_A_TIME = 4096
"""Windows whose bytes are counted together."""


def estimate_val_loss(
    model: torch.nn.Module, val_data: torch.Tensor, batch_size: int, seq_len: int, n_eval_batches: int = 10
) -> float:
    """The mean loss over random batches of `val_data` (n,), drawn from torch's global generator.

    No gradients are kept, and the model is left in the mode in which it was.
    """
    places = random_windows(val_data, batch_size, seq_len, n_eval_batches, None)
    return held_out_loss(model, val_data, places, batch_size).loss.mean


def evaluate(parts: Parts, step: int) -> Evaluation:
    """The held-out loss after a step. Every process has to call this.

    Raises:
        NonFiniteError: the loss is not finite.
    """
    piece_tokens = parts.dataset.piece_tokens
    held_out = held_out_windows(parts.dataset.val, parts.recipe.validation, parts.stream, piece_tokens)
    size = parts.gradient_sum.micro_batch_size
    workers, dataset = parts.gradient_sum.workers, parts.dataset
    lengths_V = torch.from_numpy(dataset.tokenizer.byte_lengths)
    check = dataset.check_unchanged
    evaluation = held_out_loss(
        parts.model, dataset.val, held_out, size, parts.accelerator, workers, lengths_V, check, piece_tokens, step=step
    )
    if not math.isfinite(evaluation.loss.mean):
        raise NonFiniteError(f"step {step}: the held-out loss is {evaluation.loss.mean}; {REMEDY}")
    return evaluation


def record_values(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as a record has it."""
    loss, bits_per_byte = evaluation.loss, evaluation.bits_per_byte
    return {
        "val": loss.mean,
        "val_stderr": loss.stderr,
        "val_dof": loss.dof,
        "val_perplexity": value if math.isfinite(value := perplexity(loss.mean)) else None,
        "val_bits_per_byte": bits_per_byte and bits_per_byte.mean,
        "val_bits_per_byte_stderr": bits_per_byte and bits_per_byte.stderr,
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
    piece_tokens: int = 0,
    *,
    step: int = 0,
) -> Evaluation:
    """The loss over the windows of `data` (n,) at `places`, in eval mode.

    With an accelerator its processes share them, and the `workers` of each its part. `micro_batch_size` windows go
    through the model at a time. Without the bytes of each token none are counted. `check` is called before windows are
    read. The data may be pieces of so many tokens each; see `Windows`.
    """
    groups = list(places)
    was_training = model.training
    model.eval()
    try:
        losses = [window_losses(model, data, group, micro_batch_size, accelerator, workers, check) for group in groups]
    finally:
        model.train(was_training)
    if check:
        check()
    consecutive = any(group.consecutive for group in groups)
    lengths = [len(group.starts) for group in groups]
    nothing = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    bytes_N = nothing if byte_lengths_V is None else [window_bytes(data, group, byte_lengths_V) for group in groups]
    return Evaluation(
        step,
        Windows(
            torch.cat([group.starts for group in groups]).numpy(),
            torch.cat([torch.full((len(group.starts),), group.seq_len) for group in groups]).int().numpy(),
            torch.cat(bytes_N).int().numpy(),
            consecutive=consecutive and not piece_tokens,
            piece_tokens=piece_tokens if consecutive else 0,
        ),
        torch.cat(losses).float().cpu().numpy(),
    )


def window_bytes(data: torch.Tensor, places: WindowSet, byte_lengths_V: torch.Tensor) -> torch.Tensor:
    """How many bytes the targets of each window stand for, int64 (windows,)."""
    pieces = places.starts.split(BYTES_AT_A_TIME)
    return torch.cat([byte_lengths_V[windows(data, starts, places.seq_len).targets.cpu()].sum(1) for starts in pieces])


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
