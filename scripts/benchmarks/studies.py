"""How often studies of equal recipes call them different, and how often they see a difference that is there.

    mygpt study tuned --set lr=1e-2,2e-2 --out checkpoints/known
    python scripts/benchmarks/studies.py checkpoints/known --studies 1000

takes from the runs of a study how much their losses deviate: between seeds, between windows, and between seeds from
window to window. Then it simulates studies with these deviations, and gives each to the analysis of `mygpt study`. The
recipes of a simulated study are equal, or the first is better by an effect.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mygpt.estimates import Floats
from mygpt.runs.held_out import Evaluation, Windows
from mygpt.studies.analysis import RunResult, VariantResult, compare_variants
from mygpt.studies.results import is_finished, read_variant


class Deviations(NamedTuple):
    """How losses per token of runs of one recipe deviate; its windows are those of the runs."""

    windows: Windows
    hard: Floats
    """The mean loss of each window over the seeds, (windows,)."""
    seed: float
    """Of the mean over all windows, between seeds."""
    rest: Floats
    """What is left of the losses of each run, (seeds, windows)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--studies", type=int, default=1000)
    options = parser.parse_args()
    found = deviations(next(variants_of(options.study)))
    rest = float(found.rest.std())
    print(f"between seeds {found.seed:.4f}; between seeds, window by window {rest:.4f}; {len(found.hard):,} windows")
    print("recipes  seeds  effect  share of studies that see a difference")
    for variants, seeds, effect in plans(found.seed):
        rng = np.random.default_rng(0)
        studies = (simulate(found, rng, variants=variants, seeds=seeds, effect=effect) for _ in range(options.studies))
        seen = sum(any(result.is_seen for result in compare_variants(study, 0.01)) for study in studies)
        error = math.sqrt(seen / options.studies * (1 - seen / options.studies) / options.studies)
        print(f"{variants:7}  {seeds:5}  {effect:6.3f}  {seen / options.studies:6.1%} +- {error:.1%}")


def plans(deviation: float) -> Iterator[tuple[int, int, float]]:
    """Recipes, seeds, and by how much the first recipe is better."""
    for variants in (2, 4, 6):
        for seeds in (2, 3, 5, 10):
            yield variants, seeds, 0.0
    for effect in (0.5, 1, 2, 3):
        for seeds in (3, 5, 10):
            yield 2, seeds, effect * deviation


def variants_of(study: Path) -> Iterator[VariantResult]:
    """The recipes of a study with their complete runs."""
    document = json.loads((study / "study.json").read_text())
    for recipe in document["recipes"]:
        paths = {int(seed): study / path for seed, path in recipe["runs"].items()}
        yield read_variant(recipe["name"], study, {s: path for s, path in paths.items() if is_finished(path)}, {})


def deviations(variant: VariantResult) -> Deviations:
    evaluations = [run.evaluation for run in variant.runs.values()]
    windows = evaluations[0].windows
    losses_SN = np.stack([evaluation.losses / windows.tokens for evaluation in evaluations])
    own_S = np.array([evaluation.loss.mean for evaluation in evaluations])
    rest_SN = losses_SN - own_S[:, None] - (losses_SN.mean(0) - own_S.mean())
    # The mean over the seeds takes a part of what is between them.
    rest_SN *= math.sqrt(len(evaluations) / (len(evaluations) - 1))
    return Deviations(windows, losses_SN.mean(0), float(own_S.std(ddof=1)), rest_SN)


def simulate(
    found: Deviations, rng: np.random.Generator, *, variants: int, seeds: int, effect: float
) -> list[VariantResult]:
    """A study whose recipes differ by chance alone, but for the first, which is better by `effect`.

    What windows have beside the mean is that of a real run, in stretches that keep neighbours together, with random
    signs: so neighbours are correlated as they are.
    """

    def run(effect: float) -> RunResult:
        rest_N = (
            found.rest[rng.integers(len(found.rest))]
            * np.repeat(rng.choice([-1.0, 1.0], len(found.hard) // STRETCH + 1), STRETCH)[: len(found.hard)]
        )
        losses_N = (found.hard + rest_N + rng.normal(0, found.seed) - effect) * found.windows.tokens
        return RunResult(Evaluation(1, found.windows, losses_N.astype(np.float32)), ((1, 0.0),), "")

    return [
        VariantResult(f"r{number}", {seed: run(effect * (number == 0)) for seed in range(seeds)}, {}, "same")
        for number in range(variants)
    ]


STRETCH = 50
"""Windows that keep their order."""


if __name__ == "__main__":
    main()
