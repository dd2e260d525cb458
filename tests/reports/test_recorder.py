"""Printed lines and records."""

import re
import time

import pytest

from mygpt.errors import CheckpointError
from mygpt.recipe.tables import Recipe
from mygpt.reports import recorder
from mygpt.reports.recorder import Recorder, due, header_lines, step_line
from mygpt.runs.records import Record, Timing, read_records


def record(**values):
    return Record(**{"step": 500, "loss": 2.43928, "lr": 8.95e-4, "tokens": 1} | values)


def test_header_has_the_published_form():
    """Aligned labels, thousands separated."""
    recipe = Recipe.of(schedule="cosine", warmup=100, max_grad_norm=1.0)
    sizes = {"corpus": 1_115_394, "train": 1_003_854, "val": 111_540}
    lines = header_lines(recipe, device="cpu", sizes=sizes, tokenizer="char", vocab_size=65, params=207_296)
    assert list(lines) == [
        "device:       cpu",
        "precision:    fp32",
        "corpus chars: 1,115,394",
        "train chars:  1,003,854",
        "val chars:    111,540",
        "vocab_size:   65",
        "params:       207,296",
        "steps:        2000",
        "schedule:     cosine (warmup=100)",
        "max_grad_norm:1.0",
    ]


def test_header_counts_tokens_where_they_are_no_characters():
    """The published form is that of characters."""
    lines = header_lines(Recipe(), device="cpu", sizes={"corpus": 10}, tokenizer="byte", vocab_size=256, params=1)
    assert list(lines)[2:4] == ["corpus tokens: 10", "vocab_size:    256"]


@pytest.mark.parametrize(
    ("keys", "values", "line"),
    [
        ({}, {}, "step   500: loss = 2.4393"),
        ({"schedule": "cosine"}, {"step": 1}, "step     1: loss = 2.4393  lr = 8.95e-04"),
        ({"warmup": 9}, {}, "step   500: loss = 2.4393"),
        (
            {"schedule": "linear"},
            {"val": 2.47441, "val_stderr": 0.1},
            "step   500: loss = 2.4393  val = 2.4744  lr = 8.95e-04",
        ),
        (
            {"log_val_stderr": True, "log_grad_norm": True},
            {"val": 2.47441, "val_stderr": 0.01234, "grad_norm": 0.5},
            "step   500: loss = 2.4393  val = 2.4744 +- 0.0123  grad_norm = 0.5000",
        ),
        (
            {"log_bits_per_byte": True, "log_perplexity": True},
            {"val": 2.47441, "val_bits_per_byte": 3.56982, "val_bits_per_byte_stderr": 0.1, "val_perplexity": 11.8746},
            "step   500: loss = 2.4393  val = 2.4744  bits_per_byte = 3.5698  perplexity = 11.87",
        ),
        (
            {"log_bits_per_byte": True, "log_val_stderr": True},
            {"val": 2.47441, "val_stderr": 0.2, "val_bits_per_byte": 3.56982, "val_bits_per_byte_stderr": 0.1},
            "step   500: loss = 2.4393  val = 2.4744 +- 0.2000  bits_per_byte = 3.5698 +- 0.1000",
        ),
    ],
)
def test_step_lines_show_what_applies(keys, values, line):
    """val only after an evaluation, lr only with a schedule other than constant, the rest where it was asked for."""
    assert step_line(record(**values), Recipe.of(**keys)) == line


def test_due_counts_from_one_and_includes_the_last():
    """Every third of eight steps is 3, 6 and the last; 0 is never."""
    assert [step for step in range(1, 9) if due(step, 3, 8)] == [3, 6, 8]
    assert not any(due(step, 0, 8) for step in range(1, 9))


def test_only_the_main_process_reports(tmp_path, capsys):
    """Other processes print nothing and write nothing."""
    for is_main in (False, True):
        with Recorder(Recipe.of(steps=2), tmp_path, is_main=is_main) as reporter:
            reporter.record(1, printed=True, loss=1.0, lr=0.1)
            reporter.record(2, printed=False, loss=1.0, lr=0.1)
        assert capsys.readouterr().out == ("step     1: loss = 1.0000\n" if is_main else "")
        assert (tmp_path / "metrics.jsonl").exists() is is_main
    assert [r.step for r in read_records(tmp_path)] == [1, 2]


def test_timing_says_how_fast_and_how_long(tmp_path):
    """The share of the peak, and the time left at the pace of this process, which began after step 10."""
    with Recorder(Recipe.of(steps=20, batch_size=2), tmp_path, step=10, peak_tokens_per_second=1e4) as reporter:
        time.sleep(0.05)
        reporter.record(15, printed=False, loss=1.0, lr=0.1)
        time.sleep(0.05)
        reporter.record(20, printed=False, loss=1.0, lr=0.1)
    halfway, last = (Timing.model_validate_json(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines())
    assert halfway.seconds_left == pytest.approx(halfway.elapsed_seconds, abs=0.06)
    assert last.seconds_left == 0
    assert halfway.mfu == pytest.approx(halfway.tokens_per_second / 1e4, abs=1e-4)
    assert halfway.mfu > 0.01


def test_progress_is_printed_without_a_terminal(tmp_path, capsys, monkeypatch):
    """Also while a step takes long; a complete run, other processes, and a terminal get no such line."""
    monkeypatch.setattr(recorder, "PROGRESS_SECONDS", 0.05)
    with Recorder(Recipe.of(steps=1_200, batch_size=2), tmp_path, step=1_000) as reporter:
        time.sleep(0.07)
        for _ in range(100):
            reporter.step_done()
        time.sleep(0.1)
    first, *_, last = capsys.readouterr().err.splitlines()[1:]
    assert first == "at step 1,000 of 1,200: 0 tokens/s"
    assert re.fullmatch(r"at step 1,100 of 1,200: [\d,]+ tokens/s, 00:00 left", last)
    for keys in ({"is_finished": True}, {"is_main": False}):
        with Recorder(Recipe.of(steps=3), tmp_path, **keys):
            time.sleep(0.1)
        assert "at step" not in capsys.readouterr().err


def test_missing_and_damaged_records_are_refused(tmp_path):
    """The message names the run, or the line."""
    with pytest.raises(CheckpointError, match="expected a run directory"):
        read_records(tmp_path)
    for line in ('{"step": 1}', "[" * 100_000, '{"step": 1, "loss": NaN, "lr": 1}', "\udc80"):
        (tmp_path / "metrics.jsonl").write_text(line + "\n", errors="surrogateescape")
        with pytest.raises(CheckpointError, match="line 1 is no record"):
            read_records(tmp_path)


def test_unfinished_last_line_is_left_out(tmp_path):
    """The records of a killed run can be read."""
    with Recorder(Recipe.of(steps=2), tmp_path, is_main=True) as reporter:
        reporter.record(1, printed=False, loss=1.0, lr=0.1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [r.step for r in read_records(tmp_path)] == [1]
