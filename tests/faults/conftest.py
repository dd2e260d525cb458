"""Fixtures of the tests that disturb a run and compare it with one that was never disturbed."""

import shutil
from pathlib import Path

import pytest
from support.fault_points import run


@pytest.fixture(scope="session")
def folder(tmp_path_factory, text_file):
    """A function making folders to run in, each with the text."""

    def make(name) -> Path:
        path = tmp_path_factory.mktemp(name)
        shutil.copy(text_file, path / "text.txt")
        return path

    return make


@pytest.fixture(scope="session")
def quiet(folder):
    """A function giving the folder in which these arguments have been run undisturbed, once."""
    done = {}

    def undisturbed(*arguments) -> Path:
        if arguments not in done:
            done[arguments] = folder("quiet")
            assert run(arguments, done[arguments]) == 0
        return done[arguments]

    return undisturbed
