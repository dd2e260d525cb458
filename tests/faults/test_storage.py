"""Disks that are full, that fail or cannot be written to."""

import errno
import re
import shutil
import signal
import subprocess
import sys

import pytest
from support.commands import MYGPT, needs_strace, run_process
from support.fault_points import disturb, os_error
from support.forked import ARGUMENTS, run
from support.runs import FLAGS, assert_undisturbed, contents

from mygpt.errors import DiskError
from mygpt.training.train import train

needs_namespaces = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode,
    reason="needs user namespaces",
)


@needs_namespaces
@pytest.mark.slow
@pytest.mark.fault(21)
def test_full_disk_keeps_what_was_saved(folder, undisturbed):
    """Exit 1, the old checkpoint whole; with room the same command gives the bytes of an undisturbed run."""
    arguments = ("text.txt", *FLAGS, "--steps", 12, "--save-every", 2, "--output", "disk/run")
    expected = undisturbed(*arguments)
    place = folder("disk")
    (place / "disk").mkdir()
    mygpt = f"{sys.executable} -m mygpt"
    script = f"""
mount -t tmpfs -o size=500k tmpfs disk
{mygpt} train {" ".join(map(str, arguments))} > out 2> err; echo $? > code
ls disk/run > listing
{mygpt} generate --checkpoint disk/run --prompt the > generated; echo $? > generate-code
mount -o remount,size=10m disk
{mygpt} train {" ".join(map(str, arguments))} > out2 2> err2; echo $? > code2
cp -a disk/run saved
"""
    subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=place, check=True)
    read = {path.name: path.read_text() for path in place.iterdir() if path.is_file()}
    assert read["code"].strip() == "1"
    assert re.search(r"step-\d+: cannot be saved: .*No space left on device.*the same command continues", read["err"])
    assert "step-000002" in read["listing"]
    assert read["generate-code"].strip() == "0"
    assert read["code2"].strip() == "0", read["err2"]
    ours, theirs = contents(place / "saved"), contents(expected / "disk" / "run")
    for files in (ours, theirs):
        for name in ("run.json", "recipe.toml"):  # they hold the path of the text
            del files[name]
    assert ours == theirs


@pytest.mark.fault(21, 22, 23)
@pytest.mark.parametrize(
    ("point", "count", "message"),
    [
        ("disk-full", 5, "No space left on device"),
        ("fsync-fails", 7, "Input/output error"),
        ("metrics-disk-full", 1, "File too large"),
        ("file-size-limit", 1, "File too large"),
    ],
)
def test_failing_disk_costs_one_line_and_no_checkpoint(folder, undisturbed, point, count, message):
    """Exit 1, naming the file and the remedy; saved checkpoints stay, and the same command continues from them."""
    place = folder(point)
    assert run(ARGUMENTS, place, "before-step", 6) == -signal.SIGKILL
    before = contents(place / "run")
    assert run(ARGUMENTS, place, point, count) == 1
    messages = (place / "err").read_text().splitlines()
    assert message in messages[-1]
    assert messages[-1].startswith("mygpt: ")
    assert not any(line.startswith("Traceback") for line in messages)
    after = contents(place / "run")
    assert all(after.get(name) == before[name] for name in before if name.startswith("step-000004"))
    assert run(ARGUMENTS, place) == 0
    assert_undisturbed(place, undisturbed(*ARGUMENTS))


@needs_strace
@pytest.mark.slow
@pytest.mark.fault(23)
def test_failing_sync_is_an_error(folder):
    """EIO from the kernel: a file that could not be synced does not count as saved."""
    place = folder("eio")
    command = ["strace", "-f", "-qq", "-o", "trace", "-e", "inject=fsync:error=EIO:when=3+"]
    result = run_process([*command, *MYGPT, "train", *ARGUMENTS], place)
    assert result.returncode == 1, result.stderr
    assert "Input/output error" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(place.glob("run/step-*"))


@needs_namespaces
@pytest.mark.fault(24)
def test_read_only_output_is_found_before_the_first_step(folder):
    """Exit 2 and one line."""
    place = folder("read-only")
    (place / "disk").mkdir()
    script = f"""
mount -t tmpfs -o ro tmpfs disk
{sys.executable} -m mygpt train text.txt {" ".join(map(str, FLAGS))} --output disk/run
"""
    result = run_process(["unshare", "-rm", "sh", "-c", script], place)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "disk: cannot be written to; choose another --output" in result.stderr


@pytest.mark.fault(21)
@pytest.mark.parametrize("point", ["made-run.json", "made-recipe"])
def test_disk_that_fills_before_the_first_step_costs_one_line(tiny, tmp_path, monkeypatch, point):
    """With the folder and the reason."""
    disturb(point, os_error(errno.ENOSPC), patch=monkeypatch.setattr)
    with pytest.raises(DiskError) as caught:
        train(tiny())
    assert str(caught.value) == f"output: {tmp_path / 'run'}: cannot be written: No space left on device"
