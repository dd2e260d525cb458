"""Processes that talk to each other, as threads of one."""

import threading

from torch.distributed import HashStore

from mygpt.processes import channel as launch
from mygpt.processes.channel import Channel, connect
from mygpt.processes.environment import Launched


def together(monkeypatch, *works, grace=3.0):
    """Run a function of its `Channel` for each process, in threads; returns what each returned or raised."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", grace)
    store, results = HashStore(), [None] * len(works)
    monkeypatch.setattr(launch, "_open_store", lambda: store)

    def run(rank, work):
        try:
            with connect(Launched(len(works), len(works), rank)) as peers:
                results[rank] = work(peers)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=entry) for entry in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def exchange(peers: Channel):
    return peers.exchange({"node": f"node{peers.launched.rank}"})


def fail(error):
    def work(peers):
        raise error

    return work


def lose(peers: Channel):
    exchange(peers)
    raise RuntimeError(
        "[/a/gloo/pair.cc:1] Read error [10.0.0.1]:5: Connection reset by peer. This is typically a riddle"
    )
