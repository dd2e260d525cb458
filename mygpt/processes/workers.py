"""Threads of one process that compute pieces of its work side by side, for sums that do not depend on their order."""

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

SWITCH_SECONDS = 5e-5
"""After how long a thread that runs Python lets the others have their turn. With Python's 5 ms a thread whose operator
has ended often waits for longer than the next one takes: a step of a small model took 20 ms in place of 18."""


class Workers:
    """So many threads or, for one, the caller's own.

    Python's lock is no hindrance as long as most of the time goes into torch's operators, which release it.
    """

    def __init__(self, count: int = 1):
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="mygpt-worker") if count > 1 else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results in the order of the items; `function` must not call this.

        After an exception no more items are begun, and it is raised once those that were have ended.
        """
        if self._pool is None:
            return [function(item) for item in items]
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        futures = [self._pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            wait(futures)
            raise
        finally:
            sys.setswitchinterval(before)


ALONE = Workers()
"""The caller's own thread."""
