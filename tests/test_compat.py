"""Canaries for compat.py: each fails if torch or Accelerate no longer behave as it relies on, and says what to do."""

import os
import platform
import re
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from accelerate import Accelerator
from support.commands import free_port, needs_onednn, run_process
from torch.distributed import TCPStore

from mygpt import compat
from mygpt.processes.channel import PROCESS_TIMEOUT
from mygpt.recipe.tables import OptimizerTable, Recipe, ScheduleTable
from mygpt.training.optim import build_optimizer, build_scheduler
from mygpt.training.parts import open_accelerator


@pytest.mark.fault(104)
def test_accelerate_meets_where_mygpt_says(monkeypatch):
    """If Accelerate no longer passes INIT_METHOD on, each group needs keys of its own in the store in another way; and
    if not the timeout, processes wait for thirty minutes, and not ten."""
    environment = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1"}  # or Accelerate would say that it sets it
    for name, value in (environment | {"TORCHELASTIC_RESTART_COUNT": "2"}).items():
        monkeypatch.setenv(name, value)
    prefixes, original = [], compat.PrefixStore
    monkeypatch.setattr(compat, "PrefixStore", lambda prefix, store: prefixes.append(prefix) or original(prefix, store))
    for _ in range(2):
        with open_accelerator(Recipe().runtime, torch.device("cpu"), 1) as accelerator:
            assert accelerator.num_processes == 1
            assert torch.distributed.is_initialized()
            timeout = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout
            assert PROCESS_TIMEOUT <= timeout <= PROCESS_TIMEOUT + timedelta(seconds=1)
        assert not torch.distributed.is_initialized()
    assert len(set(prefixes)) == 2
    assert all(re.fullmatch(r"mygpt/2/\d+", prefix) for prefix in prefixes)


COLLECTIVE = """
import os, sys, time
from datetime import timedelta
import torch
from mygpt.compat import is_of_collective
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
ones = torch.ones(1000)
torch.distributed.all_reduce(ones)
if os.environ["RANK"] == "1":
    time.sleep(5 if sys.argv[1] == "hangs" else 0)
    os._exit(9)
try:
    while True:
        torch.distributed.all_reduce(ones)
except Exception as error:
    print(is_of_collective(error), error, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_gloo_errors_begin_with_their_source_path(tmp_path, how):
    """If not, teach OF_GLOO the new text: without it the loss of a process looks like a bug of the survivor."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", COLLECTIVE, how]
    other = subprocess.Popen(command, env=environment | {"RANK": "1"}, cwd=tmp_path)
    result = run_process(command, tmp_path, 60, environment | {"RANK": "0"})
    assert other.wait(30) == 9
    assert result.stdout.splitlines()[-1].startswith("True ["), result.stdout + result.stderr


def test_gloo_is_kept_off_stdout(capfd):
    """What a library writes to the descriptor while a group is made; it can go when torch 2.10 is no longer allowed."""
    os.write(1, b"before ")
    with compat.gloo_kept_off_stdout():
        os.write(1, b"inside")
    os.write(1, b"after")
    assert capfd.readouterr() == ("before after", "inside")


def test_store_errors_are_of_torchs_own_kind():
    """Also when the launcher has gone with its store; if not, is_of_collective has to know the new class."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=1))
    del server
    with pytest.raises(RuntimeError) as raised:
        client.get("nothing")
    assert compat.is_of_collective(raised.value)


def test_an_accelerator_is_known_and_forgotten():
    """If not, find where Accelerate keeps the state that the Accelerators of a process share."""
    assert not compat.has_accelerator()
    Accelerator(cpu=True)
    try:
        assert compat.has_accelerator()
    finally:
        compat.forget_accelerator()
    assert not compat.has_accelerator()


def test_a_patched_forward_is_the_one_that_is_called():
    """Of an instance; if not, bf16 with FSDP2 silently computes in fp32: wrap the model in another way."""
    model = torch.nn.Linear(4, 4)
    compat.autocast_forward(model, torch.device("cpu"))
    assert model(torch.ones(1, 4)).dtype == torch.bfloat16


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86 processor, for which torch has oneDNN")
def test_torch_has_the_operator_for_products_by_onednn():
    """If it has lost it, or its arguments have changed, see whether there is a public one, or products are BLAS's."""
    assert compat.has_onednn_linear()


@needs_onednn
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_onednn_computes_what_blas_computes(compiled):
    """Product and gradients; if not, have has_onednn_linear return False."""
    inputs = [torch.randn(2, 24, 8).transpose(1, 2), torch.randn(24, 32).t(), torch.randn(32)]
    for linear_inputs in (inputs, inputs[:2]):
        results = []
        for function in (torch.nn.functional.linear, compat.onednn_linear):
            own = [value.clone().requires_grad_() for value in linear_inputs]
            y = (torch.compile(function) if compiled and function is compat.onednn_linear else function)(*own)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            results.append([y, *(value.grad for value in own)])
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


CXX = """
from torch._inductor import config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
assert config.cpp.cxx[1] == "/nonexistent", config.cpp.cxx
try:
    get_cpp_compiler()
except InvalidCxxCompiler:
    print("none")
"""


def test_compiler_takes_the_compiler_in_cxx(tmp_path):
    """And has no other; if it has, missing_for_compiler refuses what works. Its Python.h is that of sysconfig."""
    result = run_process([sys.executable, "-c", CXX], tmp_path, 60, {"CXX": "/nonexistent"})
    assert result.stdout == "none\n", result.stderr


def test_fused_adamw_withholds_an_update_on_the_device():
    """By found_inf, now and ever after; if not, update_unless has to ask the host, as on mps."""
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimizerTable())
    weights = []
    for skip in (False, True, False):
        model(torch.ones(1, 2)).sum().backward()
        compat.update_unless(optimizer, torch.tensor(skip))
        weights.append(model.weight.detach().clone())
    assert not torch.equal(weights[0], torch.zeros(2, 2))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def test_a_step_that_is_left_out_is_none_for_the_scheduler():
    """Torch warns of a rate that changes before a step, unless `_opt_called` is set; if it warns, find the new name."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = build_scheduler(optimizer, ScheduleTable(), 1e-3, 2)
    compat.update_unless(optimizer, torch.tensor(True))
    scheduler.step()


def test_optimizer_is_torchs_adamw():
    """Bit for bit the same updates and state as torch's, without its decorators; if not, drop compat.AdamW."""
    models = [torch.nn.Linear(8, 8) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = build_optimizer(models[0], OptimizerTable(lr=0.1))
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1.0, fused=True)
    for _ in range(5):
        x = torch.randn(4, 8)
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    theirs.load_state_dict(ours.state_dict())
    assert theirs.param_groups[0]["weight_decay"] == pytest.approx(0.01)


def test_optimizer_does_not_import_the_compiler(tmp_path):
    """A run that compiles nothing does not pay for its import; if it does, see what else torch has decorated."""
    code = """
import sys, torch
from mygpt.recipe.tables import OptimizerTable, ScheduleTable
from mygpt.training.optim import build_optimizer, build_scheduler
model = torch.nn.Linear(2, 2)
optimizer = build_optimizer(model, OptimizerTable())
scheduler = build_scheduler(optimizer, ScheduleTable(), 1e-3, 2)
model(torch.ones(2)).sum().backward()
optimizer.step(); optimizer.zero_grad(); scheduler.step()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


DTENSOR = """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from mygpt.compat import full_tensor, is_sharded_tensor, shard_like
mesh = init_device_mesh("cpu", (1,))
whole = torch.arange(6.0).view(3, 2)
parameter = distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)])
part = shard_like(whole, parameter)
assert is_sharded_tensor(parameter) and is_sharded_tensor(part) and not is_sharded_tensor(whole)
assert part.placements == parameter.placements and torch.equal(full_tensor(part), whole)
assert shard_like(whole, whole) is whole and full_tensor(whole) is whole
row = shard_like(whole[:1], parameter)
assert torch.equal(full_tensor(parameter * row), torch.zeros(3, 2)) and torch.equal(full_tensor(row), whole[:1])
torch.distributed.destroy_process_group()
"""


def test_a_dtensor_is_known_by_its_attributes(tmp_path):
    """If not, import its class, which costs half a second at the start of every run."""
    environment = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    result = run_process([sys.executable, "-c", DTENSOR], tmp_path, 60, environment)
    assert result.returncode == 0, result.stderr


BUCKETS = """
import torch
from torch.nn.parallel import DistributedDataParallel
torch.distributed.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(4, 4))
rebuilt = []
for _ in range(3):
    rebuilt.append(model.reducer._rebuild_buckets())
    model(torch.ones(1, 4)).sum().backward()
print(rebuilt)
torch.distributed.destroy_process_group()
"""


def test_ddp_rebuilds_its_buckets_after_the_first_backward_pass(tmp_path):
    """And never again; if it does so at another time, settle_buckets has to follow, and if it does not, to go."""
    environment = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    result = run_process([sys.executable, "-c", BUCKETS], tmp_path, 60, environment)
    assert result.stdout.splitlines()[-1] == "[False, True, False]", result.stdout + result.stderr


def test_torchrun_calls_a_launch_without_an_id_none():
    """If it has another name for it, `launch_id` takes this name for the id of one launch: add it there."""
    from torch.distributed.run import get_args_parser

    assert get_args_parser().get_default("rdzv_id") == "none"
