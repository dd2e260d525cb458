"""The held-out loss of a saved model: on the text that its recipe holds out, or on any other."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mygpt.data.dataset import Dataset
from mygpt.data.tokenizer import Tokenizer
from mygpt.errors import CorpusError, MismatchError
from mygpt.estimates import Estimate
from mygpt.processes.environment import choose_workers, no_launcher
from mygpt.processes.machine import resolve_device, set_up
from mygpt.recipe.tables import Recipe
from mygpt.runs.held_out import Evaluation
from mygpt.runs.initial import open_dataset
from mygpt.runs.records import perplexity
from mygpt.runs.run import RunDirectory
from mygpt.runs.schemas import ModelMetadata, RunInfo
from mygpt.runs.steps import read_metadata
from mygpt.training.evaluate import evaluate
from mygpt.training.gradient_sum import gradient_sum_for
from mygpt.training.parts import build_parts, open_accelerator


class Evaluated(NamedTuple):
    """The loss of a saved model on a text."""

    file: Path
    """The model file."""
    step: int
    """After which it was saved."""
    text: str
    """What it was evaluated on, for a reader."""
    tokens: int
    """Tokens that were predicted."""
    windows: int
    loss: Estimate
    """Nats per token."""
    bits_per_byte: Estimate | None
    """None if the tokens stand for no text."""
    bits_per_character: Estimate | None
    population: str
    """What the standard errors are about, in words."""

    @property
    def perplexity(self) -> float | None:
        return value if math.isfinite(value := perplexity(self.loss.mean)) else None


def evaluate_saved(recipe: Recipe, *, is_own_text: bool) -> Evaluated:
    """The held-out loss of the model that `recipe.train.init_from` names, on one process. Nothing is written.

    `is_own_text`: the text must be the one that the model's run held out.

    Raises:
        CorpusError, TokenizerError: the text cannot be read, or encoded with the model's tokenizer.
        MismatchError: it is not the text of the run any more.
        NonFiniteError: the loss is not finite.
    """
    file = Path(recipe.train.init_from or "")
    step = read_metadata(file, ModelMetadata).step
    runtime = recipe.runtime
    device = resolve_device(runtime.device, runtime.precision)
    try:
        dataset = open_dataset(recipe, only_held_out=True)
    except CorpusError as error:
        if not is_own_text or os.path.lexists(recipe.data.corpus):
            raise
        raise type(error)(f"{error}; say with --corpus where the text of the run is now") from None
    if is_own_text:
        check_text(dataset, RunDirectory(file.parent.parent).info, recipe)
    set_up(runtime, device)
    gradient_sum = gradient_sum_for(recipe, max_workers=choose_workers(runtime.threads, 1))
    with no_launcher(), open_accelerator(runtime, device, gradient_sum.accumulation_steps) as accelerator:
        parts = build_parts(recipe, accelerator, dataset, gradient_sum)
        evaluation = evaluate(parts, step)
    windows = evaluation.windows
    return Evaluated(
        file=file,
        step=step,
        text=describe_text(recipe),
        tokens=int(windows.tokens.sum()),
        windows=len(windows.tokens),
        loss=evaluation.loss,
        bits_per_byte=evaluation.bits_per_byte,
        bits_per_character=bits_per_character(evaluation, dataset),
        population=windows.population if is_own_text else "text like this one" if windows.consecutive else "this text",
    )


def check_text(dataset: Dataset, info: RunInfo, recipe: Recipe) -> None:
    """Check that the held-out text is that of the run.

    Raises:
        MismatchError: it is not.
    """
    key, found = ("val_corpus", dataset.held_out_sha256) if info.held_out_sha256 else ("corpus", dataset.sha256)
    if found != info.held_out_text:
        path = recipe.flat()[key]
        raise MismatchError(f"{path}: has changed since the model was trained; put it back, or give --corpus")


def describe_text(recipe: Recipe) -> str:
    data = recipe.data
    if data.val_corpus:
        return data.val_corpus
    parts = {"tokens": "the end", "documents": "documents at the end", "pieces": "pieces"}
    return f"{parts[data.hold_out]} of {data.corpus}, {data.val_split:g} of it, which was held out"


def bits_per_character(evaluation: Evaluation, dataset: Dataset) -> Estimate | None:
    """The loss in bits per character, as that per byte: a character counts to the token that has its first byte."""
    windows = evaluation.windows
    lengths = torch.from_numpy(character_lengths(dataset.tokenizer))
    counts = [
        int(lengths[dataset.val[start + 1 : start + 1 + tokens].int().cpu()].sum())
        for start, tokens in zip(windows.starts.tolist(), windows.tokens.tolist(), strict=True)
    ]
    by_character = windows._replace(bytes=np.array(counts, dtype=np.int32))
    return replace(evaluation, windows=by_character).bits_per_byte


def character_lengths(tokenizer: Tokenizer) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How many characters begin in each token, (vocab_size,); in a special token none."""
    lengths = np.array([sum(byte & 0xC0 != 0x80 for byte in token) for token in tokenizer.tokens], dtype=np.int64)
    lengths[list(tokenizer.special_ids)] = 0
    return lengths
