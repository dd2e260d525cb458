"""Checkpoints that are made, or changed, without a training run."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mygpt.data.tokenizer import CharTokenizer
from mygpt.model.gpt import GPT
from mygpt.recipe.tables import ModelTable, OptimizerTable, Recipe
from mygpt.runs.files import METADATA_KEY, file_sha256
from mygpt.runs.saver import Saver, TrainingState
from mygpt.runs.schemas import StateMetadata
from mygpt.training.optim import build_optimizer
from mygpt.training.state import optimizer_state

TABLE = ModelTable(embed_dim=8, num_heads=2, num_layers=1, max_seq_len=4)
TOKENIZER = CharTokenizer('abc\n"é😀')


def small_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(TABLE, TOKENIZER.vocab_size)


def save(run, gpt, step, config=TABLE, tokenizer=TOKENIZER):
    """Save a model as the loop does, with the moments of an optimizer that has made a step; returns its file."""
    optimizer = build_optimizer(gpt, OptimizerTable())
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: weight.clone() for name, weight in gpt.state_dict().items()}
    optimizer.step()
    gpt.load_state_dict(before)
    tensors = optimizer_state(optimizer, gpt, optimizer.param_groups)
    tensors |= {"generator.stream": torch.Generator().get_state(), "generator.cpu.0": torch.get_rng_state()}
    with Saver(run, Recipe(model=config), tokenizer) as saver:
        saver.save(gpt.state_dict(), TrainingState(tensors, StateMetadata(step=step, processes=1)))
        saver.wait()
    return run / f"step-{step:06d}" / "model.safetensors"


def rewrite(file, *, metadata=lambda values: None, tensors=lambda values: None):
    """Save a file of a checkpoint again, after these functions have changed its metadata and tensors in place."""
    with safe_open(file, framework="pt") as opened:
        values = json.loads(opened.metadata()[METADATA_KEY])
    parts = load_file(file)
    metadata(values)
    tensors(parts)
    save_file(parts, file, {METADATA_KEY: json.dumps(values)})


def fit_manifest(file):
    """Give the manifest beside a changed file its size and hash, so that they do not show the change."""
    path = file.parent / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    path.write_text(json.dumps(manifest))
