"""Sums over the processes of a machine: all have the same bits, with shared memory and without."""

import json

import pytest
import torch
from support.commands import BIN, free_port, run_process

from mygpt.processes import exchange
from mygpt.processes.environment import Launched

SUMS = """
import errno, json, os, sys, time
from pathlib import Path
import torch
from torch import distributed
from mygpt.processes import exchange

distributed.init_process_group("gloo")
rank, processes = distributed.get_rank(), distributed.get_world_size()
exchange.CHUNK_BYTES = 4096
def refuse(*_):
    raise OSError(errno.ENOSPC, "no space")
if sys.argv[1] == "full":
    os.posix_fallocate = refuse
if sys.argv[1] == "old python":
    del os.memfd_create
if sys.argv[1] == "slow" and rank == 1:
    # It reads what the others have written when these are at the next vector already.
    gloo = distributed.all_reduce
    distributed.all_reduce = lambda *_, **__: (gloo(*_, **__), time.sleep(0.02))
if sys.argv[1] == "private" and rank == 1:
    os.readlink = refuse
if sys.argv[1] == "another's" and rank == 1:
    original = exchange._map
    exchange._map = lambda process, number, mark, size: original(process, number, mark + 1, size)
add_up = exchange.open_sum()
results = []
for seed in range(5):
    for dtype in (torch.float32, torch.int64):
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn(2500, generator=generator).mul(2**20).to(dtype) for _ in range(processes)]
        own, expected = draws[rank].clone(), draws[0].clone()
        add_up(own)
        for other in draws[1:]:
            expected += other
        results.append(torch.equal(own, expected))
Path(f"result-{rank}").write_text(json.dumps([add_up._memory is not None, all(results)]))
distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("how", "processes"),
    [("shared", 3), ("slow", 2), ("full", 2), ("old python", 2), ("private", 3), ("another's", 3)],
)
def test_all_processes_have_the_sum_in_the_order_of_their_ranks(tmp_path, how, processes):
    """In pieces, one after the other; without memory that all can have, by messages."""
    script = tmp_path / "sums.py"
    script.write_text(SUMS)
    command = [BIN / "torchrun", "--nproc-per-node", processes, "--master-port", free_port(), script, how]
    result = run_process(command, tmp_path, 120, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    for rank in range(processes):
        assert json.loads((tmp_path / f"result-{rank}").read_text()) == [how in ("shared", "slow"), True]


def test_several_machines_and_many_processes_leave_it_to_gloo():
    """Sending every row to every process would be too much."""
    for launched in (Launched(4, 2, 0), Launched(9, 9, 0)):
        assert exchange.open_sum(launched) is torch.distributed.all_reduce
