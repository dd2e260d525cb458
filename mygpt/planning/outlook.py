"""Predicts the held-out loss of a model from its size and from the text, by a formula fitted to measured runs."""

import math
from typing import Any, NamedTuple


class Constants(NamedTuple):
    """Of the formula in `ratio`."""

    floor: float
    of_params: float
    params_power: float
    of_text: float
    text_power: float
    repeats: float
    """Passes over a text after which further ones teach little."""


CONSTANTS = Constants(0.5, 0.15, 0.3, 0.5, 0.3, 15.0)
SPREAD = 0.05


class Outlook(NamedTuple):
    """A held-out loss to expect, in bits per byte, and the ends of the range in which it should lie."""

    low: float
    middle: float
    high: float


def predict(ngram_bits: float, params: float, trained: float, unique: float) -> Outlook:
    """The loss to expect of a model with `params` weights.

    `ngram_bits` is what an n-gram model needs per byte of the text's end, `trained` how many bytes are trained on,
    `unique` how many of these there are in the training text.
    """
    middle = ngram_bits * ratio(params, trained, unique)
    return Outlook(middle * math.exp(-2 * SPREAD), middle, middle * math.exp(2 * SPREAD))


def ratio(params: float, trained: float, unique: float, constants: Constants = CONSTANTS) -> Any:
    """A model's loss, divided by the n-gram model's: a number, or a tensor if the constants are (see benchmarks).

    Source: Hoffmann et al., "Training compute-optimal large language models" (2022), equation 2; for text that is read
    more than once, Muennighoff et al., "Scaling data-constrained language models" (2023), equation 5.
    """
    again = max(0.0, trained / unique - 1)
    worth = min(trained, unique) + unique * constants.repeats * (1 - math.e ** (-again / constants.repeats))
    of_params = constants.of_params * (params / 1e6) ** -constants.params_power
    return constants.floor + of_params + constants.of_text * (worth / 1e6) ** -constants.text_power
