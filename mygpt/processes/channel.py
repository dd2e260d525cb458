"""Messages between the processes of a run, through the launcher's store instead of the process group.

The store answers before the process group is formed and after it has failed. So an error on any machine is shown on all
of them, with its name, where each of the others would only see a timeout.
"""

import json
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from mygpt.compat import is_of_collective, open_store
from mygpt.errors import LaunchError, LostProcessError, MygptError, PeerError
from mygpt.processes.environment import Launched
from mygpt.processes.signals import launcher_pid

PROCESS_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others."""
STORE_TIMEOUT = timedelta(seconds=30)
"""How long a process tries to reach a launcher that should be there already."""
NOTICE_SECONDS = 30.0
"""After this long in `exchange` a process prints which others it waits for."""
MAX_MESSAGE = 2**22
"""Characters of a value in the store; torch's own takes 8 MiB, and closes the connection when one is longer."""
POLL_SECONDS = 0.5
"""The longest interval at which a process in `exchange` looks whether another has ended."""
GRACE_SECONDS = 3.0
"""How long a process that ends waits for the others to report that they end, too."""


class Channel:
    """Exchanges messages with the other processes, and finds out why one of them has ended.

    A process that ends with an error reports it in the store; a process whose collective fails reports that it has lost
    another. So the survivors know the reason; if there is none, the rank that stays silent is the one that died.
    The number of requests of each process does not grow with the number of processes.
    """

    def __init__(self, launched: Launched, store: Store):
        self.launched = launched
        self._store = store
        self._nodes = ["?"] * launched.processes

    def exchange(
        self, own: dict[str, Any], topic: str = "reports", *, extra_seconds: float = 0.0
    ) -> list[dict[str, Any]]:
        """Send `own` to all processes, and return the messages of all, by rank. Every process calls it once per topic.

        Raises:
            PeerError: another process has ended with an error.
            LostProcessError: another has ended without an error, or has sent nothing for `PROCESS_TIMEOUT` and
                `extra_seconds`, for work that the others do not share.
        """
        patience = PROCESS_TIMEOUT.total_seconds() + extra_seconds
        keys = [f"{topic}/{rank}" for rank in range(self.launched.processes)]
        started_at, noticed = time.monotonic(), False
        self._send(keys[self.launched.rank], json.dumps(own))
        while not self._store.check(keys):
            if self._store.check(["ended"]):
                raise _AnotherEndedError
            waited = time.monotonic() - started_at
            if waited > patience:
                raise LostProcessError(
                    f"{self._late(keys)} of this run did not come within {waited:.0f} s; look at what it said"
                )
            if waited > NOTICE_SECONDS and not noticed:
                print(f"rank {self.launched.rank} waits for {self._late(keys)}", file=sys.stderr, flush=True)
                noticed = True
            # Longer and longer, because all processes ask the same store.
            time.sleep(min(0.02 + waited / 4, POLL_SECONDS))
        values = zip(keys, self._store.multi_get(keys), strict=True)
        messages = [json.loads(self._whole(key, value)) for key, value in values]
        self._nodes = [message.get("node", node) for message, node in zip(messages, self._nodes, strict=True)]
        return messages

    def _send(self, key: str, text: str) -> None:
        """Put a text into the store; one that is too long for it in pieces, and their number in its place."""
        if len(text) > MAX_MESSAGE:
            pieces = [text[start : start + MAX_MESSAGE] for start in range(0, len(text), MAX_MESSAGE)]
            for number, piece in enumerate(pieces):
                self._store.set(f"{key}/{number}", piece)
            text = str(len(pieces))
        self._store.set(key, text)

    def _whole(self, key: str, value: bytes) -> bytes:
        """What `_send` was given, from the value of its key: all messages are JSON objects, and begin with a brace."""
        if value.startswith(b"{"):
            return value
        return b"".join(self._store.get(f"{key}/{number}") for number in range(int(value)))

    def _late(self, keys: list[str]) -> str:
        return "rank " + ", ".join(str(rank) for rank, key in enumerate(keys) if not self._store.check([key]))

    def leave(self, error: Exception) -> Exception:
        """Report that this process ends with `error`; returns the error to raise, which may be another process's."""
        if isinstance(error, PeerError):
            return error
        is_loss = isinstance(error, _AnotherEndedError) or is_of_collective(error)
        text = str(error) if isinstance(error, MygptError) else " ".join(f"{type(error).__name__}: {error}".split())
        own = {"rank": self.launched.rank, "node": platform.node(), "message": None if is_loss else text}
        own["exit_code"] = getattr(error, "exit_code", 1)
        # With rank 0 the store may end: it leaves the others time to read its error.
        grace = GRACE_SECONDS if is_loss or self.launched.rank == 0 else 0.0
        ended: dict[int, dict[str, Any]] = {}
        lost = [f"the launcher at {_store_address()}"]

        def report() -> None:
            deadline = time.monotonic() + grace
            with suppress(RuntimeError):  # the store has ended
                self._store.append("ended", json.dumps(own) + "\n")  # type: ignore[attr-defined]
                while len(ended) < self.launched.processes:
                    entries = map(json.loads, self._store.get("ended").splitlines())
                    ended.update({entry["rank"]: entry for entry in entries})
                    lost[:] = [f"rank {rank} on {node}" for rank, node in enumerate(self._nodes) if rank not in ended]
                    if time.monotonic() >= deadline:
                        break
                    time.sleep(0.05)

        # In a thread, because the store may never answer over a network that is gone.
        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        thread.join(3 * GRACE_SECONDS)
        if not is_loss:
            return error
        messages: dict[str, list[str]] = {}
        for rank, entry in sorted(ended.items()):
            if entry["message"] is not None:
                messages.setdefault(entry["message"], []).append(f"rank {rank} on {entry['node']}")
        if messages:
            text = "\n".join(f"{', '.join(ranks)}: {message}" for message, ranks in messages.items())
            return PeerError(text, max(entry["exit_code"] for entry in ended.values()))
        return _lost_process(", ".join(lost) or "another process", error)


class _AnotherEndedError(Exception):
    """Ends an exchange in which another process has reported its end; `connect` raises the reason instead."""


@contextmanager
def connect(launched: Launched) -> Iterator[Channel]:
    """A channel to the other processes of this run.

    An error inside is reported to them; where another process has ended first, its error is raised instead.

    Raises:
        LaunchError: the launcher's store cannot be reached.
        PeerError: another process has ended with an error.
        LostProcessError: another has ended without an error, or does not answer.
    """
    if launched.processes == 1:
        yield Channel(launched, HashStore())
        return
    channel = Channel(launched, _open_store())
    try:
        yield channel
    except Exception as error:
        reason = channel.leave(error)
        if reason is error:
            raise
        raise reason from error


def _open_store() -> Store:
    # In a thread, because torch waits for the launcher without looking at signals.
    opening: Future[Store] = Future()

    def connect_to_launcher() -> None:
        try:
            opening.set_result(next(open_store(timeout=timeout))[0])
        except Exception as error:
            opening.set_exception(error)

    # torchrun and accelerate have their store before they start a process: where there is none, they have ended.
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout, launcher = STORE_TIMEOUT if has_store else PROCESS_TIMEOUT, launcher_pid()
    threading.Thread(target=connect_to_launcher, daemon=True).start()
    while wait([opening], timeout=POLL_SECONDS).not_done:
        if launcher not in (None, os.getppid()):
            raise LostProcessError("the launcher has ended before the processes could meet; start it again")
    try:
        store = opening.result()
    except (RuntimeError, ValueError) as error:
        raise LaunchError(f"{_store_address()}: the processes cannot meet: {str(error).splitlines()[0]}") from None
    store.set_timeout(timedelta(seconds=GRACE_SECONDS))
    return store


def _store_address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _lost_process(who: str, error: Exception) -> LostProcessError:
    detail = re.sub(r"^\[.*?\] |\. This is typically .*", "", str(error).partition("\n")[0])
    if re.search("connectFullMesh|timed out connecting", detail):
        return LostProcessError(
            "the processes cannot reach each other: set GLOO_SOCKET_IFNAME (with GPUs NCCL_SOCKET_IFNAME) to the "
            f"name of the network interface that the machines share ({detail})"
        )
    return LostProcessError(
        f"{who} has ended, or has not answered for too long: look at what it said; the same command continues "
        f"from the last checkpoint{detail and f' ({detail})'}"
    )
