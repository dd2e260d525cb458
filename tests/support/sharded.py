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


class ByRow(torch.optim.Optimizer):
    """Divides gradients by the root of a mean over each row of a matrix, and vectors by their own."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                squares = parameter.grad.square()
                squares = squares.mean(-1, keepdim=True) if squares.dim() > 1 else squares
                squares = self.state[parameter]["mean"] = 0.9 * self.state[parameter].get("mean", 0) + 0.1 * squares
                parameter -= group["lr"] * parameter.grad / (squares.sqrt() + 1e-8)


if __name__ == "__main__":
    if os.environ.get("FLOAT64"):
        torch.set_default_dtype(torch.float64)
    if os.environ.get("ACCELERATE_USE_FSDP"):
        parts.is_sharded = lambda: False
        preflight.check_sharding = lambda *_: None
        train.open_accelerator = open_sharding_accelerator
    if name := os.environ.get("OPTIMIZER"):
        make = ByRow if name == "ByRow" else getattr(torch.optim, name)
        parts.build_optimizer = lambda model, _: make(model.parameters(), lr=1.0)
    main(["train", *sys.argv[1:]])
