"""Each row of docs/faults.md has a test: `@pytest.mark.fault(n)` gives its number."""

import ast
import re
from pathlib import Path

from support.commands import REPOSITORY


def test_every_fault_has_a_test_and_a_row():
    """The numbers of the rows of docs/faults.md are the marks of the tests; none is given twice. The pages that say how
    many rows there are know it."""
    marked = set()
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fault":
                marked |= {argument.value for argument in node.args}
    faults = (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d[\d, -]*) \|", faults, re.MULTILINE)
    ranges = [part.split("-") for row in rows for part in row.split(", ")]
    numbers = [number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)]
    assert len(numbers) > 110
    assert sorted(numbers) == sorted(marked)
    for page in ("README.md", "docs/guide.md"):
        assert f"{len(rows)} ways to fail" in (REPOSITORY / page).read_text(encoding="utf-8")
