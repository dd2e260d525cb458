"""mygpt trains small GPTs from one TOML recipe and makes every number that it prints repeatable.

The names below are imported on first use, so that `import mygpt` and `mygpt --help` do not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_MODULE_OF = {
    "CharTokenizer": "tokenizer",
    "GPT": "model",
    "MygptError": "errors",
    "Recipe": "recipe",
    "cosine_warmup_lr": "optim",
    "estimate_val_loss": "evaluate",
    "generate": "generation",
    "get_batch": "data",
    "load_checkpoint": "checkpoint",
    "load_recipe": "recipe",
    "train": "loop",
}

if TYPE_CHECKING:
    from mygpt.checkpoint import load_checkpoint
    from mygpt.data import get_batch
    from mygpt.errors import MygptError
    from mygpt.evaluate import estimate_val_loss
    from mygpt.generation import generate
    from mygpt.loop import train
    from mygpt.model import GPT
    from mygpt.optim import cosine_warmup_lr
    from mygpt.recipe import Recipe, load_recipe
    from mygpt.tokenizer import CharTokenizer

__all__ = [
    "GPT",
    "CharTokenizer",
    "MygptError",
    "Recipe",
    "cosine_warmup_lr",
    "estimate_val_loss",
    "generate",
    "get_batch",
    "load_checkpoint",
    "load_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mygpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mygpt.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
