"""Threads of one process that compute pieces of its work side by side, for sums that do not depend on their order."""

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

SWITCH_SECONDS = 5e-5
"""After how long a thread that runs Python lets the others have their turn. With Python's 5 ms a thread whose operator
has ended often waits for longer than the next one takes: a step of a small model took 20 ms in place of 18."""


class Workers:
    """So many threads; one alone is the caller's own.

    Python's lock is no hindrance as long as most of the time goes into torch's operators, which release it.
    """

    def __init__(self, count: int = 1):
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="mygpt-worker") if count > 1 else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results in the order of the items. The first exception is raised once all have ended."""
        if self._pool is None:
            return [function(item) for item in items]
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            futures = [self._pool.submit(function, item) for item in items]
            errors = [error for future in futures if (error := future.exception())]
        finally:
            sys.setswitchinterval(before)
        if errors:
            raise errors[0]
        return [future.result() for future in futures]


ALONE = Workers()
"""The caller's own thread."""
