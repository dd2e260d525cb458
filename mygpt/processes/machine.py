"""The machine under a process: its device, threads and determinism, and the versions that results depend on."""

import ctypes
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mygpt import __version__
from mygpt.compat import has_onednn_linear, missing_for_compiler
from mygpt.disk import code_sha256
from mygpt.errors import LaunchError
from mygpt.processes.environment import asks_for_cpu, choose_threads, local_rank
from mygpt.recipe.tables import RuntimeTable

RECORDED_PACKAGES = ("torch", "accelerate", "safetensors", "numpy")


def resolve_device(name: str, precision: str, local_processes: int = 1) -> torch.device:
    """The torch device for a recipe's `device`; "auto" takes the first of cuda, mps and cpu that this machine has, or
    the CPU if the launch asks for it.

    Raises:
        LaunchError: it does not exist, cannot compute in `precision`, or is too little for `local_processes`.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kinds = [kind for kind, is_there in available.items() if is_there]
    if name == "auto":
        name = "cpu" if asks_for_cpu() else kinds[0]
    if name not in kinds:
        raise LaunchError(
            f"device: got {name}, which this machine (or this build of torch) does not have; use {' or '.join(kinds)}"
        )
    if precision == "bf16" and name == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise LaunchError("precision: got bf16, which this GPU does not support; use fp32")
    if precision == "bf16" and name == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise LaunchError("precision: got bf16, which mps has from macOS 14 on; use fp32")
    if name == "mps" and local_processes > 1:
        raise LaunchError(
            f"device: got mps, which computes for one process, and the launcher started {local_processes} on this "
            "machine; add --device cpu, or start one process"
        )
    if name == "cuda" and local_processes > torch.cuda.device_count():
        raise LaunchError(
            f"the launcher started {local_processes} processes on this machine, which has "
            f"{torch.cuda.device_count()} GPUs; lower --num_processes"
        )
    return torch.device(name)


class Settings(NamedTuple):
    """What `set_up` has set."""

    threads: int
    """CPU threads of this process."""
    repeatable: bool
    """Whether the same computation gives the same bits again."""


def set_up(table: RuntimeTable, device: torch.device, local_processes: int = 1) -> Settings:
    """Set threads, memory and kernels of this process as the table asks for.

    Raises:
        LaunchError: the table asks for the compiler, which cannot work here.
    """
    if table.compile and (missing := missing_for_compiler(device)):
        raise LaunchError(f"compile: got true, and {missing}; or use compile = false")
    pinned = table.reduction == "exact" and device.type == "cpu"
    threads = set_threads(table.threads, local_processes, pinned=pinned)
    keep_freed_memory(device)
    return Settings(threads, make_deterministic(device, deterministic=table.deterministic))


def set_threads(threads: int | None, local_processes: int, *, pinned: bool = False) -> int:
    """Set and return the number of CPU threads of this process.

    See `choose_threads` for the arguments. Set in-process, because `accelerate launch` and torchrun set
    OMP_NUM_THREADS=1.
    """
    threads = choose_threads(threads, local_processes, pinned=pinned)
    # Setting them, even to what they are, also turns MKL_DYNAMIC off. Then the small products inside torch's attention,
    # each of which is one thread's, are spread over threads once more: a step of a small model takes a tenth longer,
    # for the same bits. So `mygpt train` sets OMP_NUM_THREADS before torch is imported.
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    # If it is not set, as with torchrun and one process, Accelerate sets another number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    return threads


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h: how many bytes may be free at the end of the heap, and from which size on a block is mapped."""


def keep_freed_memory(device: torch.device) -> None:
    """Have a process that computes on CPUs keep freed memory for its next allocations.

    glibc returns large blocks to the system and gets them back zeroed, page by page: 40,000 page faults in each step of
    a model of 10M weights, a twelfth of its time. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and device.type == "cpu" else None
    # Older versions allow 32 MB at most; where they allow nothing, they had better adapt their thresholds themselves.
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**30)


def choose_matmul(table: RuntimeTable, device: torch.device) -> Literal["blas", "onednn"]:
    """What computes products in a run with this table.

    "auto" depends on processor, build of torch and precision, never on a measurement, so that a recipe gives the same
    bits on all machines of a kind.

    Raises:
        LaunchError: the recipe asks for oneDNN, and the device or this build of torch does not have it.
    """
    if table.matmul != "auto":
        if not has_matmul(table.matmul, device):
            has_not = "is for a cpu" if device.type != "cpu" else "this build of torch does not have"
            raise LaunchError(f'matmul: got {table.matmul}, which {has_not}; use "auto"')
        return table.matmul
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    is_better = table.precision == "fp32" and has_mkl and _is_zen_5(cpu()) and has_matmul("onednn", device)
    return "onednn" if is_better else "blas"


def has_matmul(name: str, device: torch.device) -> bool:
    """Whether the device can compute products with what `choose_matmul` has returned, here or elsewhere."""
    return name == "blas" or (device.type == "cpu" and has_onednn_linear())


def _is_zen_5(processor: Mapping[str, str]) -> bool:
    """Whether MKL, which has only AVX2 kernels for AMD's processors, wastes half of what this one can do.

    Zen 4 has AVX-512 too, and computes it in two halves: there oneDNN gains 2% for a model of 10M weights, and its
    calls cost a model of 0.2M weights 6%.
    """
    is_amd = processor.get("vendor_id") == "AuthenticAMD"
    family, flags = processor.get("cpu family", ""), processor.get("flags", "").split()
    return is_amd and family.isdecimal() and int(family) >= 26 and "avx512f" in flags


def has_bf16_products() -> bool:
    """Whether the processor has instructions for bf16 products, without which these are slower than fp32 ones.

    True where that is not known.
    """
    flags = cpu().get("flags") or cpu().get("Features")  # of x86 and of ARM
    return flags is None or not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())


def make_deterministic(device: torch.device, *, deterministic: bool = True) -> bool:
    """Have CUDA choose kernels that give the same bits every time, as CPU kernels do anyway, or any kernels.

    Returns whether results are repeatable.
    """
    if device.type == "cuda" and not deterministic:
        torch.use_deterministic_algorithms(False)
    elif device.type == "cuda":
        # cuBLAS repeats its results only with a fixed workspace, which it reads at its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return deterministic or device.type != "cuda"


PEAK_TFLOPS: Mapping[str, Mapping[str, float]] = {
    "NVIDIA B200": {"fp32": 75, "bf16": 2250},
    "NVIDIA H200": {"fp32": 67, "bf16": 989},
    "NVIDIA H100 80GB HBM3": {"fp32": 67, "bf16": 989},
    "NVIDIA H100 PCIe": {"fp32": 51, "bf16": 756},
    "NVIDIA A100-SXM4-40GB": {"fp32": 19.5, "bf16": 312},
    "NVIDIA A100-SXM4-80GB": {"fp32": 19.5, "bf16": 312},
    "NVIDIA A100-PCIE-40GB": {"fp32": 19.5, "bf16": 312},
    "NVIDIA A100 80GB PCIe": {"fp32": 19.5, "bf16": 312},
    "NVIDIA L40S": {"fp32": 91.6, "bf16": 362},
    "NVIDIA L40": {"fp32": 90.5, "bf16": 181},
    "NVIDIA L4": {"fp32": 30.3, "bf16": 121},
    "NVIDIA A10": {"fp32": 31.2, "bf16": 125},
    "Tesla T4": {"fp32": 8.1},
    "Tesla V100-SXM2-16GB": {"fp32": 15.7},
    "Tesla V100-SXM2-32GB": {"fp32": 15.7},
    "NVIDIA GeForce RTX 3090": {"fp32": 35.6, "bf16": 71},
    "NVIDIA GeForce RTX 4090": {"fp32": 82.6, "bf16": 165},
    "NVIDIA GeForce RTX 5090": {"fp32": 104.8, "bf16": 209.5},
}
"""Peak rates of products in 10^12 floating-point operations per second, dense and added in fp32, by the name that torch
gives a GPU and a recipe's `precision`. From Nvidia's data sheets and, for GeForce, its architecture whitepapers."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Floating-point operations per second of a GPU's products at their best; None where it is not known.

    A processor's rate is not known: it has no data sheet, and a measurement shows whatever else the machine does.
    """
    if device.type != "cuda":
        return None
    rates = PEAK_TFLOPS.get(torch.cuda.get_device_name(local_rank()), {})
    return 1e12 * rates[precision] if precision in rates else None


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What the bits of a result depend on: versions, code, processor, accelerator; and the commit."""
    return {
        "versions": {"mygpt": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
        "cpu": cpu().get("model name") or platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name(local_rank()) if device.type == "cuda" else None,
        "git_commit": _git_commit(),
        "code_sha256": code_sha256(),
    }


@functools.cache
def cpu(file: Path = Path("/proc/cpuinfo")) -> Mapping[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty elsewhere than on Linux."""
    try:
        first, _, _ = file.read_text().partition("\n\n")
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _git_commit() -> str | None:
    """The commit of mygpt's own checkout, with "-dirty" where files differ from it; None for an installed wheel."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def dropout_generator_state(device: torch.device) -> torch.Tensor:
    """The state of torch's global generator for the device, from which dropout draws there; uint8, 1-d."""
    return torch.get_rng_state() if device.type == "cpu" else getattr(torch, device.type).get_rng_state()


def set_dropout_generator_state(device: torch.device, state: torch.Tensor) -> None:
    """Restore the global generator for the device to a state that `dropout_generator_state` returned."""
    (torch if device.type == "cpu" else getattr(torch, device.type)).set_rng_state(state)
