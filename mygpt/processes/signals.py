"""Turn signals that ask a process to end into a request to save and stop."""

import os
import re
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from mygpt.interrupt import end_at_once, end_if_importing
from mygpt.processes.environment import is_launched

ECHO_SECONDS = 2.0
"""A terminal sends Ctrl-C to every process, and torchrun passes its own on: within this time both are one request."""


class StopRequest:
    """Whether a signal has asked this process to stop; a second one ends it at once."""

    def __init__(self) -> None:
        self.graceful = False
        """Whether the training loop looks at `pending`; if not, a signal ends the process."""
        self.signal: int | None = None
        self._received_at = 0.0
        self._launcher = launcher_pid()

    def pending(self) -> int:
        """The signal that asks to stop, SIGTERM if the launcher has ended without passing one on; 0: none."""
        if self._launcher not in (None, os.getppid()):
            self.signal = self.signal or signal.SIGTERM
        return self.signal or 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if number == signal.SIGHUP:
            leave_closed_terminal()
        if not self.graceful:
            end_if_importing(number, frame)
            raise SystemExit(128 + number)
        # The kernel and the shell both send SIGHUP, and systemd sends it after SIGTERM.
        may_repeat = is_launched() or signal.SIGHUP in (number, self.signal)
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._received_at = number, now
        elif not may_repeat or now - self._received_at >= ECHO_SECONDS:
            end_at_once(number, ", the second signal; nothing is saved after the newest checkpoint")


def leave_closed_terminal() -> None:
    """Print nowhere what would go to a terminal that has closed: it would be an error, and the run not saved."""
    for descriptor in (1, 2):
        with suppress(OSError):
            # Of character devices, one that has closed is no terminal; nor is /dev/null, which replaces it.
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                with open(os.devnull, "wb") as null:
                    os.dup2(null.fileno(), descriptor)


def launcher_pid() -> int | None:
    """The launcher that started this process; None: a parent that may end before the run, as a shell does."""
    if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return None
    pid = os.getppid()
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # no /proc: the variables have to do, though a user may have exported them
        return pid
    return pid if re.search(rb"accelerate|torchrun|torch\.distributed", command) else None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """While inside, a signal that asks to end sets the request instead of ending the process."""
    request = StopRequest()
    # Only the main thread may set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # A terminal that closes sends SIGHUP, which torchrun passes on. Slurm's --signal and other schedulers announce the
    # end of a job by SIGUSR1 or SIGUSR2.
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    previous = {number: signal.getsignal(number) for number in numbers}
    # A script's background job ignores SIGINT, and what nohup starts SIGHUP; they continue to.
    previous = {number: handler for number, handler in previous.items() if handler is not signal.SIG_IGN}
    try:
        for number in previous:
            signal.signal(number, request.receive)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
