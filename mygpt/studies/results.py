"""The results of a study: read from its run directories, shown as a table, and written as JSON."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.errors import CheckpointError, DamagedCheckpointError
from mygpt.runs.files import FAILED_NAME, MODEL_FILE, TEMPORARY_NAME, read_bytes
from mygpt.runs.held_out import read_evaluations
from mygpt.runs.run import RunDirectory
from mygpt.runs.schemas import ModelMetadata
from mygpt.runs.steps import read_manifest, read_metadata, saved_reasons, step_directory, superseded
from mygpt.studies.analysis import ComparisonResult, RunResult, VariantResult, compare_variants, mean_curve, unit_of
from mygpt.studies.grid import STUDY_FILE

FORMAT = 1


class Study(NamedTuple):
    """A study whose runs are all over."""

    variants: list[VariantResult]
    comparisons: list[ComparisonResult]
    effect: float
    file: Path
    """study.json, which holds all results."""


def read_study(folder: Path, effect: float) -> Study:
    """The results of the study in a folder, read from its runs again.

    Raises:
        CheckpointError: it is not complete, or study.json or a run cannot be read.
    """
    file = folder / STUDY_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder}: a study that is not complete; the command that began it continues it")
    try:
        found = [
            (variant["name"], {int(seed): folder / path for seed, path in variant["runs"].items()}, variant["failures"])
            for variant in json.loads(read_bytes(file))["recipes"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file}: damaged; the command that made the study writes it again") from None
    variants = [read_variant(name, folder, runs, failures) for name, runs, failures in found]
    return Study(variants, compare_variants(variants, effect), effect, file)


def is_finished(path: Path) -> bool:
    """Whether a run is there and has ended."""
    run = RunDirectory(path)
    try:
        return bool(run.info) and run.is_finished
    except CheckpointError:
        return False


@contextmanager
def explain_damage(run: Path) -> Iterator[None]:
    """Raise DamagedCheckpointError, with the way to train the run again, if it cannot be read."""
    try:
        yield
    except CheckpointError as error:
        message = f"{error}; remove {run}, and the same command trains it again"
        raise DamagedCheckpointError(message) from None


def has_failed(path: Path) -> bool:
    """Whether a step of the run was not finite: training it again would fail again."""
    return path.is_dir() and any(FAILED_NAME.fullmatch(entry.name) for entry in path.iterdir())


def is_settled(path: Path) -> bool:
    """Whether a complete run has pointed to and pruned its last checkpoints; if not, continuing it does that."""
    run = RunDirectory(path)
    try:
        newest = run.newest_checkpoint()
        assert newest is not None
        step = read_manifest(newest).step
        best = run.best_until(step) if run.recipe.keeps_best else None
        is_pointed_to = (run.latest, run.best) == (newest, step_directory(path, best.step) if best else None)
    except CheckpointError:
        return False
    unneeded = superseded(saved_reasons(path), run.recipe.checkpoint.keep_last, step, best.step if best else None)
    return is_pointed_to and not unneeded and not any(TEMPORARY_NAME.fullmatch(name) for name in os.listdir(path))


def read_variant(name: str, folder: Path, paths: Mapping[int, Path], failures: Mapping[int, str]) -> VariantResult:
    """The results of the complete runs at `paths`, by seed; `folder` is that of the study.

    Raises:
        DamagedCheckpointError: one cannot be read.
    """
    runs, tokenizer = {}, ""
    for seed, path in paths.items():
        with explain_damage(path):
            checkpoint = RunDirectory(path).newest_checkpoint()
            evaluations = read_evaluations(path, read_manifest(checkpoint).step) if checkpoint else []
            if checkpoint is None or not evaluations:
                raise CheckpointError(f"{path}: has no held-out loss at its end")
            tokenizer = json.dumps(read_metadata(checkpoint / MODEL_FILE, ModelMetadata).model_dump()["tokenizer"])
            curve = tuple((record.step, record.val) for record in RunDirectory(path).records if record.val is not None)
            runs[seed] = RunResult(evaluations[-1], curve, str(path.relative_to(folder)))
    return VariantResult(name, runs, dict(failures), tokenizer)


def table_lines(variants: Sequence[VariantResult]) -> Iterator[str]:
    """The recipes, best first, as aligned lines under a heading."""
    unit = unit_of(variants)
    rows = [("recipe", "seeds", "loss", "deviation", "95% interval")]
    complete = [variant for variant in variants if variant.runs]
    for variant in sorted(complete, key=lambda variant: variant.mean(unit).mean):
        mean, spread = variant.mean(unit), variant.spread(unit)
        interval = "" if spread is None else "{:.4f} to {:.4f}".format(*mean.interval)
        failed = f" ({len(variant.failures)} failed)" if variant.failures else ""
        shown = "" if spread is None else f"{spread:.4f}"
        rows.append((variant.name, f"{len(variant.runs)}{failed}", f"{mean.mean:.4f}", shown, interval))
    rows += [
        (variant.name, f"0 ({len(variant.failures)} failed)", "", "", "") for variant in variants if not variant.runs
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        yield "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()
    populations = {run.evaluation.windows.population for variant in complete for run in variant.runs.values()}
    on = " and ".join(sorted(populations))
    yield f"(held-out loss at the last step, {unit}; deviation between seeds; interval of the mean over all seeds)"
    if on:
        yield f"(+- is the standard error of a difference, for other seeds and {on})"


def verdict_lines(
    variants: Sequence[VariantResult], comparisons: Sequence[ComparisonResult], effect: float
) -> Iterator[str]:
    """The verdicts in words, the surest difference first."""
    for variant in variants:
        for seed, problem in variant.failures.items():
            yield f"{variant.name}, seed {seed}: {problem}"
    surest_first = sorted(comparisons, key=lambda result: (result.corrected_p is None, result.corrected_p, result.p))
    yield from (result.verdict(effect) for result in surest_first)
    if any(result.text_stderr is None and result.change for result in comparisons):
        yield 'note: each run has its own held-out windows; sampling = "full" makes them the same, and errors smaller'
    elif any("not paired" in result.manner for result in comparisons):
        yield 'note: recipes have other held-out windows; sampling = "full" makes them the same, and errors smaller'


def to_json(
    variants: Sequence[VariantResult], comparisons: Sequence[ComparisonResult], plan: Mapping[str, Any], effect: float
) -> str:
    """All results, for programs. Losses are in the unit that is named, curves in nats per token."""
    unit = unit_of(variants)
    document = {
        "format": FORMAT,
        "plan": plan,
        "unit": unit,
        "recipes": [
            {
                "name": variant.name,
                "losses": {str(seed): loss for seed, loss in variant.losses(unit).items()},
                "runs": {str(seed): run.path for seed, run in variant.runs.items()},
                "failures": {str(seed): problem for seed, problem in variant.failures.items()},
                **({"mean": variant.mean(unit).document(), "deviation": variant.spread(unit)} if variant.runs else {}),
                "curve": [
                    {"step": step, "mean": mean, "deviation": deviation}
                    for step, mean, deviation in mean_curve(variant)
                ],
            }
            for variant in variants
        ],
        "comparisons": [
            {
                **result._asdict(),
                "change": result.change and result.change.document(),
                "is_seen": result.is_seen,
                "verdict": result.verdict(effect),
            }
            for result in comparisons
        ],
    }
    return json.dumps(document, indent=2) + "\n"
