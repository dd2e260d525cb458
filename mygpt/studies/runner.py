"""Runs the grid of a study: each run in a process of its own; continues what was killed, and reads the results."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mygpt import __version__
from mygpt.cores import core_count
from mygpt.disk import code_sha256, make_directory
from mygpt.errors import CheckpointError, InterruptedRunError, MismatchError, MygptError
from mygpt.processes.signals import stop_on_signal
from mygpt.recipe.files import RUN_FILE
from mygpt.recipe.tables import HARMLESS_KEYS, PATH_KEYS, Recipe
from mygpt.reports.recorder import PROGRESS_SECONDS
from mygpt.runs.changes import differing_keys
from mygpt.runs.files import (
    LOCK_FILE,
    MEND_DISK,
    TEMPORARY_NAME,
    explain_disk_error,
    read_bytes,
    replace_text,
)
from mygpt.runs.lock import locked
from mygpt.runs.run import RunDirectory, check_output
from mygpt.runs.schemas import CODE_CHARACTERS, HASH_OF_PATH
from mygpt.runs.start import self_contained
from mygpt.studies.analysis import compare_variants
from mygpt.studies.grid import PICTURE_FILE, PLAN_FILE, STUDY_FILE, Variant
from mygpt.studies.parallelism import (
    Parallelism,
    Resources,
    complaint,
    measure_parallelism,
    reserve_resources,
    start_worker,
)
from mygpt.studies.results import Study, explain_damage, has_failed, is_finished, is_settled, read_variant, to_json
from mygpt.studies.worker import Task

POLL_SECONDS = 0.1
MOST_RESTARTS = 3
"""How often a run that is killed from outside is continued before the study gives up."""

LOG_BYTES = 2**16
"""How much of the end of a log is read: a library may print gigabytes."""

MAY_DIFFER = {"threads", *PATH_KEYS}
"""Keys in which a run of a study may differ from its recipe: threads are the plan's, and files may have been moved."""

Report = Callable[[str], None]

Hashes = Mapping[str, Mapping[str, str | None]]
"""By recipe name and by key: the hashes of the inputs that recipes name."""


class Job(NamedTuple):
    """One run of a study."""

    variant: Variant
    seed: int
    path: Path
    """Its run directory."""

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"


def run_study(
    variants: Sequence[Variant],
    seeds: int,
    folder: Path,
    effect: float,
    report: Report,
    side_by_side: int | None = None,
) -> Study:
    """Run every variant with several seeds, as `run_grid` does, and compare what they come to.

    Raises:
        MygptError, InterruptedRunError: see `run_grid`.
    """
    results = [
        read_variant(
            variant.name,
            folder,
            {seed: path for seed, path in paths.items() if is_finished(path)},
            {seed: _failure(path) for seed, path in paths.items() if not is_finished(path)},
        )
        for variant, paths in run_grid(variants, seeds, folder, report, side_by_side)
    ]
    comparisons = compare_variants(results, effect)
    plan = _read_plan(folder) if (folder / PLAN_FILE).exists() else {}
    with explain_disk_error("{path}: cannot be written: {reason}", folder / STUDY_FILE):
        replace_text(folder / STUDY_FILE, to_json(results, comparisons, plan, effect))
    return Study(results, comparisons, effect, folder / STUDY_FILE)


def run_grid(
    variants: Sequence[Variant], seeds: int, folder: Path, report: Report, side_by_side: int | None = None
) -> Iterator[tuple[Variant, dict[int, Path]]]:
    """Run every variant with the seeds from 1 to `seeds` into `folder`/RECIPE/seed-N; yields its runs by seed.

    Runs that are complete stay as they are, and others are continued: the same command continues a study that was
    killed, and one with more seeds or recipes extends it. Seeds set both init_seed and data_seed. `side_by_side` is
    the number of runs at a time; None: it is measured.

    Raises:
        MygptError: a recipe cannot be trained, or the folder holds something else or a run of another recipe.
        InterruptedRunError: a signal asked to stop; all runs are saved.
    """
    jobs = [
        Job(variant, seed, folder / variant.name / f"seed-{seed}")
        for seed in range(1, seeds + 1)
        for variant in variants
    ]
    _check(jobs, folder, side_by_side)
    hashes = _hashes_of_inputs(variants)
    _check_inputs(jobs, hashes)
    unfinished = [job for job in jobs if not (is_finished(job.path) and is_settled(job.path))]
    waiting = [job for job in unfinished if not has_failed(job.path)]
    _check_code(jobs, will_train=bool(waiting))
    if waiting:
        with locked(folder):
            parallelism = _make_plan(waiting, folder, side_by_side, report)
            done = len(jobs) - len(waiting)
            report(f"{done} of {len(jobs)} runs are complete; {len(waiting)} to go" if done else f"{len(jobs)} runs")
            _run_all(waiting, parallelism, hashes, report)
        _check_code(jobs, will_train=False)
    for variant in variants:
        yield variant, {job.seed: job.path for job in jobs if job.variant is variant}


def _check(jobs: Sequence[Job], folder: Path, side_by_side: int | None) -> None:
    """Check that all jobs can be run into the folder, before anything is written.

    Raises:
        CheckpointError: the folder holds something else, or a run of another recipe.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--out: {folder} is a file; choose another --out")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f"--out: {existing} cannot be written to; choose another --out")
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    entries = [name for name in names if name != LOCK_FILE and not TEMPORARY_NAME.fullmatch(name)]
    known = {PLAN_FILE, STUDY_FILE, PICTURE_FILE, *(job.variant.name for job in jobs)}
    if entries and not {PLAN_FILE, STUDY_FILE} & {*entries} and not known.issuperset(entries):
        raise CheckpointError(f"--out: {folder} is not empty and not a study; choose another --out")
    if PLAN_FILE in entries and side_by_side not in (None, begun_with := _read_plan(folder)["side_by_side"]):
        raise CheckpointError(
            f"--side-by-side: got {side_by_side}, and the study has begun with {begun_with}; remove "
            f"{folder / PLAN_FILE} to choose anew, which changes the last bits of the runs that are not complete"
        )
    for job in jobs:
        with explain_damage(job.path):
            check_output(job.path, replace=True)
        if (job.path / RUN_FILE).exists():
            expected = self_contained(_recipe_of(job, None))
            with explain_damage(job.path):
                found = RunDirectory(job.path).recipe
            # A prepared corpus, or a model to begin with, has its own tokenizer, which a run records.
            has_own = os.path.isdir(expected.data.corpus) or expected.train.init_from
            may_differ = HARMLESS_KEYS | MAY_DIFFER | ({"tokenizer"} if has_own else set())
            for key, (was, now) in differing_keys(found, expected):
                if key not in may_differ:
                    raise CheckpointError(
                        f"{job.path}: was trained with {key} = {was}, and the study has {now}; choose another --out"
                    )


def _hashes_of_inputs(variants: Sequence[Variant]) -> Hashes:
    """The hashes of the inputs that the recipes name now; each input is read once, as the runs will read it.

    Raises:
        CorpusError, TokenizerError, CheckpointError: an input cannot be used.
    """
    from mygpt.runs.initial import find_initial, open_dataset  # imports torch

    known: dict[tuple[object, ...], dict[str, str | None]] = {}
    hashes = {}
    for name, recipe in variants:
        train = recipe.train
        inputs = (recipe.data, train.seq_len, train.init_from, train.init_from and recipe.model)
        if inputs not in known:
            initial = find_initial(recipe, continues=False)  # a run in the recipe's own output is none of the study's
            dataset = open_dataset(recipe, initial, verify=False)
            found = (dataset.sha256, dataset.held_out_sha256, initial and initial.sha256)
            known[inputs] = dict(zip(HASH_OF_PATH, found, strict=True))
        hashes[name] = known[inputs]
    return hashes


def _check_inputs(jobs: Sequence[Job], hashes: Hashes) -> None:
    """Check that all runs that have begun read the inputs with these hashes.

    Raises:
        MismatchError: one has read another text, or began with other weights.
    """
    for job in (job for job in jobs if (job.path / RUN_FILE).exists()):
        for key, sha256 in RunDirectory(job.path).info.inputs.items():
            if sha256 != hashes[job.variant.name][key]:
                problem = "was trained on another text than" if key == "corpus" else f"had another {key} than"
                now = job.variant.recipe.flat()[key]
                raise MismatchError(f"{job.path}: {problem} {now}; choose another --out")


def _check_code(jobs: Sequence[Job], *, will_train: bool) -> None:
    """Check that one code of mygpt trained all steps of the study and, if it `will_train`, will train the others.

    Raises:
        MismatchError: there are two.
    """
    codes = {code_sha256()[:CODE_CHARACTERS]} if will_train else set[str]()
    for job in jobs:
        if (job.path / RUN_FILE).exists() and (RunDirectory(job.path).checkpoints or has_failed(job.path)):
            codes |= {stretch.environment.code for stretch in RunDirectory(job.path).info.stretches}
            if len(codes) > 1:
                other = "this one" if will_train else "other steps of the study"
                raise MismatchError(
                    f"{job.path}: was trained by another code of mygpt than {other}; go back to that code, or choose "
                    "another --out"
                )


def _recipe_of(job: Job, threads: int | None) -> Recipe:
    keys: dict[str, Any] = {"init_seed": job.seed, "data_seed": job.seed, "output": str(job.path), "resume": "auto"}
    return job.variant.recipe.replace(**keys, **({"threads": threads} if threads else {}))


def _read_plan(folder: Path) -> dict[str, Any]:
    """The content of plan.json; "side_by_side" and "threads" are those of a `Parallelism`."""
    path = folder / PLAN_FILE
    try:
        plan = dict(json.loads(read_bytes(path)))
        if min(int(plan["side_by_side"]), int(plan["threads"])) < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path}: damaged; remove it, and the same command measures again how many runs fit"
        ) from None
    return plan


def _make_plan(jobs: Sequence[Job], folder: Path, side_by_side: int | None, report: Report) -> Parallelism:
    """How many runs go side by side: as chosen when the study began, since their bits depend on their threads."""
    if (folder / PLAN_FILE).exists():
        plan = _read_plan(folder)
        return Parallelism(int(plan["side_by_side"]), int(plan["threads"]))
    largest = max((job.variant.recipe for job in jobs), key=_work_of_a_step)
    if side_by_side is None:
        parallelism = measure_parallelism(largest, len(jobs), report)
    else:
        parallelism = Parallelism(side_by_side, largest.runtime.threads or max(1, core_count() // side_by_side))
    plan = {"mygpt": __version__, **parallelism._asdict()}
    with explain_disk_error("{path}: cannot be written: {reason}", folder):
        make_directory(folder)
        replace_text(folder / PLAN_FILE, json.dumps(plan, indent=2) + "\n")
    return parallelism


def _work_of_a_step(recipe: Recipe) -> int:
    """In proportion to its floating-point operations, roughly."""
    return recipe.train.batch_size * recipe.train.seq_len * recipe.model.num_layers * recipe.model.embed_dim**2


def _run_all(jobs: Sequence[Job], parallelism: Parallelism, hashes: Hashes, report: Report) -> None:
    """Train or continue all these runs, and restart those that are killed.

    Raises:
        InterruptedRunError: a signal asked to stop.
        MismatchError: a run has read other inputs than those of the `hashes`.
        MygptError: a run ended in an error that is not its recipe's.
    """
    waiting, over, restarts = list(jobs), 0, Counter[Path]()
    running: dict[subprocess.Popen[str], tuple[Job, Resources]] = {}
    started_at = reported_at = time.monotonic()
    with reserve_resources(parallelism) as free, stop_on_signal() as stop:
        stop.graceful = True
        try:
            while running or waiting:
                if stop.pending():
                    number = signal.Signals(stop.pending())
                    stopped = f"stopped by {number.name}; the runs are saved, and the same command continues"
                    raise InterruptedRunError(stopped, exit_code=128 + number)
                while free and waiting:
                    job, resources = waiting.pop(0), free.pop(0)
                    running[_start(job, resources, parallelism.threads)] = job, resources
                for process in [process for process in running if process.poll() is not None]:
                    job, resources = running.pop(process)
                    free.append(resources)
                    if process.stdin:
                        process.stdin.close()
                    if process.returncode == 0 or has_failed(job.path):
                        _check_inputs([job], hashes)  # they may have changed since the study began
                        over += 1
                        left = (time.monotonic() - started_at) / over * (len(jobs) - over)
                        report(f"{job.name}: {_outcome(job.path)} ({over} of {len(jobs)}, {_duration(left)} left)")
                    elif process.returncode < 0 and restarts[job.path] < MOST_RESTARTS:
                        restarts[job.path] += 1
                        report(f"{job.name}: was killed; it continues")
                        waiting.insert(0, job)
                    else:
                        raise _error_of(process, job)
                if time.monotonic() - reported_at >= PROGRESS_SECONDS:
                    reported_at = time.monotonic()
                    for line in filter(None, (_progress(job) for job, _ in running.values())):
                        report(line)
                time.sleep(POLL_SECONDS)
        finally:  # the runs save when they are terminated
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def _start(job: Job, resources: Resources, threads: int) -> "subprocess.Popen[str]":
    make_directory(job.path.parent)
    with _log(job).open("a", encoding="utf-8") as log:
        task = Task(_recipe_of(job, threads).model_dump_json(), resources.cpus)
        return start_worker(task, resources, log.fileno())


def _progress(job: Job) -> str:
    """The newest line on its progress in a run's log; "": there is none."""
    lines = reversed(_end_of_log(job).splitlines())
    newest = next((line for line in lines if line.startswith("at step ")), "")
    return newest and f"{job.name}: {newest}"


def _log(job: Job) -> Path:
    """What the run prints."""
    return job.path.with_name(f"{job.path.name}.log")


def _end_of_log(job: Job) -> str:
    with _log(job).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_BYTES))
        return log.read().decode("utf-8", "replace")


def _error_of(process: "subprocess.Popen[str]", job: Job) -> MygptError:
    """The error with which a run ended, and how the study goes on."""
    reason = complaint(_end_of_log(job)) or "no message"
    if process.returncode > 1:  # a mistake, which would be found again; or a signal, whose message says the way on
        return MygptError(f"{job.name}: {reason}", process.returncode)
    way_on = "the same command continues the study"
    if process.returncode < 0:
        reason = f"was killed by {signal.Signals(-process.returncode).name} again and again"
    if "out of memory" in reason or process.returncode == -signal.SIGKILL:  # which is how Linux frees memory
        plan = job.path.parent.parent / PLAN_FILE
        way_on += f"; without {plan} it measures anew how many runs fit side by side"
    reason = reason.removesuffix(MEND_DISK)
    return MygptError(f"{job.name}: {reason}; {way_on}", max(1, process.returncode))


def _outcome(path: Path) -> str:
    if not is_finished(path):
        return _failure(path)
    record = RunDirectory(path).records[-1]
    return f"training loss {record.loss:.4f}" if record.val is None else f"held-out loss {record.val:.4f}"


def _failure(path: Path) -> str:
    failed = sorted(entry.name for entry in path.iterdir() if entry.name.startswith("failed-step-"))
    return f"step {int(failed[-1].rsplit('-', 1)[1])} was not finite" if failed else "is not complete"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
