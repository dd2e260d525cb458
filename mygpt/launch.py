"""The processes of a run: what a launcher started, and what they tell each other beside the training.

They talk through the store of the launcher, which is there before they form a group and after that has broken, so that
a mistake or a failure on one machine is told on all by the name of that machine, and not by a timeout somewhere else.
"""

import itertools
import json
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed import DistError, HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from mygpt.errors import LaunchError, LostProcessError, MygptError, PeerError

PROCESS_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others."""
NOTICE_SECONDS = 30.0
"""After this long it says for whom it waits."""
POLL_SECONDS = 0.5
"""The longest interval at which a waiting process looks for another's error."""
GRACE_SECONDS = 3.0
"""How long a mistake waits for the same one of others, and a process that ends for others to hear why."""


class Launched(NamedTuple):
    """What the launcher says it started."""

    processes: int = 1
    local_processes: int = 1
    """On this machine."""
    rank: int = 0

    @property
    def several_machines(self) -> bool:
        return self.processes > self.local_processes


def launched_processes(environ: Mapping[str, str] = os.environ) -> Launched:
    """What the environment says that the launcher started; one process without a launcher.

    Raises:
        LaunchError: `accelerate launch` was asked for several processes on CPUs but starts a single one, or for a
            way to train that mygpt does not have.
    """
    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if _is_true(environ, variable):
            name = variable.removeprefix("ACCELERATE_USE_")
            raise LaunchError(
                f"the launch configuration asks for {name}, which mygpt does not use; use recipes/launch/"
            )
    if is_sharded(environ) and environ.get("FSDP_VERSION", "1") != "2":
        raise LaunchError(
            "the launch configuration asks for FSDP version 1; mygpt uses version 2 (fsdp_version: 2, as in "
            "recipes/launch/fsdp2.yaml)"
        )
    # Accelerate looks at these, too.
    for name, harmless in (("LOCAL_RANK", None), ("OMPI_COMM_WORLD_SIZE", "1"), ("PMI_SIZE", "1")):
        if "WORLD_SIZE" not in environ and environ.get(name, harmless) != harmless:
            raise LaunchError(
                f"{name} is set, and WORLD_SIZE is not, as by mpirun or by hand; start with accelerate launch or "
                f"torchrun, or unset {name}"
            )
    if "WORLD_SIZE" in environ:
        names = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}
        values = [environ.get(name, default) for name, default in names.items()]
        processes, local, rank = (int(value) if value.isdecimal() else -1 for value in values)
        if not (1 <= local <= processes and 0 <= rank < processes):
            raise LaunchError(f"{', '.join(names)}: got {', '.join(values)}, expected numbers from a launcher")
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if processes > 1 and missing:
            raise LaunchError(
                f"WORLD_SIZE is {processes}, and {', '.join(missing)} not set; start with accelerate launch or "
                "torchrun, or unset WORLD_SIZE"
            )
        return Launched(processes, local, rank)
    # accelerate's one-process launcher names an address for the others only when it was asked for several.
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
        raise LaunchError(
            "accelerate launch was asked for several processes but started one, as it does with --cpu or "
            "distributed_type: MULTI_CPU; use --config_file recipes/launch/cpu2.yaml, or --multi_gpu with "
            "ACCELERATE_USE_CPU=true (and if it was asked for one, unset MASTER_PORT)"
        )
    return Launched()


def is_sharded(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the launch configuration asks for sharded weights (FSDP)."""
    return _is_true(environ, "ACCELERATE_USE_FSDP")


def ignored_settings(precision: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """What the launch configuration asks for and the recipe decides instead, a sentence each."""
    settings = (
        ("mixed_precision", "ACCELERATE_MIXED_PRECISION", ("no", precision), "precision"),
        ("fsdp_activation_checkpointing", "FSDP_ACTIVATION_CHECKPOINTING", ("false",), "activation_checkpointing"),
        ("dynamo_backend", "ACCELERATE_DYNAMO_BACKEND", ("no",), "compile"),
        ("gradient_accumulation_steps", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "micro_batch_size"),
    )
    return [
        f"{name}: {environ[variable]} of the launch configuration is not used: the recipe's {key} decides"
        for name, variable, harmless, key in settings
        if environ.get(variable, harmless[0]).lower() not in harmless
    ]


def check_processes(launched: int, joined: int) -> None:
    """Compare the processes that the launcher started with those that joined.

    Raises:
        LaunchError: they differ, so that each would train a model of its own.
    """
    if launched != joined:
        raise LaunchError(
            f"the launcher started {launched} processes but {joined} joined this run; on CPUs use --config_file "
            "recipes/launch/cpu2.yaml, on GPUs recipes/launch/ddp.yaml"
        )


def is_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun (--max_restarts) or Slurm (requeue) has started this command before."""
    return any(environ.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


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


def is_of_collective(error: Exception) -> bool:
    """Whether a collective or the store failed, as it does when another process ends or hangs.

    NCCL and the store raise torch's own error classes; gloo raises a RuntimeError that begins with its source path.
    """
    return isinstance(error, DistError) or (type(error) is RuntimeError and bool(re.match(OF_GLOO, str(error))))


OF_GLOO = r"\[\S*/gloo/\S+:\d+\] |Gloo connectFullMesh failed"


def _meet(url: str = "", timeout: timedelta = PROCESS_TIMEOUT, **_: Any) -> Iterator[tuple[Store, int, int]]:
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
register_rendezvous_handler("mygpt", _meet)  # type: ignore[no-untyped-call]


def _open_store() -> Store:
    try:
        store, _, _ = next(_meet())
    except (RuntimeError, ValueError) as error:
        raise LaunchError(f"{_store_address()}: the processes cannot meet: {str(error).splitlines()[0]}") from None
    store.set_timeout(timedelta(seconds=GRACE_SECONDS))
    return store


def _store_address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("true", "1")
