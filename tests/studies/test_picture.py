"""The picture of a study."""

import numpy as np
import pytest
from support.runs import evaluation_of

from mygpt.reports.plot import COLORS
from mygpt.studies.analysis import RunResult, VariantResult, compare_variants
from mygpt.studies.picture import draw
from mygpt.studies.results import Study

pytest.importorskip("matplotlib", reason="needs the report extra")


def study_of(losses, folder) -> Study:
    """A study of recipes with these losses by name, on the same windows."""
    noise = np.random.default_rng(0).standard_normal(40) / 9

    def run(loss):
        evaluation = evaluation_of(loss + noise, step=400)
        mean = evaluation.loss.mean
        return RunResult(evaluation, ((100, mean + 30), (200, mean + 0.5), (300, mean + 0.1), (400, mean)), "")

    variants = [
        VariantResult(name, {seed: run(loss) for seed, loss in enumerate(of_seeds, 1)}, {}, "same")
        for name, of_seeds in losses.items()
    ]
    return Study(variants, compare_variants(variants, 0.01), 0.01, folder / "study.json")


def test_picture_shows_runs_means_and_paired_differences(tmp_path):
    """The best recipe is on top, and the others have their difference from it; nothing is beyond the picture's edge."""
    long = "a-recipe-with-a-long-name,schedule=cosine,$lr_{=0.001"
    study = study_of({long: [2.3, 2.4, 2.36], "best": [2.2, 2.3, 2.25], "alone": [2.5]}, tmp_path)
    figure = draw(study, tmp_path / "a.png")
    curves, ends, differences = figure.axes
    assert [label.get_text() for label in ends.get_yticklabels()] == ["best", long, "alone"]
    assert curves.get_ylim()[1] < 5  # the first evaluation is of a fresh model
    drawn = [line for line in differences.get_lines() if line.get_marker() == "D"]
    change = study.comparisons[0].change
    assert [(line.get_color(), line.get_ydata()[0]) for line in drawn] == [(COLORS[1], 1)]
    assert drawn[0].get_xdata()[0] == pytest.approx(-change.mean)
    assert -change.mean == pytest.approx(0.1033, abs=1e-3)
    interval = differences.collections[0].get_segments()[0][:, 0]
    assert interval == pytest.approx([-change.mean - change.margin, -change.mean + change.margin])
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= figure.get_figwidth()
    assert box.y1 <= figure.get_figheight()


def test_study_of_one_recipe_or_of_none_that_is_complete_is_drawn(tmp_path):
    """Without differences; and without anything, if all runs have failed."""
    for losses, axes in (({"one": [2.2, 2.3]}, 2), ({"failed": []}, 2), ({}, 2)):
        assert len(draw(study_of(losses, tmp_path), tmp_path / "a.svg").axes) == axes
