"""Each row of docs/faults.md has a test: `@pytest.mark.fault(n)` gives its number."""

import ast
import re
from pathlib import Path

from support.commands import REPOSITORY


def test_every_fault_has_a_test_and_a_row():
    """Each number of a row of docs/faults.md, and no other, is the mark of a test; no number has two rows."""
    marked = set()
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fault":
                marked |= {argument.value for argument in node.args}
    rows = re.findall(r"^\| (\d+) \|", (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows)) >= 86
    assert marked == set(map(int, rows))
