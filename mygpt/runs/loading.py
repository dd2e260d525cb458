"""Reading checkpoints: their tensors, checked against the architecture in their metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from mygpt.data.build import tokenizer_from
from mygpt.data.tokenizer import Tokenizer
from mygpt.errors import DamagedCheckpointError, MismatchError
from mygpt.model.gpt import GPT
from mygpt.recipe.tables import ModelTable
from mygpt.runs.files import MANIFEST_FILE, STATE_FILE, explain_disk_error
from mygpt.runs.run import find_model_file
from mygpt.runs.saver import Tensors, TrainingState
from mygpt.runs.schemas import ModelMetadata, StateMetadata
from mygpt.runs.steps import manifest_of, read_metadata, verify_file

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""The state that AdamW keeps of each parameter."""
NUMBERS = {"bool": torch.bool, "int": torch.int64, "float": torch.float64}
"""How plain numbers in the state of an optimizer are saved, by their type: as tensors without dimensions."""


class Checkpoint(NamedTuple):
    """A model to generate from, with the tokenizer of its corpus and the step after which it was saved."""

    model: GPT
    tokenizer: Tokenizer
    step: int


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Load the model of a run directory, step directory or model file, on the CPU in eval mode.

    The file is compared with the manifest beside it; a file that was named itself may have none.

    Raises:
        CheckpointError: there is none.
        DamagedCheckpointError: it cannot be read, or is not what was saved.
        MismatchError: its tensors are not those of its architecture.
        TokenizerError: its tokenizer needs a package that is not installed.
    """
    file = find_model_file(Path(path))
    if manifest := manifest_of(file):
        verify_file(file, manifest)
    metadata = read_metadata(file, ModelMetadata)
    if not manifest and file != Path(path):
        raise DamagedCheckpointError(f"{file.parent / MANIFEST_FILE}: is missing; name the file itself to do without")
    tokenizer = tokenizer_from(metadata.tokenizer)
    weights = read_weights(file, metadata.model, tokenizer.vocab_size)
    with torch.device("meta"):
        model = GPT(metadata.model, tokenizer.vocab_size)
    model.load_state_dict(weights, assign=True)
    return Checkpoint(model.eval(), tokenizer, metadata.step)


def read_weights(file: Path, config: ModelTable, vocab_size: int, *, finite: bool = True) -> dict[str, torch.Tensor]:
    """The weights in a model file, which must be those of this architecture.

    Raises:
        DamagedCheckpointError: it cannot be read; or some weights are not finite, though they must be `finite`.
        MismatchError: the weights are of another architecture, as after a change of the model's code.
    """
    weights = read_tensors(file)
    # Before building the model: a damaged number of layers could take hours to build.
    if config.embed_dim % config.num_heads or config.num_layers > len(weights):
        raise DamagedCheckpointError(f"{file}: damaged: its metadata describes no model with these weights")
    with torch.device("meta"):
        expected = GPT(config, vocab_size).state_dict()
    if name := _first_unlike(weights, {name: (weight.shape, torch.float32) for name, weight in expected.items()}):
        got, wanted = (_describe(tensors.get(name)) for tensors in (weights, expected))
        raise MismatchError(
            f"{file}: {name}: got {got}, expected {wanted}: these weights are of another version of the model than "
            "this mygpt's; use the version that wrote them (git_commit in run.json)",
            exit_code=1,
        )
    for name, weight in weights.items():
        if finite and not torch.isfinite(weight).all():
            raise DamagedCheckpointError(f"{file}: damaged: {name} has values that are infinite or not numbers")
    return weights


def read_state(directory: Path, weights: Tensors) -> TrainingState:
    """The training state in a step directory: with the moments that AdamW has of `weights`, or with what the metadata
    say of another optimizer.

    Raises:
        DamagedCheckpointError: it cannot be read, or is not that.
    """
    file = directory / STATE_FILE
    metadata, tensors = read_metadata(file, StateMetadata), read_tensors(file)
    moments = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
    expected = {
        f"optimizer.{name}.{moment}": (torch.Size() if moment == "step" else weight.shape, torch.float32)
        for name, weight in weights.items()
        for moment in MOMENTS
    }
    if metadata.optimizer:  # only the optimizer itself knows the shapes of its tensors
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in moments.items()}
        number = {kind: (torch.Size(), dtype) for kind, dtype in NUMBERS.items()}
        expected = {
            name: number.get(kind) or found.get(name, number["float"])
            for name, kind in metadata.optimizer.kinds.items()
        }
    if name := _first_unlike(moments, expected):
        what = "what its metadata say" if metadata.optimizer else "of its weight's shape"
        raise DamagedCheckpointError(f"{file}: damaged: {name} is missing, or not {what}")
    for name, tensor in tensors.items():
        if name not in moments and (tensor.dtype != torch.uint8 or tensor.dim() != 1):
            raise DamagedCheckpointError(f"{file}: damaged: {name} is no generator's state")
    return TrainingState(tensors, metadata)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file; raises DamagedCheckpointError if it cannot be read."""
    with (
        explain_disk_error("{path}: damaged: {error}", file, DamagedCheckpointError),
        safe_open(file, framework="pt") as tensors,
    ):
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no dict


def _first_unlike(tensors: Tensors, expected: Mapping[str, tuple[torch.Size, torch.dtype]]) -> str | None:
    """The first tensor, by name, that is missing, not expected, or of another shape or type; None: all are right."""
    names = sorted(expected.keys() | tensors.keys())
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    return next((name for name in names if found.get(name) != expected.get(name)), None)


def _describe(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
