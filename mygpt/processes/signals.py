"""The machine under a run: device, threads, determinism, processes, and a record of them all."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StopRequest:
    """Whether SIGTERM or SIGINT has asked this process to stop; a second signal ends it at once."""

    def __init__(self) -> None:
        self.heeded = False
        """Whether someone looks at `pending`; while not, a signal ends the process."""
        self.signal: int | None = None
        self._launcher = _launcher_pid()
        self._received_at = 0.0

    def pending(self) -> bool:
        """Whether to stop; also when the launcher has gone: `accelerate launch` passes none on, a dead one cannot."""
        if self._launcher not in (None, os.getppid()):
            self.signal = self.signal or signal.SIGTERM
        return self.signal is not None

    def receive(self, number: int, _frame: object) -> None:
        """The signal handler."""
        if not self.heeded:
            raise SystemExit(128 + number)
        now = time.monotonic()
        # A terminal sends Ctrl-C to every process, and a launcher passes its own on: that is one request, not two.
        launched = "WORLD_SIZE" in os.environ
        if self.signal is not None and not (launched and now - self._received_at < ECHO_SECONDS):
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self._received_at = number, now


ECHO_SECONDS = 2.0


def _launcher_pid() -> int | None:
    """The launcher that started this process; None: there is none, and a parent that ends means nothing."""
    if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return None
    pid = os.getppid()
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # no /proc: the variables have to do
        return pid
    return pid if re.search(rb"accelerate|torchrun|torch\.distributed", command) else None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Have SIGTERM and SIGINT ask to stop, in place of ending the process, while inside."""
    request = StopRequest()
    # Only the main thread may set handlers; elsewhere signals do what they did.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # A signal that is ignored, as by a job that a script has put into the background, stays so.
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    previous = {number: handler for number, handler in previous.items() if handler is not signal.SIG_IGN}
    try:
        for number in previous:
            signal.signal(number, request.receive)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
