"""Flushing files and directories to the disk."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest
from support.runs import contents

from mygpt import disk
from mygpt.training.train import train

F_FULLFSYNC = 51


def failing(error, *, of=lambda _mode: True):
    """As os.fsync, of descriptors of this kind an error."""
    fsync = os.fsync

    def flush(descriptor):
        if of(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    return flush


@pytest.mark.fault(106)
@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP])
def test_disk_that_cannot_flush_directories_is_saved_to(tiny, tmp_path, monkeypatch, error):
    """The run has the bytes of any other; a file that cannot be flushed is an error."""
    expected = contents(train(tiny(save_every=2, output=str(tmp_path / "a" / "run"))), without=["run.json"])
    monkeypatch.setattr(os, "fsync", failing(error, of=stat.S_ISDIR))
    assert contents(train(tiny(save_every=2, output=str(tmp_path / "b" / "run"))), without=["run.json"]) == expected
    monkeypatch.setattr(os, "fsync", failing(error))
    with pytest.raises(OSError, match=os.strerror(error)):
        disk.sync(Path(__file__))


def test_directory_that_the_disk_fails_to_flush_is_an_error(tmp_path, monkeypatch):
    """Other than one that it has no way to flush."""
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        disk.sync(tmp_path)


@pytest.mark.fault(106)
@pytest.mark.parametrize(
    ("answer", "expected"),
    [(None, ["full"]), (errno.ENOTSUP, ["full", "fsync"]), (errno.EINVAL, ["full", "fsync"]), (errno.EIO, OSError)],
)
def test_macos_flushes_the_cache_of_the_drive(tmp_path, monkeypatch, answer, expected):
    """Where the disk can; fsync alone leaves what was written in that cache."""
    calls = []

    def flush_fully(descriptor, command):
        assert stat.S_ISDIR(os.fstat(descriptor).st_mode)
        assert command == F_FULLFSYNC
        calls.append("full")
        if answer:
            raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(disk.sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", flush_fully)
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    if expected is OSError:
        with pytest.raises(OSError, match="Input/output error"):
            disk.sync(tmp_path)
    else:
        disk.sync(tmp_path)
        assert calls == expected


def test_error_that_follows_a_failed_write_does_not_hide_it(tmp_path, monkeypatch):
    """As of a disk that becomes read-only when it fails."""

    def refuse(_path, *_args, **_keys):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def fill(_path, _content):
        monkeypatch.setattr(Path, "unlink", refuse)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match="No space left on device"):
        disk.replace_bytes(tmp_path / "file", b"content")
