"""`mygpt`, `python -m mygpt` and `accelerate launch -m mygpt`: the command, and Ctrl-C while it starts and ends."""

import signal
from collections.abc import Sequence

from mygpt.interrupt import end_at_once, receive_interrupt


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `mygpt` command; see mygpt/cli/main.py."""
    # A script's background job ignores SIGINT, and continues to.
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    try:
        if not is_ignored:
            signal.signal(signal.SIGINT, receive_interrupt)
        from mygpt.cli import main as cli

        cli.main(argv)
    except KeyboardInterrupt:
        end_at_once(signal.SIGINT)
    finally:
        if not is_ignored:  # handlers do not run any more while Python ends
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
