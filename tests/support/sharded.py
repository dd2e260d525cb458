"""`mygpt train` with sharded weights (FSDP2) on CPU processes, where Accelerate by itself shards on GPUs only."""

import os
import sys
from contextlib import contextmanager

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from mygpt.cli.main import main
from mygpt.processes import preflight as startup
from mygpt.training import train as loop

accelerator_for = loop.accelerator_for


@contextmanager
def sharding_accelerator(table, device, micro_batches):
    """Accelerate's own way to FSDP2, entered where it has decided that there is no GPU to shard on."""
    with accelerator_for(table, device, micro_batches) as accelerator:
        accelerator.state.fsdp_plugin = loop.sharding_plugin()
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        assert accelerator.is_fsdp2
        yield accelerator


if __name__ == "__main__":
    if os.environ.get("FLOAT64"):
        torch.set_default_dtype(torch.float64)
    if os.environ.get("ACCELERATE_USE_FSDP"):
        loop.is_sharded = lambda: False
        startup.check_sharding = lambda *_: None
        loop.accelerator_for = sharding_accelerator
    main(["train", *sys.argv[1:]])
