"""Checkpoints: the weights and training state of a step, written beside the training and verified when read."""

import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_IMODE
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mygpt.errors import DamagedCheckpointError, MismatchError, NonFiniteError
from mygpt.metadata import FileEntry, Manifest, ModelMetadata, Reason, StateMetadata, TokenizerMetadata
from mygpt.model import GPT
from mygpt.recipe import METRICS_FILE, ModelTable, Recipe
from mygpt.rundir import (
    LATEST_FILE,
    MANIFEST_FILE,
    METADATA_KEY,
    MODEL_FILE,
    STATE_FILE,
    file_sha256,
    find_model_file,
    point_to,
    prune,
    publish,
    read_manifest,
    read_metadata,
    read_state_metadata,
    replace_text,
    step_directory,
    sync,
    verify_file,
)
from mygpt.tokenizer import CharTokenizer

Tensors = Mapping[str, torch.Tensor]


class Checkpoint(NamedTuple):
    """A model to generate from, with the tokenizer of its corpus and the step after which it was saved."""

    model: GPT
    tokenizer: CharTokenizer
    step: int


class TrainingState(NamedTuple):
    """What continuing a run needs beside the weights."""

    tensors: Tensors
    """Optimizer moments, named optimizer.PARAMETER.MOMENT, and generator states, named generator.NAME."""
    metadata: StateMetadata


@dataclass
class Saver:
    """Saves checkpoints into `run` beside the training: `save` takes a copy and returns, a thread writes it.

    At most one is being written; the next `save` waits for it. Errors of the thread are raised by the next call.
    """

    run: Path
    recipe: Recipe
    tokenizer: CharTokenizer
    corpus_sha256: str
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _writing: Future[None] | None = None
    # Kept from one save to the next: filling memory that the system has just handed out takes ten times longer.
    _copies: dict[str, torch.Tensor] = field(default_factory=dict)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        if error[0] is not None and self._writing is not None and (unsaved := self._writing.exception()):
            print(f"mygpt: {unsaved}", file=sys.stderr)  # another error is on its way and would hide it

    def save(self, weights: Tensors, state: TrainingState, reason: Reason = "scheduled") -> None:
        """Save the weights and state of a step as `run`/step-NNNNNN, and point `latest` (and `best`) there.

        Raises:
            DamagedCheckpointError, NonFiniteError: the checkpoint before could not be saved; see `write_checkpoint`.
        """
        self.wait()
        model_copy, state_copy = self._copy("model.", weights), self._copy("state.", state.tensors)
        manifest = Manifest(
            step=state.metadata.step,
            reason=reason,
            finished=state.metadata.step == self.recipe.train.steps,
            recipe=self.recipe,
            corpus_sha256=self.corpus_sha256,
            files={},
        )
        self._writing = self._thread.submit(
            self._write, model_copy, TrainingState(state_copy, state.metadata), manifest
        )

    def check(self) -> None:
        """Raise what the thread has raised by now; does not wait for it."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is on the disk, and raise what the thread has raised."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _copy(self, prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
        for name, tensor in tensors.items():
            copy = self._copies.get(prefix + name)
            if copy is None or copy.shape != tensor.shape:
                on_gpu = tensor.device.type == "cuda"
                copy = self._copies[prefix + name] = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
            copy.copy_(tensor.detach(), non_blocking=tensor.device.type == "cuda")
        if any(tensor.device.type == "cuda" for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self._copies[prefix + name] for name in tensors}

    def _write(self, weights: Tensors, state: TrainingState, manifest: Manifest) -> None:
        step, best = state.metadata.step, state.metadata.best_step
        target = step_directory(self.run, step)
        try:
            # The records up to this step are part of what a resumed run continues.
            if (self.run / METRICS_FILE).exists():
                sync(self.run / METRICS_FILE)
        except OSError as error:
            raise _unsaved(self.run / METRICS_FILE, error) from error
        write_checkpoint(target, weights, model_metadata(self.recipe.model, self.tokenizer, step), state, manifest)
        try:
            point_to(self.run, step, best)
        except OSError as error:
            raise _unsaved(self.run / LATEST_FILE, error) from error
        with suppress(OSError):  # the next save, or the next start, tries again
            prune(self.run, self.recipe.checkpoint.keep_last, step, best)


def model_metadata(config: ModelTable, tokenizer: CharTokenizer, step: int) -> ModelMetadata:
    return ModelMetadata(model=config, step=step, tokenizer=TokenizerMetadata(vocab=tokenizer.vocab))


def write_checkpoint(
    target: Path,
    weights: Tensors,
    model_metadata: ModelMetadata,
    state: TrainingState,
    manifest: Manifest,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint of CPU tensors to `target`, which has its name only when it is whole and on the disk.

    `texts` are the contents of further files, by name.

    Raises:
        DamagedCheckpointError: the disk refused it; what was saved before is untouched.
        NonFiniteError: a weight is infinite or not a number, and it is not the record of a step that failed.
    """
    if manifest.reason != "failed":
        for name, tensor in weights.items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"step {manifest.step}: weights of {name} are not finite; not saved; lower lr or clip gradients"
                )
    partial = target.with_name(f".tmp-{target.name}")
    contents = ((MODEL_FILE, weights, model_metadata), (STATE_FILE, state.tensors, state.metadata))
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        (partial / MANIFEST_FILE).touch()
        mode = (partial / MANIFEST_FILE).stat().st_mode
        files = {}
        for name, tensors, metadata in contents:
            file = partial / name
            save_file(dict(tensors), file, {METADATA_KEY: metadata.to_json()})
            # safetensors makes files readable by their owner alone; give this one the mode of any other new file.
            file.chmod(S_IMODE(mode))
            sync(file)
            files[name] = FileEntry(bytes=file.stat().st_size, sha256=file_sha256(file))
        for name, text in (texts or {}).items():
            replace_text(partial / name, text)
        replace_text(partial / MANIFEST_FILE, manifest.model_copy(update={"files": files}).to_json() + "\n")
        publish(partial, target)
    except (OSError, SafetensorError) as error:
        # A full disk is not to stay full of it.
        with suppress(OSError):
            shutil.rmtree(partial)
        raise _unsaved(target, error) from error


def _unsaved(target: Path, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{target}: cannot be saved: {error}; earlier checkpoints are as they were: mend the disk or make room, and "
        "the same command continues"
    )


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Load the model of a run directory, step directory or model file, on the CPU in eval mode.

    A file is held against the manifest beside it; one without a manifest is taken as it is if it was named itself.

    Raises:
        CheckpointError: there is none.
        DamagedCheckpointError: it cannot be read, or is not what was saved.
        MismatchError: its tensors are not those of its architecture.
    """
    file = find_model_file(Path(path))
    if (file.parent / MANIFEST_FILE).exists() or file != Path(path):
        verify_file(file, read_manifest(file.parent, prefix=None))
    metadata = read_metadata(file)
    tokenizer = CharTokenizer(metadata.tokenizer.vocab)
    weights = read_weights(file, metadata.model, tokenizer.vocab_size)
    with torch.device("meta"):
        model = GPT(metadata.model, tokenizer.vocab_size)
    model.load_state_dict(weights, assign=True)
    return Checkpoint(model.eval(), tokenizer, metadata.step)


def read_weights(file: Path, config: ModelTable, vocab_size: int, *, finite: bool = True) -> dict[str, torch.Tensor]:
    """The weights in a model file, which must be those of this architecture.

    Raises:
        DamagedCheckpointError: it cannot be read; or, if they must be `finite`, some are not.
        MismatchError: they are not, as after a change of the model's code.
    """
    weights = read_tensors(file)
    # Before building what the metadata asks for: a damaged number of layers could take hours to build.
    if config.embed_dim % config.num_heads or config.num_layers > len(weights):
        raise DamagedCheckpointError(f"{file}: damaged: its metadata describes no model with these weights")
    with torch.device("meta"):
        expected = GPT(config, vocab_size).state_dict()
    if name := _first_unlike(weights, {name: (weight.shape, torch.float32) for name, weight in expected.items()}):
        got, wanted = (_describe(tensors.get(name)) for tensors in (weights, expected))
        raise MismatchError(
            f"{file}: {name}: got {got}, expected {wanted}: these weights are of another version of the model than "
            "this mygpt's; use the version that wrote them (git_commit in run.json)"
        )
    for name, weight in weights.items():
        if finite and not torch.isfinite(weight).all():
            raise DamagedCheckpointError(f"{file}: damaged: {name} has values that are infinite or not numbers")
    return weights


def read_state(directory: Path, weights: Tensors) -> TrainingState:
    """The training state in a step directory, whose moments must be those of `weights`.

    Raises:
        DamagedCheckpointError: it cannot be read, or they are not.
    """
    file = directory / STATE_FILE
    metadata = read_state_metadata(file)
    tensors = read_tensors(file)
    moments = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
    expected = {
        f"optimizer.{name}.{moment}": (torch.Size() if moment == "step" else weight.shape, torch.float32)
        for name, weight in weights.items()
        for moment in MOMENTS
    }
    if name := _first_unlike(moments, expected):
        raise DamagedCheckpointError(f"{file}: damaged: {name} is missing, or not of its weight's shape")
    for name, tensor in tensors.items():
        if name not in moments and (tensor.dtype != torch.uint8 or tensor.dim() != 1):
            raise DamagedCheckpointError(f"{file}: damaged: {name} is no generator's state")
    return TrainingState(tensors, metadata)


MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of each parameter."""


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file.

    Raises:
        DamagedCheckpointError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{file}: damaged: {error}") from None


def _describe(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _first_unlike(tensors: Tensors, expected: Mapping[str, tuple[torch.Size, torch.dtype]]) -> str | None:
    """The first tensor, by name, that is missing, not expected, or of another shape or type; None: all are right."""
    names = sorted(expected.keys() | tensors.keys())
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    return next((name for name in names if found.get(name) != expected.get(name)), None)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The optimizer's moments by the names of its parameters, which are given in its order."""
    (group,) = optimizer.param_groups
    return {
        f"optimizer.{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in zip(names, group["params"], strict=True)
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: Tensors) -> None:
    """Give the optimizer the moments that `optimizer_tensors` took, each sharded as its parameter is."""
    (group,) = optimizer.param_groups
    states = {
        index: {moment: _shard(tensors[f"optimizer.{name}.{moment}"], parameter) for moment in MOMENTS}
        for index, (name, parameter) in enumerate(zip(names, group["params"], strict=True))
    }
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _shard(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not hasattr(parameter, "device_mesh") or not tensor.dim():
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every process has all of it, so that none has to send anything.
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)
