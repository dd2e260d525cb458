"""Several machines: two network namespaces take their place; and Slurm's batch script, with fake commands."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from support.commands import BIN, LAUNCH, REPOSITORY, SCRIPT, patched, run_process, wait_for
from support.runs import TINY, assert_same_run, flags_of

ADDRESSES = ["10.77.0.1", "10.77.0.2"]
STEPS = 200
KEYS = TINY | {"steps": STEPS, "save_every": 10, "log_every": 10, "dropout": 0.1, "print_every": 100}
KEYS |= {"reduction": "exact", "val_split": 0.1, "val_every": 50, "max_grad_norm": 1.0}
FLAGS = flags_of(KEYS)
# The messages of the loss of each machine: with the first one ends the launcher's store, which has the names.
ENDED = ["the launcher at 10.77.0.1:29500 has ended", "rank 1 on nodeB has ended"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(text_file, tmp_path_factory) -> Path:
    """The folder in which one process has trained, never disturbed."""
    place = tmp_path_factory.mktemp("undisturbed")
    result = run_process([sys.executable, SCRIPT, text_file, *FLAGS, "--output", "run"], place, 120)
    assert result.returncode == 0, result.stderr
    (place / "out0").write_text(result.stdout)
    return place


# ---- two machines


@pytest.fixture(scope="module")
def nodes():
    """The names of two network namespaces with a cable between them; in each it is the interface `e0`."""
    names = [f"mygpt-{os.getpid()}-{letter}" for letter in "ab"]

    def ip(*arguments):
        result = run_process(["ip", *arguments], "/", 30)
        if result.returncode:
            pytest.skip(f"needs network namespaces: {result.stderr.strip()}")

    if not hasattr(os, "geteuid") or os.geteuid() or not all(map(shutil.which, ("ip", "nsenter", "unshare", "mount"))):
        pytest.skip("needs root, and ip, nsenter, unshare and mount, to make network namespaces")
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "e0", "netns", names[0], "type", "veth", "peer", "name", "e0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "e0")
            ip("-n", name, "link", "set", "e0", "up")
        yield names
    finally:
        for name in names:
            run_process(["ip", "netns", "del", name], "/", 30)


@contextmanager
def launched(nodes, place, text_file, *flags, script=SCRIPT, own=([], [])):
    """Run the documented command on both nodes, with the `own` flags of each; kills the processes that are left."""
    command = [BIN / "accelerate", "launch", "--config_file", LAUNCH / "multinode.yaml", "--num_processes", 2]
    command += ["--main_process_ip", ADDRESSES[0]]
    with ExitStack() as stack:
        processes = []
        for rank, node in enumerate(nodes):
            # A host name that nothing resolves, and a process namespace, so that all processes die with the first.
            inside = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
            inside += ["sh", "-c", f'hostname node{"AB"[rank]} && exec "$@"', "sh"]
            training = ["--machine_rank", rank, script, text_file, *FLAGS, *flags, *own[rank], "--output", "run"]
            process = subprocess.Popen(
                list(map(str, ["nsenter", f"--net=/run/netns/{node}", *inside, *command, *training])),
                cwd=place,
                env=os.environ | {"GLOO_SOCKET_IFNAME": "e0"},
                stdout=stack.enter_context((place / f"out{rank}").open("w")),
                stderr=stack.enter_context((place / f"err{rank}").open("w")),
            )
            stack.callback(process.wait, 30)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def end(place, processes, seconds=120):
    """Wait for both; the messages of each are in the error if one fails."""
    for rank, process in enumerate(processes):
        assert process.wait(seconds) == 0, (place / f"err{rank}").read_text()


def test_two_machines_give_the_bytes_of_one(nodes, text_file, undisturbed, tmp_path):
    """Two machines of one process each train to the bytes, and print the lines, of one process."""
    with launched(nodes, tmp_path, text_file) as processes:
        end(tmp_path, processes)
    assert_same_run(tmp_path / "run", undisturbed / "run")
    assert (tmp_path / "out0").read_text() == (undisturbed / "out0").read_text()
    assert (tmp_path / "out1").read_text() == ""


def test_dead_machine_ends_the_others_and_the_run_continues(nodes, text_file, undisturbed, tmp_path):
    """SIGKILL to all processes of either machine: the other reports it within seconds; the same commands continue."""
    latest, before = tmp_path / "run" / "latest", None
    for victim in (1, 0):
        with launched(nodes, tmp_path, text_file) as processes:
            wait_for(lambda: latest.exists() and latest.read_text() != before, *processes)  # noqa: B023 - called at once
            processes[victim].kill()
            assert processes[1 - victim].wait(60) != 0
        assert ENDED[victim] in (tmp_path / f"err{1 - victim}").read_text()
        before = latest.read_text()
        assert int(before.removeprefix("step-")) < STEPS
    with launched(nodes, tmp_path, text_file) as processes:
        end(tmp_path, processes)
    assert f"continuing after step {int(before.removeprefix('step-'))}" in (tmp_path / "err0").read_text()
    assert_same_run(tmp_path / "run", undisturbed / "run")
    assert (tmp_path / "out0").read_text() == (undisturbed / "out0").read_text()


def test_unplugged_cable_ends_both_after_a_bounded_time(nodes, text_file, tmp_path):
    """A machine notices only that the other does not answer: after ten minutes by default; here five seconds."""
    script = patched(tmp_path, "wait_at_most(5)")
    link = ["ip", "-n", nodes[1], "link", "set", "e0"]
    try:
        with launched(nodes, tmp_path, text_file, "--steps", "100000", script=script) as processes:
            wait_for((tmp_path / "run" / "latest").exists, *processes)
            assert run_process([*link, "down"], tmp_path, 30).returncode == 0
            assert all(process.wait(30) != 0 for process in processes)
    finally:
        run_process([*link, "up"], tmp_path, 30)
    assert all(ENDED[1 - rank] in (tmp_path / f"err{rank}").read_text() for rank in (0, 1))


def test_text_that_one_machine_lacks_is_reported_with_its_name(nodes, text_file, tmp_path):
    """On both machines, at once; nothing is created."""
    with launched(nodes, tmp_path, text_file, own=([], ["--corpus", "elsewhere.txt"])) as processes:
        assert all(process.wait(60) != 0 for process in processes)
    for rank in (0, 1):
        message = "mygpt: rank 1 on nodeB: elsewhere.txt: no such text file"
        assert message in (tmp_path / f"err{rank}").read_text()
    assert not (tmp_path / "run").exists()


# ---- Slurm

# Runs a task on each node, and writes down their process ids. As with the real one, SIGTERM to it kills them.
SRUN = """
import os, pathlib, signal, subprocess, sys
arguments = sys.argv[1:]
nodes = next(int(a.removeprefix("--nodes=")) for a in arguments if a.startswith("--nodes="))
command = arguments[next(i for i, a in enumerate(arguments) if not a.startswith("-")):]
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task.pid, signal.SIGKILL) for task in tasks])
for node in range(nodes):
    env = os.environ | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}
    tasks.append(subprocess.Popen(command, env=env, start_new_session=True))
pathlib.Path(os.environ["FAKE_SLURM"], "tasks").write_text(" ".join(str(task.pid) for task in tasks))
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
"""

# Takes the place of the tasks: ends with the exit code that the test wants, after SIGTERM where it sends one.
SRUN_STUB = """
import os, pathlib, signal, sys, time
folder, code = pathlib.Path(os.environ["FAKE_SLURM"]), int(os.environ["FAKE_CODE"])
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(code))
(folder / "tasks").write_text(str(os.getpid()))
time.sleep(60)
"""

SCANCEL = """
import os, pathlib, signal, sys
assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]], sys.argv
number = signal.SIGUSR1 if "FAKE_CODE" in os.environ else signal.SIGTERM
for pid in pathlib.Path(os.environ["FAKE_SLURM"], "tasks").read_text().split():
    os.kill(int(pid), number)
"""

SCONTROL = """
import os, pathlib, sys, time
folder = pathlib.Path(os.environ["FAKE_SLURM"])
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1", flush=True)
    time.sleep(0.1)  # a reader that has gone by now breaks the pipe
    print("127.0.0.2")
elif sys.argv[1:] == ["show", "job", os.environ["SLURM_JOB_ID"]]:
    print("JobId=7 JobName=mygpt", "   JobState=" + os.environ.get("FAKE_STATE", "RUNNING"), sep="\\n")
else:
    with (folder / "requeued").open("a") as file:
        print(*sys.argv[1:], file=file)
"""


@pytest.fixture
def sbatch(tmp_path):
    """A function that starts the batch script as Slurm does on the first of two nodes; returns process and log file."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    with socket.socket() as free:
        port = next(p for p in range(15000 + os.getpid() % 10000, 30000) if free.connect_ex(("127.0.0.1", p)))
    job = str(port - 15000)
    started = []

    def start(*arguments, srun=SRUN, **environment):
        for name, text in {"srun": srun, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
            (folder / name).write_text(f"#!{sys.executable}\n{text}")
            (folder / name).chmod(0o755)
        (folder / "tasks").unlink(missing_ok=True)
        log = folder / f"log{len(started)}"
        with log.open("w") as file:
            process = subprocess.Popen(
                ["bash", LAUNCH / "slurm.sh", *map(str, arguments)],
                cwd=REPOSITORY,
                env=os.environ
                | {"PATH": f"{folder}:{BIN}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}
                | {"SLURM_JOB_ID": job, "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
                | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        return process, log

    start.requeued = lambda: (folder / "requeued").read_text().splitlines() if (folder / "requeued").exists() else []
    start.requeue = f"requeue {job}"
    start.tasks = folder / "tasks"
    yield start
    for process in started:
        if process.poll() is None:
            for pid in start.tasks.read_text().split() if start.tasks.exists() else ():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def test_slurm_job_continues_after_its_time_limit(text_file, undisturbed, tmp_path, sbatch):
    """SIGTERM to the batch script: the run is saved, the job queued again, and ends with the bytes of one job."""
    arguments = [text_file, *FLAGS, "--output", tmp_path / "run"]
    process, log = sbatch(*arguments)
    wait_for((tmp_path / "run" / "latest").exists, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert "stopped by SIGTERM; saved" in log.read_text()
    assert sbatch.requeued() == [sbatch.requeue], log.read_text()
    saved = int((tmp_path / "run" / "latest").read_text().removeprefix("step-"))
    assert saved < STEPS
    process, log = sbatch(*arguments, SLURM_RESTART_COUNT="1")
    assert process.wait(120) == 0, log.read_text()
    assert f"continuing after step {saved}" in log.read_text()
    assert sbatch.requeued() == [sbatch.requeue]
    assert_same_run(tmp_path / "run", undisturbed / "run")


def test_failed_slurm_job_is_not_queued_again(text_file, tmp_path, sbatch):
    """It would fail again, as with a mistake in the recipe."""
    process, log = sbatch(text_file, *FLAGS, "--lr", "-1", "--output", tmp_path / "run")
    assert process.wait(120) != 0
    assert "lr" in log.read_text()
    assert sbatch.requeued() == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("code", "state", "signals", "requeued"),
    [(1, "RUNNING", 1, True), (1, "RUNNING", 2, True), (0, "RUNNING", 1, False), (1, "CANCELLED", 1, False)],
)
def test_slurm_job_is_queued_again_only_when_interrupted(sbatch, code, state, signals, requeued):
    """Not one that is complete at the signal, nor one that scancel ends, which sends SIGTERM as well."""
    process, log = sbatch("any.txt", srun=SRUN_STUB, FAKE_CODE=str(code), FAKE_STATE=state)
    wait_for(lambda: sbatch.tasks.exists() and sbatch.tasks.read_text(), process)
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == code, log.read_text()
    assert sbatch.requeued() == ([sbatch.requeue] if requeued else [])
