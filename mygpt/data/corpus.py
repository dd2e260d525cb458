"""Reads a corpus, which is a text file or a named text, and its sha256.

Text is UTF-8 and is not changed: a byte order mark is the character U+FEFF, and `\\r\\n` stays two characters, so that
a file gives the same tokens on every system.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from mygpt.data import download
from mygpt.data.sources import decode_text
from mygpt.errors import CorpusError
from mygpt.recipe.reading import read_file
from mygpt.recipe.tables import NAMED_CORPORA


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
        path = download.find_tinyshakespeare()
        corpus = _read_text(path)
        if corpus.sha256 != download.TINYSHAKESPEARE_SHA256:
            raise CorpusError(
                f"{path}: not Tiny Shakespeare (sha256 {download.TINYSHAKESPEARE_SHA256}); replace or remove it"
            )
        return corpus
    if name == "python-docs":
        return _python_docs()
    return _read_text(Path(name))


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
