"""The order of the modules, read from their syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mygpt"

# A module may import from those before it only.
ORDER = [
    "__init__",
    "errors",
    "recipe",
    "seeds",
    "corpus",
    "tokenizer",
    "data",
    "model",
    "optim",
    "reduction",
    "runtime",
    "launch",
    "evaluate",
    "metadata",
    "startup",
    "agreement",
    "rundir",
    "checkpoint",
    "state",
    "failure",
    "metrics",
    "compare",
    "resume",
    "loop",
    "doctor",
    "verify",
    "generation",
    "course",
    "report",
    "cli",
    "__main__",
]
WITHOUT_TORCH = {
    "__init__",
    "errors",
    "recipe",
    "corpus",
    "tokenizer",
    "rundir",
    "compare",
    "metrics",
    "resume",
    "report",
}
WITH_ACCELERATE = {"agreement", "evaluate", "state", "loop", "doctor"}


def imports(module: str) -> set[str]:
    """The dotted names that a module imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_place():
    """A new module is put into the order above."""
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("module", [name for name in ORDER if name != "__init__"])
def test_modules_import_only_from_earlier_ones(module):
    """Data flows one way: no module knows of those after it."""
    allowed = {"mygpt", *(f"mygpt.{name}" for name in ORDER[: ORDER.index(module)])}
    own = {name for name in imports(module) if name.split(".")[0] == "mygpt"}
    modules = {".".join(name.split(".")[:2]) for name in own} - {"mygpt.__version__"}
    assert modules <= allowed


def test_light_modules_import_no_torch(tmp_path):
    """Recipes, comparisons and reports answer without waiting for torch, whatever they import in turn."""
    modules = ", ".join(f"mygpt.{name}" for name in sorted(WITHOUT_TORCH - {"__init__"}))
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'accelerate', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


@pytest.mark.parametrize("module", sorted(set(ORDER) - WITH_ACCELERATE))
def test_accelerate_stays_where_processes_meet(module):
    """Only the loop, evaluation, what is gathered of the state, and the doctor know of Accelerate."""
    assert "accelerate" not in {name.split(".")[0] for name in imports(module)}
