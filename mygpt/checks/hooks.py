"""Hooks that see every value of a training step in the order in which the model computes it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mygpt.model.gpt import GPT

See = Callable[[str, torch.Tensor], None]
"""Takes the name of a value and the value."""


def watch(gpt: GPT, see: See) -> None:
    """Show `see` every module's output on the way forward, and every gradient on the way back, in the order made."""
    for name, module in gpt.named_modules():
        module.register_forward_hook(partial(_see_output, see, name or "loss"))
    for name, parameter in gpt.named_parameters():
        parameter.register_hook(partial(see, f"gradient with respect to the weights of {name}"))


def _see_output(see: See, name: str, _module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
    see(name, output.detach())
    if output.requires_grad:
        output.register_hook(partial(see, f"gradient with respect to the output of {name}"))
