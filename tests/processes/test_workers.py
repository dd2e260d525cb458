"""Threads that compute side by side: results in order, errors once all have ended, Python's own pace restored."""

import sys
import threading

import pytest

from mygpt.processes.workers import SWITCH_SECONDS, Workers


@pytest.mark.parametrize("count", [1, 3])
def test_results_are_in_the_order_of_the_items(count):
    """Whatever thread computes them; one alone is the caller's own."""
    threads = set()

    def square(number):
        threads.add(threading.current_thread())
        return number**2

    assert Workers(count).map(square, range(20)) == [number**2 for number in range(20)]
    assert (threads == {threading.current_thread()}) == (count == 1)


def test_they_work_at_the_same_time_and_switch_often():
    """Each waits for the other; afterwards Python switches threads as before."""
    barrier, before, seen = threading.Barrier(2, timeout=20), sys.getswitchinterval(), []

    def meet(number):
        barrier.wait()
        seen.append(sys.getswitchinterval())
        return number

    assert Workers(2).map(meet, [1, 2]) == [1, 2]
    assert seen == pytest.approx([SWITCH_SECONDS] * 2)
    assert sys.getswitchinterval() == before


def test_the_first_error_is_raised_once_all_have_ended():
    """So that none is still at work when the caller gives up."""
    ended = []

    def fail(number):
        try:
            if number:
                raise ValueError(number)
        finally:
            ended.append(number)

    with pytest.raises(ValueError, match="1"):
        Workers(2).map(fail, [0, 1, 2])
    assert sorted(ended) == [0, 1, 2]
