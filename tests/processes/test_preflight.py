"""Checks before step 1: the processes would train the same run, on machines that compute alike."""

import pytest

from mygpt.errors import LaunchError
from mygpt.processes.preflight import ProcessReport, check_alike, describe_ranks

REPORT = ProcessReport(
    node="a",
    device="cpu",
    backend="gloo",
    inputs={"corpus": "0" * 64, "val_corpus": None, "init_from": None},
    recipe={"lr": 1e-3, "steps": 10},
    environment={"device": "cpu", "cpu": "x", "threads": 1, "torch": "2.13", "git_commit": "1"},
)


def differing(**changes) -> list[ProcessReport]:
    return [REPORT, REPORT._replace(node="b", **changes)]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"inputs": REPORT.inputs | {"corpus": "1" * 64}},
            "corpus: the processes read different texts, by sha256: 000000000000 on rank 0 on a",
        ),
        (
            {"inputs": REPORT.inputs | {"init_from": "1" * 64}},
            "init_from: the processes read different weights, by sha256: nothing on rank 0 on a, 111111111111 on",
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
def test_processes_of_different_runs_are_refused(changes, problem, exact):
    """The message has each value and its machine."""
    check_alike(differing(), exact=exact)
    with pytest.raises(LaunchError, match=problem):
        check_alike(differing(**changes), exact=exact)


@pytest.mark.parametrize("name", ["cpu", "threads", "torch"])
def test_exact_sums_need_machines_that_compute_alike(name):
    """Fast sums do not promise the last bits; and another commit does not matter."""
    reports = differing(environment=REPORT.environment | {name: "other"})
    check_alike(reports, exact=False)
    with pytest.raises(LaunchError, match=f"{name}: differs: .* on rank 0 on a, other on rank 1 on b; exact sums need"):
        check_alike(reports, exact=True)
    check_alike(differing(environment=REPORT.environment | {"git_commit": "2"}), exact=True)


def test_ranks_are_named_by_machine():
    """A machine with several ranks is named once."""
    assert describe_ranks([REPORT, REPORT, REPORT._replace(node="b")], [0, 1, 2]) == "rank 0, 1 on a and rank 2 on b"
