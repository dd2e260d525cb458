"""Chooses the recipe that should reach the lowest held-out loss on a text in a given time on this machine."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from mygpt.checks.speed import time_step
from mygpt.data.dataset import Dataset
from mygpt.errors import MygptError, OutOfMemoryError
from mygpt.model.gpt import GPT
from mygpt.planning.outlook import Outlook, predict
from mygpt.planning.text import Text
from mygpt.processes.machine import resolve_device
from mygpt.recipe.tables import Recipe
from mygpt.training.train import explain_out_of_memory

RESERVE = 0.05
"""Share of the time that is not planned for: machines get slower when others use them."""
EVALUATIONS = 10
"""In a run, evenly spaced: enough to see where the held-out loss turns."""
EVALUATING = 0.05
"""Largest share of the time for evaluations. If a tenth of the text would take longer, less is held out."""
EVALUATION_COST = 0.4
"""Time to evaluate a token, as a share of the time to train on it."""
HELD_OUT_WINDOWS = 8
"""Fewest windows in the held-out part."""

LEAST_STEPS = 100
"""A run of fewer steps has hardly begun when its rate falls."""
STEPS_FOR_A_MILLION = 2000
"""Steps of a run that trains on a million tokens."""
RATE = 0.77
"""Learning rate times width: 6e-3 for a width of 128."""
FULL_RATE_FROM = 1024
"""Tokens a step. With fewer, the rate is lower in proportion."""
MICRO_BATCH = 16_384
"""Most tokens in a forward pass: more do not make it faster, and need more memory."""
DROPOUT = 0.2
DROPOUT_FROM = 20
"""Passes over the training text from which dropout lowers the loss by more than its time would."""
MOST_PASSES = 60
"""Passes over the training text after which more of them hardly lower the loss."""
MOST_WEIGHTS = 10
"""Per byte of training text: larger models memorise it."""

FIRST_GUESS = 2e10
"""Floating-point operations a second, before anything was timed."""
TRYING = 0.7
"""Seconds for which a size is timed."""
TIMINGS = 4
"""Most timings of a size. Another one is made if the recipe for the measured speed has other batches."""
LONGEST_STEP = 1.0
"""Seconds. Of a larger batch, as much is timed as fits into this."""


class Size(NamedTuple):
    """The shape of a model, and the length of its windows."""

    embed_dim: int
    num_layers: int
    num_heads: int
    seq_len: int


SIZES = (
    Size(64, 4, 4, 128),
    Size(128, 4, 4, 128),
    Size(192, 6, 6, 128),
    Size(256, 6, 8, 256),
    Size(384, 6, 6, 256),
    Size(512, 8, 8, 512),
    Size(768, 12, 12, 512),
)
"""What is tried: 0.2 to 86 million weights, and the vocabulary's."""
SMALLEST = SIZES[0].embed_dim
"""Width of the model that is tried on any text."""


class Candidate(NamedTuple):
    """A recipe, and what it should come to."""

    recipe: Recipe
    params: int
    flops_per_token: int
    tokens_per_second: float
    passes: float
    """Over the training text."""
    minutes: float
    outlook: Outlook
    is_exhausted: bool
    """Whether time is left over, since more passes over the text would hardly help."""


class Plan(NamedTuple):
    """What was chosen, and from what."""

    best: Candidate
    tried: list[Candidate]
    text: Text


def choose(text: Text, minutes: float, report: Callable[[str], None]) -> Plan:
    """Time models of several sizes on this machine, and choose the one with the lowest loss to expect.

    A larger model learns more from each token and sees fewer of them. So the loss falls from size to size, and then
    rises: sizes are tried until it does, or until the text is too short for them. `report` is told what was timed.

    Raises:
        MygptError: not even the smallest fits into the time.
    """
    device = resolve_device("auto", "fp32")
    tried: list[Candidate] = []
    flops_per_second = FIRST_GUESS
    for size in SIZES:
        candidate = try_size(text, 60 * minutes * (1 - RESERVE), size, flops_per_second, device)
        if candidate is None:
            break
        tried.append(candidate)
        flops_per_second = candidate.flops_per_token * candidate.tokens_per_second
        report(f"timed {candidate.params / 1e6:.1f}M weights: {candidate.tokens_per_second:,.0f} tokens/s")
        if len(tried) > 1 and candidate.outlook.middle > tried[-2].outlook.middle:
            break
    if not tried:
        raise MygptError(f"--minutes {minutes:g}: too short for {LEAST_STEPS} steps of the smallest model; give more")
    return Plan(min(tried, key=lambda candidate: candidate.outlook.middle), tried, text)


def try_size(text: Text, seconds: float, size: Size, flops_per_second: float, device: torch.device) -> Candidate | None:
    """The candidate of this size, timed; None: the text, the time or the memory is too small for it.

    `flops_per_second` is how fast the machine probably is.
    """
    size = size._replace(seq_len=min(size.seq_len, text.tokens // (10 * HELD_OUT_WINDOWS)))
    with torch.device("meta"):  # without memory
        gpt = GPT(recipe_for(size, 1e6, text, 0.1).model, text.tokenizer.vocab_size)
    if size.embed_dim > SMALLEST and gpt.num_params() > MOST_WEIGHTS * text.bytes:
        return None
    speed = flops_per_second / gpt.flops_per_token(size.seq_len)
    timed: list[Recipe] = []
    dropout = 0.0
    while candidate := candidate_of(text, seconds, size, gpt, speed, dropout):
        # Dropout slows a step, so that fewer passes fit into the time. It stays all the same, or this would go on.
        if timed and candidate.passes > DROPOUT_FROM and not dropout:
            dropout = DROPOUT
            continue
        part = part_to_time(candidate.recipe, speed)
        if len(timed) == TIMINGS or (timed and _are_alike(part, timed[-1])):
            return candidate
        timed.append(part)
        try:
            speed = time_training(part, text, device)
        except OutOfMemoryError:
            return None
    return None


def _are_alike(one: Recipe, other: Recipe) -> bool:
    sizes = sorted((one.train.batch_size, other.train.batch_size))
    return one.model.dropout == other.model.dropout and sizes[1] <= 1.5 * sizes[0]


def candidate_of(text: Text, seconds: float, size: Size, gpt: GPT, speed: float, dropout: float) -> Candidate | None:
    """What this size comes to at `speed` tokens a second; None: the time is too short."""
    held_out, to_train = split_time(text.tokens, seconds, speed, size.seq_len)
    if to_train < LEAST_STEPS * size.seq_len:
        return None
    recipe = recipe_for(size, to_train, text, held_out, dropout)
    trained = recipe.train.steps * recipe.train.batch_size * size.seq_len
    in_training = (1 - held_out) * text.tokens
    bytes_per_token = text.bytes / text.tokens
    return Candidate(
        recipe=recipe,
        params=gpt.num_params(),
        flops_per_token=gpt.flops_per_token(size.seq_len),
        tokens_per_second=speed,
        passes=trained / in_training,
        minutes=(trained + EVALUATIONS * EVALUATION_COST * held_out * text.tokens) / speed / 60,
        outlook=predict(text.ngram_bits, gpt.num_params(), trained * bytes_per_token, in_training * bytes_per_token),
        is_exhausted=to_train >= MOST_PASSES * in_training,
    )


def split_time(tokens: int, seconds: float, speed: float, seq_len: int) -> tuple[float, float]:
    """The share of a text of so many tokens to hold out, and how many to train on, at `speed` tokens a second."""
    affordable = speed * seconds
    fewest = HELD_OUT_WINDOWS * seq_len / tokens
    most = EVALUATING * affordable / (EVALUATIONS * EVALUATION_COST) / tokens
    held_out = float(f"{min(0.1, max(fewest, most)):.2g}")
    to_train = affordable - EVALUATIONS * EVALUATION_COST * held_out * tokens
    return held_out, min(to_train, MOST_PASSES * (1 - held_out) * tokens)


def part_to_time(recipe: Recipe, speed: float) -> Recipe:
    """The recipe with as much of a batch as goes through the model at a time, or as `LONGEST_STEP` allows."""
    table = recipe.train
    affordable = max(1, int(LONGEST_STEP * speed / table.seq_len))
    batch_size = min(table.micro_batch_size or table.batch_size, affordable)
    return recipe.replace(batch_size=batch_size, micro_batch_size=None)


def time_training(recipe: Recipe, text: Text, device: torch.device) -> float:
    """Tokens a second in training, from a short try.

    Raises:
        OutOfMemoryError: it does not fit into memory.
    """
    ids = torch.from_numpy(text.ids)
    with explain_out_of_memory(recipe.train):
        timed = time_step(recipe, device, Dataset(text.tokenizer, ids, ids[:0], sha256=""), TRYING)
    return recipe.train.batch_size * recipe.train.seq_len / timed.seconds


def recipe_for(size: Size, to_train: float, text: Text, held_out: float, dropout: float = 0.0) -> Recipe:
    """The recipe that trains a model of this size on about `to_train` tokens of a text.

    The number of steps grows with the fourth root of what is trained on, so that batches grow with it: late in a long
    run, the noise of small ones would be in the way. The rate falls with the width, and with small batches.
    """
    steps = max(LEAST_STEPS, STEPS_FOR_A_MILLION * (to_train / 1e6) ** 0.25)
    batch_size = max(1, round(to_train / steps / size.seq_len))
    micro_batch_size = max(1, MICRO_BATCH // size.seq_len)
    if batch_size > micro_batch_size:
        batch_size = round(batch_size / micro_batch_size) * micro_batch_size
    batch_tokens = batch_size * size.seq_len
    steps = max(1, round(to_train / batch_tokens))
    val_every = -(-steps // EVALUATIONS)
    return Recipe.of(
        corpus=text.corpus,
        val_split=held_out,
        embed_dim=size.embed_dim,
        num_heads=size.num_heads,
        num_layers=size.num_layers,
        max_seq_len=size.seq_len,
        dropout=dropout,
        init="gpt2",
        activation="gelu-tanh",
        biases="none",
        steps=steps,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size if batch_size > micro_batch_size else None,
        seq_len=size.seq_len,
        max_grad_norm=1.0,
        print_every=val_every,
        lr=float(f"{RATE / size.embed_dim * min(1, batch_tokens / FULL_RATE_FROM):.2g}"),
        beta2=0.99,
        weight_decay=0.1,
        decay="matrices",
        schedule="linear",
        warmup=steps // 20,
        val_every=val_every,
        sampling="full",
        log_val_stderr=True,
        log_bits_per_byte=True,
        save_every=val_every,
        keep_last=1,
        save_best=True,
        **text.tokenizer_keys,
    )
