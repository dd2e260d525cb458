"""How many runs go side by side."""

import pytest

from mygpt.errors import MygptError
from mygpt.recipe.tables import Recipe
from mygpt.studies import room
from mygpt.studies.room import Room, candidates, measure_room
from mygpt.studies.worker import Measured


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this a machine with so many cores, GPUs and free memory (GB)."""

    def make(cores, gpus=0, free=100):
        monkeypatch.setattr(room, "available_cores", lambda: list(range(cores)))
        monkeypatch.setattr(room, "visible_gpus", lambda: [str(number) for number in range(gpus)])
        monkeypatch.setattr(room.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free * 2**30}))

    return make


def test_candidates_share_the_cores_and_take_turns_on_the_gpus(machine):
    """Runs are doubled up to the cores, or four on a GPU; the recipe's threads are kept."""
    machine(cores=6)
    assert list(candidates(None, 100)) == [Room(1, 6), Room(2, 3), Room(4, 1), Room(6, 1)]
    assert list(candidates(2, 100)) == [Room(1, 2), Room(2, 2), Room(3, 2)]
    assert list(candidates(None, 2)) == [Room(1, 6), Room(2, 3)]
    assert list(candidates(8, 100)) == [Room(1, 8)]
    machine(cores=16, gpus=2)
    assert [slot.gpu for slot in Room(4, 4).slots()] == ["0", "1", "0", "1"]
    assert list(candidates(16, 100))[-1] == Room(8, 16)
    assert list(candidates(None, 100))[-1] == Room(8, 2)
    assert list(candidates(None, 100, on_gpus=False))[-1] == Room(16, 1)
    assert [slot.cpus for slot in Room(2, 3).slots()] == [(0, 1, 2), (3, 4, 5)]


def measured(seconds, memory=1, share=0.0):
    """What the probes of a room measure, if a step takes so long by the number of runs side by side."""
    return lambda _recipe, a_room: [Measured(seconds[a_room.side_by_side], memory * 2**30, share)] * a_room.side_by_side


@pytest.mark.parametrize(
    ("seconds", "free", "side_by_side"),
    [
        ({1: 1.0, 2: 1.1, 4: 1.2, 8: 2.3}, 100, 4),  # eight are hardly faster than four
        ({1: 1.0, 2: 1.99}, 100, 1),
        ({1: 1.0, 2: 1.1, 4: 1.2, 8: 1.3}, 3, 2),  # there is no memory for four
    ],
)
def test_as_many_as_are_faster_in_all_and_fit_into_memory(machine, monkeypatch, seconds, free, side_by_side):
    """Each doubling must gain, and leave some memory free."""
    machine(cores=8, free=free)
    monkeypatch.setattr(room, "time_side_by_side", measured(seconds))
    lines = []
    assert measure_room(Recipe(), 100, lines.append) == Room(side_by_side, 8 // side_by_side)
    assert lines[0].startswith("1 side by side, 8 threads each: 1 steps/s in all, 1,024 MiB")


@pytest.mark.parametrize(("share", "side_by_side"), [(0.1, 4), (0.3, 2), (0.5, 1)])
def test_gpu_memory_limits_the_runs(machine, monkeypatch, share, side_by_side):
    """Four fifths of it: evaluations need some, too."""
    machine(cores=8, gpus=1)
    monkeypatch.setattr(room, "time_side_by_side", measured({1: 1.0, 2: 1.1, 4: 1.2}, share=share))
    assert measure_room(Recipe(), 100, print).side_by_side == side_by_side


def test_runs_that_do_not_fit_beside_each_other_are_not_tried_further(machine, monkeypatch):
    """As on a GPU whose memory two of them exceed."""
    machine(cores=8, gpus=1)
    monkeypatch.setattr(room, "time_side_by_side", lambda _, a: [Measured(1, 1, 0.3)] if a.side_by_side == 1 else None)
    lines = []
    assert measure_room(Recipe(), 100, lines.append).side_by_side == 1
    assert lines[1:] == ["2 runs side by side: do not fit"]


def test_recipe_that_cannot_be_trained_is_an_error(tmp_path):
    """With the message of the process that has tried."""
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(MygptError, match="the training part has"):
        measure_room(Recipe.of(corpus=str(tmp_path / "text.txt")), 2, print)
