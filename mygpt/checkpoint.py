"""Checkpoints: the weights of a step, saved so that a step directory that has its name is whole."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mygpt.errors import DamagedCheckpointError, NonFiniteError
from mygpt.model import GPT
from mygpt.recipe import ModelTable
from mygpt.rundir import (
    LATEST_FILE,
    METADATA_KEY,
    MODEL_FILE,
    ModelMetadata,
    TokenizerMetadata,
    find_model_file,
    read_metadata,
)
from mygpt.tokenizer import CharTokenizer


class Checkpoint(NamedTuple):
    """A model to generate from, with the tokenizer of its corpus and the step after which it was saved."""

    model: GPT
    tokenizer: CharTokenizer
    step: int


def save_checkpoint(
    run: Path, weights: Mapping[str, torch.Tensor], config: ModelTable, tokenizer: CharTokenizer, step: int
) -> Path:
    """Save weights as `run`/step-NNNNNN and name it in `latest`; returns its model file.

    It is written under another name, synced to the disk and renamed when it is complete.

    Raises:
        DamagedCheckpointError: the disk refused it; what was saved before is untouched.
        NonFiniteError: a weight is infinite or not a number.
    """
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"step {step}: weights of {name} are not finite; not saved; lower lr or clip gradients"
            )
    metadata = ModelMetadata(model=config, step=step, tokenizer=TokenizerMetadata(vocab=tokenizer.vocab))
    target = run / f"step-{step:06d}"
    partial = run / f".tmp-{target.name}"
    try:
        partial.mkdir()
        file = partial / MODEL_FILE
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, file, {METADATA_KEY: metadata.to_json()})
        _apply_umask(file)
        _sync(file)
        _sync(partial)
        partial.rename(target)
        _sync(run)
        _replace_text(run / LATEST_FILE, target.name)
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{target}: cannot be saved: {error}") from error
    return target / MODEL_FILE


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Load the model of a run directory, step directory or model file, on the CPU in eval mode.

    Raises:
        CheckpointError: there is none.
        DamagedCheckpointError: it cannot be read, or its tensors are not those of its architecture.
    """
    file = find_model_file(Path(path))
    metadata = read_metadata(file)
    tokenizer, config = CharTokenizer(metadata.tokenizer.vocab), metadata.model
    try:
        with safe_open(file, framework="pt") as tensors:
            weights = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{file}: damaged: {error}") from None
    # Before building what the metadata asks for: a damaged number of layers could take hours to build.
    if config.embed_dim % config.num_heads or config.num_layers > len(weights):
        raise DamagedCheckpointError(f"{file}: damaged: its metadata describes no model with these weights")
    with torch.device("meta"):
        model = GPT(config, tokenizer.vocab_size)
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or weights[name].shape != expected.get(name) or weights[name].dtype != torch.float32:
            raise DamagedCheckpointError(f"{file}: damaged: {name} is missing, or not of the architecture's shape")
        if not torch.isfinite(weights[name]).all():
            raise DamagedCheckpointError(f"{file}: damaged: {name} has values that are infinite or not numbers")
    model.load_state_dict(weights, assign=True)
    return Checkpoint(model.eval(), tokenizer, metadata.step)


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".tmp-{path.name}")
    partial.write_text(text + "\n", encoding="utf-8")
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Have the system write a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _apply_umask(file: Path) -> None:
    """safetensors makes files readable by their owner alone; give this one the mode of any other new file."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
