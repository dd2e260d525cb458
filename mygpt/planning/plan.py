"""Chooses the recipe that should reach the lowest held-out loss on a text in a given time on this machine."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mygpt.checks.speed import time_step
from mygpt.data.dataset import Dataset, make_tokenizer
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
"""Share of the time for evaluations, at most, where less than a tenth of the text is held out for it."""
FORWARD = 0.4
"""Share of the time of training on some tokens in which as many are evaluated."""
HELD_OUT_WINDOWS = 8
"""At least, in a tenth of the text."""

LEAST_STEPS = 100
"""A run of fewer steps has hardly begun when its rate falls."""
STEPS = 2000
"""Of a run that trains on a million tokens."""
RATE = 0.77
"""Learning rate times width: 6e-3 for a width of 128."""
FULL_RATE_FROM = 1024
"""Tokens a step. With fewer, the rate is lower in proportion."""
MICRO_BATCH = 16_384
"""Tokens in a forward pass, at most: more do not make it faster, and need more memory."""
DROPOUT = 0.2
DROPOUT_FROM = 8
"""Passes over the training text from which dropout helps more than it slows down."""
MOST_EPOCHS = 60
"""Passes over the training text after which more of them hardly lower the loss."""

FIRST_GUESS = 2e10
"""Floating-point operations a second, before anything was timed."""
TRYING = 0.7
"""Seconds for which a size is timed."""
TRIED_STEP = 1.0
"""Seconds of a step that is timed, at most: a smaller batch is timed in place of one that takes longer."""


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


class Candidate(NamedTuple):
    """A recipe, and what it should come to."""

    recipe: Recipe
    params: int
    tokens_per_second: float
    epochs: float
    """Passes over the training text."""
    minutes: float
    outlook: Outlook
    is_exhausted: bool
    """Whether time is left over, since more passes over the text would hardly help."""


class Plan(NamedTuple):
    """What was chosen, and from what."""

    best: Candidate
    tried: list[Candidate]
    text: Text
    tokens: int
    """Of the whole text; estimated, unless it was looked at as a whole."""


class Task(NamedTuple):
    """What all sizes are tried on."""

    text: Text
    tokens: int
    sample: Dataset
    seconds: float
    keys: dict[str, Any]
    device: torch.device


def choose(text: Text, minutes: float, keys: dict[str, Any], say: Callable[[str], None]) -> Plan:
    """Time models of several sizes on this machine, and choose the one with the lowest loss to expect.

    `keys` are those of the recipe that name the tokenizer. `say` is told what was timed. A larger model learns more
    from each token and sees fewer of them, so that the loss falls from size to size, and then rises: sizes are tried
    until it does.

    Raises:
        MygptError: not even the smallest fits into the time, or the text is too short.
    """
    tokenizer = text.tokenizer or make_tokenizer(Recipe.of(**keys).data, text.sample)
    ids = torch.from_numpy(tokenizer.encode(text.sample))
    sample = Dataset(tokenizer, ids, ids[:0], sha256="")
    tokens = round(len(ids) * text.bytes / len(text.sample.encode()))
    keys = keys | {"corpus": text.corpus}
    task = Task(text, tokens, sample, 60 * minutes * (1 - RESERVE), keys, resolve_device("auto", "fp32"))
    tried: list[Candidate] = []
    flops_per_second = FIRST_GUESS
    for size in SIZES:
        candidate, flops_per_second = attempt(task, size, flops_per_second)
        if candidate is None:
            break
        tried.append(candidate)
        say(f"timed {candidate.params / 1e6:.1f}M weights: {candidate.tokens_per_second:,.0f} tokens/s")
        if len(tried) > 1 and candidate.outlook.middle > tried[-2].outlook.middle:
            break
    if not tried:
        raise MygptError(f"--minutes {minutes:g}: too short for {LEAST_STEPS} steps of the smallest model; give more")
    return Plan(min(tried, key=lambda candidate: candidate.outlook.middle), tried, text, tokens)


def attempt(task: Task, size: Size, flops_per_second: float) -> tuple[Candidate | None, float]:
    """Time a model of this size, given how fast the last one was; returns how fast this one is, too.

    None: the time or the memory is too small for it.
    """
    size = size._replace(seq_len=min(size.seq_len, task.tokens // (10 * HELD_OUT_WINDOWS)))
    recipe = recipe_for(size, 1e6, task.tokens, 0.1, task.keys)
    with torch.device("meta"):  # without memory
        gpt = GPT(recipe.model, task.sample.tokenizer.vocab_size)
    flops = gpt.flops_per_token(size.seq_len)
    speed, timed_with = flops_per_second / flops, None
    for _ in range(3):
        held_out, to_train = share(task, speed, size.seq_len)
        if to_train < LEAST_STEPS * size.seq_len:
            return None, flops_per_second
        recipe = recipe_for(size, to_train, task.tokens, held_out, task.keys)
        if recipe.model.dropout == timed_with:
            break
        timed_with = recipe.model.dropout  # which takes time
        try:
            speed = time_training(recipe, task, speed)
        except OutOfMemoryError:
            return None, flops_per_second
    trained = recipe.train.steps * recipe.train.batch_size * size.seq_len
    evaluated = EVALUATIONS * held_out * task.tokens * FORWARD
    text, in_training = task.text, (1 - held_out) * task.tokens
    bytes_per_token = text.bytes / task.tokens
    return (
        Candidate(
            recipe=recipe,
            params=gpt.num_params(),
            tokens_per_second=speed,
            epochs=trained / in_training,
            minutes=(trained + evaluated) / speed / 60,
            outlook=predict(
                text.bits_per_byte, gpt.num_params(), trained * bytes_per_token, in_training * bytes_per_token
            ),
            is_exhausted=trained > 0.99 * MOST_EPOCHS * in_training,
        ),
        speed * flops,
    )


def share(task: Task, speed: float, seq_len: int) -> tuple[float, float]:
    """The share of the text to hold out, and how many tokens to train on, at so many tokens a second."""
    affordable = speed * task.seconds
    least = HELD_OUT_WINDOWS * seq_len / task.tokens
    held_out = EVALUATING * affordable / (EVALUATIONS * FORWARD) / task.tokens
    held_out = float(f"{min(0.1, max(least, held_out)):.2g}")
    to_train = affordable - EVALUATIONS * FORWARD * held_out * task.tokens
    return held_out, min(to_train, MOST_EPOCHS * (1 - held_out) * task.tokens)


def time_training(recipe: Recipe, task: Task, guess: float) -> float:
    """Tokens a second in training, from a short try; `guess` is about how many."""
    table = recipe.train
    affordable = max(1, int(TRIED_STEP * guess / table.seq_len))
    tried = recipe.replace(batch_size=min(table.batch_size, affordable), micro_batch_size=None)
    with explain_out_of_memory(tried.train):
        timed = time_step(tried, task.device, task.sample, TRYING)
    return tried.train.batch_size * table.seq_len / timed.seconds


def recipe_for(size: Size, to_train: float, tokens: int, held_out: float, keys: dict[str, Any]) -> Recipe:
    """The recipe that trains a model of this size on about `to_train` tokens of a text that has `tokens`.

    The number of steps grows with the fourth root of what is trained on, so that batches grow with it: late in a long
    run, the noise of small ones would be in the way. The rate falls with the width, and with small batches.
    """
    steps = max(LEAST_STEPS, STEPS * (to_train / 1e6) ** 0.25)
    batch_size = max(1, round(to_train / steps / size.seq_len))
    micro_batch_size = max(1, MICRO_BATCH // size.seq_len)
    if batch_size > micro_batch_size:
        batch_size = round(batch_size / micro_batch_size) * micro_batch_size
    batch_tokens = batch_size * size.seq_len
    steps = max(1, round(to_train / batch_tokens))
    val_every = -(-steps // EVALUATIONS)
    return Recipe.of(
        val_split=held_out,
        embed_dim=size.embed_dim,
        num_heads=size.num_heads,
        num_layers=size.num_layers,
        max_seq_len=size.seq_len,
        dropout=DROPOUT if to_train > DROPOUT_FROM * (1 - held_out) * tokens else 0.0,
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
        **keys,
    )
