"""Pictures of runs."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from mygpt.errors import CheckpointError, MygptError
from mygpt.reports.plot import plot
from mygpt.training.train import train

pytest.importorskip("matplotlib", reason="needs the report extra")


@pytest.fixture
def runs(tiny, tmp_path):
    return [
        train(tiny(output=str(tmp_path / "plain"))),
        train(
            tiny(output=str(tmp_path / "_<watched> & $co_{"), val_split=0.2, val_every=2, schedule="cosine", warmup=2)
        ),
    ]


def test_picture_shows_every_run(runs, tmp_path):
    """Both runs in the legend, the held-out loss where there is one, names escaped; the same bytes every time."""
    pictures = [tmp_path / name for name in ("a.svg", "b.svg")]
    for picture in pictures:
        plot(runs, picture)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    svg = pictures[0].read_text()
    ElementTree.fromstring(svg)
    # Text is drawn as shapes, each under a comment that holds it.
    assert "plain: training" in svg
    assert "plain: held-out" not in svg
    assert "$co_{: held-out" in svg
    assert "<watched>" not in svg


def test_loss_can_be_drawn_in_other_units(runs, tmp_path):
    """In bits per byte only runs with evaluations, since training batches are not counted in bytes."""
    plot(runs, tmp_path / "perplexity.svg", "perplexity")
    assert "plain: training" in (tmp_path / "perplexity.svg").read_text()
    plot(runs[1:], tmp_path / "bits.svg", "bits-per-byte")
    svg = (tmp_path / "bits.svg").read_text()
    assert "loss (bits per byte)" in svg
    assert ": held-out" in svg
    assert ": training" not in svg
    with pytest.raises(MygptError, match="plain: has no held-out loss in bits-per-byte; expected a run with val_every"):
        plot(runs, tmp_path / "bits.svg", "bits-per-byte")


@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_ending_chooses_the_format(runs, tmp_path, ending):
    """PNG and PDF as well as SVG, the same bytes every time."""
    pictures = [tmp_path / f"{name}.{ending}" for name in "ab"]
    for picture in pictures:
        plot(runs, picture)
    assert pictures[0].read_bytes()[:4] in (b"\x89PNG", b"%PDF")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_short_runs_and_runs_of_one_name_can_be_drawn(tiny, tmp_path):
    """A run of a single record; two runs with the same name in different folders."""
    runs = [train(tiny(steps=1, output=str(tmp_path / folder / "run"))) for folder in "ab"]
    plot(runs, tmp_path / "loss.svg")
    assert all(f"{run}: training" in (tmp_path / "loss.svg").read_text() for run in runs)


def test_mistakes_are_named(runs, tmp_path):
    """No records, an unknown ending, a missing folder."""
    with pytest.raises(CheckpointError, match="expected a run directory"):
        plot([tmp_path], tmp_path / "a.png")
    with pytest.raises(MygptError, match=r"got the ending '\.bmp'"):
        plot(runs, tmp_path / "a.bmp")
    with pytest.raises(MygptError, match="cannot be written"):
        plot(runs, Path(tmp_path / "nowhere" / "a.png"))
