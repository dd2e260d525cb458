"""What a launcher started, by the environment that it sets."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from support.commands import BIN, run_process
from torch.distributed import HashStore

from mygpt.errors import LaunchError
from mygpt.processes import machine, preflight
from mygpt.processes.channel import Channel
from mygpt.processes.environment import (
    SHORT_WAITS,
    Launched,
    check_joined,
    choose_workers,
    ignored_settings,
    launched_processes,
    set_before_torch,
)
from mygpt.processes.machine import choose_matmul, resolve_device, set_threads
from mygpt.recipe.tables import RuntimeTable


def test_launched_processes_are_counted_from_the_environment():
    """torchrun's WORLD_SIZE; one without a launcher; an error where the launcher would train another model."""
    assert launched_processes({}) == Launched(1, 1, 0)
    several = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launched_processes(several) == Launched(8, 4, 5)
    assert launched_processes({"ACCELERATE_MIXED_PRECISION": "no"}) == Launched(1, 1, 0)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
        for count in ("many", "-1", "8" if name == "RANK" else "0"):
            with pytest.raises(LaunchError, match="WORLD_SIZE"):
                launched_processes(several | {name: count})
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(LaunchError, match=f"WORLD_SIZE is 8, and {name} not set; start with"):
            launched_processes({key: value for key, value in several.items() if key != name})
    with pytest.raises(LaunchError, match="WORLD_SIZE is 1, and MASTER_ADDR, MASTER_PORT not set"):
        launched_processes({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"})
    for name, value in (("LOCAL_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2"), ("PMI_SIZE", "4")):
        with pytest.raises(LaunchError, match=f"{name} is set, and WORLD_SIZE is not"):
            launched_processes({name: value})
    assert launched_processes({"OMPI_COMM_WORLD_SIZE": "1"}) == Launched(1, 1, 0)
    with pytest.raises(LaunchError, match=r"cpu2\.yaml"):
        launched_processes({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"})
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        with pytest.raises(LaunchError, match=name):
            launched_processes({f"ACCELERATE_USE_{name}": "true", "WORLD_SIZE": "2"})


def test_fsdp_has_to_be_version_2():
    """Accelerate's default is version 1."""
    with pytest.raises(LaunchError, match="fsdp_version: 2"):
        launched_processes({"ACCELERATE_USE_FSDP": "true"})
    assert launched_processes({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}) == Launched()


def test_unused_settings_of_the_launch_file_are_named():
    """Where they differ from the recipe."""
    assert ignored_settings("fp32", {}) == []
    assert ignored_settings("bf16", {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO"}) == []
    lines = ignored_settings(
        "fp32",
        {
            "ACCELERATE_MIXED_PRECISION": "fp16",
            "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        },
    )
    assert [line.split(":")[0] for line in lines] == [
        *("mixed_precision", "dynamo_backend", "gradient_accumulation_steps")
    ]


@pytest.mark.fault(108)
def test_auto_is_the_cpu_if_the_launch_asks_for_it(monkeypatch):
    """In any word that Accelerate knows; else it is the GPU that is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for value, expected in (("true", "cpu"), ("YES", "cpu"), ("false", "cuda"), ("", "cuda")):
        monkeypatch.setenv("ACCELERATE_USE_CPU", value)
        assert resolve_device("auto", "fp32").type == expected
    assert resolve_device("cuda", "fp32").type == "cuda"


def test_several_processes_on_mps_are_refused(monkeypatch):
    """Accelerate would start separate runs; the launch files for several processes are for other devices."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto", "fp32", 1).type == "mps"
    with pytest.raises(LaunchError, match=r"mps, which computes for one process, .* started 2 .* add --device cpu"):
        resolve_device("auto", "fp32", 2)


def test_processes_that_do_not_meet_are_refused():
    """Two independent runs of one process each would train two models."""
    check_joined(2, 2)
    with pytest.raises(LaunchError, match=r"started 2 processes but 1 joined .*cpu2\.yaml and --device cpu"):
        check_joined(2, 1)


def test_threads_are_set_in_process(monkeypatch):
    """The recipe's number, else the cores shared among the processes of this machine."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        assert set_threads(1, 1) == torch.get_num_threads() == 1
        monkeypatch.setattr("mygpt.processes.environment.core_count", lambda: 6)
        assert set_threads(None, 4) == 1
        assert set_threads(None, 3) == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_threads_that_are_right_are_not_set(monkeypatch):
    """Setting them costs a small model a tenth of its speed: `mygpt train` puts them where torch looks for them."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("set"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert set_threads(torch.get_num_threads(), 1) == torch.get_num_threads()


def test_waiting_threads_sleep_soon():
    """Unless the user has said how OpenMP's threads wait, in any of the three variables."""
    environ = {"PATH": "/bin"}
    set_before_torch(environ)
    assert environ == {"PATH": "/bin", **SHORT_WAITS}
    for own in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "200"}):
        environ = dict(own)
        set_before_torch(environ)
        assert environ == own


@pytest.mark.skipif(sys.platform != "linux", reason="needs a torch with GNU's OpenMP, as on Linux")
def test_every_command_shortens_waits(tmp_path, monkeypatch):
    """Before torch is imported, when OpenMP's library reads its variables: the library says what it has read."""
    for name in ("OMP_WAIT_POLICY", *SHORT_WAITS):
        monkeypatch.delenv(name, raising=False)
    result = run_process([BIN / "mygpt", "doctor"], tmp_path, environment={"OMP_DISPLAY_ENV": "verbose"})
    shown = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)
    assert shown == [SHORT_WAITS["GOMP_SPINCOUNT"]], result.stderr


def test_workers_fill_the_cores(monkeypatch):
    """This process's share of them, with so many threads each."""
    monkeypatch.setattr("mygpt.processes.environment.core_count", lambda: 8)
    got = [choose_workers(threads, processes) for threads, processes in ((None, 1), (None, 4), (3, 1), (16, 1))]
    assert got == [8, 2, 2, 1]


CPUINFO = """\
processor\t: 0
vendor_id\t: {}
cpu family\t: {}
model name\t: AMD EPYC
flags\t\t: fpu {} avx2

processor\t: 1
vendor_id\t: another
"""


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (("AuthenticAMD", 26, "avx512f"), "onednn"),
        (("AuthenticAMD", 26, "sse"), "blas"),
        (("AuthenticAMD", 25, "avx512f"), "blas"),
        (("GenuineIntel", 26, "avx512f"), "blas"),
    ],
)
def test_the_processor_decides_what_computes_products(tmp_path, monkeypatch, processor, expected):
    """Unless the recipe does, or there are no fp32 products on a CPU to compute."""
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO.format(*processor))
    found = machine.cpu(file)
    assert machine.cpu(tmp_path / "nothing") == {}
    monkeypatch.setattr(machine, "cpu", lambda: found)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(machine, "has_onednn_linear", lambda: True)
    cpu = torch.device("cpu")
    assert choose_matmul(RuntimeTable(), cpu) == expected
    assert choose_matmul(RuntimeTable(matmul="blas"), cpu) == "blas"
    assert choose_matmul(RuntimeTable(matmul="onednn"), cpu) == "onednn"
    assert choose_matmul(RuntimeTable(precision="bf16"), cpu) == "blas"
    assert choose_matmul(RuntimeTable(), torch.device("cuda")) == "blas"
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert choose_matmul(RuntimeTable(), cpu) == "blas"


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"flags": "avx2 avx512f"}, False),
        ({"flags": "avx512_bf16"}, True),
        ({"Features": "fp asimd"}, False),
        ({}, True),
    ],
)
def test_bf16_where_the_processor_has_no_products_of_it_is_noted(tiny, monkeypatch, processor, expected):
    """By train and doctor; where the processor is unknown, it is not."""
    monkeypatch.setattr(machine, "cpu", lambda: processor)
    assert machine.has_bf16_products() == expected
    found = preflight.run_preflight(tiny(precision="bf16"), Launched(), Channel(Launched(), HashStore()), 16)
    assert any("bf16 is slower than fp32 here" in note for note in found.notes) == (not expected)


def test_onednn_that_is_not_there_is_an_error(monkeypatch):
    """Asked for in the recipe; "auto" does without."""
    with pytest.raises(LaunchError, match='matmul: got onednn, which is for a cpu; use "auto"'):
        choose_matmul(RuntimeTable(matmul="onednn"), torch.device("cuda"))
    monkeypatch.setattr(machine, "has_onednn_linear", lambda: False)
    with pytest.raises(LaunchError, match="onednn, which this build of torch does not have"):
        choose_matmul(RuntimeTable(matmul="onednn"), torch.device("cpu"))
    assert choose_matmul(RuntimeTable(), torch.device("cpu")) == "blas"


@pytest.mark.parametrize("largest", [2**30, 2**25, 0])
def test_freed_memory_is_kept_only_where_large_blocks_can_be(monkeypatch, largest):
    """Setting the one threshold stops glibc from adapting the other, which older versions allow up to 32 MB."""
    calls = {}

    def mallopt(parameter, value):
        if parameter == machine.M_MMAP_THRESHOLD and value > largest:
            return 0
        calls[parameter] = value
        return 1

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(machine.sys, "platform", "linux")
    machine.keep_freed_memory(torch.device("cpu"))
    assert calls.get(machine.M_MMAP_THRESHOLD) == (largest or None)
    assert (machine.M_TRIM_THRESHOLD in calls) == (largest > 0)
