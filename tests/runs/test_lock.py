"""The lock of a run directory."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from mygpt.errors import CheckpointError, MygptError
from mygpt.runs.files import LOCK_FILE
from mygpt.runs.lock import locked


@pytest.mark.fault(67)
def test_lock_holds_on_network_disks(tmp_path, monkeypatch):
    """On NFS a directory's lock is local to a machine, and a file's lock needs a writable descriptor."""
    kinds = []
    flock = fcntl.flock

    def watching(descriptor, operation):
        writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        kinds.append((os.path.isfile(f"/proc/self/fd/{descriptor}"), writable))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", watching)
    with (
        locked(tmp_path / "run"),
        pytest.raises(CheckpointError, match="another process is training into"),
        locked(tmp_path / "run"),
    ):
        pass
    assert kinds == [(True, True)] * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(67)
def test_disk_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys):
    """The run continues, and the user knows that nothing keeps a second run out."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / "run"):
        pass
    assert "cannot be locked (No locks available): see that no two commands write there" in capsys.readouterr().err


@pytest.mark.fault(67)
def test_lock_file_that_was_removed_while_waiting_does_not_count(tmp_path, monkeypatch):
    """A run without files removes its lock file at its end; a process that opened it before opens the new one."""
    run, flock, calls = tmp_path / "run", fcntl.flock, []

    def removed_meanwhile(descriptor, operation):
        if not calls:
            (run / LOCK_FILE).unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with locked(run):
        assert (run / LOCK_FILE).exists()
    assert len(calls) == 2


def test_directory_that_was_removed_while_locking_is_made_again(tmp_path, monkeypatch):
    """A run that fails at once removes its empty directory, perhaps while another process is about to lock it."""
    run, opened, calls = tmp_path / "run", os.open, []

    def removed_meanwhile(path, *args, **kwargs):
        if Path(path).name == LOCK_FILE and not calls:
            calls.append(path)
            run.rmdir()
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", removed_meanwhile)
    with locked(run):
        assert (run / LOCK_FILE).exists()


def test_lock_that_is_a_link_is_not_followed(tmp_path):
    """Nothing outside the run directory is opened for writing."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "outside")
    with pytest.raises(MygptError, match="cannot be written"), locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "outside").exists()
