"""A copy of a run as it was after one of its checkpoints. The run itself is only read."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from mygpt.errors import DamagedCheckpointError, FormatError
from mygpt.recipe.files import RECIPE_FILE, RUN_FILE
from mygpt.runs import files
from mygpt.runs.records import LINES, cut_after
from mygpt.runs.run import RunDirectory
from mygpt.runs.start import recipe_text
from mygpt.runs.steps import point_to, step_directory, verify_checkpoint


def copy_until(checkpoint: Path, target: Path) -> None:
    """Make the directory `target` a run that ends with this step directory of another run, which can be continued.

    It gets recipe, run.json and records up to this step, the checkpoint, and the best checkpoint before it. If that is
    missing, there is no file `best`.

    Raises:
        DamagedCheckpointError: the checkpoint cannot be read.
        DiskError: a file cannot be copied or written.
    """
    run = RunDirectory(checkpoint.parent)
    step = verify_checkpoint(checkpoint).step
    recipe, origin = run.recipe_for(step), run.info.origin
    if origin:
        origin = origin.model_copy(update={"checkpoint": str(files.real_path(run.path / origin.checkpoint))})
    stretches = run.info.stretches_until(step)
    info = run.info.model_copy(update={"recipe": recipe, "origin": origin, "stretches": stretches})
    best = run.best_until(step) if recipe.keeps_best else None
    with files.explain_disk_error(files.CANNOT_WRITE, target):
        target.mkdir()
        files.replace_text(target / RUN_FILE, info.to_json())
        files.replace_text(target / RECIPE_FILE, recipe_text(recipe))
        for name, kind in LINES.items():
            if (run.path / name).is_file():
                shutil.copyfile(run.path / name, target / name)
            cut_after(target / name, kind, step)
        _copy_step(checkpoint, target)
        if best and best.step != step:
            with suppress(DamagedCheckpointError, FormatError):
                verify_checkpoint(step_directory(run.path, best.step))
                _copy_step(step_directory(run.path, best.step), target)
        point_to(target, step, best.step if best else None)


def publish_run(run: Path, target: Path) -> None:
    """Give a run directory that has been made under a temporary name its own name, at which there must be nothing.

    Raises:
        DiskError: the disk refused it.
    """
    with files.explain_disk_error(files.CANNOT_WRITE, target):
        for folder, _, names in os.walk(run):
            for name in names:
                files.sync(Path(folder) / name)
            files.sync(Path(folder))
        run.rename(target)
        files.sync(target.parent)


def _copy_step(checkpoint: Path, target: Path) -> None:
    (target / checkpoint.name).mkdir()
    for name in (files.MODEL_FILE, files.STATE_FILE, files.MANIFEST_FILE):
        shutil.copyfile(checkpoint / name, target / checkpoint.name / name)
