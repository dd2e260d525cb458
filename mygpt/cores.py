"""Which cores this process may use, and the limits of the container that it is in. Imports nothing of mygpt."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
"""Where Linux keeps the limits of containers, and which of them hold for this process."""


def available_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def core_count() -> int:
    """How many cores this process may use at a time, as a container may have fewer than it sees."""
    quotas = [float(len(available_cores()))]
    for folder in cgroups("cpu"):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with suppress(OSError, ValueError):
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            quotas += [int(quota) / int(period)] * (int(quota) > 0)
    return max(1, int(min(quotas)))


def cgroups(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups, of version 1 and 2, from its own to the outermost."""
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CGROUPS / controller if controllers else CGROUPS
            if not controllers or controller in controllers.split(","):
                own = root / path.strip("/")  # in a container it may be the host's path, which is not there
                yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))
