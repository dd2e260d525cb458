"""The order of the modules, read from their syntax trees."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mygpt"

# A module may import from those before it only.
ORDER = [
    "__init__",
    "errors",
    "recipe",
    "corpus",
    "tokenizer",
    "data",
    "model",
    "optim",
    "runtime",
    "evaluate",
    "rundir",
    "checkpoint",
    "compare",
    "metrics",
    "loop",
    "generation",
    "report",
    "cli",
    "__main__",
]
WITHOUT_TORCH = {"__init__", "errors", "recipe", "corpus", "tokenizer", "rundir", "compare", "metrics", "report"}
WITH_ACCELERATE = {"evaluate", "checkpoint", "loop"}


def imports(module: str, *, at_import_only: bool = False) -> set[str]:
    """The dotted names that a module imports: anywhere in it, or only where importing it runs them."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    lazy = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef) or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.dump(outer.test))
        for node in ast.walk(outer)
    }
    names = set()
    for node in ast.walk(tree):
        if at_import_only and id(node) in lazy:
            continue
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


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH))
def test_light_modules_import_no_torch(module):
    """Recipes, comparisons and reports answer without waiting for torch."""
    heavy = {"torch", "accelerate", "matplotlib"}
    assert not {name.split(".")[0] for name in imports(module, at_import_only=True)} & heavy


@pytest.mark.parametrize("module", sorted(set(ORDER) - WITH_ACCELERATE))
def test_accelerate_stays_in_three_modules(module):
    """Only the loop, evaluation and checkpoints know of Accelerate."""
    assert "accelerate" not in {name.split(".")[0] for name in imports(module)}
