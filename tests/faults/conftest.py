"""The run with which a disturbed run is compared."""

from pathlib import Path

import pytest
from support.forked import run


@pytest.fixture(scope="session")
def undisturbed(folder):
    """A function giving the folder in which these arguments have been run without a fault, once."""
    done = {}

    def make(*arguments) -> Path:
        if arguments not in done:
            done[arguments] = folder("undisturbed")
            assert run(arguments, done[arguments]) == 0
        return done[arguments]

    return make
