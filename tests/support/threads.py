"""Processes that exchange messages over a channel, as threads of one process."""

import threading
import time

from torch.distributed import HashStore

from mygpt.processes import channel
from mygpt.processes.channel import Channel, connect
from mygpt.processes.environment import Launched


def in_threads(work, count):
    """Call `work` with each rank, in a thread each, and wait for all."""
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def together(monkeypatch, *works, grace=3.0):
    """Run a function of its `Channel` for each process; returns what each returned or raised."""
    store, results = HashStore(), [None] * len(works)
    monkeypatch.setattr(channel, "GRACE_SECONDS", grace)
    monkeypatch.setattr(channel, "open_store", lambda **_: iter([(store, None, None)]))

    def run(rank):
        try:
            with connect(Launched(len(works), len(works), rank)) as own:
                results[rank] = works[rank](own)
        except Exception as error:
            results[rank] = error

    in_threads(run, len(works))
    return results


def exchange(own: Channel):
    return own.exchange({"node": f"node{own.launched.rank}"})


def fail(error):
    """A process that exchanges nothing and fails."""

    def work(_own):
        raise error

    return work


def exchange_and_fail(error):
    return lambda own: exchange(own) and fail(error)(own)


def lose(own: Channel):
    """A process that loses another in a collective, as gloo reports it."""
    exchange(own)
    time.sleep(0.2)  # until the others have read the messages, too: it is lost later than that
    raise RuntimeError(
        "[/a/gloo/pair.cc:1] Read error [10.0.0.1]:5: Connection reset by peer. This is typically a riddle"
    )
