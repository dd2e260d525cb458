"""With exact sums all processes hold the same weights and optimizer state, which they check before each save."""

import platform

import pytest
import torch
from support.commands import torchrun
from support.runs import EXACT, assert_same_run, flags_of, steps_of

from mygpt.training import agreement

NODE = platform.node()


FLIP = """
import torch
def flip(tensor):
    tensor.detach().view(torch.int32).view(-1)[7] ^= 1
GPT, restore = parts.GPT, parts.restore
def other_start(*args):
    model = GPT(*args)
    flip(next(model.parameters()))
    return model
def other_checkpoint(*args):
    restored = restore(*args)
    flip(next(tensor for name, tensor in restored[1].items() if name.endswith(".exp_avg")))
    return restored
def flip_weight(built, *_):
    flip(next(built.model.parameters()))
def flip_moment(built, *_):
    flip(built.optimizer.state[next(built.model.parameters())]["exp_avg"])
def is_rank(rank):
    return os.environ["RANK"] == str(rank)
"""


def train_three(place, patch=""):
    return torchrun(3, place, "text.txt", *flags_of(EXACT), "--output", "run", patch=f"{FLIP}\n{patch}")


@pytest.mark.slow
@pytest.mark.fault(69)
def test_processes_that_start_with_different_weights_are_refused(folder):
    """One bit of one process, before anything is written: all of them end, and name it."""
    place = folder("start")
    result = train_three(place, "if is_rank(1): parts.GPT = other_start")
    assert result.returncode == 1
    assert (
        f"mygpt: before step 1: the processes hold different weights or optimizer state, rank 1 on {NODE} "
        f"against rank 0, 2 on {NODE}; their processors or versions compute other initial weights"
    ) in result.stderr
    assert not (place / "run").exists()


@pytest.mark.slow
@pytest.mark.fault(69)
@pytest.mark.parametrize("flip", ["flip_weight", "flip_moment"])
def test_flipped_bit_of_one_process_is_not_saved(folder, exact_run, flip):
    """Step 4 is not saved; the same command continues from step 3, to the bytes of a run never disturbed."""
    place = folder("flip")
    result = train_three(place, f"if is_rank(2): disturb('after-step', {flip}, count=4)")
    assert result.returncode == 1
    assert (
        f"mygpt: step 4: the processes hold different weights or optimizer state, rank 2 on {NODE} "
        f"against rank 0, 1 on {NODE}; this step is not saved"
    ) in result.stderr
    assert steps_of(place / "run") == [1, 2, 3]

    result = train_three(place, "if is_rank(1): parts.restore = other_checkpoint")
    assert result.returncode == 1
    assert "mygpt: before step 4: the processes hold different weights or optimizer state, rank 1" in result.stderr
    assert "they have read different checkpoints" in result.stderr

    result = train_three(place)
    assert result.returncode == 0, result.stderr
    assert_same_run(place / "run", exact_run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_checksum_depends_on_every_bit_and_place(monkeypatch, dtype):
    """Of all tensors, across the borders of chunks, and on the order of the tensors."""
    monkeypatch.setattr(agreement, "CHUNK", 16)
    tensors = [torch.arange(size).remainder(7).to(dtype) for size in (1, 50, 33)]

    def value():
        return agreement.checksum(tensors, torch.device("cpu")).item()

    seen, count = {value()}, 1
    for tensor in tensors:
        bits = tensor.view(torch.uint8)
        for place in range(len(bits)):
            for bit in range(8):
                bits[place] ^= 1 << bit
                seen.add(value())
                bits[place] ^= 1 << bit
                count += 1
    assert len(seen) == count
    assert value() in seen
    tensors.reverse()
    assert value() not in seen
