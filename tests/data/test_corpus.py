"""Loading texts, and downloading Tiny Shakespeare."""

import functools
import gc
import hashlib
import http.server
import sys
import threading
import warnings

import pooch
import pytest

from mygpt.data import download
from mygpt.data.corpus import load_corpus
from mygpt.errors import CorpusError, DownloadError


@pytest.mark.fault(55, 56)
def test_text_is_taken_exactly(tmp_path):
    """A byte order mark and carriage returns stay characters, on every system."""
    path = tmp_path / "text.txt"
    raw = b"\xef\xbb\xbfone\r\ntwo\rthree\n\xc3\xa9"
    path.write_bytes(raw)
    assert load_corpus(str(path)) == ("\ufeffone\r\ntwo\rthree\n\u00e9", hashlib.sha256(raw).hexdigest())


def test_python_docs_need_no_file():
    """The embedded corpus is large enough to learn from and the same at every call."""
    first, second = load_corpus("python-docs"), load_corpus("python-docs")
    assert first == second
    assert len(first.text) > 400_000


def test_python_without_its_docs_is_named(monkeypatch):
    """Some distributions leave them out."""
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CorpusError, match=r"^python-docs: this Python comes without pydoc_data; give a text file"):
        load_corpus("python-docs")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A local server's folder, from which Tiny Shakespeare is downloaded into an empty cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(handler.func, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(download, "TINYSHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
        monkeypatch.delenv("MYGPT_DATA_DIR", raising=False)
        yield folder
        server.shutdown()
    # requests leaves the connection of a failed download for the garbage collector to close.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_download_is_checked_and_kept(served, tmp_path, monkeypatch):
    """A named corpus is fetched once, checked against its hash, and then read from the cache."""
    monkeypatch.setattr(download, "TINYSHAKESPEARE_SHA256", hashlib.sha256(b"to be").hexdigest())
    (served / "input.txt").write_bytes(b"to be")
    assert load_corpus("tinyshakespeare").text == "to be"
    (served / "input.txt").unlink()
    assert load_corpus("tinyshakespeare").text == "to be"
    assert (tmp_path / "cache" / "mygpt" / "tinyshakespeare.txt").read_bytes() == b"to be"


def test_wrong_download_is_refused(served, tmp_path):
    """Bytes that are not the published ones are neither trained on nor kept."""
    (served / "input.txt").write_bytes(b"not to be")
    with pytest.raises(DownloadError, match=r"cannot be downloaded.*MYGPT_DATA_DIR"):
        load_corpus("tinyshakespeare")
    assert not list((tmp_path / "cache").glob("*/*"))


def test_failed_download_names_the_remedy(served):
    """A machine without a network can use a file."""
    with pytest.raises(DownloadError, match=r"put the file into a folder as tinyshakespeare\.txt") as caught:
        load_corpus("tinyshakespeare")
    assert caught.value.exit_code == 1


def test_data_dir_comes_first_and_is_checked(tmp_path, monkeypatch):
    """The file in MYGPT_DATA_DIR is used, if it has the right hash."""
    monkeypatch.setenv("MYGPT_DATA_DIR", str(tmp_path))
    (tmp_path / "tinyshakespeare.txt").write_text("something else")
    with pytest.raises(CorpusError, match="not Tiny Shakespeare"):
        load_corpus("tinyshakespeare")


def test_data_dir_without_the_file_is_refused(served, tmp_path, monkeypatch):
    """MYGPT_DATA_DIR asks for this file: nothing is downloaded, nor taken from the cache, instead."""
    monkeypatch.setattr(download, "TINYSHAKESPEARE_SHA256", hashlib.sha256(b"to be").hexdigest())
    (served / "input.txt").write_bytes(b"to be")
    assert load_corpus("tinyshakespeare").text == "to be"  # in the cache from now on
    monkeypatch.setenv("MYGPT_DATA_DIR", str(tmp_path / "typo"))
    with pytest.raises(CorpusError) as caught:
        load_corpus("tinyshakespeare")
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"{tmp_path / 'typo' / 'tinyshakespeare.txt'}: no such file, and MYGPT_DATA_DIR is set to {tmp_path / 'typo'}; "
        "put the file there, correct MYGPT_DATA_DIR, or unset it to have the file downloaded"
    )
