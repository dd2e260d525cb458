"""The names of a from-scratch GPT course, in the forms in which its chapters call them.

A thin layer over mygpt's own model, loss, schedule and tokenizer: a chapter's loop computes what `mygpt train`
computes, and both read each other's checkpoints. Only the forms differ: the model returns (logits, loss), ids are a
tensor, and random numbers come from torch's global generator.

Suffixes name the axes of a tensor: B batch, T tokens, V vocabulary, N any number.
"""

import json
import random
from collections.abc import Iterable
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from mygpt.data.batches import get_batch
from mygpt.data.tokenizer import CharTokenizer as PlainTokenizer
from mygpt.errors import CheckpointError, DamagedCheckpointError, NonFiniteError, TokenizerError
from mygpt.model import gpt as plain
from mygpt.model.generation import sample_token
from mygpt.processes.machine import resolve_device
from mygpt.recipe.tables import ModelTable, build_recipe, check_recipe
from mygpt.runs import loading, saver
from mygpt.runs.files import MANIFEST_FILE, METADATA_KEY, sync
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
    """mygpt's character tokenizer, made from its characters, whose ids are tensors."""

    def __init__(self, chars: Iterable[str]):
        super().__init__("".join(chars))
        self.chars = list(self.vocab)
        """Its characters, in code point order; a token's id is its place here."""

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer whose vocabulary is the sorted distinct characters of `text`.

        Raises:
            TokenizerError: the text is empty.
        """
        return cls(text)

    def encode(self, text: str, what: str = "text") -> torch.Tensor:  # type: ignore[override]
        """The ids of a text's characters, int64 (len(text),); `what` names the text in an error.

        Raises:
            TokenizerError: a character is not in the vocabulary; names it and its position (0-based).
        """
        return torch.from_numpy(super().encode(text, what)).long()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the characters to `path`, as JSON."""
        Path(path).write_text(json.dumps({"chars": self.chars}), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "CharTokenizer":
        """The tokenizer that `save` wrote.

        Raises:
            TokenizerError: the file is not one that it wrote.
        """
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8"))["chars"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TokenizerError(f"{path}: not a tokenizer that was saved here ({error})") from None


class GPT(plain.GPT):
    """mygpt's model, made from plain arguments and returning (logits, loss).

    Sizes are in tokens (`max_seq_len`) and numbers (`embed_dim`), `dropout` is a probability. Weights are drawn from
    torch's global generator and have the names and values of `mygpt train` with the same seed.

    Raises:
        RecipeError: a value that a recipe may not have either.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int = DEFAULTS.embed_dim,
        num_heads: int = DEFAULTS.num_heads,
        num_layers: int = DEFAULTS.num_layers,
        max_seq_len: int = DEFAULTS.max_seq_len,
        dropout: float = DEFAULTS.dropout,
    ):
        table = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "max_seq_len": max_seq_len,
            "dropout": dropout,
        }
        # Relations are checked of whole recipes; a window that fits leaves those of the model.
        recipe = build_recipe({"model": table, "train": {"seq_len": max_seq_len}}, source="GPT")
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
            raise ValueError(
                f"got ids of shape {tuple(tokens_BT.shape)}, expected (batch, tokens): use ids.unsqueeze(0)"
            )
        if not 0 < tokens_BT.shape[1] <= self.max_seq_len:
            raise ValueError(f"got {tokens_BT.shape[1]} tokens, expected from 1 to max_seq_len = {self.max_seq_len}")
        logits_BTV = super().forward(tokens_BT)
        return logits_BTV, None if targets_BT is None else plain.next_token_loss(logits_BTV, targets_BT)


def estimate_val_loss(
    model: nn.Module, val_data: torch.Tensor, batch_size: int, seq_len: int, n_eval_batches: int = 10
) -> float:
    """The mean loss in nats over random batches of `val_data` (N,), drawn from torch's global generator.

    No gradients are kept, and the model is left in the mode in which it was.
    """
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
    device, was_training = prompt_ids.device, model.training
    logits_only, limit = _LogitsOnly(model), _uncompiled(model).config.max_seq_len
    ids_BT = prompt_ids
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(max_new_tokens):
                logits_BV = logits_only(ids_BT[..., -limit:])[:, -1].float().cpu()
                drawn = [sample_token(logits_V, temperature, top_k or 0, None) for logits_V in logits_BV]
                ids_BT = torch.cat([ids_BT, torch.stack(drawn).to(device)], dim=1)
    finally:
        model.train(was_training)
    return ids_BT


def set_seed(seed: int = 0) -> None:
    """Seed torch's generators (of all devices), numpy's and Python's.

    Raises:
        ValueError: the seed is not from 0 to 2**32 - 1.
    """
    np.random.seed(seed)  # first, since it alone refuses a seed
    random.seed(seed)
    torch.manual_seed(seed)


def pick_device(arg: str = "auto") -> torch.device:
    """The device of that name; "auto": cuda where there is one, else mps, else cpu.

    Raises:
        LaunchError: it is not there.
    """
    return resolve_device(arg, "fp32")


def save_checkpoint(model: nn.Module, tokenizer: PlainTokenizer, path: str | PathLike[str], step: int = 0) -> None:
    """Save a model as the safetensors file `path`, which `mygpt generate --checkpoint` reads, too.

    The file holds weights (fp32), architecture, vocabulary and step, but not the optimizer's state. Missing folders are
    made; a file that is there is replaced once the new one is whole. Of a model that torch.compile returned, the one
    inside is saved.

    Raises:
        CheckpointError: the path is a folder or a file of a run, or the tokenizer is not the model's.
        DamagedCheckpointError: the disk refused it; what was saved before is untouched.
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
    partial = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # a leftover could be a link
        partial.write_bytes(save(weights, {METADATA_KEY: metadata.to_json()}))
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DamagedCheckpointError(f"{path}: cannot be saved: {error}; what was saved before is as it was") from error


def load_checkpoint(path: str | PathLike[str]) -> tuple[GPT, CharTokenizer]:
    """Load (model, tokenizer) from what `save_checkpoint` or `mygpt train` saved: a file, a step or a run.

    The model is on the CPU in eval mode: call its `train` before training on, and `to` for another device.

    Raises:
        CheckpointError: there is no such checkpoint.
        DamagedCheckpointError: it cannot be read, or is not what was saved.
    """
    saved, tokenizer, _ = loading.load_checkpoint(Path(path))
    with torch.device("meta"):
        model = GPT(saved.vocab_size, **saved.config.model_dump())
    model.load_state_dict(saved.state_dict(), assign=True)
    return model.eval(), CharTokenizer(tokenizer.vocab)


class _LogitsOnly(nn.Module):
    """A model that returns (logits, loss), as mygpt's own functions call a model: for its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training  # the mode that will be restored

    def forward(self, tokens_BT: torch.Tensor) -> Any:
        output = self.model(tokens_BT)
        return output[0] if isinstance(output, tuple) else output


def _uncompiled(model: nn.Module) -> plain.GPT:
    gpt = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not isinstance(gpt, plain.GPT):
        raise TypeError(f"model: got {type(gpt).__name__}, expected a GPT")
    return gpt
