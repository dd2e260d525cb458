"""Derives every further seed from a recipe's seeds by hashing, so that no two purposes, ranks or seeds share one.

`init_seed` and `data_seed` themselves seed the initial weights and the stream of training batches. If they are equal,
as with --seed, weights and batches come from the same random numbers, which does no harm: they are unrelated.
"""

import hashlib


def micro_batch_dropout_seed(data_seed: int, step: int, micro_batch: int) -> int:
    """The seed of dropout in one micro-batch of a step with reduction = "exact", on whichever process computes it."""
    return _derive("dropout", data_seed, step, micro_batch)


def process_dropout_seed(data_seed: int, rank: int, after_step: int = 0) -> int:
    """The seed of a process's dropout with reduction = "fast": at the start of a run, or after `after_step` in a run
    that continues without this process's generator state, as on another number of processes."""
    return _derive("dropout of process", data_seed, rank, after_step)


def batch_seed_after(data_seed: int, step: int) -> int:
    """The seed of the batches after `step` in a run that continues with another data_seed."""
    return _derive("batches after", data_seed, step)


def epoch_seed(data_seed: int, epoch: int) -> int:
    """The seed of the order of windows in an epoch (from 0), with order = "epoch"."""
    return _derive("epoch", data_seed, epoch)


def held_out_seed() -> int:
    """The seed of held-out windows with sampling = "own-stream": one for all runs, so that runs can be compared."""
    return _derive("held-out windows")


def held_out_pieces_seed() -> int:
    """The seed of the places of pieces with hold_out = "pieces": one for all runs, so that runs can be compared."""
    return _derive("held-out pieces")


def _derive(purpose: str, *numbers: int) -> int:
    """A seed of 32 bits: torch's CPU generator ignores the others."""
    digest = hashlib.sha256(" ".join([purpose, *map(str, numbers)]).encode()).digest()
    return int.from_bytes(digest[:4])
