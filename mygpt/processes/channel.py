"""The processes of a run: what a launcher started, and what they tell each other beside the training.

They talk through the store of the launcher, which is there before they form a group and after that has broken, so that
a mistake or a failure on one machine is told on all by the name of that machine, and not by a timeout somewhere else.
"""

import json
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from mygpt.compat import is_of_collective, meet
from mygpt.errors import LaunchError, LostProcessError, MygptError, PeerError
from mygpt.processes.environment import Launched

PROCESS_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others."""
NOTICE_SECONDS = 30.0
"""After this long it says for whom it waits."""
POLL_SECONDS = 0.5
"""The longest interval at which a waiting process looks for another's error."""
GRACE_SECONDS = 3.0
"""How long a mistake waits for the same one of others, and a process that ends for others to hear why."""


class Peers:
    """The processes of this run, each of which can tell the others something.

    Each process sends the store few requests, however many processes there are.
    """

    def __init__(self, launched: Launched, store: Store):
        self.launched = launched
        self._store = store
        self._nodes: list[str] = []

    def exchange(self, own: dict[str, Any], topic: str = "facts") -> list[dict[str, Any]]:
        """Tell all processes `own`, once for a topic, and return what each told, by rank. Every process has to call it.

        Raises:
            PeerError: another has ended with an error; it is told as its.
            LostProcessError: another has told nothing for too long.
        """
        keys = [f"{topic}/{rank}" for rank in range(self.launched.processes)]
        started_at, noticed = time.monotonic(), False
        self._store.set(keys[self.launched.rank], json.dumps(own))
        while not self._store.check(keys):
            if self._said("error"):
                raise self._reason()
            waited = time.monotonic() - started_at
            if waited > PROCESS_TIMEOUT.total_seconds():
                raise LostProcessError(
                    f"{self._without(keys)} of this run did not come within {waited:.0f} s; look at what it said"
                )
            if waited > NOTICE_SECONDS and not noticed:
                print(f"rank {self.launched.rank} waits for {self._without(keys)}", file=sys.stderr, flush=True)
                noticed = True
            # Longer and longer, because all processes ask the same store.
            time.sleep(min(0.02 + waited / 4, POLL_SECONDS))
        told = [json.loads(value) for value in self._store.multi_get(keys)]
        self._nodes = self._nodes or [entry.get("node", "?") for entry in told]
        return told

    def leave(self, error: Exception) -> Exception:
        """End with an error: tell the others, or find out what another has told; returns what is to be raised."""
        answers: list[Exception] = []
        # Aside, and for so long only, since over a network that is gone the store may never answer.
        thread = threading.Thread(target=lambda: answers.append(self._leave(error)), daemon=True)
        thread.start()
        thread.join(3 * GRACE_SECONDS)
        if answers:
            return answers[0]
        return self._lost(f"the launcher at {_store_address()}", error) if is_of_collective(error) else error

    def _leave(self, error: Exception) -> Exception:
        with suppress(RuntimeError):
            if is_of_collective(error):
                error = self._reason(error)
            elif not isinstance(error, PeerError | LostProcessError):
                known = isinstance(error, MygptError)
                message = str(error) if known else " ".join(f"{type(error).__name__}: {error}".split())
                self._say("error", node=platform.node(), message=message, exit_code=getattr(error, "exit_code", 1))
            # With the first process the store may go: it gives the others time to hear of it.
            self._wait_for("left") if self.launched.rank == 0 else self._say("left")
        return error

    def _reason(self, error: Exception | None = None) -> MygptError:
        """Why this process has lost another, as a collective's `error` showed: what that said, or who it is."""
        try:
            # Those who lost it, too, say so: who does not is the one.
            told = self._wait_for("lost")
            if errors := self._said("error"):
                lines: dict[str, list[str]] = {}
                for rank, entry in sorted(errors.items()):
                    lines.setdefault(entry["message"], []).append(f"rank {rank} on {entry['node']}")
                text = "\n".join(f"{', '.join(who)}: {message}" for message, who in lines.items())
                return PeerError(text, max(entry["exit_code"] for entry in errors.values()))
            missing = [rank for rank in range(self.launched.processes) if rank not in told]
            who = ", ".join(f"rank {rank} on {self._nodes[rank]}" for rank in missing) or "another process"
        except (RuntimeError, IndexError):
            who = f"the launcher at {_store_address()}"
        return self._lost(who, error)

    def _lost(self, who: str, error: Exception | None) -> LostProcessError:
        detail = re.sub(r"^\[.*?\] |\. This is typically .*", "", str(error).splitlines()[0]) if error else ""
        if re.search("connectFullMesh|timed out connecting", detail):
            return LostProcessError(
                "the processes cannot reach each other: set GLOO_SOCKET_IFNAME (with GPUs NCCL_SOCKET_IFNAME) to the "
                f"name of the network interface that the machines share ({detail})"
            )
        return LostProcessError(
            f"{who} has ended, or has not answered for too long: look at what it said; the same command continues "
            f"from the last checkpoint{detail and f' ({detail})'}"
        )

    def _say(self, what: str, **told: Any) -> None:
        line = json.dumps({"rank": self.launched.rank, **told}) + "\n"
        self._store.append(what, line)  # type: ignore[attr-defined]

    def _said(self, what: str) -> dict[int, Any]:
        """What the processes that have said `what` have told, by rank."""
        lines = self._store.get(what).splitlines() if self._store.check([what]) else []
        return {entry["rank"]: entry for entry in map(json.loads, lines)}

    def _wait_for(self, what: str) -> dict[int, Any]:
        """Say `what`, and wait for a moment until all others have said it, or have told their error."""
        self._say(what)
        deadline = time.monotonic() + GRACE_SECONDS
        while len(said := self._said(what)) < self.launched.processes and time.monotonic() < deadline:
            if what == "lost" and len(said | self._said("error")) == self.launched.processes:
                break
            time.sleep(0.05)
        return said

    def _without(self, keys: list[str]) -> str:
        return "rank " + ", ".join(str(rank) for rank, key in enumerate(keys) if not self._store.check([key]))


@contextmanager
def peers_of(launched: Launched) -> Iterator[Peers]:
    """The processes of this run; an error inside is told to the others, and another's is raised here as its.

    Raises:
        PeerError: another process has ended with an error.
        LostProcessError: another has ended without a word, or does not answer.
    """
    if launched.processes == 1:
        yield Peers(launched, HashStore())
        return
    peers = Peers(launched, _open_store())
    try:
        yield peers
    except Exception as error:
        reason = peers.leave(error)
        if reason is error:
            raise
        raise reason from error


def _open_store() -> Store:
    try:
        store, _, _ = next(meet("", timeout=PROCESS_TIMEOUT))
    except (RuntimeError, ValueError) as error:
        raise LaunchError(f"{_store_address()}: the processes cannot meet: {str(error).splitlines()[0]}") from None
    store.set_timeout(timedelta(seconds=GRACE_SECONDS))
    return store


def _store_address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
