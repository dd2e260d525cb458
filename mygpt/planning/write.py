"""Writes a plan as a recipe whose comments give the reasons."""

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

from mygpt.errors import printable
from mygpt.planning.plan import Candidate, Plan
from mygpt.planning.text import NGRAM
from mygpt.recipe.tables import KEYS_OF_TABLE, NAMED_CORPORA, Recipe, check_recipe

COMMENT_WIDTH = 100
CHOSEN = ("embed_dim", "num_heads", "num_layers", "max_seq_len", "steps", "batch_size", "seq_len", "lr")
"""Keys that are written though they may have their defaults: they are what was chosen."""


def recipe_text(plan: Plan, made_by: str, folder: Path) -> str:
    """The recipe of a plan, as TOML for a file in `folder`. `made_by` is the command."""
    default, why, outlook = Recipe().flat(), reasons(plan), plan.best.outlook
    recipe = plan.best.recipe.replace(
        corpus=seen_from(folder, plan.text.corpus),
        expected_minutes=_rounded(plan.best.minutes, 2),
        expected_bits_per_byte=(_rounded(outlook.low, 3), _rounded(outlook.high, 3)),
    )
    check_recipe(recipe)
    lines = [f"Made by `{printable(made_by)}`, for this text and the machine that it ran on.", "", *summary(plan)]
    lines = [f"# {line}".rstrip() for line in lines]
    for table, keys in KEYS_OF_TABLE.items():
        values = {key: recipe.flat()[key] for key in keys}
        values = {key: value for key, value in values.items() if value != default[key] or key in CHOSEN}
        if values:
            lines += ["", f"[{table}]"]
        for key, value in values.items():
            lines += [*_comment(why.get(key, "")), _assignment(key, value)]
    return "\n".join(lines) + "\n"


def seen_from(folder: Path, corpus: str) -> str:
    """The corpus as a recipe in `folder` names it; a file never by a name that stands for another text."""
    if corpus in NAMED_CORPORA or os.path.isabs(corpus):
        return corpus
    # A folder may be a link, from which `..` leads elsewhere.
    path = os.path.relpath(os.path.realpath(corpus), os.path.realpath(folder))
    return f"./{path}" if path in NAMED_CORPORA else path


def summary(plan: Plan) -> Iterator[str]:
    """What was found, and what to expect, in lines."""
    best, text = plan.best, plan.text
    low, _, high = best.outlook
    yield f"text:      {text.bytes:,} bytes, about {text.tokens:,} tokens"
    yield f"           a {NGRAM}-gram model of it needs {text.ngram_bits:.3g} bits per byte"
    yield f"expected:  {_rounded(best.minutes, 2):g} minutes; held-out loss {low:.3g} to {high:.3g} bits per byte"
    if best.is_exhausted:
        yield "           more passes over this text would hardly help: more text would"
    yield "tried:       weights   tokens/s     steps   passes   bits per byte"
    yield from (("       -> " if candidate is best else " " * 10) + _row(candidate) for candidate in plan.tried)


def _row(candidate: Candidate) -> str:
    low, _, high = candidate.outlook
    return (
        f"{candidate.params / 1e6:>9.1f}M {candidate.tokens_per_second:>10,.0f} {candidate.recipe.train.steps:>9,} "
        f"{candidate.passes:>8.2g}   {low:.3g} to {high:.3g}"
    )


def reasons(plan: Plan) -> dict[str, str]:
    """Why a key has its value, by key."""
    best, text = plan.best, plan.text
    recipe = best.recipe
    train, passes = recipe.train, f"{best.passes:.2g} passes over the training text"
    evaluations = -(-train.steps // recipe.validation.val_every)
    return {
        "tokenizer": f"a token stands for {text.bytes / text.tokens:.1f} bytes of this text",
        "val_split": (
            f"about {recipe.data.val_split * text.bytes:,.0f} bytes at the end are never trained on: the loss on them "
            "is what counts"
        ),
        "embed_dim": f"of the sizes tried, the one with the lowest loss to expect: {best.params:,} weights",
        "dropout": f"{passes} invite the model to memorise it; dropout slows that down",
        "init": "GPT-2's, with which such models learn faster than with torch's own",
        "steps": f"{passes}, {'after which more would hardly help' if best.is_exhausted else 'as fit into the time'}",
        "batch_size": (
            f"{train.batch_size * train.seq_len:,} tokens a step: small batches learn more from few tokens, large ones "
            "are steadier"
        ),
        "micro_batch_size": "windows at a time, which need less memory",
        "max_grad_norm": "a rare large gradient does no harm",
        "lr": "lower for wider models, and for small batches; the first key to try other values of",
        "schedule": "down to 0: much of the gain comes as the rate falls",
        "warmup": "a twentieth of the steps",
        "val_every": f"{evaluations} evaluations, to see where the held-out loss turns",
        "sampling": "all of the held-out text: no luck in the draw",
        "save_every": "what a power failure costs at most; Ctrl-C and SIGTERM save first",
        "save_best": "if the held-out loss turns, the best checkpoint is kept",
        "expected_minutes": (
            "of this recipe as it stands, on one device: remove what you change it for. `mygpt train` says at its end "
            "how close it came"
        ),
    }


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _assignment(key: str, value: Any) -> str:
    if isinstance(value, tuple):  # which tomli_w would write over several lines
        return f"{key} = [{', '.join(map(str, value))}]"
    return tomli_w.dumps({key: value}).strip()


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, COMMENT_WIDTH)]
