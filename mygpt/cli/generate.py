"""`mygpt generate`: continue a prompt with a trained model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mygpt.cli.command import command
from mygpt.errors import MygptError


@dataclass(frozen=True)
class Options:
    checkpoint: Path
    """A run directory (its newest step), a step directory or a model.safetensors."""
    prompt: str = "\n"
    """The text to continue."""
    max_new_tokens: int = 200
    """Characters to add."""
    temperature: float = 1.0
    """Below 1 safer, above 1 wilder; 0: always the most likely character."""
    top_k: int = 10
    """Choose among this many most likely characters; 0: among all."""
    seed: int = 0
    """Seed of the choices."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of matrix products."""


@command
def generate(options: Options) -> None:
    """Continue a prompt."""
    for name in ("max_new_tokens", "top_k", "seed"):
        if not 0 <= (value := getattr(options, name)) < 2**31:
            raise MygptError(f"--{name.replace('_', '-')}: got {value}, expected an integer from 0 to {2**31 - 1}")
    if not 0 <= options.temperature < float("inf"):
        raise MygptError(f"--temperature: got {options.temperature}, expected a number from 0 up")
    import torch

    from mygpt.model.generation import stream_text
    from mygpt.processes.machine import resolve_device
    from mygpt.runs.loading import load_checkpoint

    model, tokenizer, _ = load_checkpoint(options.checkpoint)
    device = resolve_device(options.device, options.precision)
    generator = torch.Generator().manual_seed(options.seed)
    choice = options.max_new_tokens, options.temperature, options.top_k, generator
    characters = stream_text(model.to(device), tokenizer, options.prompt, *choice)
    print(options.prompt, end="", flush=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        for character in characters:
            print(character, end="", flush=True)
    print()
