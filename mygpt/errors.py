"""The errors that a user can act on: the command prints their message alone, without a traceback. And notes."""

import sys


class MygptError(Exception):
    """Base of every error that mygpt raises on purpose.

    `exit_code` is 2 for a mistake in the user's input (nothing has been created on disk), and 1 for a failure that the
    input did not cause: a full disk, a lost network, a non-finite loss.
    """

    exit_code = 2

    def __init__(self, message: str, exit_code: int | None = None):
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class RecipeError(MygptError):
    """A recipe cannot be used, or a flag that sets one of its keys."""


class CorpusError(MygptError):
    """The training text is missing, unreadable or too short."""


class DownloadError(CorpusError):
    """A named corpus could not be downloaded, or the download does not match its published hash."""

    exit_code = 1


class DamagedCorpusError(CorpusError):
    """A prepared corpus is not as it was prepared, or has changed while it was in use."""

    exit_code = 1


class TokenizerError(MygptError):
    """A text has a character outside the vocabulary, or a tokenizer cannot be read, trained or built."""


class LaunchError(MygptError):
    """The devices or processes that the user asked for are not available."""


class LostProcessError(MygptError):
    """Another process of the run has ended, or has not answered for too long."""

    exit_code = 1


class PeerError(MygptError):
    """Another process of the run has failed: carries its message, with the name of its machine, and its exit code."""


class DisagreementError(MygptError):
    """The processes of a run with exact sums do not hold the same weights."""

    exit_code = 1


class CheckpointError(MygptError):
    """A path is not a run or a checkpoint, or writing there would overwrite one."""


class DamagedCheckpointError(CheckpointError):
    """A file of a run exists, but cannot be read, or is not as it was saved."""

    exit_code = 1


class FormatError(CheckpointError):
    """A checkpoint was written by another version of mygpt, in a format that this one does not read."""

    exit_code = 1


class MismatchError(CheckpointError):
    """A checkpoint is intact, but its architecture or corpus is not that of the run that would continue it."""


class DiskError(MygptError):
    """The disk refuses a file of a run or of a prepared corpus that mygpt writes, as when it is full."""

    exit_code = 1


class OutOfMemoryError(MygptError):
    """The model or the batch does not fit into memory."""

    exit_code = 1


class NonFiniteError(MygptError):
    """A loss, a gradient or a weight became infinite or not a number."""

    exit_code = 1


class InterruptedRunError(MygptError):
    """A signal stopped the run after it was saved; the same command continues it."""


def printable(line: str) -> str:
    """A text on one line: control characters, as a file's name may have them, are escaped."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)


def counted(number: int, noun: str) -> str:
    """A number of things: "1 file", "2,000 files"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def print_note(text: str) -> None:
    """Tell the user on one line on stderr, beside what a command answers on stdout."""
    print(printable(text), file=sys.stderr, flush=True)
