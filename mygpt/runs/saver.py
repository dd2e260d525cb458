"""Checkpoints: the weights and training state of a step, written beside the training and verified when read."""

import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_IMODE
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mygpt.data.tokenizer import CharTokenizer
from mygpt.errors import DamagedCheckpointError, NonFiniteError
from mygpt.recipe.files import METRICS_FILE
from mygpt.recipe.tables import ModelTable, Recipe
from mygpt.runs.files import (
    LATEST_FILE,
    MANIFEST_FILE,
    METADATA_KEY,
    MODEL_FILE,
    STATE_FILE,
    file_sha256,
    publish,
    replace_text,
    sync,
)
from mygpt.runs.schemas import FileEntry, Manifest, ModelMetadata, Reason, StateMetadata, TokenizerMetadata
from mygpt.runs.steps import (
    point_to,
    prune,
    step_directory,
)

Tensors = Mapping[str, torch.Tensor]


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

    def save(
        self, weights: Tensors, state: TrainingState, reason: Reason = "scheduled", *, finished: bool = False
    ) -> None:
        """Save the weights and state of a step as `run`/step-NNNNNN, and point `latest` (and `best`) there.

        Raises:
            DamagedCheckpointError, NonFiniteError: the checkpoint before could not be saved; see `write_checkpoint`.
        """
        self.wait()
        model_copy, state_copy = self._copy("model.", weights), self._copy("state.", state.tensors)
        manifest = Manifest(
            step=state.metadata.step,
            reason=reason,
            finished=finished,
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
