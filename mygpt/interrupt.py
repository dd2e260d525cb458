"""Ctrl-C at any moment of the `mygpt` command. Imports next to nothing, so that the command can begin with it."""

import os
import signal
from types import FrameType


def receive_interrupt(number: int, frame: FrameType | None) -> None:
    """The SIGINT handler of the command: raises KeyboardInterrupt, or ends the process if it imports a module."""
    end_if_importing(number, frame)
    raise KeyboardInterrupt


def end_if_importing(number: int, frame: FrameType | None) -> None:
    """End the process at once if `frame` is in an import, where an exception may be swallowed, or abort C++ code."""
    while frame and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    if frame:
        end_at_once(number)


def end_at_once(number: int, remark: str = "") -> None:
    """End the process for a signal, with one line about it, and a `remark`."""
    try:
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            os.write(2, f"{chr(10) * os.isatty(2)}mygpt: stopped by {name}{remark}\n".encode())
    finally:
        os._exit(128 + number)
