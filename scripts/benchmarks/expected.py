"""Measures the losses that a recipe should come to: the rows of its table [expected], over runs with several seeds.

    python scripts/benchmarks/expected.py hardened --seeds 10 --out checkpoints/expected

prints the table, to be put into the recipe. A run is a study's: the same command continues one that was killed.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from mygpt.errors import print_note
from mygpt.recipe.flags import load_target
from mygpt.recipe.tables import ExpectedTable
from mygpt.reports.outcome import training_loss
from mygpt.runs.records import Record
from mygpt.runs.run import RunDirectory
from mygpt.studies.grid import Variant
from mygpt.studies.runner import run_grid

ROWS = 4
"""Steps for which a loss is given, at most: with more, the range for each would have to be wider."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/expected"))
    options = parser.parse_args()
    for name in options.recipes:
        recipe = load_target(name).replace(**dict.fromkeys(ExpectedTable.model_fields))
        variants = [Variant(Path(name).stem, recipe)]
        for variant, paths in run_grid(variants, options.seeds, options.out / Path(name).stem, print_note):
            runs = [RunDirectory(path) for path in paths.values()]
            print("\n".join([f"# {variant.name}", *table([run.records for run in runs], runs[0].info.corpus_sha256)]))


def table(runs: Sequence[Sequence[Record]], corpus_sha256: str) -> list[str]:
    """The table of what these runs came to, as TOML."""
    evaluated = [record.step for record in runs[0] if record.val is not None]
    recorded = [record.step for record in runs[0] if record.step % 10 == 0]
    lines = ["[expected]", f"expected_seeds = {len(runs)}", f'expected_text = "{corpus_sha256[:12]}"']
    if evaluated:
        found = [{record.step: record.val for record in run if record.val is not None} for run in runs]
        return [*lines, f"expected_val = {rows(spread_over(evaluated), found)}"]
    steps = spread_over(recorded)
    return [*lines, f"expected_loss = {rows(steps, [{s: training_loss(run, s).mean for s in steps} for run in runs])}"]


def spread_over(steps: Sequence[int]) -> list[int]:
    """Up to `ROWS` of these steps, evenly spaced, with the last."""
    count = min(ROWS, len(steps))
    return [steps[-1 - (len(steps) * number) // count] for number in reversed(range(count))]


def rows(steps: Sequence[int], runs: Sequence[dict[int, float]]) -> str:
    values = [[run[step] for run in runs] for step in steps]
    shown = [
        f"[{step}, {statistics.mean(losses):.4f}, {statistics.stdev(losses):.4f}]"
        for step, losses in zip(steps, values, strict=True)
    ]
    return f"[{', '.join(shown)}]"


if __name__ == "__main__":
    main()
