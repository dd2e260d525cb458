"""Read from the environment variables of a launcher what it started and asked for. Imports no torch."""

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import NamedTuple

from mygpt.cores import core_count
from mygpt.errors import LaunchError

_COUNTS = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}
"""The variables of `Launched`, in its order, and their values where they are not set."""


class Launched(NamedTuple):
    """The processes that a launcher started, and which of them this is."""

    processes: int = 1
    local_processes: int = 1
    """On this machine."""
    rank: int = 0


def read_launched(environ: Mapping[str, str] = os.environ) -> Launched:
    """As `launched_processes`, but checks nothing; a variable that holds no number gives -1."""
    return Launched(*(_number(environ.get(name, default)) for name, default in _COUNTS.items()))


def local_rank() -> int:
    """The number of this process among those on this machine, from 0; also the number of its GPU."""
    return _number(os.environ.get("LOCAL_RANK", "0"))


def is_main_process() -> bool:
    """Whether this is rank 0, which alone writes the run directory and prints the lines of a run."""
    return read_launched().rank == 0


def is_launched() -> bool:
    """Whether a launcher, or someone by hand, has set the number of processes."""
    return "WORLD_SIZE" in os.environ


@contextmanager
def no_launcher() -> Iterator[None]:
    """While inside, nothing that this process starts or asks finds a launcher's variables."""
    of_mpi = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    names = {*_COUNTS, "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *of_mpi}
    found = [name for name in os.environ if name in names or name.startswith(("ACCELERATE_", "FSDP_"))]
    hidden = {name: os.environ.pop(name) for name in found}
    try:
        yield
    finally:
        os.environ.update(hidden)


def launched_processes(environ: Mapping[str, str] = os.environ) -> Launched:
    """The processes that the launcher started; one process without a launcher.

    Raises:
        LaunchError: the variables contradict each other, `accelerate launch` was asked for several processes on CPUs
            but starts a single one, or the launch configuration asks for a way to train that mygpt does not have.
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
    if "WORLD_SIZE" not in environ:
        # Accelerate reads these, too, and would start a process group.
        for name, harmless in (("LOCAL_RANK", None), ("OMPI_COMM_WORLD_SIZE", "1"), ("PMI_SIZE", "1")):
            if environ.get(name, harmless) != harmless:
                raise LaunchError(
                    f"{name} is set, and WORLD_SIZE is not, as by mpirun or by hand; start with accelerate launch or "
                    f"torchrun, or unset {name}"
                )
        # accelerate's one-process launcher sets an address for other processes only if it was asked for several.
        if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
            raise LaunchError(
                "accelerate launch was asked for several processes but started one, as it does with --cpu or "
                "distributed_type: MULTI_CPU; use --config_file recipes/launch/cpu2.yaml, or --multi_gpu with "
                "ACCELERATE_USE_CPU=true (and if it was asked for one, unset MASTER_PORT)"
            )
        return Launched()
    launched = read_launched(environ)
    if not (1 <= launched.local_processes <= launched.processes and 0 <= launched.rank < launched.processes):
        values = ", ".join(environ.get(name, default) for name, default in _COUNTS.items())
        raise LaunchError(f"{', '.join(_COUNTS)}: got {values}, expected numbers from a launcher")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    # With a LOCAL_RANK Accelerate starts a process group, even of one process.
    if missing and (launched.processes > 1 or "LOCAL_RANK" in environ):
        raise LaunchError(
            f"WORLD_SIZE is {launched.processes}, and {', '.join(missing)} not set; start with accelerate launch or "
            "torchrun, or unset WORLD_SIZE"
        )
    return launched


SHORT_WAITS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long a waiting thread of OpenMP spins before it sleeps: rounds with GNU's library, milliseconds with Intel's and
LLVM's. By default it spins for so long that on a busy machine it takes the core from the thread that it waits for.
Source: the libraries' manuals; chosen by scripts/benchmarks/busy.py."""


LOWER_PRECISION = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
"""With these oneDNN computes fp32 products in bf16 or TF32."""


def set_before_torch(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what OpenMP and oneDNN read when torch is imported: `SHORT_WAITS`, unless the user has said how threads wait,
    and no `LOWER_PRECISION`."""
    if not {"OMP_WAIT_POLICY", *SHORT_WAITS} & environ.keys():
        environ.update(SHORT_WAITS)
    for name in LOWER_PRECISION:
        environ.pop(name, None)


def choose_threads(threads: int | None, local_processes: int, *, pinned: bool = False) -> int:
    """The number of CPU threads of this process, if the recipe asks for `threads`.

    None means one thread if results must not depend on the number of processes (`pinned`), and otherwise this process's
    share of the cores.
    """
    if threads is not None or pinned:
        return threads or 1
    return max(1, core_count() // max(1, local_processes))


def choose_workers(threads: int | None, local_processes: int) -> int:
    """Micro-batches to compute at the same time: this process's cores / the threads of each, which are one by default.

    At most `MAX_WORKERS`, since each needs memory for its activations and gradients.
    """
    return min(MAX_WORKERS, max(1, choose_threads(None, local_processes) // (threads or 1)))


MAX_WORKERS = 8


def is_sharded(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the launch configuration asks for sharded weights (FSDP)."""
    return _is_true(environ, "ACCELERATE_USE_FSDP")


def asks_for_cpu(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the launch configuration asks for the CPU."""
    return _is_true(environ, "ACCELERATE_USE_CPU")


def is_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun (--max_restarts) or Slurm (requeue) has started this command before."""
    return any(environ.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def launch_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """What Slurm keeps when it queues a job again, and torchrun when it restarts processes; None: there is none."""
    names = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")
    # "none" is the id of every torchrun that was given neither --rdzv-id nor --standalone.
    return next((f"{name}={environ[name]}" for name in names if environ.get(name, "none") != "none"), None)


def may_be_restarted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun (--max_restarts) starts this command again if it fails."""
    count, most = (_number(environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return count < most


def ignored_settings(precision: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each setting of the launch configuration that differs from the recipe, which decides."""
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


def check_joined(launched: int, joined: int) -> None:
    """Compare the number of processes that the launcher started with the number that joined the process group.

    Raises:
        LaunchError: they differ, so that the processes would train separate models.
    """
    if launched != joined:
        raise LaunchError(
            f"the launcher started {launched} processes but {joined} joined this run; on CPUs use --config_file "
            "recipes/launch/cpu2.yaml and --device cpu, on GPUs recipes/launch/ddp.yaml"
        )


def _number(value: str) -> int:
    return int(value) if value.isdecimal() else -1


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    """In the words that Accelerate knows."""
    return environ.get(name, "").lower() in ("y", "yes", "t", "true", "on", "1")
