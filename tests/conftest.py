"""Fixtures of many tests: small recipes, texts, folders to run in, and the command in this process or a new one."""

import gc
import os
import shutil
import subprocess
from pathlib import Path

import hypothesis
import pytest
from support.commands import MYGPT, REPOSITORY, run_process
from support.runs import EXACT, TINY

from mygpt.cli.main import main
from mygpt.data.corpus import load_corpus
from mygpt.data.download import TINYSHAKESPEARE_SHA256, find_tinyshakespeare
from mygpt.errors import DownloadError
from mygpt.recipe.tables import Recipe

# A machine that is busy with something else is no defect.
hypothesis.settings.register_profile("mygpt", deadline=None)
hypothesis.settings.load_profile("mygpt")


def pytest_collection_finish():
    """Take what has been imported out of garbage collection: each run collects twice, which took most of its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny(tmp_path, text_file):
    """A function making tiny recipes that train on `text_file` into `tmp_path`/run."""

    def make(**keys) -> Recipe:
        return Recipe.of(**TINY | {"corpus": str(text_file), "output": str(tmp_path / "run")} | keys)

    return make


@pytest.fixture(scope="session")
def text() -> str:
    """Twenty thousand characters of the embedded corpus."""
    return load_corpus("python-docs").text[:20_000]


@pytest.fixture(scope="session")
def text_file(text, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory, text_file):
    """A function making folders to run in, each with a copy of the text, text.txt."""

    def make(name) -> Path:
        path = tmp_path_factory.mktemp(name)
        shutil.copy(text_file, path / "text.txt")
        return path

    return make


@pytest.fixture(scope="session")
def exact_run(text_file, tmp_path_factory) -> Path:
    """A run of one process with exact sums: its bytes are those of any number of processes."""
    from mygpt.training.train import train

    return train(Recipe.of(**EXACT, corpus=str(text_file), output=str(tmp_path_factory.mktemp("exact") / "run")))


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    """Tiny Shakespeare, downloaded if need be; the test is skipped where it cannot be downloaded."""
    beside = REPOSITORY.parent / "shared" / "data"
    if not os.environ.get("MYGPT_DATA_DIR") and (beside / "tinyshakespeare.txt").is_file():
        os.environ["MYGPT_DATA_DIR"] = str(beside)
    try:
        path = find_tinyshakespeare()
    except DownloadError as error:  # a wrong MYGPT_DATA_DIR is a mistake, and no reason to skip
        pytest.skip(f"needs Tiny Shakespeare: {error}")
    assert load_corpus("tinyshakespeare").sha256 == TINYSHAKESPEARE_SHA256
    return path


@pytest.fixture
def call(capsys):
    """A function that runs `mygpt ARGUMENTS` in this process; returns exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def command(tmp_path):
    """A function that runs `mygpt ARGUMENTS` in `tmp_path` and returns the finished process."""

    def run(*arguments, cwd=tmp_path, timeout=300, **environment) -> subprocess.CompletedProcess:
        return run_process([*MYGPT, *arguments], cwd, timeout, environment)

    return run
