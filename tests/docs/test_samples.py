"""What the README and the pages in docs/ show as output: the words of the program, the numbers of its recipes."""

import ast
import math
import re
import textwrap

import pytest
from support.commands import REPOSITORY
from test_golden import DEFAULT, HARDENED

from mygpt.recipe.files import load_recipe, shipped_recipes
from mygpt.recipe.tables import TABLE_OF_KEY
from mygpt.reports.outcome import place_lines, places
from mygpt.runs.records import Record

PAGES = ["README.md", "docs/guide.md", "docs/recipes.md", "docs/several-devices.md"]
TEXTS = {page: (REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES}
SAMPLES = {
    page: re.findall(r"^    (?!mygpt [a-z])(.*)", re.sub(r"(?ms)^```.*?^```$", "", text), re.MULTILINE)
    for page, text in TEXTS.items()
}
"""The lines of output that a page shows: indented, and no commands."""
VALUES = {"vm", "cpu", "gloo", "python", "mine", "toml", "nan", "max_gradnorm", "attention_norm", "blocks"} | {
    "token_embedding",
    "position_embedding",
}
"""Words of the samples that are values: of a machine, a file, a mistake."""


def strings_of_the_program():
    """Each string in mygpt/ that is not a docstring, as a list of its constant parts, between which values stand."""
    for file in (REPOSITORY / "mygpt").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        own_lines = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                yield [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in own_lines:
                yield [node.value]


STRINGS = {tuple(parts) for parts in strings_of_the_program()}
WORDS = {"".join(filter(None, parts)).strip() for parts in STRINGS} | {*TABLE_OF_KEY, *shipped_recipes(), *VALUES}
SENTENCES = [
    re.compile("".join("(.*?)" if part is None else re.escape(part) for part in parts))
    for parts in STRINGS
    if " " in "".join(filter(None, parts)).strip()
]


def unknown_words(line):
    """The words of a line that are in no sentence of the program, and are no name or value."""
    rest = list(line)
    for sentence in SENTENCES:
        for found in sentence.finditer(line):
            values = {at for group in range(1, sentence.groups + 1) for at in range(*found.span(group))}
            for at in {*range(*found.span())} - values:
                rest[at] = " "
    return {word for word in re.findall(r"[a-z_][a-z_-]{2,}", "".join(rest)) if word not in WORDS}


@pytest.mark.parametrize("page", PAGES)
def test_samples_have_the_words_of_the_program(page):
    """A line that the program prints in other words by now is found."""
    assert SAMPLES[page]
    assert not {line: words for line in SAMPLES[page] if (words := unknown_words(line))}
    assert unknown_words("loss: held-out 2.2152 at step 2000; a guess among 65 tokens has 4.1744")


def test_main_job_prints_what_the_golden_runs_print():
    """The README shows all of it, and the table of recipes the last losses."""
    assert textwrap.indent(HARDENED, "    ") in TEXTS["README.md"]
    for name, output in (("default", DEFAULT), ("hardened", HARDENED)):
        losses = re.findall(r"(?:loss|val) = \S+", output.splitlines()[-1])
        assert (
            f"{', '.join(losses).replace(' =', '')} |\n" in re.search(rf"\| `{name}` .*\n", TEXTS["docs/recipes.md"])[0]
        )


def test_expected_ranges_are_those_of_the_recipes():
    """Each range that a page shows comes from the table [expected] of a shipped recipe."""
    known = [load_recipe(name).expected for name in shipped_recipes()]
    lines = [line for samples in SAMPLES.values() for line in samples if line.startswith("expected: ")]
    assert len(lines) == 2
    for line in lines:
        value, step = re.search(r"normal: ([\d.]+) at step (\d+);", line).groups()
        record = Record(step=int(step), loss=1.0, lr=0.0, tokens=1, val=float(value))
        assert line in [
            found for expected in known for found, _ in place_lines(expected, [record], expected.expected_text or "")
        ]


def test_losses_in_the_table_of_recipes_are_normal():
    """The held-out loss at the last step is within the range of other seeds."""
    seen = 0
    for name, value in re.findall(r"^\| `([\w-]+)` .*\bval ([\d.]+)", TEXTS["docs/recipes.md"], re.MULTILINE):
        recipe = load_recipe(name)
        record = Record(step=recipe.train.steps, loss=1.0, lr=0.0, tokens=1, val=float(value))
        for kind, found in places(recipe.expected, [record]):
            assert kind != "held-out loss" or [place.is_within for place in found] == [True], (name, found)
            seen += 1
    assert seen >= 6


def test_loss_of_a_guess_is_the_logarithm():
    """Of the number of tokens."""
    shown = re.findall(r"guessing at random among (\d+) tokens gives ([\d.]+)", TEXTS["docs/guide.md"])
    assert shown == [("65", f"{math.log(65):.4f}")]
