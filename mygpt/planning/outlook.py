"""Predicts the held-out loss of a model from its size and from the text, by a formula fitted to measured runs."""

import math
from typing import NamedTuple

PARAMS_POWER, TEXT_POWER = 0.34, 0.28
"""Source: Hoffmann et al., "Training compute-optimal large language models" (2022), table A.3."""
MOST_REPEATS = 15.4
"""How many passes over a text further ones are worth together. Source: Muennighoff et al., "Scaling data-constrained
language models" (2023), equation 5."""


class Constants(NamedTuple):
    """Of the terms of the formula, by which a model's loss is divided by that of an n-gram model of the same text."""

    floor: float
    params: float
    text: float


CONSTANTS = Constants(0.523, 0.062, 0.477)
"""Fitted by scripts/benchmarks/outlook.py."""
SPREAD = 0.061
"""Root mean square of the logarithm of the measured over the predicted loss, for texts that the constants were not
fitted to."""

UNIFORM = 8.0
"""Bits per byte of a model that has learned nothing, and takes each byte to be as likely as the others."""


class Outlook(NamedTuple):
    """A held-out loss to expect, in bits per byte, and the ends of the range in which it should lie."""

    low: float
    middle: float
    high: float


def predict(ngram_bits: float, params: float, trained: float, unique: float) -> Outlook:
    """The loss to expect of a model with `params` weights; the range is two spreads to either side.

    `ngram_bits` is what an n-gram model needs per byte of the text's end, `trained` how many bytes are trained on,
    `unique` how many of these there are in the training text.
    """
    parts = zip(CONSTANTS, terms(params, trained, unique), strict=True)
    middle = ngram_bits * sum(constant * term for constant, term in parts)
    ends = (middle * math.exp(sign * 2 * SPREAD) for sign in (-1, 0, 1))
    return Outlook(*(min(end, UNIFORM) for end in ends))


def terms(params: float, trained: float, unique: float) -> tuple[float, float, float]:
    """What the constants are multiplied with: nothing, millions of weights, and megabytes of text.

    Text that is read again counts less and less.
    """
    repeats = max(0.0, trained / unique - 1)
    worth = min(trained, unique) + unique * MOST_REPEATS * (1 - math.exp(-repeats / MOST_REPEATS))
    return 1.0, (params / 1e6) ** -PARAMS_POWER, (worth / 1e6) ** -TEXT_POWER
