"""How many runs go side by side."""

import os
import sys

import pytest
from support.runs import TINY

from mygpt import cores as machine_cores
from mygpt.cores import core_count
from mygpt.errors import MygptError
from mygpt.processes.environment import choose_threads
from mygpt.recipe.tables import Recipe
from mygpt.studies import parallelism
from mygpt.studies.parallelism import (
    Parallelism,
    candidates,
    complaint,
    free_memory,
    measure_parallelism,
    reserve_resources,
    time_side_by_side,
)
from mygpt.studies.worker import Measured


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes this a machine with so many cores, GPUs and free memory (GB)."""

    def make(cores, gpus=0, free=100):
        monkeypatch.setattr(machine_cores, "OWN_CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(machine_cores, "CGROUPS", tmp_path / "fs")
        monkeypatch.setattr(parallelism, "CORE_MARK", f"\0mygpt-test-{os.getpid()}-{{}}")
        for module in (parallelism, machine_cores):
            monkeypatch.setattr(module, "available_cores", lambda: list(range(cores)))
        monkeypatch.setattr(parallelism, "visible_gpus", lambda: [str(number) for number in range(gpus)])
        monkeypatch.setattr(
            parallelism.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free * 2**30})
        )

    return make


def test_candidates_share_the_cores_and_take_turns_on_the_gpus(machine):
    """Runs are doubled up to the cores, or four on a GPU; the recipe's threads are kept."""
    machine(cores=6)
    assert list(candidates(None, 100)) == [Parallelism(1, 6), Parallelism(2, 3), Parallelism(4, 1), Parallelism(6, 1)]
    assert list(candidates(2, 100)) == [Parallelism(1, 2), Parallelism(2, 2), Parallelism(3, 2)]
    assert list(candidates(None, 2)) == [Parallelism(1, 6), Parallelism(2, 3)]
    assert list(candidates(8, 100)) == [Parallelism(1, 8)]
    machine(cores=16, gpus=2)
    with reserve_resources(Parallelism(4, 4)) as reserved:
        assert [resources.gpu for resources in reserved] == ["0", "1", "0", "1"]
    assert list(candidates(16, 100))[-1] == Parallelism(8, 16)
    assert list(candidates(None, 100))[-1] == Parallelism(8, 2)
    assert list(candidates(None, 100, on_gpus=False))[-1] == Parallelism(16, 1)


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs abstract sockets, and cores to choose")


def cpus(reserved):
    return [resources.cpus for resources in reserved]


@needs_linux
def test_two_studies_on_one_machine_take_different_cores(machine):
    """As long as there are any; a study that is over gives its own back."""
    machine(cores=10)
    with (
        reserve_resources(Parallelism(2, 2)) as first,
        reserve_resources(Parallelism(2, 2)) as second,
        reserve_resources(Parallelism(2, 2)) as third,
    ):
        assert cpus(first) == [(0, 1), (2, 3)]
        assert cpus(second) == [(4, 5), (6, 7)]
        assert cpus(third) == [(8, 9), (0, 1)]
    with reserve_resources(Parallelism(2, 3)) as reserved:
        assert cpus(reserved) == [(0, 1, 2), (3, 4, 5)]


@needs_linux
def test_run_without_a_core_for_each_thread_may_use_any(machine):
    """One core for two threads would make each wait for the other, while cores of other runs may be idle."""
    machine(cores=3)
    with reserve_resources(Parallelism(2, 2)) as reserved:
        assert cpus(reserved) == [(0, 1), ()]


GIB = 2**30
CGROUP_FILES = {
    "version 2": {
        "cgroup": "0::/pod/run\n",
        "fs/pod/cpu.max": "250000 100000\n",
        "fs/pod/run/cpu.max": "max 100000\n",
        "fs/pod/memory.max": f"{4 * GIB}\n",
        "fs/pod/memory.current": f"{3 * GIB}\n",
        "fs/pod/memory.stat": f"anon {GIB}\ninactive_file {GIB}\n",
        "fs/pod/run/memory.max": "max\n",
    },
    "version 1, whose paths are those of the host": {
        "cgroup": "12:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n1:name=systemd:/\n",
        "fs/cpu/cpu.cfs_quota_us": "250000\n",
        "fs/cpu/cpu.cfs_period_us": "100000\n",
        "fs/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "fs/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
        "fs/memory/memory.stat": f"cache 0\ntotal_inactive_file {GIB}\n",
    },
    "no limits": {
        "cgroup": "3:memory:/\n2:cpu:/\n0::/\n",
        "fs/cpu/cpu.cfs_quota_us": "-1\n",
        "fs/cpu/cpu.cfs_period_us": "100000\n",
        "fs/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
        "fs/memory/memory.usage_in_bytes": "0\n",
        "fs/memory/memory.stat": "",
    },
    "no Linux": {},
}


@needs_linux
@pytest.mark.fault(113)
@pytest.mark.parametrize("name", CGROUP_FILES)
def test_limits_of_containers_count(machine, tmp_path, name):
    """Memory and cores: a container may use less than it sees. Its cores are then not chosen, but shared."""
    machine(cores=8, free=100)
    for file, content in CGROUP_FILES[name].items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    is_limited = name.startswith("version")
    assert free_memory() == (2 if is_limited else 100) * GIB
    assert core_count() == choose_threads(None, 1) == (2 if is_limited else 8)
    assert list(candidates(None, 100))[-1] == (Parallelism(2, 1) if is_limited else Parallelism(8, 1))
    with reserve_resources(Parallelism(2, 1)) as reserved:
        assert cpus(reserved) == ([(), ()] if is_limited else [(0,), (1,)])


@pytest.mark.fault(112)
def test_what_a_library_prints_is_no_answer(monkeypatch, tmp_path, text_file):
    """More of it than a pipe holds, before and after what a probe reports; an error of mygpt stays the message."""
    lines = 'import atexit, os\ndef speak(): os.write(1, b"noise\\n" * 20000); os.write(2, b"noise\\n" * 20000)\n'
    (tmp_path / "sitecustomize.py").write_text(f"{lines}speak()\natexit.register(speak)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")
    monkeypatch.setattr(parallelism, "PROBE_SECONDS", 0.1)
    recipe = Recipe.of(**TINY | {"threads": 1}, corpus=str(text_file))
    assert [run.seconds > 0 for run in time_side_by_side(recipe, Parallelism(2, 1))] == [True, True]
    message = rf"^{tmp_path}/nothing: no such text file; expected the path of a text, or one of: "
    with pytest.raises(MygptError, match=message):
        time_side_by_side(recipe.replace(corpus=str(tmp_path / "nothing")), Parallelism(1, 1))
    (tmp_path / "sitecustomize.py").write_text(f"{lines}import sys\natexit.register(speak)\nsys.stdin = None\n")
    with pytest.raises(MygptError, match=r"^AttributeError: 'NoneType' object has no attribute 'readline'$"):
        time_side_by_side(recipe, Parallelism(1, 1))


def test_error_of_a_traceback_is_the_complaint():
    """Of the last one, though lines follow; a line of mygpt after it wins."""
    first = "Traceback (most recent call last):\n  File\nKeyError: 1\n"
    printed = (
        first + "\nDuring handling of it:\n\n" + first.replace("KeyError: 1", "OSError: 2") + "onednn_verbose,v1\n"
    )
    assert complaint(printed) == "OSError: 2"
    assert complaint("mygpt: early\n" + printed + "mygpt: late\nmore\n") == "late"
    assert (complaint("a\nb\n"), complaint("")) == ("b", "")


def test_probe_that_is_killed_before_it_begins_does_not_fit(monkeypatch, text_file):
    """As by Linux when memory is full; alone, it is an error with its exit code."""
    next_reports = parallelism._next_reports

    def kill_when_ready(probes):
        lines = next_reports(probes)
        probes[-1].process.kill()
        probes[-1].process.wait()
        return lines

    monkeypatch.setattr(parallelism, "_next_reports", kill_when_ready)
    monkeypatch.setattr(parallelism, "PROBE_SECONDS", 0.1)
    recipe = Recipe.of(**TINY | {"threads": 1}, corpus=str(text_file))
    assert time_side_by_side(recipe, Parallelism(2, 1)) is None
    way_on = "killed by SIGKILL, as Linux does when memory is full; the same command continues the study"
    with pytest.raises(MygptError, match=way_on) as killed:
        time_side_by_side(recipe, Parallelism(1, 1))
    assert killed.value.exit_code == 1


@pytest.mark.fault(109)
def test_probe_without_a_compiler_says_so(monkeypatch, text_file):
    """With the line of `mygpt train`."""
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    recipe = Recipe.of(**TINY | {"threads": 1, "compile": True}, corpus=str(text_file))
    with pytest.raises(MygptError, match=r"^compile: got true, and there is no compiler /nonexistent/c"):
        time_side_by_side(recipe, Parallelism(1, 1))


def measured(seconds, memory=1, share=0.0):
    """What the probes measure, if a step takes so long by the number of runs side by side."""
    return lambda _recipe, chosen: [Measured(seconds[chosen.side_by_side], memory * 2**30, share)] * chosen.side_by_side


@pytest.mark.parametrize(
    ("seconds", "free", "side_by_side"),
    [
        ({1: 1.0, 2: 1.1, 4: 1.2, 8: 2.3}, 100, 4),  # eight are hardly faster than four
        ({1: 1.0, 2: 1.99}, 100, 1),
        ({1: 1.0, 2: 1.1, 4: 1.2, 8: 1.3}, 3, 2),  # there is no memory for four
    ],
)
def test_as_many_as_are_faster_in_all_and_fit_into_memory(machine, monkeypatch, seconds, free, side_by_side):
    """Each doubling must gain, and leave some memory free."""
    machine(cores=8, free=free)
    monkeypatch.setattr(parallelism, "time_side_by_side", measured(seconds))
    lines = []
    assert measure_parallelism(Recipe(), 100, lines.append) == Parallelism(side_by_side, 8 // side_by_side)
    assert lines[0].startswith("1 side by side, 8 threads each: 1 steps/s in all, 1,024 MiB")


@pytest.mark.parametrize(("share", "side_by_side"), [(0.1, 4), (0.3, 2), (0.5, 1)])
def test_gpu_memory_limits_the_runs(machine, monkeypatch, share, side_by_side):
    """Four fifths of it: evaluations need some, too."""
    machine(cores=8, gpus=1)
    monkeypatch.setattr(parallelism, "time_side_by_side", measured({1: 1.0, 2: 1.1, 4: 1.2}, share=share))
    assert measure_parallelism(Recipe(), 100, print).side_by_side == side_by_side


def test_runs_that_do_not_fit_beside_each_other_are_not_tried_further(machine, monkeypatch):
    """As on a GPU whose memory two of them exceed."""
    machine(cores=8, gpus=1)
    monkeypatch.setattr(
        parallelism, "time_side_by_side", lambda _, a: [Measured(1, 1, 0.3)] if a.side_by_side == 1 else None
    )
    lines = []
    assert measure_parallelism(Recipe(), 100, lines.append).side_by_side == 1
    assert lines[1:] == ["2 runs side by side: do not fit"]


def test_recipe_that_cannot_be_trained_is_an_error(tmp_path):
    """With the message of the process that has tried."""
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(MygptError, match="the training part has"):
        measure_parallelism(Recipe.of(corpus=str(tmp_path / "text.txt")), 2, print)
