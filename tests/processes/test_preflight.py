"""Checks before step 1: the processes would train the same run, on machines that compute alike."""

import importlib.util
import sysconfig

import pytest
import torch
from support.runs import FLAGS

from mygpt.compat import missing_for_compiler
from mygpt.errors import LaunchError
from mygpt.processes.preflight import ProcessReport, check_alike, describe_ranks

REPORT = ProcessReport(
    node="a",
    device="cpu",
    backend="gloo",
    inputs={"corpus": "0" * 64, "val_corpus": None, "init_from": None},
    recipe={"lr": 1e-3, "steps": 10},
    environment={"device": "cpu", "cpu": "x", "threads": 1, "torch": "2.13"},
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
    """Fast sums do not promise the last bits."""
    reports = differing(environment=REPORT.environment | {name: "other"})
    check_alike(reports, exact=False)
    with pytest.raises(LaunchError, match=f"{name}: differs: .* on rank 0 on a, other on rank 1 on b; exact sums need"):
        check_alike(reports, exact=True)


def test_ranks_are_named_by_machine():
    """A machine with several ranks is named once."""
    assert describe_ranks([REPORT, REPORT, REPORT._replace(node="b")], [0, 1, 2]) == "rank 0, 1 on a and rank 2 on b"


@pytest.mark.fault(109)
@pytest.mark.parametrize("lacking", ["path", "CXX", "Python.h"])
def test_compile_without_a_compiler_is_refused(call, monkeypatch, text_file, tmp_path, lacking):
    """One line that says what is missing, before anything is made."""
    monkeypatch.delenv("CXX", raising=False)
    if lacking == "Python.h":
        monkeypatch.setattr(sysconfig, "get_path", lambda *_, **__: str(tmp_path))
    elif lacking == "CXX":
        monkeypatch.setenv("CXX", "/nonexistent/c++")
    else:
        monkeypatch.setenv("PATH", "/nonexistent")
    code, out, err = call("train", text_file, *FLAGS, "--compile", "--output", tmp_path / "run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    missing = {
        "path": "there is no compiler g++; install one (such as g++), or name it in CXX",
        "CXX": "there is no compiler /nonexistent/c++; install one",
        "Python.h": f"{tmp_path} has no Python.h; install Python's headers (such as the package python3-dev)",
    }[lacking]
    assert err.startswith(f"mygpt: compile: got true, and {missing}")
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(109)
def test_compiling_for_cuda_needs_triton_and_a_c_compiler(monkeypatch):
    """And for mps nothing that can be looked for."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert str(missing_for_compiler(torch.device("cuda"))).startswith("triton is missing; ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "triton")
    assert missing_for_compiler(torch.device("cuda")) is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert str(missing_for_compiler(torch.device("cuda"))).startswith("there is no compiler gcc or clang; ")
    assert missing_for_compiler(torch.device("mps")) is None
