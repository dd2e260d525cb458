"""The command that compares recipes over several seeds: `mygpt study`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from mygpt.cli.command import command
from mygpt.errors import MygptError, print_note

MOST_SEEDS = 1000


@dataclass(frozen=True)
class StudyOptions:
    recipes: Positional[tuple[str, ...]]
    """Recipes, or names of shipped ones."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE,VALUE")] = field(
        default=()
    )
    """Values of a recipe key: every recipe is run with each of them, and with every combination of several --set."""
    seeds: int = 5
    """Runs of each recipe; more extend a study that is there."""
    out: Path | None = None
    """The study's folder; absent: checkpoints/study- and the names of the recipes and keys."""
    effect: float = 0.01
    """A difference that matters: where none is seen, the study says how many more seeds would reveal one so large.
    In the unit of the table."""
    side_by_side: int | None = None
    """Runs at a time; absent: as many as are fastest in all and fit into memory, which is measured."""
    json: bool = False
    """Print study.json, and not the table."""
    picture: Path | None = None
    """The picture to draw (.png, .svg or .pdf), which needs matplotlib; absent: study.png in the study's folder."""
    no_picture: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Draw none."""


@command
def study(options: StudyOptions) -> None:
    """Run recipes with several seeds, and say which is better, by how much, and how sure that is."""
    from mygpt.reports.plot import check_out
    from mygpt.studies.grid import PICTURE_FILE, cells_of, read_settings
    from mygpt.studies.results import table_lines, verdict_lines
    from mygpt.studies.runner import run_study

    if not options.recipes:
        raise MygptError("expected a recipe: mygpt study RECIPE --set lr=3e-4,1e-3")
    if not 2 <= options.seeds <= MOST_SEEDS:
        raise MygptError(f"--seeds: got {options.seeds}, expected 2 to {MOST_SEEDS}: one seed is not a result")
    if not 0 < options.effect < float("inf"):
        raise MygptError(f"--effect: got {options.effect:g}, expected a number above 0")
    if options.side_by_side is not None and options.side_by_side < 1:
        raise MygptError(f"--side-by-side: got {options.side_by_side}, expected at least 1")
    if options.picture is not None:
        check_out(options.picture)
    settings = read_settings(options.set)
    cells = cells_of(options.recipes, settings)
    folder = options.out or _default_out(options.recipes, settings)
    result = run_study(cells, options.seeds, folder, options.effect, print_note, options.side_by_side)
    verdicts = verdict_lines(result.cells, result.comparisons, options.effect)
    if options.json:
        print(result.file.read_text(encoding="utf-8"), end="")
    else:
        print("\n".join([*table_lines(result.cells), *verdicts]))
    written = [str(result.file)]
    if not options.no_picture:
        from mygpt.studies.picture import draw

        picture = options.picture or folder / PICTURE_FILE
        try:
            draw(result, picture)
            written.append(str(picture))
        except MygptError as error:
            print_note(str(error))
    print_note(f"wrote {' and '.join(written)}")


def _default_out(recipes: tuple[str, ...], settings: dict[str, list[object]]) -> Path:
    from mygpt.studies.grid import stem_of

    return Path("checkpoints", "-".join(["study", *map(stem_of, recipes), *settings]))
