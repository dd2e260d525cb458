"""mygpt trains small GPTs from one TOML recipe and makes every number that it prints repeatable.

The public names are imported on first use, so that `import mygpt` and `mygpt --help` do not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_MODULE_OF = {
    "CharTokenizer": "data.tokenizer",
    "GPT": "model.gpt",
    "MygptError": "errors",
    "Recipe": "recipe.tables",
    "cosine_warmup_lr": "training.optim",
    "estimate_val_loss": "training.evaluate",
    "generate": "model.generation",
    "get_batch": "data.batches",
    "load_checkpoint": "runs.loading",
    "Run": "api",
    "load_recipe": "api",
    "plot": "api",
    "train": "api",
}

__all__ = [*_MODULE_OF]

if TYPE_CHECKING:
    from mygpt.api import Run as Run
    from mygpt.api import load_recipe as load_recipe
    from mygpt.api import plot as plot
    from mygpt.api import train as train
    from mygpt.data.batches import get_batch as get_batch
    from mygpt.data.tokenizer import CharTokenizer as CharTokenizer
    from mygpt.errors import MygptError as MygptError
    from mygpt.model.generation import generate as generate
    from mygpt.model.gpt import GPT as GPT
    from mygpt.recipe.tables import Recipe as Recipe
    from mygpt.runs.loading import load_checkpoint as load_checkpoint
    from mygpt.training.evaluate import estimate_val_loss as estimate_val_loss
    from mygpt.training.optim import cosine_warmup_lr as cosine_warmup_lr


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mygpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mygpt.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
