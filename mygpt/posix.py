"""The modules of Python that only POSIX systems have. Where they are missing, importing this says what to do."""

from mygpt.errors import MygptError

try:
    import fcntl as fcntl
    import resource as resource
except ImportError:
    raise MygptError(
        "this needs the file locks and signals of Linux or macOS; on Windows run mygpt in WSL, which `wsl --install` "
        "sets up"
    ) from None
