"""What processes tell each other before step 1 and when one fails: by its name, on every one of them."""

import os
import time

import pytest
from support.peers import exchange, fail, lose, together
from torch.distributed import HashStore

from mygpt.errors import CorpusError, LaunchError, LostProcessError, PeerError
from mygpt.processes import channel as launch
from mygpt.processes.channel import Channel
from mygpt.processes.environment import Launched, ignored_settings, launched_processes
from mygpt.processes.preflight import ProcessReport, check_alike, describe_ranks

REPORT = ProcessReport(
    node="a",
    device="cpu",
    backend="gloo",
    corpus_sha256="0" * 64,
    recipe={"lr": 1e-3, "steps": 10},
    environment={"device": "cpu", "cpu": "x", "threads": 1, "torch": "2.13", "git_commit": "1"},
)


def differing(**changes) -> list[ProcessReport]:
    return [REPORT, REPORT._replace(node="b", **changes)]


def test_every_process_knows_what_every_process_told(monkeypatch):
    """In order of rank; one process alone tells itself."""
    told = [{"node": "node0"}, {"node": "node1"}, {"node": "node2"}]
    assert together(monkeypatch, exchange, exchange, exchange) == [told] * 3
    assert Channel(Launched(), HashStore()).exchange({"node": "x"}) == [{"node": "x"}]


def test_a_mistake_of_one_process_is_told_by_all_under_its_name(monkeypatch):
    """At once, with its exit code; it itself raises its own."""
    missing, started_at = CorpusError("text.txt: no such file"), time.monotonic()
    first, own, third = together(monkeypatch, exchange, fail(missing), exchange)
    assert own is missing
    for error in (first, third):
        assert isinstance(error, PeerError)
        assert str(error) == f"rank 1 on {os.uname().nodename}: text.txt: no such file"
        assert error.exit_code == 2
    assert time.monotonic() - started_at < 3


def test_a_failure_in_training_is_the_reason_of_those_who_lost_the_process(monkeypatch):
    """Whatever it was: also what no one foresaw."""
    lost, own = together(monkeypatch, lose, lambda peers: exchange(peers) and fail(KeyError("b"))(peers))
    assert isinstance(own, KeyError)
    assert str(lost) == f"rank 1 on {os.uname().nodename}: KeyError: 'b'"
    assert lost.exit_code == 1


def test_a_process_that_ends_without_a_word_is_named(monkeypatch):
    """By those who notice: it alone does not say that it has lost another."""
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


def test_processes_that_cannot_reach_each_other_are_told_what_to_set(monkeypatch):
    """gloo listens where the machine's own name leads, often to no other machine."""
    errors = together(monkeypatch, *[fail(RuntimeError("Gloo connectFullMesh failed with [x] timed out"))] * 2)
    assert all("set GLOO_SOCKET_IFNAME" in str(error) for error in errors)


def test_a_process_that_does_not_come_is_waited_for_a_bounded_time(monkeypatch, capsys):
    """It says for whom it waits, and then gives up."""
    monkeypatch.setattr(launch, "NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(launch, "PROCESS_TIMEOUT", launch.timedelta(seconds=0.5))
    error, _ = together(monkeypatch, exchange, lambda peers: None, grace=0.2)
    assert isinstance(error, LostProcessError)
    assert "rank 1 of this run did not come" in str(error)
    assert capsys.readouterr().err == "rank 0 waits for rank 1\n"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"corpus_sha256": "1" * 64},
            "corpus: the processes read different texts, by sha256: 000000000000 on rank 0 on a",
        ),
        (
            {"recipe": {"lr": 1e-4, "steps": 10}},
            r"\[optimizer\] lr: differs: 0.001 on rank 0 on a, 0.0001 on rank 1 on b",
        ),
        (
            {"environment": REPORT.environment | {"device": "cuda"}},
            "device: differs: cpu on rank 0 on a, cuda on rank 1",
        ),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_processes_that_would_train_on_different_things_are_refused(changes, problem, exact):
    """Which value, on which machine."""
    check_alike(differing(), exact=exact)
    with pytest.raises(LaunchError, match=problem):
        check_alike(differing(**changes), exact=exact)


@pytest.mark.parametrize("name", ["cpu", "threads", "torch"])
def test_exact_sums_need_machines_that_compute_alike(name):
    """Fast sums do not promise the last bits; and the commit is no machine."""
    facts = differing(environment=REPORT.environment | {name: "other"})
    check_alike(facts, exact=False)
    with pytest.raises(LaunchError, match=f"{name}: differs: .* on rank 0 on a, other on rank 1 on b; exact sums need"):
        check_alike(facts, exact=True)
    check_alike(differing(environment=REPORT.environment | {"git_commit": "2"}), exact=True)


def test_ranks_are_named_by_machine():
    """Several on one machine once."""
    assert describe_ranks([REPORT, REPORT, REPORT._replace(node="b")], [0, 1, 2]) == "rank 0, 1 on a and rank 2 on b"


def test_settings_of_the_launch_file_that_are_not_used_are_told():
    """Where they differ from what the recipe says."""
    assert ignored_settings("fp32", {}) == []
    assert ignored_settings("bf16", {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO"}) == []
    told = ignored_settings(
        "fp32",
        {
            "ACCELERATE_MIXED_PRECISION": "fp16",
            "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        },
    )
    assert [line.split(":")[0] for line in told] == ["mixed_precision", "dynamo_backend", "gradient_accumulation_steps"]


def test_only_the_second_version_of_fsdp_is_taken():
    """Accelerate's default is the first."""
    with pytest.raises(LaunchError, match="fsdp_version: 2"):
        launched_processes({"ACCELERATE_USE_FSDP": "true"})
    assert launched_processes({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}) == Launched()
