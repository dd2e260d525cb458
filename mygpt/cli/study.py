"""The command that compares recipes over several seeds: `mygpt study`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from mygpt.cli.command import JsonOptions, command
from mygpt.errors import MygptError, print_note
from mygpt.recipe.files import shipped_recipes
from mygpt.recipe.flags import Positional, Repeated
from mygpt.recipe.tables import Count

if TYPE_CHECKING:
    from mygpt.studies.results import Study

MOST_SEEDS = 1000


class StudyOptions(JsonOptions):
    recipes: Annotated[tuple[str, ...], Positional("RECIPE")]
    """Recipes, or names of shipped ones; or the folder of one study, which is shown again."""
    set: Annotated[tuple[str, ...], Repeated("KEY=VALUE,VALUE")] = ()
    """Values of a recipe key: every recipe is run with each of them, and with every combination of several --set."""
    seeds: int = 5
    """Runs of each recipe; more extend a study that is there."""
    out: Path | None = None
    """The study's folder; absent: checkpoints/study- and the names of the recipes and keys."""
    effect: Annotated[float, Field(gt=0)] = 0.01
    """A difference that matters: where none is seen, the study says how many more seeds would reveal one so large.
    In the unit of the table."""
    side_by_side: Count | None = None
    """Runs at a time; absent: as many as are fastest in all and fit into memory, which is measured."""
    picture: Path | None = None
    """The picture to draw (.png, .svg or .pdf), which needs matplotlib; absent: study.png in the study's folder."""
    no_picture: bool = False
    """Draw none."""


@command
def study(options: StudyOptions) -> None:
    """Run recipes with several seeds, and say which is better, by how much, and how sure that is."""
    from mygpt.reports.plot import check_out
    from mygpt.studies.grid import PICTURE_FILE, PLAN_FILE, STUDY_FILE, read_settings, stem_of, variants_of
    from mygpt.studies.runner import run_study

    why = ": one seed is not a result" * (options.seeds == 1)
    if not 2 <= options.seeds <= MOST_SEEDS:
        raise MygptError(f"--seeds: got {options.seeds}, expected 2 to {MOST_SEEDS}{why}")
    if options.picture is not None and options.no_picture:
        raise MygptError(f"got --picture {options.picture} and --no-picture; leave one out")
    if options.picture is not None:
        check_out(options.picture)
    folder = Path(options.recipes[0])
    if str(folder) not in shipped_recipes() and any((folder / name).is_file() for name in (STUDY_FILE, PLAN_FILE)):
        _show(folder, options)
        return
    settings = read_settings(options.set)
    variants = variants_of(options.recipes, settings)
    folder = options.out or Path("checkpoints", "-".join(["study", *map(stem_of, options.recipes), *settings]))
    picture = options.picture or folder / PICTURE_FILE
    if not options.no_picture:
        check_out(picture)
        if picture.parent != folder and not picture.parent.is_dir():
            raise MygptError(f"--picture: there is no folder {picture.parent}; make it, or choose another name")
    result = run_study(variants, options.seeds, folder, options.effect, print_note, options.side_by_side)
    _print(result, as_json=options.as_json)
    written = [str(result.file)]
    if not options.no_picture:
        from mygpt.studies.picture import draw

        try:
            draw(result, picture)
            written.append(str(picture))
        except MygptError as error:
            print_note(str(error))
    print_note(f"wrote {' and '.join(written)}")


def _show(folder: Path, options: StudyOptions) -> None:
    """Print what the study in a folder has found, and draw a picture if one is named; trains nothing."""
    from mygpt.studies.results import read_study

    for name in ("set", "seeds", "out", "side_by_side"):
        if name in options.model_fields_set:
            flag = f"--{name.replace('_', '-')}"
            raise MygptError(f"{folder}: is shown as it is; leave {flag} out, or give the recipes of the study")
    if options.recipes[1:]:
        raise MygptError(f"{folder}: a study, and one is shown at a time; leave {options.recipes[1]} out")
    study = read_study(folder, options.effect)
    _print(study, as_json=options.as_json)
    if options.picture:
        from mygpt.studies.picture import draw

        draw(study, options.picture)
        print_note(f"wrote {options.picture}")


def _print(study: "Study", *, as_json: bool) -> None:
    from mygpt.studies.results import table_lines, verdict_lines

    if as_json:
        print(study.file.read_text(encoding="utf-8"), end="")
    else:
        lines = [*table_lines(study.variants), *verdict_lines(study.variants, study.comparisons, study.effect)]
        print("\n".join(lines))
