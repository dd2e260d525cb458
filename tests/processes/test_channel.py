"""Messages between processes: reports before step 1, and whose error ended the others."""

import platform
import time
from datetime import timedelta

import pytest
from support.threads import exchange, exchange_and_fail, fail, in_threads, lose, together
from torch.distributed import DistNetworkError, HashStore, TCPStore

from mygpt.errors import CorpusError, LostProcessError, PeerError
from mygpt.processes import channel
from mygpt.processes.channel import Channel, connect
from mygpt.processes.environment import Launched

RANK_1 = f"rank 1 on {platform.node()}"


def test_every_process_gets_the_messages_of_all(monkeypatch):
    """In order of rank; one process alone gets its own."""
    messages = [{"node": "node0"}, {"node": "node1"}, {"node": "node2"}]
    assert together(monkeypatch, exchange, exchange, exchange) == [messages] * 3
    assert Channel(Launched(), HashStore()).exchange({"node": "x"}) == [{"node": "x"}]


def test_long_messages_go_in_pieces():
    """Torch's store takes 8 MiB in one value: more, as of a run with many evaluations, would end the connection."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    long, results = "x" * (2 * channel.MAX_MESSAGE + 1), [None, None]

    def work(rank):
        own = TCPStore("localhost", store.port, is_master=False)
        results[rank] = Channel(Launched(2, 2, rank), own).exchange({"text": long if rank else "{short}"})

    in_threads(work, 2)
    assert results == [[{"text": "{short}"}, {"text": long}]] * 2


def test_mistake_of_one_process_is_raised_by_all_with_its_name(monkeypatch):
    """At once, with its exit code; the process itself raises its own error."""
    missing, started_at = CorpusError("text.txt: no such file"), time.monotonic()
    first, own, third = together(monkeypatch, exchange, fail(missing), exchange)
    assert own is missing
    for error in (first, third):
        assert isinstance(error, PeerError)
        assert str(error) == f"{RANK_1}: text.txt: no such file"
        assert error.exit_code == 2
    assert time.monotonic() - started_at < 3


def test_survivors_of_a_failure_report_its_reason(monkeypatch):
    """Also an error that is none of mygpt's."""
    lost, own = together(monkeypatch, lose, exchange_and_fail(KeyError("b")))
    assert isinstance(own, KeyError)
    assert str(lost) == f"{RANK_1}: KeyError: 'b'"
    assert lost.exit_code == 1


def test_process_that_ends_silently_is_named(monkeypatch):
    """By the survivors: it is the only one that does not report the loss."""
    *losers, _killed = together(monkeypatch, lose, lose, exchange, grace=0.5)
    for error in losers:
        assert isinstance(error, LostProcessError)
        assert str(error).startswith("rank 2 on node2 has ended, or has not answered for too long: ")
        assert str(error).endswith("(Read error [10.0.0.1]:5: Connection reset by peer)")


class EndingStore(HashStore):
    """A store that ends once a value has been read, as it does with the process that holds it."""

    reads = 0

    def get(self, key):
        self.reads += 1
        if self.reads > 1:
            raise RuntimeError("Connection reset by peer")
        return super().get(key)


def test_a_lost_process_is_named_though_the_store_ends_before_the_wait():
    """Rank 0, which may hold the store, can end first: the last entries that were read name the silent rank."""
    store = EndingStore()
    store.set("reports/0", '{"node": "node0"}')
    store.set("reports/2", '{"node": "node2"}')
    store.append("ended", '{"rank": 0, "node": "node0", "message": null, "exit_code": 1}\n')
    channel = Channel(Launched(3, 1, 1), store)
    exchange(channel)
    error = channel.leave(RuntimeError("[/a/gloo/pair.cc:1] Connection closed by peer"))
    assert isinstance(error, LostProcessError)
    assert str(error).startswith("rank 2 on node2 has ended, or has not answered for too long: ")


def test_processes_that_cannot_reach_each_other_name_the_setting(monkeypatch):
    """gloo listens at the address of the host name, which other machines often cannot reach."""
    errors = together(monkeypatch, *[fail(RuntimeError("Gloo connectFullMesh failed with [x] timed out"))] * 2)
    assert all("set GLOO_SOCKET_IFNAME" in str(error) for error in errors)


def test_missing_process_is_waited_for_a_bounded_time(monkeypatch, capsys):
    """A message names it before the wait ends with an error."""
    monkeypatch.setattr(channel, "NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(channel, "PROCESS_TIMEOUT", timedelta(seconds=0.5))
    error, _ = together(monkeypatch, exchange, lambda own: None, grace=0.2)
    assert isinstance(error, LostProcessError)
    assert "rank 1 of this run did not come" in str(error)
    assert capsys.readouterr().err == "rank 0 waits for rank 1\n"


def test_process_with_more_to_do_is_waited_for_longer(monkeypatch):
    """As one that hashes a large corpus for its machine."""
    monkeypatch.setattr(channel, "PROCESS_TIMEOUT", timedelta(seconds=0.1))

    def hash_first(own):
        time.sleep(0.5)
        return exchange(own)

    patient, _ = together(monkeypatch, lambda own: own.exchange({"node": "node0"}, extra_seconds=10), hash_first)
    assert patient == [{"node": "node0"}, {"node": "node1"}]


@pytest.mark.fault(13)
def test_process_whose_launcher_ends_before_they_meet(monkeypatch):
    """torch would wait ten minutes for it, deaf to signals."""
    parents = iter([1, 1, 2])
    monkeypatch.setattr(channel, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(channel, "launcher_pid", lambda: 1)
    monkeypatch.setattr(channel.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(channel, "open_store", lambda **_: time.sleep(1) or iter([]))
    with pytest.raises(LostProcessError, match="the launcher has ended before the processes could meet"):
        channel._open_store()


LIKE_A_LOST_PROCESS = [
    RuntimeError("tracker: [Errno 32] Broken pipe"),
    RuntimeError("upload failed: Connection reset by peer"),
    RuntimeError("cannot log to wandb: Timed out waiting 5000ms; is NCCL or gloo there?"),
    RuntimeError("saved by: [/a/gloo/pair.cc:1] Connection closed by peer"),
    OSError("Connection reset by peer"),
]


@pytest.mark.fault(70)
@pytest.mark.parametrize("error", [*LIKE_A_LOST_PROCESS, DistNetworkError("Broken pipe")])
def test_single_process_raises_its_own_error(error):
    """Also an error that looks like a lost process: there is no other process."""
    with pytest.raises(type(error)) as raised, connect(Launched()):
        raise error
    assert raised.value is error


@pytest.mark.fault(70)
@pytest.mark.parametrize("error", LIKE_A_LOST_PROCESS)
def test_error_that_looks_like_a_lost_process_keeps_its_owner(monkeypatch, error):
    """The process that has it raises it; the other, which has lost that process, names it."""
    lost, own = together(monkeypatch, lose, exchange_and_fail(error))
    assert own is error
    assert isinstance(lost, PeerError)
    assert str(lost) == f"{RANK_1}: {type(error).__name__}: {error}"


class CountingStore:
    """A client of a store that counts its requests to the server."""

    def __init__(self, port):
        self.store, self.requests = TCPStore("127.0.0.1", port, is_master=False), 0

    def __getattr__(self, name):
        self.requests += 1
        return getattr(self.store, name)


@pytest.mark.slow
def test_many_processes_send_the_store_few_requests():
    """64 processes on one store: fewer requests of each than processes; and an error reaches all within two seconds."""
    count, delay = 64, 1.5
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [CountingStore(server.port) for _ in range(count)]
    channels = [Channel(Launched(count, count, rank), store) for rank, store in enumerate(stores)]
    results, ended = [None] * count, [0.0] * count

    def report(rank):
        time.sleep(delay * (rank == 1))
        results[rank] = channels[rank].exchange({"node": f"node{rank}"})

    def end(rank):
        try:
            if rank == 1:
                time.sleep(delay)
                raise KeyError("b")
            channels[rank].exchange({}, "more")
        except Exception as error:
            ended[rank] = time.monotonic()
            results[rank] = channels[rank].leave(error)

    in_threads(report, count)
    assert results == [[{"node": f"node{rank}"} for rank in range(count)]] * count
    assert max(store.requests for store in stores) < count
    in_threads(end, count)
    assert isinstance(results[1], KeyError)
    assert {str(error) for rank, error in enumerate(results) if rank != 1} == {f"{RANK_1}: KeyError: 'b'"}
    assert max(ended) - ended[1] < 2
