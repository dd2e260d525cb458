"""Pictures of runs."""

import errno
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from mygpt import disk
from mygpt.errors import MygptError
from mygpt.reports.plot import COLORS, plot
from mygpt.runs.records import read_records
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


def texts(picture: Path) -> str:
    """An SVG's source, in which text is drawn as shapes, each under a comment that holds it."""
    return picture.read_text()


def test_picture_shows_every_run(runs, tmp_path):
    """Both runs in the legend, what their lines are, names escaped; the same bytes every time."""
    pictures = [tmp_path / name for name in ("a.svg", "b.svg")]
    for picture in pictures:
        plot(runs, picture)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    svg = texts(pictures[0])
    ElementTree.fromstring(svg)
    assert "<!-- plain -->" in svg
    assert "$co_{ -->" in svg
    assert "<watched>" not in svg
    assert "held-out, 95% interval" in svg
    assert "deviation of seeds" not in svg
    assert "held-out" not in texts_of_labels(plot(runs[:1]))


def texts_of_labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_loss_can_be_drawn_in_other_units(runs, tmp_path):
    """In bits per byte only runs with evaluations, since training batches are not counted in bytes."""
    plot(runs, tmp_path / "perplexity.svg", "perplexity")
    assert "<!-- perplexity -->" in texts(tmp_path / "perplexity.svg")
    warnings = []
    figure = plot(runs, None, "bits-per-byte", warn=warnings.append)
    assert figure.axes[0].get_ylabel() == "loss (bits per byte)"
    assert texts_of_labels(figure) == ["_<watched> & $co_{", "held-out, 95% interval"]
    assert len(warnings) == 1
    assert re.search(r"plain: has no held-out loss in bits-per-byte, .*; left out", warnings[0])
    with pytest.raises(MygptError, match="has no held-out loss in bits-per-byte"):
        plot(runs[:1], None, "bits-per-byte", warn=warnings.append)


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
    runs = [
        train(tiny(steps=1, lr=lr, output=str(tmp_path / folder / "run"))) for folder, lr in (("a", 1.0), ("b", 2.0))
    ]
    assert texts_of_labels(plot(runs))[:2] == list(map(str, runs))


def test_seeds_are_drawn_as_mean_and_band(tiny, tmp_path):
    """Runs that differ by their seeds alone are one curve; a folder stands for the runs in it."""
    keys = {"val_split": 0.2, "val_every": 3, "sampling": "full"}
    runs = {}
    for lr in (1e-2, 3e-2):
        for seed in (1, 2, 3):
            output = tmp_path / "study" / f"lr={lr}" / f"seed-{seed}"
            runs[lr, seed] = train(tiny(**keys, lr=lr, init_seed=seed, data_seed=seed, output=str(output)))
    figure = plot([tmp_path / "study"])
    assert texts_of_labels(figure)[:2] == ["lr=0.01 (3 seeds)", "lr=0.03 (3 seeds)"]
    assert "deviation of seeds" in texts_of_labels(figure)
    training, held_out, *_ = figure.axes[0].get_lines()
    records = [read_records(runs[1e-2, seed]) for seed in (1, 2, 3)]
    assert training.get_ydata().tolist() == pytest.approx(
        [sum(r.loss for r in step) / 3 for step in zip(*records, strict=True)]
    )
    assert held_out.get_xdata().tolist() == [3, 6]
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    losses = [record[-1].loss for record in records]
    for edge in (
        statistics.mean(losses) - statistics.stdev(losses),
        statistics.mean(losses) + statistics.stdev(losses),
    ):
        assert min(abs(band - edge)) < 1e-5
    apart = plot([tmp_path / "study"], merge_seeds=False)
    assert len(texts_of_labels(apart)) == 6 + 2


def test_copy_of_a_run_is_no_other_seed(tiny, tmp_path):
    """One run of each recipe and seed counts, the longest; a note names the others, which can be drawn apart."""
    for seed in (1, 2, 3):
        train(tiny(init_seed=seed, output=str(tmp_path / "seeds" / f"{seed}")))
    alone, copies = plot([tmp_path / "seeds"]), tmp_path / "copies"
    shutil.copytree(tmp_path / "seeds" / "2", copies / "2")
    train(tiny(init_seed=1, output=str(copies / "1")), last_step=3)
    warnings = []
    figure = plot([copies, tmp_path / "seeds"], warn=warnings.append)
    assert "other seeds (3 seeds)" in texts_of_labels(figure)[0]
    for line, other in zip(figure.axes[0].get_lines(), alone.axes[0].get_lines(), strict=True):
        assert line.get_ydata().tolist() == pytest.approx(other.get_ydata().tolist())
    assert warnings == [
        f"recipe and seeds are the same: left out {copies}/1 of {tmp_path}/seeds/1, {tmp_path}/seeds/2 of "
        f"{copies}/2; --no-merge-seeds draws each run"
    ]
    assert len(texts_of_labels(plot([copies, tmp_path / "seeds"], merge_seeds=False))) == 5 + 1
    for name in ("4", "5", "6"):
        shutil.copytree(copies / "2", copies / name)
    plot([copies], warn=warnings.append)
    assert f"left out {copies}/4, {copies}/5 and {copies}/6 of {copies}/2;" in warnings[1]


def test_mean_over_seeds_ends_where_the_first_ends(tiny, tmp_path):
    """Beyond that it would be over fewer; it is said."""
    warnings = []
    for seed, steps in ((1, 6), (2, 6)):
        train(
            tiny(steps=steps, init_seed=seed, output=str(tmp_path / "seeds" / str(seed))),
            last_step=3 if seed == 1 else 6,
        )
    figure = plot([tmp_path / "seeds"], warn=warnings.append)
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [1, 2, 3]
    assert warnings[0].startswith(f"{tmp_path}/seeds/1 ends with step 3, and so does the mean over its seeds")


def test_axes_are_as_asked_for(tiny, tmp_path):
    """Tokens or minutes, a logarithmic scale, its ends, averages of training losses, the gradient's norm."""
    run = train(tiny(steps=12, log_every=2))
    records = read_records(run)
    figure = plot([run], x="tokens", y_min=1.0, y_max=50.0, log=True, smooth=4, grad_norm=True)
    loss_axes, norm_axes, rate_axes = figure.axes
    assert (loss_axes.get_ylim(), loss_axes.get_yscale(), rate_axes.get_xlabel()) == ((1.0, 50.0), "log", "tokens")
    raw, smooth = loss_axes.get_lines()
    assert raw.get_xdata().tolist() == [record.tokens for record in records]
    by_step = {record.step: record.loss for record in records}
    first = {step: max(step - 4, step * 3 // 4) for step in by_step}
    means = [statistics.mean(loss for at, loss in by_step.items() if first[step] < at <= step) for step in by_step]
    assert smooth.get_ydata().tolist() == pytest.approx(means)
    assert norm_axes.get_lines()[0].get_ydata().tolist() == [record.grad_norm for record in records]
    minutes = plot([run], x="minutes").axes[0].get_lines()[0].get_xdata()
    lines = (run / "timing.jsonl").read_text().splitlines()
    assert minutes.tolist() == [json.loads(line)["elapsed_seconds"] / 60 for line in lines]


def test_frame_is_that_of_the_runs_that_matter(tiny, tmp_path):
    """Neither a fresh model's loss nor a run that diverges sets the range; what is outside is named."""
    records = [{"step": step, "loss": 3 + 40 / step, "lr": 1e-3, "tokens": step} for step in range(1, 101)]
    for name, factor in (("a", 1.0), ("b", 1.1), ("c", 100.0)):
        (tmp_path / name).mkdir()
        lines = [json.dumps(record | {"loss": record["loss"] * factor}) for record in records]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    warnings = []
    bottom, top = plot([tmp_path], warn=warnings.append).axes[0].get_ylim()
    assert 2 < bottom < 3.4
    assert 5 < top < 15
    assert len(warnings) == 1
    assert warnings[0].startswith("c: its losses are above the picture, from 340 on")


def test_short_run_is_drawn_over_what_follows_its_first_losses(tmp_path):
    """A fresh model's losses set neither the frame, nor the averages of later steps."""
    losses = {step: 2.5 + 38 * math.exp(-step / 12) for step in range(10, 151, 10)}
    run = write_records(tmp_path / "run", {1: 40.0, **losses}, val=3.0)
    assert plot([run]).axes[0].get_ylim()[1] < 5
    _, smooth = plot([run], smooth=100).axes[0].get_lines()[:2]
    assert smooth.get_ydata()[-1] < 2.6
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    vals = [30.0, 8.0, 3.0, *(3.0 + 0.1 * number for number in range(13))]
    lines = [json.dumps(record | {"val": val}) for record, val in zip(records, vals, strict=True)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert vals[-1] < plot([run]).axes[0].get_ylim()[1] < 12


def test_twenty_colours_are_distinct():
    """As far apart, in CIELAB, as two that nobody confuses: a just noticeable difference is 2.3."""
    import numpy as np
    from matplotlib.colors import to_rgb

    rgb = np.array([to_rgb(color) for color in COLORS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    x, y, z = np.cbrt(linear @ to_xyz.T / to_xyz.sum(1)).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    assert len(lab) == 20
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2)) > 20


def test_missing_run_does_not_keep_others_from_being_drawn(runs, tmp_path, call):
    """It is named, on stderr, and the picture is made."""
    (tmp_path / "empty").mkdir()
    code, out, err = call(
        "plot", runs[0], tmp_path / "nothing", tmp_path / "empty", runs[0] / "latest", "--out", tmp_path / "a.png"
    )
    assert (code, out) == (0, "")
    assert err.splitlines() == [
        f"{tmp_path}/nothing: no such run; left out",
        f"{tmp_path}/empty: no run in it; left out",
        f"{runs[0]}/latest: not a run, but in one; expected the run, {runs[0]}; left out",
        f"wrote {tmp_path}/a.png",
    ]
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_figure_is_shown_by_a_notebook(runs):
    """It brings its picture along, without pyplot."""
    assert plot(runs)._repr_png_()[:4] == b"\x89PNG"


@pytest.mark.fault(110)
def test_settings_of_the_user_change_no_picture(command, tmp_path):
    """A backend, fonts and a LaTeX that are not there: the bytes are those that are drawn without these settings."""
    write_records(tmp_path / "run", {1: 3.0, 2: 2.0})
    (tmp_path / "rc").write_text("text.usetex: True\nfont.family: NoSuchFont\nfigure.dpi: 50\nsvg.fonttype: none\n")
    (tmp_path / "binary").write_bytes(b"\xff")
    for ending in ("png", "svg", "pdf"):
        assert command("plot", "run", "--out", f"plain.{ending}").returncode == 0
        for settings in ({"MPLBACKEND": "module://nonsense"}, {"MPLBACKEND": "x"}, {"MATPLOTLIBRC": "rc"}):
            done = command("plot", "run", "--out", f"other.{ending}", **settings)
            assert (done.returncode, done.stderr) == (0, f"wrote other.{ending}\n")
            assert (tmp_path / f"other.{ending}").read_bytes() == (tmp_path / f"plain.{ending}").read_bytes()
    done = command("plot", "run", "--out", "other.png", MATPLOTLIBRC="binary")
    assert done.returncode == 2
    assert re.match("mygpt: a picture needs matplotlib, which cannot be imported: .*", done.stderr.splitlines()[-1])


def write_records(run: Path, losses, **more) -> Path:
    """A directory with the records of a run alone, by their losses."""
    run.mkdir(parents=True)
    records = [{"step": step, "loss": loss, "lr": 1e-3, "tokens": step, **more} for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_backend_of_a_notebook_stays(tmp_path):
    """What the user imports afterwards has the backend that the environment names."""
    run = write_records(tmp_path / "run", {1: 3.0})
    lines = f"import mygpt; mygpt.plot({str(run)!r}); import matplotlib; print(matplotlib.get_backend())"
    environment = os.environ | {"MPLBACKEND": "svg"}
    done = subprocess.run([sys.executable, "-c", lines], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "svg\n"


def test_names_are_drawn_as_they_are(tmp_path):
    """No formula is made of a name; what the font lacks is escaped, and a long name does not squeeze the axes."""
    names = ["a$b$c", "x_{", "\u540d", "a\nb\x1b", os.fsdecode(b"\xff"), "<--x>", "l" * 150]
    runs = [write_records(tmp_path / name, {1: 3.0, 2: 2.0}) for name in names]
    figure = plot(runs, tmp_path / "a.svg")
    ElementTree.fromstring((tmp_path / "a.svg").read_text())
    shown = ["a$b$c", "x_{", r"\u540d", r"a\nb\x1b", r"\udcff", "<--x>", "l" * 150]
    assert texts_of_labels(figure)[:-1] == shown
    assert figure.axes[0].get_position().width * figure.get_figwidth() > 4


@pytest.mark.fault(111)
def test_only_a_picture_of_mygpt_is_overwritten(tmp_path, call, monkeypatch):
    """Another file of the same name is refused before anything is read; a write that fails leaves the old picture."""
    run = write_records(tmp_path / "run", {1: 3.0, 2: 2.0})
    for ending in ("png", "svg", "pdf"):
        out = tmp_path / f"a.{ending}"
        plot([run], out)
        assert call("plot", run, "--out", out) == (0, "", f"wrote {out}\n")
        out.write_bytes(b"mine")
        code, _, err = call("plot", tmp_path / "nothing", "--out", out)
        assert (code, err) == (
            2,
            f"mygpt: {out}: exists, and has no mark of mygpt; choose another name, or remove it\n",
        )
        assert out.read_bytes() == b"mine"
        out.unlink()
    plot([run], out := tmp_path / "a.png")
    before = out.read_bytes()
    monkeypatch.setattr(disk, "sync", lambda _: fail_with(errno.ENOSPC))
    with pytest.raises(MygptError, match=r"a\.png: cannot be written: No space left on device") as full:
        plot([run, write_records(tmp_path / "other", {1: 4.0})], out)
    assert full.value.exit_code == 1
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "other", "run"]


def fail_with(number: int):
    raise OSError(number, os.strerror(number))


def test_mistakes_are_named(runs, tmp_path, call):
    """No records, an unknown ending, a missing folder, ends in the wrong order."""
    with pytest.raises(MygptError, match=r"nothing: no such run$"):
        plot([tmp_path / "nothing"])
    with pytest.raises(MygptError, match=r"got the ending '\.bmp'"):
        plot(runs, tmp_path / "a.bmp")
    with pytest.raises(MygptError, match="cannot be written"):
        plot(runs, Path(tmp_path / "nowhere" / "a.png"))
    for flags, message in (
        (
            ("--y-min", 3, "--y-max", 2),
            "y_min: got 3, expected less than y_max = 2",
        ),
        (("--y-max", -1), r"y_max: got -1, expected more than .*, where the picture begins"),
        (("--y-min", 1e9), r"y_min: got 1e\+09, expected less than .*, where the picture ends"),
        (("--y-min", 0, "--log"), "y_min: got 0.0, expected a number above 0 on a logarithmic scale"),
        (("--smooth", -1), "smooth: got -1, expected 0 or more steps"),
    ):
        code, out, err = call("plot", runs[0], *flags, "--out", tmp_path / "a.png")
        assert (code, out) == (2, "")
        assert re.fullmatch(f"mygpt: {message}\n", err)
    for keys, message in (
        ({"unit": "x"}, "unit: got 'x', expected one of nats-per-token, bits-per-byte, perplexity"),
        ({"x": "time"}, "x: got 'time', expected one of step, tokens, minutes"),
    ):
        with pytest.raises(MygptError, match=f"^{message}$"):
            plot(runs, **keys)
    with pytest.raises(MygptError, match="expected at least one run"):
        plot([])
    assert not (tmp_path / "a.png").exists()
