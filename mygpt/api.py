"""What a notebook or a program uses: recipes from keys, training that returns a run, and pictures.

    run = mygpt.train(mygpt.load_recipe("quickstart", steps=100))
    mygpt.plot(run)

The names are those of `mygpt` itself, which imports them on first use.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from os import PathLike, fspath
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Any

from mygpt.errors import CheckpointError, InterruptedRunError, MygptError, RecipeError
from mygpt.processes.environment import is_main_process, set_before_torch
from mygpt.recipe import files
from mygpt.recipe.tables import TABLE_OF_KEY, Recipe, check_recipe, lay_over, seed_keys
from mygpt.runs import run as runs
from mygpt.runs.files import BEST_FILE, LATEST_FILE
from mygpt.runs.run import named_checkpoint
from mygpt.runs.steps import step_directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from mygpt.model.gpt import GPT
    from mygpt.runs.loading import Checkpoint


FLAG = re.compile(r'`[^`]*`|(?<!\S)--([a-z][\w-]*)(?: (\d[\w.]*|"\w+"))?')
"""A flag in a message, and its value if that is a number or quoted; or a command, which keeps its flags."""


@contextmanager
def _naming_keys() -> Iterator[None]:
    """Let errors name keys, which a program gives, and not flags: `val_split=0.1`, not `--val-split 0.1`."""

    def as_key(flag: re.Match[str]) -> str:
        key = (flag[1] or "").replace("-", "_")
        if key not in {*TABLE_OF_KEY, "overwrite"}:
            return flag[0]  # of a launcher, say
        return f"{key}={flag[2]}" if flag[2] else key

    try:
        yield
    except MygptError as error:
        error.args = (FLAG.sub(as_key, str(error)),)
        raise


class Run(runs.RunDirectory):
    """A run directory: `Run("checkpoints/hardened")`, and what `train` returns.

    Beside what is here it has `recipe`, `info` (run.json), `records` (of metrics.jsonl), `checkpoints` (by step),
    `best`, `latest` and `is_finished`. It can stand where the path of a run is expected.

    Raises CheckpointError if there is no run, and DamagedCheckpointError for a file that cannot be read.
    """

    def __init__(self, path: str | PathLike[str]):
        super().__init__(Path(path))
        if is_main_process():  # other machines of a launch need not have its directory
            self.check_exists()

    def to_pandas(self) -> "DataFrame":
        """The records as a pandas DataFrame, a row for each and a column for each of their values, by step.

        Raises:
            MygptError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise MygptError("to_pandas needs pandas: pip install pandas") from None
        return DataFrame([record.model_dump() for record in self.records]).set_index("step")

    def load(self, checkpoint: str | int = "latest") -> "Checkpoint":
        """The model after a step, or that of "best" or "latest", with its tokenizer, on the CPU in eval mode.

        Raises:
            CheckpointError: the run has no such checkpoint.
            DamagedCheckpointError, MismatchError, TokenizerError: as `mygpt.load_checkpoint`.
        """
        from mygpt.runs.loading import load_checkpoint

        path = None
        if checkpoint in (BEST_FILE, LATEST_FILE):
            path = named_checkpoint(self.path / str(checkpoint))
        elif isinstance(checkpoint, Integral):
            path = step_directory(self.path, int(checkpoint))
        if path is None or not path.is_dir():
            raise CheckpointError(f"{self.path}: has no checkpoint {checkpoint!r}; expected a step, 'best' or 'latest'")
        return load_checkpoint(path)

    @property
    def model(self) -> "GPT":
        """The model after the newest step; see `load`."""
        return self.load().model

    def plot(self, **keys: Any) -> "Figure":
        """A picture of the run; see `mygpt.plot`."""
        return plot(self, **keys)


@_naming_keys()
def load_recipe(path: str | PathLike[str], **keys: Any) -> Recipe:
    """A recipe file, or a shipped recipe by its name, with other values for these keys, as flags of `mygpt train` give.

    As with flags, `seed` sets both seeds, expectations of the recipe that no longer hold are dropped, and so are keys
    that only refine evaluations, if `val_every=0`.

    Raises:
        RecipeError: with one line for each mistake, in the file or in the keys.
    """
    recipe = loaded = files.load_recipe(fspath(path))
    if "seed" in keys:
        keys = seed_keys(keys.pop("seed"), "seed") | keys
    if keys:
        recipe = files.with_own_output(fspath(path), loaded, lay_over(loaded, keys, source="recipe"), keys.keys())
    check_recipe(recipe, source=str(path))
    return recipe


@_naming_keys()
def train(recipe: Recipe, *, overwrite: bool = False) -> Run:
    """Train as `recipe` says, or continue its run if there is one; returns the run.

    It prints what `mygpt train` prints. With `overwrite` a run that is already in `recipe.checkpoint.output` is
    replaced. torch's threads and global seeds are set, and stay so.

    Raises:
        KeyboardInterrupt: of an interrupt, as by a notebook's stop button; the run is saved, if it has made a step, and
            the same call goes on.
        MygptError: anything that the user can act on, with the message that the command prints.
    """
    set_before_torch()
    from mygpt.training.train import train

    if not isinstance(recipe, Recipe):
        example = f"load_recipe({fspath(recipe)!r})" if isinstance(recipe, (str, PathLike)) else "Recipe.of(steps=100)"
        example = "the .recipe of the run" if isinstance(recipe, Run) else example
        raise RecipeError(f"train: got {recipe!r}, expected a recipe, such as {example}")
    try:
        return Run(train(recipe, overwrite=overwrite))
    except InterruptedRunError as stopped:
        if stopped.exit_code != 128 + SIGINT:
            raise
        # Which ends a loop over recipes, too, though that may go on after an error of one of them.
        raise KeyboardInterrupt(str(stopped)) from None
    except SystemExit as stopped:  # before there was anything to save
        if stopped.code != 128 + SIGINT:
            raise
        raise KeyboardInterrupt from None


def plot(
    runs: str | PathLike[str] | Iterable[str | PathLike[str]],
    out: str | PathLike[str] | None = None,
    **keys: Any,
) -> "Figure":
    """A picture of one or several runs, or of a folder of runs, which a notebook shows; and the file `out`, if given.

    The keys are those of `mygpt.reports.plot.plot`: `unit`, `x`, `y_min`, `y_max`, `log`, `smooth`, `grad_norm`,
    `merge_seeds`.

    Raises:
        MygptError: nothing can be drawn, matplotlib is not installed, or `out` cannot be written.
    """
    from mygpt.reports.plot import plot

    paths = [runs] if isinstance(runs, (str, PathLike)) else runs
    return plot([Path(run) for run in paths], None if out is None else Path(out), **keys)
