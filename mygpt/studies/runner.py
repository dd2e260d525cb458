"""Runs the grid of a study: each run in a process of its own; continues what was killed, and reads the results."""

import json
import os
import signal
import subprocess
import time
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
    COPY_NAME,
    LOCK_FILE,
    MEND_DISK,
    TEMPORARY_NAME,
    explain_disk_error,
    read_bytes,
    replace_text,
)
from mygpt.runs.lock import locked
from mygpt.runs.run import Run, check_output
from mygpt.runs.schemas import CODE_CHARACTERS, HASH_OF_PATH
from mygpt.runs.start import self_contained
from mygpt.studies.analysis import compare_cells
from mygpt.studies.copies import copy_model, with_copies
from mygpt.studies.grid import PICTURE_FILE, PLAN_FILE, STUDY_FILE, Cell
from mygpt.studies.results import Study, explain_damage, has_failed, is_finished, is_settled, read_cell, to_json
from mygpt.studies.room import Room, Slot, complaint, measure_room, start_worker, take_slots
from mygpt.studies.worker import Task

POLL_SECONDS = 0.1
MOST_RESTARTS = 3
"""Of a run that is killed from outside, before the study gives up."""

LOG_BYTES = 2**16
"""How much of the end of a log is read: a library may print gigabytes."""

MAY_DIFFER = {"threads", *PATH_KEYS}
"""Keys in which a run of a study may differ from its recipe: threads are the plan's, and files may have been moved."""

Report = Callable[[str], None]


class Job(NamedTuple):
    """One run of a study."""

    cell: Cell
    seed: int
    path: Path
    """Its run directory."""

    @property
    def name(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"


def run_study(
    cells: Sequence[Cell], seeds: int, folder: Path, effect: float, report: Report, side_by_side: int | None = None
) -> Study:
    """Run every cell with several seeds, as `run_grid` does, and compare what they come to.

    Raises:
        MygptError, InterruptedRunError: see `run_grid`.
    """
    results = [
        read_cell(
            cell.name,
            folder,
            {seed: path for seed, path in paths.items() if is_finished(path)},
            {seed: _failure(path) for seed, path in paths.items() if not is_finished(path)},
        )
        for cell, paths in run_grid(cells, seeds, folder, report, side_by_side)
    ]
    comparisons = compare_cells(results, effect)
    plan = _read_plan(folder) if (folder / PLAN_FILE).exists() else {}
    with explain_disk_error("{path}: cannot be written: {reason}", folder / STUDY_FILE):
        replace_text(folder / STUDY_FILE, to_json(results, comparisons, plan, effect))
    return Study(results, comparisons, effect, folder / STUDY_FILE)


def run_grid(
    cells: Sequence[Cell], seeds: int, folder: Path, report: Report, side_by_side: int | None = None
) -> Iterator[tuple[Cell, dict[int, Path]]]:
    """Run every cell with the seeds from 1 to `seeds` into `folder`/CELL/seed-N; each cell with its runs by seed.

    Runs that are complete stay as they are, and others are continued; so the same command continues a study that was
    killed, and one with more seeds or cells extends it. Seeds set both init_seed and data_seed. Without `side_by_side`
    the number of runs at a time is measured.

    Raises:
        MygptError: a recipe cannot be trained, or the folder holds something else or a run of another recipe.
        InterruptedRunError: a signal asked to stop; all runs are saved.
    """
    cells = with_copies(cells, folder, report)
    jobs = [Job(cell, seed, folder / cell.name / f"seed-{seed}") for seed in range(1, seeds + 1) for cell in cells]
    _check(jobs, folder, side_by_side)
    hashes = _hashes_of_inputs(cells)
    _check_inputs(jobs, hashes)
    unfinished = [job for job in jobs if not (is_finished(job.path) and is_settled(job.path))]
    waiting = [job for job in unfinished if not has_failed(job.path)]
    _check_code(jobs, will_train=bool(waiting))
    if waiting:
        with locked(folder):
            plan = _make_plan(waiting, folder, side_by_side, report)
            done = len(jobs) - len(waiting)
            report(f"{done} of {len(jobs)} runs are complete; {len(waiting)} to go" if done else f"{len(jobs)} runs")
            copies = {cell.name: copy_model(cell.recipe, folder, hashes[cell.name]["init_from"]) for cell in cells}
            _run_all(waiting, _room_of(plan), copies, report)
        _check_inputs(jobs, hashes)  # they may have changed while they were trained
        _check_code(jobs, will_train=False)
    for cell in cells:
        yield cell, {job.seed: job.path for job in jobs if job.cell is cell}


def _check(jobs: Sequence[Job], folder: Path, side_by_side: int | None) -> None:
    """See that all can be run into the folder, before anything is written.

    Raises:
        CheckpointError: it cannot.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--out: {folder} is a file; choose another --out")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(f"--out: {existing} cannot be written to; choose another --out")
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    entries = [name for name in names if name != LOCK_FILE and not TEMPORARY_NAME.fullmatch(name)]
    known = {PLAN_FILE, STUDY_FILE, PICTURE_FILE, *(job.cell.name for job in jobs)}
    known |= {name for name in entries if COPY_NAME.fullmatch(name)}
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
                found = Run(job.path).recipe
            # A prepared corpus, or a model to begin with, has its own tokenizer, which a run records.
            has_own = os.path.isdir(expected.data.corpus) or expected.train.init_from
            of_corpus = {"tokenizer"} if has_own else set()
            for key, (was, now) in differing_keys(found, expected):
                if key in HARMLESS_KEYS | MAY_DIFFER | of_corpus:
                    continue
                raise CheckpointError(
                    f"{job.path}: was trained with {key} = {was}, and the study has {now}; choose another --out"
                )


def _hashes_of_inputs(cells: Sequence[Cell]) -> dict[str, dict[str, str | None]]:
    """For each recipe, by its name, the hashes of what it reads, by key; it is read as the runs will read it.

    Raises:
        CorpusError, TokenizerError, CheckpointError: it cannot be used.
    """
    from mygpt.runs.initial import find_initial, open_dataset  # imports torch

    known: dict[tuple[object, ...], dict[str, str | None]] = {}
    for recipe in (cell.recipe for cell in cells):
        if (inputs := _inputs(recipe)) not in known:
            initial = find_initial(recipe, continues=False)  # a run in the recipe's own output is none of the study's
            dataset = open_dataset(recipe, initial, verify=False)
            hashes = (dataset.sha256, dataset.held_out_sha256, initial and initial.sha256)
            known[inputs] = dict(zip(HASH_OF_PATH, hashes, strict=True))
    return {cell.name: known[_inputs(cell.recipe)] for cell in cells}


def _inputs(recipe: Recipe) -> tuple[object, ...]:
    return recipe.data, recipe.train.seq_len, recipe.train.init_from, recipe.train.init_from and recipe.model


def _check_inputs(jobs: Sequence[Job], hashes: Mapping[str, Mapping[str, str | None]]) -> None:
    """See that all runs that are there were trained on the texts of their recipe, and began with its weights.

    Raises:
        MismatchError: one was not.
    """
    for job in (job for job in jobs if (job.path / RUN_FILE).exists()):
        for key, sha256 in Run(job.path).info.inputs.items():
            if sha256 != hashes[job.cell.name][key]:
                problem = "was trained on another text than" if key == "corpus" else f"had another {key} than"
                now = job.cell.recipe.flat()[key]
                raise MismatchError(f"{job.path}: {problem} {now}; choose another --out")


def _check_code(jobs: Sequence[Job], *, will_train: bool) -> None:
    """See that one code of mygpt has trained all steps that are there and, if it `will_train`, will train the others.

    Raises:
        MismatchError: it has not.
    """
    codes = {code_sha256()[:CODE_CHARACTERS]} if will_train else set[str]()
    for job in jobs:
        if (job.path / RUN_FILE).exists() and (Run(job.path).checkpoints or has_failed(job.path)):
            codes |= {stretch.environment.code for stretch in Run(job.path).info.stretches}
            if len(codes) > 1:
                other = "this one" if will_train else "other steps of the study"
                raise MismatchError(
                    f"{job.path}: was trained by another code of mygpt than {other}; go back to that code, or choose "
                    "another --out"
                )


def _recipe_of(job: Job, threads: int | None) -> Recipe:
    keys: dict[str, Any] = {"init_seed": job.seed, "data_seed": job.seed, "output": str(job.path), "resume": "auto"}
    return job.cell.recipe.replace(**keys, **({"threads": threads} if threads else {}))


def _read_plan(folder: Path) -> dict[str, Any]:
    path = folder / PLAN_FILE
    try:
        plan = json.loads(read_bytes(path))
        _room_of(plan)
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged; remove it, and the room for runs is measured again") from None
    return dict(plan)


def _room_of(plan: dict[str, Any]) -> Room:
    room = Room(int(plan["side_by_side"]), int(plan["threads"]))
    if min(room) < 1:
        raise ValueError
    return room


def _make_plan(jobs: Sequence[Job], folder: Path, side_by_side: int | None, report: Report) -> dict[str, Any]:
    """How many runs go side by side: as chosen when the study began, since their bits depend on their threads."""
    if (folder / PLAN_FILE).exists():
        return _read_plan(folder)
    largest = max((job.cell.recipe for job in jobs), key=_work_of_a_step)
    if side_by_side is None:
        room = measure_room(largest, len(jobs), report)
    else:
        room = Room(side_by_side, largest.runtime.threads or max(1, core_count() // side_by_side))
    plan = {"mygpt": __version__, **room._asdict()}
    with explain_disk_error("{path}: cannot be written: {reason}", folder):
        make_directory(folder)
        replace_text(folder / PLAN_FILE, json.dumps(plan, indent=2) + "\n")
    return plan


def _work_of_a_step(recipe: Recipe) -> int:
    """In proportion to its floating-point operations, roughly."""
    return recipe.train.batch_size * recipe.train.seq_len * recipe.model.num_layers * recipe.model.embed_dim**2


def _run_all(jobs: Sequence[Job], room: Room, copies: Mapping[str, str | None], report: Report) -> None:
    """Run them all, as many side by side as there is room for; `copies` are the models to begin with, by cell.

    Raises:
        InterruptedRunError: a signal asked to stop.
        MygptError: a run ended in an error that is not its recipe's.
    """
    waiting = list(jobs)
    running: dict[subprocess.Popen[str], tuple[Job, Slot]] = {}
    restarts: dict[Path, int] = {}
    started_at, over = time.monotonic(), 0
    reported_at = started_at
    problem: MygptError | None = None
    with take_slots(room) as free, stop_on_signal() as stop:
        stop.graceful = True
        try:
            while running or (waiting and not problem):
                if stop.pending() and problem is None:
                    number = signal.Signals(stop.pending())
                    stopped = f"stopped by {number.name}; the runs are saved, and the same command continues"
                    problem = InterruptedRunError(stopped, exit_code=128 + number)
                    _end(running)
                while free and waiting and not problem:
                    job, slot = waiting.pop(0), free.pop(0)
                    running[_start(job, slot, room.threads, copies[job.cell.name])] = job, slot
                for process in [process for process in running if process.poll() is not None]:
                    job, slot = running.pop(process)
                    free.append(slot)
                    if process.stdin:
                        process.stdin.close()
                    if process.returncode == 0 or has_failed(job.path):
                        over += 1
                        left = (time.monotonic() - started_at) / over * (len(jobs) - over)
                        report(f"{job.name}: {_outcome(job.path)} ({over} of {len(jobs)}, {_duration(left)} left)")
                    elif problem is None and (error := _error_of(process, job, restarts)):
                        problem = error
                        _end(running)
                    elif problem is None:
                        report(f"{job.name}: was killed; it continues")
                        waiting.insert(0, job)
                if time.monotonic() - reported_at >= PROGRESS_SECONDS:
                    reported_at = time.monotonic()
                    for line in filter(None, (_progress(job) for job, _ in running.values())):
                        report(line)
                time.sleep(POLL_SECONDS)
        finally:
            _end(running)
            for process in running:
                process.wait()
    if problem:
        raise problem


def _start(job: Job, slot: Slot, threads: int, init_from: str | None) -> "subprocess.Popen[str]":
    make_directory(job.path.parent)
    with _log(job).open("a", encoding="utf-8") as log:
        task = Task(_recipe_of(job, threads).replace(init_from=init_from).model_dump_json(), slot.cpus)
        return start_worker(task, slot, log.fileno())


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


def _end(running: "Sequence[subprocess.Popen[str]] | dict[subprocess.Popen[str], tuple[Job, Slot]]") -> None:
    for process in running:
        process.terminate()


def _error_of(process: "subprocess.Popen[str]", job: Job, restarts: dict[Path, int]) -> MygptError | None:
    """The error with which a run ended; None: it was killed from outside, and may be tried again."""
    if process.returncode < 0 and restarts.get(job.path, 0) < MOST_RESTARTS:
        restarts[job.path] = restarts.get(job.path, 0) + 1
        return None
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
    record = Run(path).records[-1]
    return f"training loss {record.loss:.4f}" if record.val is None else f"held-out loss {record.val:.4f}"


def _failure(path: Path) -> str:
    failed = sorted(entry.name for entry in path.iterdir() if entry.name.startswith("failed-step-"))
    return f"step {int(failed[-1].rsplit('-', 1)[1])} was not finite" if failed else "is not complete"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
