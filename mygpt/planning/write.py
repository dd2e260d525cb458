"""Writes a plan as a recipe whose comments give the reasons."""

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

from mygpt.planning.plan import Candidate, Plan
from mygpt.planning.text import NGRAM
from mygpt.recipe.tables import KEYS_OF_TABLE, NAMED_CORPORA, Recipe

WIDTH = 100
"""Of comments."""


def recipe_text(plan: Plan, made_by: str, folder: Path) -> str:
    """The recipe of a plan, as TOML for a file in `folder`. `made_by` is the command."""
    default, why = Recipe().flat(), reasons(plan)
    recipe = plan.best.recipe.replace(
        corpus=_seen_from(folder, plan.text.corpus),
        expected_minutes=round(plan.best.minutes, 1) or 0.1,
        expected_bits_per_byte=(round(plan.best.outlook.low, 2), round(plan.best.outlook.high, 2)),
    )
    lines = [f"Made by `{_printable(made_by)}`, for this text and the machine that it ran on.", "", *summary(plan)]
    lines = [f"# {line}".rstrip() for line in lines]
    for table, keys in KEYS_OF_TABLE.items():
        values = {key: value for key in keys if (value := recipe.flat()[key]) != default[key]}
        if values:
            lines += ["", f"[{table}]"]
        for key, value in values.items():
            lines += [*_comment(why.get(key, "")), _assignment(key, value)]
    return "\n".join(lines) + "\n"


def _seen_from(folder: Path, corpus: str) -> str:
    """The corpus as a recipe in `folder` names it."""
    return corpus if corpus in NAMED_CORPORA or os.path.isabs(corpus) else os.path.relpath(corpus, folder)


def _printable(text: str) -> str:
    """The text on one line, as a comment needs it: a file's name may have control characters."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def summary(plan: Plan) -> Iterator[str]:
    """What was found, and what to expect, in lines."""
    best, text = plan.best, plan.text
    yield f"text:      {text.bytes:,} bytes, {plan.tokens:,} tokens"
    yield f"           a {NGRAM}-gram model of it needs {text.bits_per_byte:.2f} bits per byte"
    low, _, high = best.outlook
    yield f"expected:  {best.minutes:.1f} minutes, and {low:.2f} to {high:.2f} bits per byte on held-out text"
    if best.is_exhausted:
        yield "           more passes over this text would not help: more text would"
    yield "tried:     " + COLUMNS
    yield from (("       -> " if candidate is best else " " * 10) + _row(candidate) for candidate in plan.tried)


COLUMNS = "  weights   tokens/s     steps   passes   bits per byte"


def _row(candidate: Candidate) -> str:
    low, _, high = candidate.outlook
    return (
        f"{candidate.params / 1e6:>9.1f}M {candidate.tokens_per_second:>10,.0f} {candidate.recipe.train.steps:>9,} "
        f"{candidate.epochs:>8.1f}   {low:.2f} to {high:.2f}"
    )


def reasons(plan: Plan) -> dict[str, str]:
    """Why a key has its value, by key."""
    best, text = plan.best, plan.text
    recipe = best.recipe
    train, held_out = recipe.train, recipe.data.val_split
    evaluations = -(-train.steps // recipe.validation.val_every)
    size = f"of the sizes tried, the one with the lowest loss to expect in this time: {best.params:,} weights"
    return {
        "corpus": "prepared: its tokenizer comes with it" if text.tokenizer else "",
        "tokenizer": f"a token stands for {text.bytes / plan.tokens:.1f} bytes of this text",
        "val_split": (
            f"{held_out * text.bytes:,.0f} bytes at the end are never trained on: the loss on them is what counts"
        ),
        "embed_dim": size,
        "dropout": f"the training text is read {best.epochs:.1f} times; without it the model would learn it by heart",
        "init": "GPT-2's, with which such models learn faster than with torch's own",
        "steps": f"what fits into the time: {best.epochs:.2g} passes over the training text",
        "batch_size": (
            f"{train.batch_size * train.seq_len:,} tokens a step: small batches learn more from few tokens, large ones "
            "are steadier"
        ),
        "max_grad_norm": "a rare large gradient does no harm",
        "lr": "falls with the width of the model, and with small batches; the first key to try other values of",
        "schedule": "down to 0, where the loss falls most",
        "warmup": "a twentieth of the steps",
        "val_every": f"{evaluations} evaluations, to see where the held-out loss turns",
        "sampling": "all of the held-out text: no luck in the draw",
        "save_every": "what a power cut costs at most; Ctrl-C and SIGTERM save first",
        "save_best": "if the held-out loss turns, the best checkpoint is kept",
        "expected_minutes": "`mygpt train` says at its end how close these were",
    }


def _assignment(key: str, value: Any) -> str:
    if isinstance(value, tuple):  # which tomli_w would write over several lines
        return f"{key} = [{', '.join(map(str, value))}]"
    return tomli_w.dumps({key: value}).strip()


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH)]
