"""The published numbers, to four decimals: whole runs on Tiny Shakespeare, started in every way."""

import pytest
from support.commands import BIN, REPOSITORY, SCRIPT, run_process

from mygpt.checks.compare import compare
from mygpt.recipe.flags import parse_recipe

pytestmark = pytest.mark.slow

RECIPES = REPOSITORY / "recipes"

DEFAULT = """\
device:       cpu
precision:    fp32
corpus chars: 1,115,394
train chars:  1,115,394
vocab_size:   65
params:       207,296
steps:        2000
schedule:     constant (warmup=0)
max_grad_norm:0.0
step     1: loss = 41.0367
step   500: loss = 2.5944
step  1000: loss = 2.3529
step  1500: loss = 2.1795
step  2000: loss = 2.0785
"""

HARDENED = """\
device:       cpu
precision:    fp32
corpus chars: 1,115,394
train chars:  1,003,854
val chars:    111,540
vocab_size:   65
params:       207,296
steps:        2000
schedule:     cosine (warmup=100)
max_grad_norm:1.0
step     1: loss = 41.5789  lr = 1.00e-05
step   500: loss = 2.4393  val = 2.4744  lr = 8.95e-04
step  1000: loss = 2.2950  val = 2.2975  lr = 5.41e-04
step  1500: loss = 2.1387  val = 2.2136  lr = 1.61e-04
step  2000: loss = 2.1927  val = 2.2152  lr = 0.00e+00
"""

CPU = ["--device", "cpu"]
ACCELERATE = [BIN / "accelerate", "launch"]
TWO_PROCESSES = [*ACCELERATE, "--config_file", RECIPES / "launch" / "cpu2.yaml"]
HARDENED_RUN = [SCRIPT, RECIPES / "hardened.toml", *CPU]
# tests/processes/test_launch.py compares all ways to start for a few steps, python and accelerate byte for byte.
WAYS = {
    ("default", "two-processes"): (
        [*TWO_PROCESSES, SCRIPT, RECIPES / "default.toml", *CPU, "--matmul", "onednn"],
        DEFAULT,
    ),
    # It also keeps the weights of step 1999, which changes no number.
    ("hardened", "accelerate"): ([*ACCELERATE, *HARDENED_RUN, "--save-every", "1999"], HARDENED),
    ("hardened", "exact"): ([*TWO_PROCESSES, *HARDENED_RUN, "--reduction", "exact"], HARDENED),
}
FLAGS = ["--val-split", 0.1, "--val-every", 500, "--schedule", "cosine", "--warmup", 100, "--max-grad-norm", 1.0]


@pytest.fixture(scope="session")
def runs(shakespeare, tmp_path_factory):
    """A function that makes a golden run once; returns the finished process and its run directory."""
    folder, done = tmp_path_factory.mktemp("golden"), {}

    def make(recipe, launcher):
        if (recipe, launcher) not in done:
            output = folder / f"{recipe}-{launcher}"
            arguments, _ = WAYS[recipe, launcher]
            done[recipe, launcher] = run_process([*arguments, "--output", output], folder, 900), output
        return done[recipe, launcher]

    return make


@pytest.mark.parametrize(("recipe", "launcher"), WAYS)
def test_recipe_prints_the_published_numbers(runs, recipe, launcher):
    """Every character of the output: one process, two of them with oneDNN, and two with exact sums.

    If this fails, the numbers of the published runs have changed: that is a bug, whatever else improved. Look for the
    order in which random numbers are drawn (weights, batches, held-out batches) before looking at arithmetic.
    """
    process, _ = runs(recipe, launcher)
    assert process.returncode == 0, process.stderr
    assert process.stdout == WAYS[recipe, launcher][1]


def test_course_command_is_the_hardened_recipe(shakespeare):
    """The command line of the course, on the text file itself, asks for the run whose numbers are published.

    The documentation's test runs it, and the recipe, for a few steps, and compares the two.
    """
    flags, _ = parse_recipe([str(shakespeare), *map(str, FLAGS)], "mygpt train")
    hardened, _ = parse_recipe(["hardened", "--corpus", str(shakespeare)], "mygpt train")
    assert flags.replace(output="run") == hardened.replace(output="run", save_every=0)


def test_step_at_rate_zero_changes_nothing(runs):
    """The weights after steps 1999 and 2000 of the hardened recipe are bitwise equal."""
    _, run = runs("hardened", "accelerate")
    result = compare(run / "step-001999", run / "step-002000")
    assert result.weights.differences == []
    assert result.steps == (1999, 2000)
