"""The errors that a user can act on: each is printed as its message alone, without a traceback."""


class MygptError(Exception):
    """Base of every error that mygpt raises on purpose.

    `exit_code` is 2 for a mistake in what the user gave (nothing has been created on disk), and 1 where the
    world failed: a full disk, a lost network, a loss that is no longer a number.
    """

    exit_code = 2


class RecipeError(MygptError):
    """A recipe, or a flag that stands for one of its keys, cannot be used."""


class CorpusError(MygptError):
    """The training text is missing, unreadable or too short."""


class DownloadError(CorpusError):
    """A named corpus could not be fetched, or what came is not what its hash says."""

    exit_code = 1


class TokenizerError(MygptError):
    """A text holds a character outside the vocabulary."""


class LaunchError(MygptError):
    """The devices or processes that were asked for are not the ones that are there."""


class LostProcessError(MygptError):
    """Another process of the run has ended, or has not answered for too long."""

    exit_code = 1


class PeerError(MygptError):
    """Another process of the run has ended with an error: this is its message, with its machine, and its exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class DisagreementError(MygptError):
    """The processes of a run with exact sums do not hold the same weights."""

    exit_code = 1


class CheckpointError(MygptError):
    """A path is not a run or a checkpoint, or writing there would overwrite one."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint exists but cannot be read back, or a new one cannot be written."""

    exit_code = 1


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a later version of mygpt."""

    exit_code = 1


class MismatchError(CheckpointError):
    """A checkpoint is whole, but of another architecture or corpus than the run that would continue it."""

    exit_code = 1


class OutOfMemoryError(MygptError):
    """The model or the batch does not fit into memory."""

    exit_code = 1


class NonFiniteError(MygptError):
    """A loss, a gradient or a weight became infinite or not a number."""

    exit_code = 1


class InterruptedRunError(MygptError):
    """A signal asked the run to stop, and it has stopped: saved, to be continued by the same command."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
