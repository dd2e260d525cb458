"""SIGTERM and SIGINT: the step is finished and saved, and the same command continues."""

import json
import os
import signal
import subprocess
import time

import pytest
from support.commands import BIN, REPOSITORY
from support.fault_points import run, start
from support.runs import FLAGS, contents, wait_for


def signalled(
    folder, *signals, arguments=("text.txt", *FLAGS, "--steps", 100_000, "--save-every", 50, "--output", "run")
):
    """Start a long run, send it signals once it has saved, and return its folder, exit code and messages."""
    place = folder("signal")
    process = start(arguments, place)
    wait_for((place / "run" / "latest").exists)
    for number in signals:
        os.kill(process.pid, number)
    process.join(60)
    return place, process.exitcode, (place / "err").read_text()


@pytest.mark.fault(13, 14)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(folder, quiet, number, code):
    """The step is finished and saved; the same command goes on from there, to the bytes of a run never stopped."""
    place, exitcode, messages = signalled(folder, number)
    assert exitcode == code
    step = int((place / "run" / "latest").read_text().removeprefix("step-"))
    assert f"stopped by {number.name}; saved run/step-{step:06d}, and the same command continues" in messages
    assert "Traceback" not in messages
    arguments = ("text.txt", *FLAGS, "--steps", step + 20, "--save-every", 50, "--output", "run")
    assert run(arguments, place) == 0
    assert f"continuing after step {step}" in (place / "err").read_text()
    undisturbed = quiet(*arguments)
    saved = contents(place / "run")
    for name in (f"step-{step + 20:06d}/model.safetensors", f"step-{step + 20:06d}/state.safetensors", "metrics.jsonl"):
        assert saved[name] == contents(undisturbed / "run")[name]
    assert f"step-{step:06d}" not in saved or step % 50 == 0


@pytest.mark.fault(15)
def test_a_second_signal_ends_at_once(folder, monkeypatch):
    """While the first is still being answered; the checkpoint before stays whole."""
    place = folder("twice")
    arguments = ("text.txt", *FLAGS, "--steps", 100_000, "--save-every", 50, "--output", "run")
    process = start(arguments, place, "slow-saves")
    wait_for((place / "run" / "latest").exists)
    before = (place / "run" / "latest").read_text()
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    assert process.exitcode == 130
    assert (place / "run" / "latest").read_text() == before
    assert run((*arguments, "--steps", 60), place) == 0


@pytest.mark.fault(13, 14)
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_signal_to_a_launcher_saves_and_stops(folder, launcher, number):
    """One process or several: they stop at the same step, save and leave; also when the launcher is killed."""
    place = folder(launcher)
    command = {
        "torchrun": [BIN / "torchrun", "--nproc-per-node", 2],
        "accelerate": [BIN / "accelerate", "launch", "--config_file", REPOSITORY / "recipes/launch/cpu1.yaml"],
    }[launcher]
    command += ["-m", "mygpt"]
    arguments = ["train", "text.txt", *FLAGS, "--steps", 100_000, "--save-every", 20, "--output", "run"]
    process = subprocess.Popen(
        [*map(str, command), *map(str, arguments)], cwd=place, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for((place / "run" / "latest").exists)
    if number == signal.SIGINT:  # as a terminal sends it, to all
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode != 0
    # All processes hold stderr: it has ended, so they have. A launcher that was killed passed on no signal.
    assert f"stopped by {'SIGTERM' if number == signal.SIGKILL else number.name}; saved run/step-" in messages
    saved = max(int(path.name.removeprefix("step-")) for path in (place / "run").glob("step-*"))
    manifest = json.loads((place / "run" / f"step-{saved:06d}" / "manifest.json").read_text())
    assert manifest["reason"] == ("scheduled" if saved % 20 == 0 else "interrupted")
    assert (place / "run" / "latest").read_text() == f"step-{saved:06d}\n"
