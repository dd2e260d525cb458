"""The names that the chapters of a from-scratch GPT course import, with the signatures that they use.

A thin layer over mygpt's own model, loss, schedule and tokenizer: a chapter's loop gives the numbers of `mygpt train`,
and each reads the other's checkpoints. Only the signatures differ: the model returns (logits, loss), ids are a tensor,
and random numbers come from torch's global generator.

Suffixes name the axes of a tensor: B batch, T tokens, V vocabulary, N any number.
"""

import json
import random
from collections.abc import Iterable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from mygpt.data.batches import get_batch
from mygpt.data.tokenizer import CharTokenizer as PlainTokenizer
from mygpt.errors import CheckpointError, NonFiniteError, TokenizerError
from mygpt.model import gpt as plain
from mygpt.model.generation import sample_token, stream_tokens
from mygpt.processes.machine import resolve_device
from mygpt.recipe.tables import ModelTable, build_recipe, check_recipe
from mygpt.runs import loading, saver
from mygpt.runs.files import MANIFEST_FILE, METADATA_KEY, explain_disk_error, replace_bytes
from mygpt.training import evaluate
from mygpt.training.optim import cosine_warmup_lr

__all__ = [
    "GPT",
    "CharTokenizer",
    "cosine_warmup_lr",
    "estimate_val_loss",
    "generate",
    "get_batch",
    "load_checkpoint",
    "pick_device",
    "save_checkpoint",
    "set_seed",
]

DEFAULTS = ModelTable()


class CharTokenizer(PlainTokenizer):
    """mygpt's character tokenizer, made from its characters; ids are tensors."""

    def __init__(self, chars: Iterable[str]):
        super().__init__("".join(chars))
        self.chars = list(self.vocab)
        """Its characters, in code point order; a token's id is its index here."""

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer whose vocabulary is the sorted distinct characters of `text`; TokenizerError if it is empty."""
        return cls(text)

    def encode(self, text: str, name: str = "text") -> torch.Tensor:  # type: ignore[override]
        """The ids of a text's characters, int64 (len(text),); see mygpt.CharTokenizer."""
        return torch.from_numpy(super().encode(text, name)).long()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the characters to `path`, as JSON."""
        Path(path).write_text(json.dumps({"chars": self.chars}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "CharTokenizer":
        """The tokenizer that `save` wrote.

        Raises:
            TokenizerError: `save` did not write that file.
        """
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8"))["chars"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TokenizerError(f"{path}: not a tokenizer that was saved here ({error})") from None


class GPT(plain.GPT):
    """mygpt's model, made from plain arguments and returning (logits, loss).

    The arguments are the keys of a recipe's [model] table. Weights are drawn from torch's global generator; their names
    and values are those of `mygpt train` with the same seed.

    Raises:
        RecipeError: a recipe may not have that value.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = DEFAULTS.embed_dim,
        num_heads: int = DEFAULTS.num_heads,
        num_layers: int = DEFAULTS.num_layers,
        max_seq_len: int = DEFAULTS.max_seq_len,
        dropout: float = DEFAULTS.dropout,
        **keys: Any,
    ):
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_layers": num_layers, "max_seq_len": max_seq_len}
        # Relations are checked in whole recipes; a seq_len that fits leaves those of the model.
        recipe = build_recipe(
            {"model": {**sizes, "dropout": dropout, **keys}, "train": {"seq_len": max_seq_len}}, source="GPT"
        )
        check_recipe(recipe, source="GPT")
        super().__init__(recipe.model, vocab_size)
        self.embed_dim, self.num_heads, self.num_layers = embed_dim, num_heads, num_layers
        self.max_seq_len = max_seq_len

    def forward(  # type: ignore[override]
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (B, T, V) and, with targets, their mean cross-entropy in nats (a scalar), else None.

        `tokens_BT` and `targets_BT` are int64 token ids; T is at most max_seq_len.

        Raises:
            ValueError: the tokens have no batch axis, or are too many.
        """
        if tokens_BT.dim() != 2:
            shape = tuple(tokens_BT.shape)
            raise ValueError(f"got ids of shape {shape}, expected (batch, tokens): use ids.unsqueeze(0)")
        if not 0 < tokens_BT.shape[1] <= self.max_seq_len:
            raise ValueError(f"got {tokens_BT.shape[1]} tokens, expected from 1 to max_seq_len = {self.max_seq_len}")
        logits_BTV = super().forward(tokens_BT)
        return logits_BTV, None if targets_BT is None else plain.next_token_loss(logits_BTV, targets_BT)


def estimate_val_loss(
    model: nn.Module, val_data: torch.Tensor, batch_size: int, seq_len: int, n_eval_batches: int = 10
) -> float:
    """See mygpt.estimate_val_loss; `model` may also return (logits, loss)."""
    return evaluate.estimate_val_loss(_LogitsOnly(model), val_data, batch_size, seq_len, n_eval_batches)


def generate(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> torch.Tensor:
    """The prompts (B, T) and `max_new_tokens` ids more, int64 (B, T + max_new_tokens).

    Each is drawn from the softmax of logits / `temperature` (0: the most likely one) over the `top_k` most likely ids
    (None: all), with torch's global generator. The model sees the last max_seq_len ids, and is left in the mode in
    which it was.

    Raises:
        ValueError: the prompts have no batch axis, or no ids.
    """
    limit = _uncompiled(model).config.max_seq_len
    sample = partial(sample_token, temperature=temperature, top_k=top_k or 0, generator=None)
    drawn = stream_tokens(_LogitsOnly(model), prompt_ids, limit, max_new_tokens, sample)
    return torch.cat([prompt_ids, *(ids_B1.to(prompt_ids.device) for ids_B1 in drawn)], dim=1)


def set_seed(seed: int = 0) -> None:
    """Seed torch's generators (of all devices), numpy's and Python's.

    Raises:
        ValueError: the seed is not from 0 to 2**32 - 1.
    """
    np.random.seed(seed)  # first, since it alone refuses a seed
    random.seed(seed)
    torch.manual_seed(seed)


def pick_device(arg: str = "auto") -> torch.device:
    """The device of that name; "auto": cuda if the machine has it, else mps, else cpu.

    Raises:
        LaunchError: the machine does not have it.
    """
    return resolve_device(arg, "fp32")


def save_checkpoint(model: nn.Module, tokenizer: PlainTokenizer, path: str | PathLike[str], step: int = 0) -> None:
    """Save a model as the safetensors file `path`, which `mygpt generate --checkpoint` also reads.

    The file holds weights (fp32), architecture, vocabulary and step, but not the optimizer's state. Missing folders are
    made; an existing file is replaced once the new one is complete. A model compiled by torch.compile is saved as the
    model inside it.

    Raises:
        CheckpointError: the path is a folder or a file of a run, or the tokenizer is not the model's.
        DiskError: the disk refused it; an existing file is untouched.
        NonFiniteError: a weight is infinite or not a number.
    """
    path, gpt = Path(path), _uncompiled(model)
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder; expected the path of a file, such as {path / 'mine.safetensors'}")
    if (path.parent / MANIFEST_FILE).exists():
        raise CheckpointError(f"{path}: its folder belongs to a run of `mygpt train`; save into another")
    if tokenizer.vocab_size != gpt.vocab_size:
        raise CheckpointError(
            f"{path}: not saved: the tokenizer has {tokenizer.vocab_size} characters, the model a vocab_size of "
            f"{gpt.vocab_size}; expected the tokenizer with which it was trained"
        )
    weights = {name: weight.to("cpu", torch.float32).contiguous() for name, weight in gpt.state_dict().items()}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise NonFiniteError(f"{path}: weights of {name} are not finite; not saved; lower lr or clip gradients")
    metadata = saver.model_metadata(gpt.config, tokenizer, step)
    with explain_disk_error("{path}: cannot be saved: {error}; what was saved before is as it was", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, save(weights, {METADATA_KEY: metadata.to_json()}))


def load_checkpoint(path: str | PathLike[str]) -> tuple[GPT, CharTokenizer]:
    """Load (model, tokenizer) from a file of `save_checkpoint`, or from a run or step directory of `mygpt train`.

    The model is on the CPU in eval mode: call its `train` to continue training, and `to` for another device.

    Raises:
        CheckpointError: there is none, or its tokens are not characters.
        DamagedCheckpointError, MismatchError: see mygpt.load_checkpoint.
    """
    saved, tokenizer, _ = loading.load_checkpoint(Path(path))
    if not isinstance(tokenizer, PlainTokenizer):
        raise CheckpointError(f"{path}: its tokenizer is {tokenizer.metadata.type!r}; use mygpt.load_checkpoint")
    with torch.device("meta"):
        model = GPT(saved.vocab_size, **saved.config.model_dump())
    model.load_state_dict(saved.state_dict(), assign=True)
    return model.eval(), CharTokenizer(tokenizer.vocab)


class _LogitsOnly(nn.Module):
    """Wraps a model that may return (logits, loss), so that it returns the logits, as mygpt's own functions expect."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training  # callers restore the mode of the wrapper, and by it the model's

    def forward(self, tokens_BT: torch.Tensor) -> Any:
        output = self.model(tokens_BT)
        return output[0] if isinstance(output, tuple) else output


def _uncompiled(model: nn.Module) -> plain.GPT:
    gpt = getattr(model, "_orig_mod", model)  # the model inside what torch.compile returns
    if not isinstance(gpt, plain.GPT):
        raise TypeError(f"model: got {type(gpt).__name__}, expected a GPT")
    return gpt
