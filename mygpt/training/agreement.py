"""Check that all processes hold the same weights and optimizer state, as exact sums need, by comparing checksums."""

from collections.abc import Iterable

import torch

from mygpt.errors import DisagreementError
from mygpt.processes.preflight import describe_ranks
from mygpt.runs.saver import Tensors, TrainingState
from mygpt.training.parts import Parts

REMEDY_AT_START = (
    'their processors or versions compute other initial weights: make the machines alike, or use reduction = "fast"'
)
REMEDY_AFTER_RESUMING = "they have read different checkpoints: give all machines the same run directory"
REMEDY_WHEN_SAVING = (
    "this step is not saved: check the memory and the processor of the machine that differs; the same command "
    "continues from the last checkpoint"
)
CHUNK = 2**20
"""Elements per chunk, which bounds the memory of the int64 temporaries."""


def check_agreement(parts: Parts, weights: Tensors, state: TrainingState, when: str, remedy: str) -> None:
    """Compare the tensors of all processes, in one message of 8 bytes each. Every process has to call it.

    Raises:
        DisagreementError: they differ. All processes raise it: `when`, which ranks and machines, and the `remedy`.
    """
    accelerator = parts.accelerator
    if accelerator.num_processes == 1:
        return
    tensors = [*weights.values(), *state.tensors.values()]
    checksums = accelerator.gather(checksum(tensors, accelerator.device)[None]).tolist()
    owners: dict[int, list[int]] = {}
    for rank, value in enumerate(checksums):
        owners.setdefault(value, []).append(rank)
    if len(owners) > 1:
        groups = " against ".join(describe_ranks(parts.reports, ranks) for ranks in sorted(owners.values(), key=len))
        raise DisagreementError(f"{when}: the processes hold different weights or optimizer state, {groups}; {remedy}")


def checksum(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """An int64 scalar on `device` that depends on every bit of the tensors and on their order.

    The bits of an element, as an integer of at most 32 bits, are multiplied by an odd number that belongs to its place
    in a chunk, and the products are summed modulo 2**64; from chunk to chunk the sum is multiplied by an odd number
    again. As odd numbers have an inverse modulo 2**64, a single element that changes always changes the result, and
    several that change leave it as it is by chance alone. A sum of integers does not depend on their order, so that
    the result is the same on every kind of device.

    torch.hash_tensor does not do: it combines elements by XOR, so that 64 ones have the hash of 64 twos, and a tensor
    that of its elements in another order.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    factors = torch.zeros(0, dtype=torch.int64, device=device)
    for tensor in tensors:
        values = tensor.detach().flatten()
        integers = {1: torch.uint8, 2: torch.int16}.get(values.element_size(), torch.int32)
        for chunk in torch.split(values.view(integers), CHUNK):
            if len(chunk) > len(factors):
                factors = odd_numbers(len(chunk), device)
            total = total * MULTIPLIER + (chunk.to(device, torch.int64) * factors[: len(chunk)]).sum()
    return total


def odd_numbers(count: int, device: torch.device) -> torch.Tensor:
    """`count` odd int64 numbers without a pattern, the same on every device; a longer list begins as a shorter one."""
    places = torch.arange(1, count + 1, device=device) * MULTIPLIER
    return (places ^ (places >> 29)) * MULTIPLIER | 1


MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
"""2**64 divided by the golden ratio, odd, as int64: its multiples are spread evenly (Knuth, TAOCP 3, section 6.4)."""
