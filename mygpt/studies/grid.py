"""The recipes of a study: each target with each combination of values for some keys."""

import itertools
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mygpt.errors import MygptError, RecipeError
from mygpt.recipe.flags import load_target
from mygpt.recipe.tables import SEED_KEYS, STUDY_KEYS, ExpectedTable, Recipe, check_recipe
from mygpt.runs.start import self_contained

STUDY_FILE = "study.json"
PLAN_FILE = "plan.json"
PICTURE_FILE = "study.png"
OWN_FILES = (STUDY_FILE, PLAN_FILE, PICTURE_FILE)
"""The files of a study, beside the folders of its recipes."""
HELD_OUT_KEYS = ("val_corpus", "corpus", "val_split", "hold_out")
"""Keys that choose the held-out text. If val_corpus is given, the other three do not matter."""


class Variant(NamedTuple):
    """One recipe of a study, with its name, which is also that of its folder."""

    name: str
    recipe: Recipe


def read_settings(texts: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each key, from texts such as "lr=3e-4,1e-3".

    Raises:
        MygptError: a text is not of this form, or names a key twice or one that the study sets.
    """
    settings: dict[str, list[Any]] = {}
    for text in texts:
        key, sign, values = text.partition("=")
        key = key.strip().replace("-", "_")
        if not (sign and key and values):
            raise MygptError(f"--set: got {text!r}, expected KEY=VALUE,VALUE such as lr=3e-4,1e-3")
        if key in settings:
            raise MygptError(f"--set: {key} is given twice; give all its values together: {key}=VALUE,VALUE")
        if key in {"seed", *STUDY_KEYS}:
            remedy = "--seeds says how many" if key in ("seed", *SEED_KEYS) else "give another key"
            raise MygptError(f"--set: {key} is set by the study; {remedy}")
        settings[key] = [_value(value.strip()) for value in values.split(",")]
    return settings


def variants_of(targets: Sequence[str], settings: Mapping[str, Sequence[Any]]) -> list[Variant]:
    """Every target, a recipe file or a shipped recipe's name, with every combination of the settings.

    Raises:
        RecipeError: a recipe cannot be used, has no held-out loss, or holds out another text than the others.
        MygptError: two recipes have the same name, or one has that of a file of the study.
    """
    variants = []
    for target in targets:
        loaded = load_target(target).replace(**dict.fromkeys(ExpectedTable.model_fields))
        for values in itertools.product(*settings.values()):
            keys = dict(zip(settings, values, strict=True))
            # A key with a single value is the same in all recipes, and distinguishes none.
            shown = [f"{key}={value}" for key, value in keys.items() if len(settings[key]) > 1]
            name = re.sub(r"[^\w.,=+-]", "_", ",".join([stem_of(target), *shown]))
            recipe = loaded.replace(**keys)
            if name.startswith(".") or name.casefold() in ("", *OWN_FILES):
                raise MygptError(f"{target}: a study needs this name for a file of its own; rename the recipe")
            check_recipe(recipe, source=name)
            if not recipe.validation.val_every:
                raise RecipeError(
                    f"{name} [validation] val_every: got 0, expected evaluations, since a study compares held-out "
                    "losses; set val_split and val_every, such as --set val_split=0.1 --set val_every=500"
                )
            if recipe.checkpoint.resume not in ("auto", "never"):
                raise RecipeError(f"{name} [checkpoint] resume: expected none, since the runs of a study begin anew")
            variants.append(Variant(name, recipe))
    _check_texts(variants)
    names = [variant.name.casefold() for variant in variants]  # some disks do not know capital letters
    if double := next((name for name in names if names.count(name) > 1), None):
        raise MygptError(f"two recipes of the study are called {double!r}; rename one, or give each value once")
    return variants


def stem_of(target: str) -> str:
    """The name of a recipe without its folder and ending."""
    return re.sub(r"(?i)\.toml$", "", os.path.basename(target.rstrip("/")))


def _check_texts(variants: Sequence[Variant]) -> None:
    """Check that all hold out the same text: losses on different texts say nothing about recipes."""
    first, *others = (self_contained(variant.recipe).flat() for variant in variants)
    for variant, other in zip(variants[1:], others, strict=True):
        for key in HELD_OUT_KEYS[:1] if first["val_corpus"] else HELD_OUT_KEYS:
            if other[key] != first[key]:
                raise RecipeError(
                    f"{variant.name} [data] {key}: got {other[key]}, and {variants[0].name} has {first[key]}; expected "
                    "the same in all recipes of a study, which must hold out the same text"
                )


def _value(text: str) -> Any:
    """A number, true, false or a string, as TOML has them; a string needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
