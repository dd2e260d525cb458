"""Everything that relies on behaviour which torch or Accelerate do not document, each with its reason.

tests/test_compat.py has a canary test for each: when one fails after an update, its message says what to do here.
"""

import itertools
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous


def is_of_collective(error: Exception) -> bool:
    """Whether a collective or the store failed, as it does when another process ends or hangs.

    NCCL and the store raise torch's own error classes; gloo raises a RuntimeError that begins with its source path.
    """
    return isinstance(error, DistError) or (type(error) is RuntimeError and bool(re.match(OF_GLOO, str(error))))


OF_GLOO = r"\[\S*/gloo/\S+:\d+\] |Gloo connectFullMesh failed"


def meet(url: str, *, timeout: timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """Connect to the launcher's store; yields it with this process's rank and the number of processes.

    A launcher that restarts processes keeps its store, and a script that trains twice uses one store twice. The prefix
    hides what is left in it: without it a process would try to connect to the addresses of ended processes.
    """
    store, rank, processes = next(rendezvous("env://", timeout=timeout))
    prefix = f"mygpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_openings)}"
    yield PrefixStore(prefix, store), rank, processes


_openings = itertools.count()

INIT_METHOD = "mygpt://"
"""For `torch.distributed.init_process_group`, to which Accelerate passes it on (a test is the canary for that)."""
register_rendezvous_handler("mygpt", meet)  # type: ignore[no-untyped-call]
