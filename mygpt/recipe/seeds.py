"""Every seed that is derived from the recipe's two: by hashing, so that no two purposes, ranks or seeds share one.

`init_seed` and `data_seed` themselves seed the initial weights and the stream of training batches. Where they are
equal, as by --seed, both use the same random numbers, for purposes that have nothing to do with each other.
"""

import hashlib


def micro_batch_dropout_seed(data_seed: int, step: int, micro_batch: int) -> int:
    """Seeds dropout in one micro-batch of a step, with reduction = "exact": the same whichever process computes it."""
    return _derive("dropout", data_seed, step, micro_batch)


def process_dropout_seed(data_seed: int, rank: int, after_step: int = 0) -> int:
    """Seeds the dropout of a process, with reduction = "fast": at the start of a run, or where one continues
    `after_step` without this process's generator state, as on another number of processes."""
    return _derive("dropout of process", data_seed, rank, after_step)


def batch_seed_after(data_seed: int, step: int) -> int:
    """Seeds the batches of a run that goes on after `step` with another data_seed than before."""
    return _derive("batches after", data_seed, step)


def held_out_seed() -> int:
    """Seeds the held-out windows of sampling = "own-stream": the same for every run, so that runs can be compared."""
    return _derive("held-out windows")


def _derive(purpose: str, *numbers: int) -> int:
    """32 bits, which is what torch's CPU generator keeps of a seed."""
    digest = hashlib.sha256(" ".join([purpose, *map(str, numbers)]).encode()).digest()
    return int.from_bytes(digest[:4])
