"""The processes of a run: what a launcher started, and what they tell each other beside the training.

They talk through the store of the launcher, which is there before they form a group and after that has broken, so that
a mistake or a failure on one machine is told on all by the name of that machine, and not by a timeout somewhere else.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from mygpt.errors import LaunchError


class Launched(NamedTuple):
    """What the launcher says it started."""

    processes: int = 1
    local_processes: int = 1
    """On this machine."""
    rank: int = 0

    @property
    def several_machines(self) -> bool:
        return self.processes > self.local_processes


def launched_processes(environ: Mapping[str, str] = os.environ) -> Launched:
    """What the environment says that the launcher started; one process without a launcher.

    Raises:
        LaunchError: `accelerate launch` was asked for several processes on CPUs but starts a single one, or for a
            way to train that mygpt does not have.
    """
    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if _is_true(environ, variable):
            name = variable.removeprefix("ACCELERATE_USE_")
            raise LaunchError(
                f"the launch configuration asks for {name}, which mygpt does not use; use recipes/launch/"
            )
    if is_sharded(environ) and environ.get("FSDP_VERSION", "1") != "2":
        raise LaunchError(
            "the launch configuration asks for FSDP version 1; mygpt uses version 2 (fsdp_version: 2, as in "
            "recipes/launch/fsdp2.yaml)"
        )
    # Accelerate looks at these, too.
    for name, harmless in (("LOCAL_RANK", None), ("OMPI_COMM_WORLD_SIZE", "1"), ("PMI_SIZE", "1")):
        if "WORLD_SIZE" not in environ and environ.get(name, harmless) != harmless:
            raise LaunchError(
                f"{name} is set, and WORLD_SIZE is not, as by mpirun or by hand; start with accelerate launch or "
                f"torchrun, or unset {name}"
            )
    if "WORLD_SIZE" in environ:
        names = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}
        values = [environ.get(name, default) for name, default in names.items()]
        processes, local, rank = (int(value) if value.isdecimal() else -1 for value in values)
        if not (1 <= local <= processes and 0 <= rank < processes):
            raise LaunchError(f"{', '.join(names)}: got {', '.join(values)}, expected numbers from a launcher")
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if processes > 1 and missing:
            raise LaunchError(
                f"WORLD_SIZE is {processes}, and {', '.join(missing)} not set; start with accelerate launch or "
                "torchrun, or unset WORLD_SIZE"
            )
        return Launched(processes, local, rank)
    # accelerate's one-process launcher names an address for the others only when it was asked for several.
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
        raise LaunchError(
            "accelerate launch was asked for several processes but started one, as it does with --cpu or "
            "distributed_type: MULTI_CPU; use --config_file recipes/launch/cpu2.yaml, or --multi_gpu with "
            "ACCELERATE_USE_CPU=true (and if it was asked for one, unset MASTER_PORT)"
        )
    return Launched()


def is_sharded(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the launch configuration asks for sharded weights (FSDP)."""
    return _is_true(environ, "ACCELERATE_USE_FSDP")


def ignored_settings(precision: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What the launch configuration asks for and the recipe decides instead, a sentence each."""
    settings = (
        ("mixed_precision", "ACCELERATE_MIXED_PRECISION", ("no", precision), "precision"),
        ("fsdp_activation_checkpointing", "FSDP_ACTIVATION_CHECKPOINTING", ("false",), "activation_checkpointing"),
        ("dynamo_backend", "ACCELERATE_DYNAMO_BACKEND", ("no",), "compile"),
        ("gradient_accumulation_steps", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "micro_batch_size"),
    )
    return [
        f"{name}: {environ[variable]} of the launch configuration is not used: the recipe's {key} decides"
        for name, variable, harmless, key in settings
        if environ.get(variable, harmless[0]).lower() not in harmless
    ]


def check_processes(launched: int, joined: int) -> None:
    """Compare the processes that the launcher started with those that joined.

    Raises:
        LaunchError: they differ, so that each would train a model of its own.
    """
    if launched != joined:
        raise LaunchError(
            f"the launcher started {launched} processes but {joined} joined this run; on CPUs use --config_file "
            "recipes/launch/cpu2.yaml, on GPUs recipes/launch/ddp.yaml"
        )


def is_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun (--max_restarts) or Slurm (requeue) has started this command before."""
    return any(environ.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("true", "1")
