"""Whether a run's losses are normal: beside those of other seeds, and by its own history."""

import math
from collections.abc import Iterator
from pathlib import Path

from mygpt.data.build import tokenizer_from
from mygpt.recipe.files import METRICS_FILE
from mygpt.reports.outcome import early_end_line, outcome_lines, place_lines, verdict_line
from mygpt.runs.files import FAILED_NAME, MODEL_FILE, TIMING_FILE
from mygpt.runs.held_out import Evaluation, read_evaluations
from mygpt.runs.records import Timing, read_until
from mygpt.runs.run import RunDirectory
from mygpt.runs.schemas import ModelMetadata
from mygpt.runs.steps import read_manifest, read_metadata


def check(path: Path) -> Iterator[tuple[str, bool]]:
    """Lines on a run, complete or not, and of each whether it is as it should be.

    Raises:
        CheckpointError: there is no run, or it has no record yet.
        DamagedCheckpointError: it cannot be read.
    """
    run = RunDirectory(path)
    recipe = run.recipe
    failures = sorted(entry.name for entry in path.iterdir() if FAILED_NAME.fullmatch(entry.name))
    for failed in failures:
        yield f"{failed}: a loss or a gradient was not finite; `mygpt replay {path}` looks into it", False
    records, checkpoint = [] if failures and not has_records(path) else run.records, run.newest_checkpoint()
    if not records:
        return
    last, ended_by = records[-1], None
    evaluations: list[Evaluation] = []
    end = f"step {last.step} of {recipe.train.steps}, not complete"
    if checkpoint is not None:
        manifest = read_manifest(checkpoint)
        evaluations = read_evaluations(path, manifest.step)
        ended_by = manifest.ended_by
        if ended_by:
            end = f"complete after {manifest.step} steps"
            if last.step < manifest.step:  # records were lost
                end += f", of which the records after step {last.step} are missing"
            if evaluations and ended_by == "patience":
                end = early_end_line(evaluations, recipe.validation.patience, run.best_until(manifest.step))
    yield f"run: {end}", True
    kind, loss = ("training", last.loss) if last.val is None else ("held-out", last.val)
    guess = ""
    if checkpoint is not None:
        vocab_size = tokenizer_from(read_metadata(checkpoint / MODEL_FILE, ModelMetadata).tokenizer).vocab_size
        guess = f"; guessing at random among {vocab_size:,} tokens gives {math.log(vocab_size):.4f}"
    yield f"loss: {kind} {loss:.4f} at step {last.step}{guess}", True
    if not evaluations and recipe.validation.val_every:
        yield "verdict: none, because no checkpoint has a held-out loss yet", True
    else:
        yield verdict_line(evaluations, records, recipe.data, ended_by=ended_by), True
    judged = list(place_lines(recipe.expected, records, run.info.corpus_sha256))
    timings = read_until(path / TIMING_FILE, Timing, last.step)
    if ended_by and timings:
        judged += [
            (line, True)
            for line in outcome_lines(recipe.expected, last, timings[-1], run.info.stretches[-1].environment.processes)
        ]
    yield from judged
    if not judged:
        yield "expected: the recipe has no expected losses; `mygpt study` measures those of other seeds", True


def has_records(path: Path) -> bool:
    """Whether a step of the run has been recorded."""
    file = path / METRICS_FILE
    return file.is_file() and file.stat().st_size > 0
