"""Downloads Tiny Shakespeare once, and checks its hash."""

import os
from pathlib import Path

from mygpt.errors import CorpusError, DownloadError

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


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
