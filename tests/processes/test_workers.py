"""Threads that compute side by side: results in order, errors once all have ended, Python's own pace restored."""

import sys
import threading
import time

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


def test_an_error_is_raised_once_all_that_were_begun_have_ended():
    """So that none is still at work when the caller gives up; and no more are begun."""
    barrier, begun, ended = threading.Barrier(2, timeout=20), [], []

    def fail(number):
        begun.append(number)
        barrier.wait()
        if number == 0:
            raise ValueError(number)
        time.sleep(0.2)
        ended.append(number)

    workers = Workers(2)
    with pytest.raises(ValueError, match="0"):
        workers.map(fail, range(8))
    assert sorted(begun) in ([0, 1], [0, 1, 2])
    assert ended == [1]
    assert workers.map(str, [1, 2]) == ["1", "2"]
