"""The tests with each version of Python, and with the oldest and the newest torch and Accelerate that mygpt allows.

    pip install nox
    nox                              # all of them; each installs its own torch, which is large
    nox -s "tests(python='3.13', torch='2.13.0')" -- tests/recipe
    nox -s mutants -- "mygpt.estimates*"    # which small changes of the code no test notices

Without arguments each session of `tests` runs the tests that are not marked as slow.
"""

import re
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests"]
VERSIONS = [("3.11", "2.10.0"), ("3.12", "2.11.0"), ("3.13", "2.13.0"), ("3.13", "2.15.0")]
"""Of Python and torch. Accelerate 1.15.0 is both the oldest that is allowed and the newest that there is."""


@nox.session
@nox.parametrize(("python", "torch"), VERSIONS)
def tests(session: nox.Session, torch: str) -> None:
    """Install the checkout with this torch, and the other packages as they are pinned, and run the tests."""
    pins = Path("constraints.txt").read_text(encoding="utf-8")
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text(re.sub("(?m)^torch==.*$", f"torch=={torch}", pins), encoding="utf-8")
    session.install("-c", str(constraints), "-e", ".[dev]")
    session.run("pytest", "-n", "2", "--dist", "worksteal", *(session.posargs or ["-m", "not slow"]))


@nox.session
def mutants(session: nox.Session) -> None:
    """Change the code in small ways, one at a time, and run the tests of the function; all of it takes days.

    `mutmut results` lists the changes that no test noticed, and `mutmut show NAME` shows one. pyproject.toml says what
    is changed, and which tests are run.
    """
    session.install("-c", "constraints.txt", "-e", ".[dev]", "mutmut==3.8.1")
    environment = {"PYTHONPATH": str(Path("mutants").absolute()), "OMP_NUM_THREADS": "1"}  # for tests that start mygpt
    session.run("mutmut", "run", "--max-children", "1", *session.posargs, env=environment)
