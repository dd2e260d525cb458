"""Everything that relies on behaviour which torch or Accelerate do not document, each with its reason.

tests/test_compat.py has a canary test for each: if one fails after an update, its docstring says what to do here.
"""

import importlib.util
import inspect
import itertools
import os
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistError, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

# ---- Processes: how they meet, and how it looks when one is lost

INIT_METHOD = "mygpt://"
"""For `torch.distributed.init_process_group`, to which Accelerate passes it on."""

_openings = itertools.count()


def open_store(url: str = INIT_METHOD, *, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """Connect to the launcher's store; yields it with this process's rank and the number of processes.

    A launcher that restarts processes keeps its store, and a script that trains twice uses one store twice. The prefix
    hides what is left in it: without it a process would try to connect to the addresses of ended processes.
    """
    store, rank, processes = next(rendezvous("env://", timeout=timeout))
    prefix = f"mygpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_openings)}"
    yield PrefixStore(prefix, store), rank, processes


register_rendezvous_handler("mygpt", open_store)  # type: ignore[no-untyped-call]


def is_of_collective(error: Exception) -> bool:
    """Whether a collective or the store failed, as it does when another process ends or hangs.

    NCCL and the store raise torch's own error classes; gloo raises a RuntimeError that begins with its source path.
    """
    return isinstance(error, DistError) or (type(error) is RuntimeError and bool(re.match(OF_GLOO, str(error))))


@contextmanager
def gloo_kept_off_stdout() -> Iterator[None]:
    """While inside, what is written to the file descriptor of stdout goes to stderr.

    When a process group is made, gloo of torch 2.10 writes there how many processes are connected; stdout is the run's.
    """
    try:
        sys.stdout.flush()
        own = os.dup(1)
    except (AttributeError, OSError, ValueError):  # it is closed
        yield
        return
    try:
        with suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)


OF_GLOO = r"\[\S*/gloo/\S+:\d+\] |Gloo connectFullMesh failed"


# ---- Accelerate


def has_accelerator() -> bool:
    """Whether this process has an Accelerator already, whose settings a new one would share."""
    from accelerate.state import AcceleratorState

    return bool(AcceleratorState._shared_state)


def forget_accelerator() -> None:
    """Let the next Accelerator of this process start from its arguments, not from the settings of the last."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def autocast_forward(model: torch.nn.Module, device: torch.device) -> None:
    """Have the model compute in bfloat16, as Accelerate does it for everything but FSDP2.

    There it would have FSDP cast weights, gradients and the loss. FSDP calls the patched method of the instance.
    """
    model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)


# ---- DistributedDataParallel and FSDP2


def settle_buckets(accelerator: Any, model: torch.nn.Module, optimizer: Any, *inputs: torch.Tensor) -> None:
    """Have DDP sort its gradients as it does after the first step of a run.

    It sorts them anew after its first backward pass, and the sums of three or more processes depend on how they are
    sorted: without this the first step of a continued run would not be that of a run never interrupted. `model` gives
    a loss for `inputs`; no weight changes.
    """
    accelerator.backward(model(*inputs))
    optimizer.zero_grad()


def is_sharded_tensor(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. Asked by its attribute, since importing the class takes half a second."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered from all processes, each of which has to call this, if it is sharded."""
    return tensor.full_tensor() if is_sharded_tensor(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The part of a full tensor that this process holds of a parameter; scalars, and if it is whole, the tensor.

    One of another shape than the parameter is whole on each process, as a DTensor, which can meet the parameter's.
    """
    if not is_sharded_tensor(parameter) or not tensor.dim():
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    # Every process has all of it, so that none has to send anything.
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    if tensor.shape != parameter.shape:
        placements = [Replicate() for _ in placements]
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


# ---- Precision, and the compiler


def compute_fp32_in_fp32() -> None:
    """Have fp32 products computed in fp32, whatever torch's flags say.

    Otherwise a GPU may compute them in TF32, and oneDNN on a CPU in bf16. Of torch's ways to say so, this one alone
    sets the older and the newer flags alike; torch raises an error where they differ, and some versions warn.
    """
    with warnings.catch_warnings(action="ignore"):
        torch.set_float32_matmul_precision("highest")


def missing_for_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, and how to get it; None: nothing that is known."""
    if device.type not in ("cpu", "cuda"):
        return None
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is missing; install it (pip install triton)"
    on_cpu = "clang++" if sys.platform == "darwin" else "g++"
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", (on_cpu,))
    names = (os.environ[variable],) if variable in os.environ else names
    if not any(map(shutil.which, names)):
        return f"there is no compiler {' or '.join(names)}; install one (such as {on_cpu}), or name it in {variable}"
    folders = {sysconfig.get_path("include"), sysconfig.get_path("include", scheme="posix_prefix")}
    if sys.platform == "linux" and not any((Path(folder) / "Python.h").exists() for folder in folders):
        return f"{min(folders)} has no Python.h; install Python's headers (such as the package python3-dev)"
    return None


# ---- Products by oneDNN


def has_onednn_linear() -> bool:
    """Whether this build of torch has the private operator that `onednn_linear` calls."""
    try:
        schema = str(torch.ops.mkldnn._linear_pointwise.default._schema)
    except (AttributeError, RuntimeError):
        return False
    is_built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_built and schema == LINEAR_POINTWISE


LINEAR_POINTWISE = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


# An operator of our own, because the compiler replaces torch's only for constant weights.
_operators = torch.library.Library("mygpt", "FRAGMENT")  # type: ignore[no-untyped-call]
_operators.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
_operators.impl("product", _product, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "mygpt::product", lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]), lib=_operators
)


class _OneDNNLinear(torch.autograd.Function):
    """The gradient, which torch's operator does not have."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mygpt.product(x, weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows = grad.flatten(0, -2)
        # BLAS takes transposed operands as they are, oneDNN only copies of them: of these two products the second is
        # faster with BLAS, since the copies of activations are larger than that of a weight.
        grad_x = torch.ops.mygpt.product(grad, weight.t().contiguous(), None)
        return grad_x, rows.t() @ x.flatten(0, -2), rows.sum(0) if ctx.needs_input_grad[2] else None


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `torch.nn.functional.linear` of fp32 tensors on a CPU, computed by oneDNN."""
    return _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]


# ---- The optimizer


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the decorators that keep the compiler out of it.

    They import the compiler when these methods are first called: over a second and 70 MB at the start of every run.
    Only the model is ever compiled here, so there is nothing to keep out.
    """

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


def update_unless(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> None:
    """An optimizer step, which changes nothing if `skip` (a bool scalar) is true, now or at an earlier step; then the
    gradients are dropped.

    The host does not wait to know: fused AdamW looks at `found_inf` on the device, as for torch's GradScaler. For any
    other optimizer the host waits.
    Accelerate's wrapper adds a gradient scaler and accumulation, which are not used here, and looks for a package on
    the disk at each step, which takes 0.4 ms: the optimizer inside is stepped itself.
    """
    own: Any = getattr(optimizer, "optimizer", optimizer)
    own.held = torch.maximum(getattr(own, "held", skip.float()), skip.float())
    looks = type(own) is AdamW and own.defaults["fused"] and skip.device.type != "mps"  # of mps not every version does
    if looks:
        own.found_inf = own.held
    if looks or not own.held.item():
        own.step()
    else:
        own._opt_called = True  # or the scheduler would warn that it goes on before the first step
    own.zero_grad()
