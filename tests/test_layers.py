"""The order of the packages, read from the syntax trees of their modules."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mygpt"

# Lowest first; a floor imports only from lower ones. Those of one floor do not import each other.
FLOORS = [
    {"errors", "compat", "cores", "disk", "estimates", "interrupt"},
    {"posix"},
    {"recipe"},
    {"data"},
    {"model"},
    {"runs"},
    {"processes", "reports"},
    {"training"},
    {"checks"},
    {"planning", "studies"},
    {"api", "course", "cli"},
    {"__main__"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
WITHOUT_TORCH = [
    *(name for name in MODULES if name.startswith(("recipe.", "reports."))),
    *(
        f"runs.{name}"
        for name in ("run", "steps", "files", "lock", "schemas", "start", "changes", "copying", "records", "held_out")
    ),
    *(
        "errors",
        "disk",
        "estimates",
        "data.corpus",
        "data.tokenizer",
        "checks.compare",
        "processes.environment",
        "api",
        "cli.main",
        "cli.train",
    ),
]


def imports(path: Path) -> set[str]:
    """The dotted names that a module imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    """Which of mygpt's modules a module imports."""
    return {name.removeprefix("mygpt.") for name in imports(path)} & MODULES.keys()


def test_every_package_has_its_floor_and_says_what_belongs_in_it():
    """A new package is put into the order above, and its docstring is a paragraph."""
    names = {name.split(".")[0] for name in MODULES}
    assert names == FLOOR_OF.keys()
    for name in names:
        if (PACKAGE / name).is_dir():
            text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
            assert text
            assert len(text.split()) > 15, name


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_from_lower_floors(module):
    """Imports point down; inside a package they go both ways, but never in a circle (see below)."""
    package = module.split(".")[0]
    for name in own_imports(MODULES[module]):
        other = name.split(".")[0]
        assert other == package or FLOOR_OF[other] < FLOOR_OF[package], f"{module} imports {name}"


def test_no_module_imports_itself_through_others():
    """Not inside a package either."""
    graph = {module: own_imports(path) - {module} for module, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_light_modules_import_no_torch(tmp_path):
    """Recipes, comparisons and reports answer without waiting for torch, whatever they import in turn."""
    assert set(WITHOUT_TORCH) <= MODULES.keys()
    modules = ", ".join(f"mygpt.{name}" for name in WITHOUT_TORCH)
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'accelerate', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_accelerate_is_imported_in_training_alone():
    """And by the doctor; compat.py asks it, inside two functions, what it does not document."""
    found = {module for module, path in MODULES.items() if any(name.startswith("accelerate") for name in imports(path))}
    assert {module for module in found if not module.startswith("training.")} == {"checks.doctor", "compat"}
