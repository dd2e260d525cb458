"""Writing checkpoints: class `Saver` writes them in a thread beside the training."""

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_IMODE
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from mygpt.data.tokenizer import Tokenizer
from mygpt.errors import DiskError, NonFiniteError, print_note
from mygpt.recipe.files import METRICS_FILE
from mygpt.recipe.tables import ModelTable, Recipe
from mygpt.runs import files
from mygpt.runs.schemas import End, FileEntry, Manifest, ModelMetadata, Reason, StateMetadata
from mygpt.runs.steps import point_to, prune, saved_reasons, step_directory

Tensors = Mapping[str, torch.Tensor]


class TrainingState(NamedTuple):
    """All that continuing a run needs beside the weights."""

    tensors: Tensors
    """The optimizer's state, named optimizer.PARAMETER.NAME, and generator states, named generator.NAME."""
    metadata: StateMetadata


@dataclass
class Saver:
    """Saves checkpoints into `run` beside the training: `save` copies the tensors and returns, a thread writes them.

    At most one checkpoint is being written; the next `save` waits for it. The next call raises the thread's errors. A
    checkpoint by the clock that the disk refuses costs a warning, and is tried again when the next one is due.
    """

    run: Path
    recipe: Recipe
    tokenizer: Tokenizer
    saved: Callable[[Path], None] = lambda _: None
    """Is given each step directory, in the thread that writes, before superseded ones are removed."""
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _writing: Future[None] | None = None
    _reason: Reason = "scheduled"  # of what is being written
    # Kept from one save to the next: filling memory that the system has just handed out takes ten times longer.
    _copies: dict[str, torch.Tensor] = field(default_factory=dict)
    _saved_at: float = field(default_factory=time.monotonic)
    _reasons: dict[int, Reason] | None = None
    """Why each checkpoint was saved: reading all manifests at each save would take longer with each checkpoint."""

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        if error[0] is not None and self._writing is not None and (unsaved := self._writing.exception()):
            print_note(f"mygpt: {unsaved}")  # the error that is being raised would hide it

    def save(
        self,
        weights: Tensors,
        state: TrainingState,
        reason: Reason = "scheduled",
        ended_by: End | None = None,
        best: int | None = None,
    ) -> None:
        """Save the weights and state of a step as `run`/step-NNNNNN, and point `latest` there, and `best` to that step.

        `ended_by` says why the run is finished with this step; None: it is not.

        Raises:
            DiskError, NonFiniteError: the checkpoint before could not be saved; see `write_checkpoint`.
        """
        self.wait()
        step = state.metadata.step
        copies = self._copy("model.", weights), TrainingState(self._copy("state.", state.tensors), state.metadata)
        manifest = Manifest(step=step, reason=reason, ended_by=ended_by, files={})
        self._writing = self._thread.submit(self._write, *copies, manifest, best)
        self._reason, self._saved_at = reason, time.monotonic()

    def is_time_to_save(self) -> bool:
        """Whether the last checkpoint, or the beginning, is `save_seconds` ago, and nothing is being written."""
        seconds = self.recipe.checkpoint.save_seconds
        is_idle = self._writing is None or self._writing.done()
        return seconds > 0 and is_idle and time.monotonic() - self._saved_at >= seconds

    def check(self) -> None:
        """Raise the error of a save that has failed by now; does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is on the disk; raises the error of a save that failed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except DiskError as error:
                if self._reason != "timed":
                    raise
                problem = str(error).removesuffix(files.MEND_DISK)
                print_note(f"{problem}; the run goes on, and the next one is tried when due")

    def _copy(self, prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
        for name, tensor in tensors.items():
            copy = self._copies.get(prefix + name)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                on_gpu = tensor.device.type == "cuda"
                # Contiguous, as a file holds it; a tensor of the optimizer's state need not be.
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
                self._copies[prefix + name] = copy
            copy.copy_(tensor.detach(), non_blocking=tensor.device.type == "cuda")
        if any(tensor.device.type == "cuda" for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self._copies[prefix + name] for name in tensors}

    def _write(self, weights: Tensors, state: TrainingState, manifest: Manifest, best: int | None) -> None:
        step = manifest.step
        # A resumed run continues the records up to this step.
        for records in (self.run / METRICS_FILE, self.run / files.EVALUATIONS_FILE):
            with files.explain_disk_error(files.CANNOT_SAVE + files.MEND_DISK, records):
                if records.exists():
                    files.sync(records)
        metadata = model_metadata(self.recipe.model, self.tokenizer, step)
        write_checkpoint(step_directory(self.run, step), weights, metadata, state, manifest)
        with files.explain_disk_error(files.CANNOT_SAVE + files.MEND_DISK, self.run / files.LATEST_FILE):
            point_to(self.run, step, best)
        self.saved(step_directory(self.run, step))
        with suppress(OSError):  # the next save, or the next start, tries again
            if self._reasons is None:
                self._reasons = saved_reasons(self.run)
            self._reasons[step] = manifest.reason
            prune(self.run, self.recipe.checkpoint.keep_last, step, best, self._reasons)
            if manifest.reason != "interrupted" and files.is_directory(self.run / files.REPLACED_NAME):
                files.remove(self.run / files.REPLACED_NAME)


def model_metadata(config: ModelTable, tokenizer: Tokenizer, step: int) -> ModelMetadata:
    return ModelMetadata(model=config, step=step, tokenizer=tokenizer.metadata)


def write_checkpoint(
    target: Path,
    weights: Tensors,
    model_metadata: ModelMetadata,
    state: TrainingState,
    manifest: Manifest,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write CPU tensors as the step directory `target`, which has its name only once it is complete and on the disk.

    `texts` are the contents of further files, by name.

    Raises:
        DiskError: the disk refused it; earlier checkpoints are untouched.
        NonFiniteError: a weight is not finite, and the manifest's reason is not "failed".
    """
    for name, tensor in weights.items():
        if manifest.reason != "failed" and not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"step {manifest.step}: weights of {name} are not finite; not saved; lower lr or clip gradients"
            )
    partial, entries = target.with_name(f".tmp-{target.name}"), {}
    contents = ((files.MODEL_FILE, weights, model_metadata), (files.STATE_FILE, state.tensors, state.metadata))
    try:
        with files.explain_disk_error(files.CANNOT_SAVE + files.MEND_DISK, target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / files.MANIFEST_FILE).touch()
            mode = S_IMODE((partial / files.MANIFEST_FILE).stat().st_mode)
            for name, tensors, metadata in contents:
                file = partial / name
                save_file(dict(tensors), file, {files.METADATA_KEY: metadata.to_json()})
                file.chmod(mode)  # that of any other new file: safetensors lets only the owner read it
                files.sync(file)
                entries[name] = FileEntry(bytes=file.stat().st_size, sha256=files.file_sha256(file))
            for name, text in (texts or {}).items():
                files.replace_text(partial / name, text)
            files.replace_text(
                partial / files.MANIFEST_FILE, manifest.model_copy(update={"files": entries}).to_json() + "\n"
            )
            files.publish(partial, target)
    except DiskError:
        # Free the space: this checkpoint may have filled the disk.
        shutil.rmtree(partial, ignore_errors=True)
        raise
