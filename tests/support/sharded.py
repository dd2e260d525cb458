"""`mygpt train` with sharded weights (FSDP2) on CPU processes, where Accelerate by itself shards on GPUs only."""

import os
import sys
from contextlib import contextmanager

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from mygpt.cli.main import main
from mygpt.processes import preflight
from mygpt.training import parts, train

open_accelerator = parts.open_accelerator


@contextmanager
def open_sharding_accelerator(table, device, accumulation_steps):
    """Accelerate's own way to FSDP2, entered where it has decided that there is no GPU to shard on."""
    with open_accelerator(table, device, accumulation_steps) as accelerator:
        accelerator.state.fsdp_plugin = parts.sharding_plugin()
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        assert accelerator.is_fsdp2
        yield accelerator


if __name__ == "__main__":
    if os.environ.get("FLOAT64"):
        torch.set_default_dtype(torch.float64)
    if os.environ.get("ACCELERATE_USE_FSDP"):
        parts.is_sharded = lambda: False
        preflight.check_sharding = lambda *_: None
        train.open_accelerator = open_sharding_accelerator
    main(["train", *sys.argv[1:]])
