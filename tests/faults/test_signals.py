"""SIGTERM, SIGINT and others that ask a run to end: the step is finished and saved, and the same command continues."""

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from support.commands import BIN, LAUNCH, run_process, wait_for
from support.fault_points import disturb, send
from support.forked import LONG, run, start
from support.runs import FLAGS, contents, latest_step

from mygpt.errors import InterruptedRunError
from mygpt.processes.signals import ECHO_SECONDS, StopRequest, leave_closed_terminal, stop_on_signal
from mygpt.runs.steps import read_manifest
from mygpt.training.pending import PendingSteps
from mygpt.training.train import train


@pytest.mark.fault(13, 14, 105)
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        *((number, 128 + number) for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)),
    ],
)
def test_signal_saves_and_stops(folder, undisturbed, number, code):
    """The step is finished and saved; the same command continues from it, to the bytes of a run never stopped."""
    place = folder("signal")
    process = start(LONG, place)
    wait_for((place / "run" / "latest").exists)
    os.kill(process.pid, number)
    process.join(60)
    messages = (place / "err").read_text()
    assert process.exitcode == code
    step = latest_step(place / "run")
    assert f"stopped by {number.name}; saved run/step-{step:06d}, and the same command continues" in messages
    assert "Traceback" not in messages
    arguments = (*LONG, "--steps", step + 20)
    assert run(arguments, place) == 0
    assert f"continuing after step {step}" in (place / "err").read_text()
    saved, expected = contents(place / "run"), contents(undisturbed(*arguments) / "run")
    for name in (f"step-{step + 20:06d}/model.safetensors", f"step-{step + 20:06d}/state.safetensors", "metrics.jsonl"):
        assert saved[name] == expected[name]
    assert f"step-{step:06d}" not in saved or step % 50 == 0


def test_echo_of_a_signal_is_not_a_second_one(monkeypatch):
    """A terminal and a launcher may both send it; without a launcher the second signal ends the process."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for launched, code in ((True, []), (False, [130])):
        monkeypatch.setenv("WORLD_SIZE", "1") if launched else monkeypatch.delenv("WORLD_SIZE")
        request = StopRequest()
        request.graceful = True
        for _ in range(2):
            request.receive(signal.SIGINT, None)
        assert request.pending()
        assert ended == code


@pytest.mark.fault(105)
def test_hangup_that_is_sent_twice_is_one_request(monkeypatch):
    """By the kernel and the shell; or, by systemd, with SIGTERM. Later a second signal ends the process."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for first, second in ((signal.SIGHUP, signal.SIGHUP), (signal.SIGTERM, signal.SIGHUP)):
        request = StopRequest()
        request.graceful = True
        request.receive(first, None)
        request.receive(second, None)
        assert (request.pending(), ended) == (first, [])
    later = time.monotonic() + ECHO_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    request.receive(signal.SIGHUP, None)
    assert ended == [129]


@pytest.mark.fault(105)
def test_ignored_hangup_stays_ignored():
    """As nohup starts a run; the other signals are taken."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGUSR1) == stop.receive
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


ON_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.mark.fault(105)
@pytest.mark.slow
def test_closed_terminal_saves_and_stops(folder):
    """Nothing can be printed there any more, neither the step nor the end."""
    place = folder("terminal")
    ours, theirs = os.openpty()
    mygpt = [sys.executable, "-m", "mygpt", "train", *LONG, "--print-every", 1]
    command = [sys.executable, "-c", ON_TERMINAL, *map(str, mygpt)]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, cwd=place, start_new_session=True, **streams)
    os.close(theirs)
    while not (place / "run" / "latest").exists():
        os.read(ours, 2**16)
    os.close(ours)
    assert process.wait(60) == 129
    step = latest_step(place / "run")
    assert read_manifest(place / "run" / f"step-{step:06d}").reason == ("interrupted" if step % 50 else "scheduled")


@pytest.mark.fault(105)
def test_closed_terminal_leaves_no_file_open(monkeypatch):
    """What /dev/null was opened with is closed again."""
    opened = []
    monkeypatch.setattr(stat, "S_ISCHR", lambda _: True)
    monkeypatch.setattr(os, "isatty", lambda _: False)
    monkeypatch.setattr(os, "dup2", lambda descriptor, _: opened.append(descriptor))
    leave_closed_terminal()
    assert len(opened) == 2
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.slow
def test_background_run_outlives_its_shell(folder):
    """Also where a variable of accelerate launch is exported: the shell is no launcher."""
    place = folder("background")
    command = [sys.executable, "-m", "mygpt", "train", "text.txt", *FLAGS, "--steps", 400, "--output", "run"]
    line = f"{shlex.join(map(str, command))} > out 2> err & while ! grep -q 'step ' out; do sleep 0.05; done"
    assert run_process(["sh", "-c", line], place, 60, {"ACCELERATE_MIXED_PRECISION": "no"}).returncode == 0
    wait_for((place / "run" / "latest").exists)
    assert latest_step(place / "run") == 400


@pytest.mark.fault(15)
def test_second_signal_ends_at_once(folder):
    """It comes while the run still saves after the first signal; the checkpoint before stays whole."""
    place = folder("twice")
    process = start(LONG, place, "slow-saves")
    latest = place / "run" / "latest"
    wait_for(latest.exists)
    before = latest.read_text()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    assert process.exitcode == 130
    end = "mygpt: stopped by SIGINT, the second signal; nothing is saved after the newest checkpoint"
    assert (place / "err").read_text().splitlines()[-1] == end
    assert latest.read_text() == before
    assert run((*LONG, "--steps", 60), place) == 0


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("recipe list", "mygpt.cli.command"),
        ("generate run", "numpy._core.multiarray"),
        ("eval run --corpus text.txt", "torch._C"),
        ("train text.txt", "torch.nn.functional"),
        ("train text.txt --device cpu", "accelerate.state"),
    ],
)
def test_interrupt_of_an_import_is_one_line(folder, undisturbed, command, module):
    """An exception would be a traceback, be swallowed, or abort torch. Nothing is made."""
    place = folder("importing")
    shutil.copytree(undisturbed(*LONG, "--steps", 60) / "run", place / "run")
    before = sorted(place.iterdir())
    lines, arguments = [], [sys.executable, "-X", "importtime", "-m", "mygpt", *command.split()]
    with subprocess.Popen(arguments, cwd=place, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            lines.append(line)
            if line.rstrip().endswith(f" {module}"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert [line for line in lines if not line.startswith("import time:")] == ["mygpt: stopped by SIGINT\n"]
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("own", "others", "told"), [(0, 2, 2), (15, 2, 2), (2, 15, 2), (0, 15, 15), (0, 0, 0)], ids=str
)
def test_all_processes_name_the_same_signal(own, others, told):
    """The one that reached any of them; the SIGTERM by which a launcher then ends the others hides no SIGINT."""

    class TwoProcesses:
        num_processes = 2

        def gather(self, values):
            return torch.cat([values, torch.cat([values[:-3], torch.tensor([others, 1.0, 0.1])])])

    steps = PendingSteps(TwoProcesses())
    steps.add(1, None, [torch.tensor(value) for value in (2.5, 1.0, 0.0)])
    reading = steps.read(own)
    assert reading.stop == told
    assert reading.save  # since it is time for the other one


@pytest.mark.fault(13, 14, 105)
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL])
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_signal_to_a_launcher_saves_and_stops(folder, launcher, number):
    """One process or several: they stop at the same step, save and exit; also when the launcher is killed."""
    place = folder(launcher)
    command = {
        "torchrun": [BIN / "torchrun", "--nproc-per-node", 2],
        "accelerate": [BIN / "accelerate", "launch", "--config_file", LAUNCH / "cpu1.yaml"],
    }[launcher]
    arguments = ["-m", "mygpt", "train", "text.txt", *FLAGS, "--steps", 100_000, "--save-every", 20, "--output", "run"]
    process = subprocess.Popen(
        [*map(str, command), *map(str, arguments)], cwd=place, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for((place / "run" / "latest").exists)
    if number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # a terminal, or Slurm, sends it to all processes
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode != 0
    # stderr has ended, and all processes hold it: so all have ended. A launcher that was killed passed on no signal.
    # Nor does torchrun pass on SIGUSR1, which ends it; and its processes are not of its group.
    is_lost = number == signal.SIGKILL or (number == signal.SIGUSR1 and launcher == "torchrun")
    assert f"stopped by {'SIGTERM' if is_lost else number.name}; saved run/step-" in messages
    saved = max(int(path.name.removeprefix("step-")) for path in (place / "run").glob("step-*"))
    manifest = json.loads((place / "run" / f"step-{saved:06d}" / "manifest.json").read_text())
    assert manifest["reason"] == ("scheduled" if saved % 20 == 0 else "interrupted")
    assert (place / "run" / "latest").read_text() == f"step-{saved:06d}\n"


@pytest.mark.fault(68)
@pytest.mark.parametrize(("point", "count"), [("before-step", 6), ("validation", 1), ("before-rename", 1)])
def test_signal_during_the_last_step_ends_a_complete_run(tiny, monkeypatch, capsys, point, count):
    """Exit 0 and complete: nothing is left to continue, so a scheduler need not queue the job again."""
    with monkeypatch.context() as patch:
        disturb(point, send(signal.SIGTERM), count=count, patch=patch.setattr)
        run = train(tiny(val_split=0.2, val_every=6))
    assert (run / "latest").read_text() == "step-000006\n"
    assert read_manifest(run / "step-000006").ended_by == "steps"
    assert f"saved {run}" in capsys.readouterr().err
    if point == "before-step":  # the negative control: one step earlier the run is to be continued
        disturb(point, send(signal.SIGTERM), count=5, patch=monkeypatch.setattr)
        with pytest.raises(InterruptedRunError):
            train(tiny(val_split=0.2, val_every=6), overwrite=True)


@pytest.mark.fault(13)
def test_signal_is_obeyed_after_the_step_in_which_it_came(tiny, tmp_path, monkeypatch):
    """By a process alone, though nothing else makes the host read the numbers of a step."""
    monkeypatch.setattr("mygpt.training.pending.MAX_UNREAD_SECONDS", 1000.0)
    disturb("before-step", send(signal.SIGTERM), count=5, patch=monkeypatch.setattr)
    with pytest.raises(InterruptedRunError):
        train(tiny(steps=60, log_every=60, print_every=60))
    assert latest_step(tmp_path / "run") == 5
