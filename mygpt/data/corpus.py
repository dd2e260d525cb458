"""Reads a corpus, which is a text file or a named text, and its sha256.

Text is UTF-8 and is not changed: a byte order mark is the character U+FEFF, and `\\r\\n` stays two characters, so that
a file gives the same tokens on every system.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from mygpt.data.sources import decode_text
from mygpt.errors import CorpusError, DownloadError
from mygpt.recipe.reading import read_file
from mygpt.recipe.tables import NAMED_CORPORA

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Corpus(NamedTuple):
    """A text and the sha256 of its UTF-8 bytes, in hexadecimal."""

    text: str
    sha256: str


def load_corpus(name: str) -> Corpus:
    """Load a named corpus or a text file; a name wins over a file of the same name.

    Raises:
        CorpusError: the file is missing, not a regular file, unreadable, empty, or not UTF-8, or holds documents that
            have to be prepared; or a named corpus is not the published one.
        DownloadError: a named corpus could not be fetched, or has the wrong hash.
    """
    if name == "tinyshakespeare":
        path = find_tinyshakespeare()
        corpus = _read_text(path)
        if corpus.sha256 != TINYSHAKESPEARE_SHA256:
            raise CorpusError(f"{path}: not Tiny Shakespeare (sha256 {TINYSHAKESPEARE_SHA256}); replace or remove it")
        return corpus
    if name == "python-docs":
        return _python_docs()
    return _read_text(Path(name))


def find_tinyshakespeare() -> Path:
    """The file of Tiny Shakespeare: in MYGPT_DATA_DIR if that is set, else in the cache, downloaded if it is not there.

    Raises:
        CorpusError: MYGPT_DATA_DIR is set, and the file is not there.
        DownloadError: the file is not in the cache and cannot be fetched.
    """
    if folder := os.environ.get("MYGPT_DATA_DIR"):
        path = Path(folder) / "tinyshakespeare.txt"
        # No fallback to the cache or a download: a command should not depend on what this machine has run before.
        if not path.is_file():
            raise CorpusError(
                f"{path}: no such file, and MYGPT_DATA_DIR is set to {folder}; put the file there, correct "
                "MYGPT_DATA_DIR, or unset it to have the file downloaded"
            )
        return path
    import pooch

    try:
        file = pooch.retrieve(
            TINYSHAKESPEARE_URL,
            f"sha256:{TINYSHAKESPEARE_SHA256}",
            fname="tinyshakespeare.txt",
            path=pooch.os_cache("mygpt"),
        )
    except Exception as error:  # requests, urllib3 and pooch each raise their own kinds
        raise DownloadError(
            f"tinyshakespeare: cannot be downloaded from {TINYSHAKESPEARE_URL} ({type(error).__name__}); put the file "
            "into a folder as tinyshakespeare.txt and set MYGPT_DATA_DIR to that folder"
        ) from error
    return Path(file)


def _python_docs() -> Corpus:
    """The reference text behind Python's `help()`: half a megabyte of English; it differs between Python versions."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError("python-docs: this Python comes without pydoc_data; give a text file as the corpus") from None
    text = "\n\n".join(f"{name}\n\n{topics[name]}" for name in sorted(topics))
    return Corpus(text, hashlib.sha256(text.encode()).hexdigest())


def _read_text(path: Path) -> Corpus:
    names = ", ".join(NAMED_CORPORA)
    missing = f"no such text file; expected the path of a text, or one of: {names}"
    raw = read_file(path, CorpusError, expected="a text file", missing=missing)
    text = decode_text(path, raw)
    if not text:
        raise CorpusError(f"{path}: empty; expected a text to train on")
    return Corpus(text, hashlib.sha256(raw).hexdigest())
