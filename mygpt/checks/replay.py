"""Run a failed step again, to see which value became non-finite first."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from mygpt.checks.hooks import watch
from mygpt.data.batches import Batch
from mygpt.data.build import tokenizer_from
from mygpt.data.dataset import Dataset
from mygpt.data.tokenizer import Tokenizer
from mygpt.errors import CheckpointError, DamagedCheckpointError
from mygpt.model.gpt import GPT
from mygpt.processes.environment import no_launcher
from mygpt.processes.machine import has_matmul, make_deterministic, set_dropout_generator_state, set_threads
from mygpt.recipe.tables import Recipe
from mygpt.runs.files import FAILED_NAME, MODEL_FILE, STATE_FILE, real_path
from mygpt.runs.loading import read_tensors, read_weights
from mygpt.runs.run import RunDirectory
from mygpt.runs.schemas import ModelMetadata, read_table
from mygpt.runs.steps import read_metadata, verify_checkpoint
from mygpt.training.failed_step import BATCH_FILE, FailedStep, describe_problem
from mygpt.training.gradient_sum import gradient_sum_for
from mygpt.training.loop import train_step
from mygpt.training.parts import build_parts, open_accelerator
from mygpt.training.pending import is_finite
from mygpt.training.state import dropout_name


class Finding(NamedTuple):
    """What running a failed step again has shown."""

    failed: FailedStep
    lines: list[str]
    """What was computed on the way, up to the first non-finite value."""
    non_finite: str | None
    """What was non-finite first; None: nothing."""
    not_repeated: tuple[str, ...] = ()
    """How the failed step was computed otherwise than here."""


def replay(path: Path, device: torch.device) -> Finding:
    """Run the failed step at `path`, a run or a failed-step directory, again, with its number of threads.

    It runs `train_step` eagerly, on one process, and keeps all activations, so that every module's output is seen once:
    what of the failed step's settings it does not repeat is in the finding.

    Raises:
        CheckpointError: no step has failed there.
        DamagedCheckpointError: what was kept of it cannot be read.
    """
    if not path.is_dir():
        _ = RunDirectory(path).info  # says what is there instead
    directory = _find_failed(path)
    verify_checkpoint(directory, "failed-step-")
    metadata = read_metadata(directory / MODEL_FILE, ModelMetadata)
    tokenizer = tokenizer_from(metadata.tokenizer)
    failed = _read_failed_step(directory / BATCH_FILE, metadata.model.max_seq_len, tokenizer)
    weights = read_weights(directory / MODEL_FILE, metadata.model, tokenizer.vocab_size, finite=False)
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            return Finding(failed, [], f"the weights of {name}, {_count(weight)}, already before the step")
    set_threads(failed.threads, failed.processes)
    make_deterministic(device)
    generators = read_tensors(directory / STATE_FILE)
    states = [generators.get(dropout_name(device, process)) for process in range(failed.processes)]
    tokens = torch.tensor(failed.tokens)
    recipe = Recipe.of(
        **metadata.model.model_dump(),
        batch_size=len(tokens),
        micro_batch_size=failed.micro_batch_size,
        seq_len=tokens.shape[1] - 1,
        precision=failed.precision,
        loss_chunk=failed.loss_chunk,
        matmul=failed.matmul if has_matmul(failed.matmul, device) else "blas",
        reduction="exact" if failed.dropout_seeds else "fast",
    )
    gradient_sum = gradient_sum_for(recipe)
    with no_launcher(), open_accelerator(recipe.runtime, device, gradient_sum.accumulation_steps) as accelerator:
        dataset = Dataset(tokenizer, tokens.flatten(), tokens.new_empty(0), "")  # not drawn from: see `batch`
        parts = build_parts(recipe, accelerator, dataset, gradient_sum)
        parts.gpt.load_state_dict(weights)
        watch = Watch(parts.gpt, failed, states)
        batch = Batch(*(part.to(device) for part in (tokens[:, :-1], tokens[:, 1:])))
        loss, grad_norm, out_of_range = (value.item() for value in train_step(parts, batch, failed.step))
    lines, non_finite = watch.lines, watch.non_finite
    if non_finite is None and is_finite(loss, grad_norm, out_of_range):
        lines = [*lines, f"gradient norm: {grad_norm:.4g}"]
    elif non_finite is None:
        problem = "the norm of gradients that are all finite: its square overflows"
        if out_of_range:
            problem = describe_problem(loss, grad_norm, out_of_range, gradient_sum.micro_batches)
        name, largest = max(watch.largest_gradients.items(), key=lambda item: item[1])
        non_finite = f"{problem}; the largest is in {name}, {largest:.3g}"
    has_same_dropout = not metadata.model.dropout or (
        failed.device == device.type if failed.dropout_seeds else None not in states
    )
    return Finding(failed, lines, non_finite, tuple(_not_repeated(failed, device, has_same_dropout)))


def _not_repeated(failed: FailedStep, device: torch.device, has_same_dropout: bool) -> Iterator[str]:
    if failed.device != device.type:
        yield f"computed on {failed.device}; replayed on {device.type}"
    if not has_same_dropout:
        yield f"dropout drew on {failed.device}: here on {device.type} it drops other activations"
    if not has_matmul(failed.matmul, device):
        yield f"products computed by {failed.matmul}; replayed without"
    if failed.compile:
        yield "computed compiled; replayed without"
    if failed.activation_checkpointing:
        yield "computed with activation checkpointing; replayed without"


class Watch:
    """Sees every module's output on the way forward and every gradient on the way back, in the order made.

    Before each micro-batch it puts dropout where it was in the failed step: to the seed of the micro-batch, or at the
    start of each process's share to the state of its generator, where there is one for this device.
    """

    def __init__(self, gpt: GPT, failed: FailedStep, dropout_states: Sequence[torch.Tensor | None]):
        self.lines: list[str] = []
        """What was finite, up to the first value that was not."""
        self.non_finite: str | None = None
        self.largest_gradients: dict[str, float] = {}
        """The largest magnitude by parameter: of the accumulated gradient or, summed exactly, of any micro-batch's."""
        self._device = next(gpt.parameters()).device
        self._failed, self._dropout_states = failed, dropout_states
        self._micro_batches = 0
        gpt.register_forward_pre_hook(lambda *_: self._start_micro_batch())
        watch(gpt, self._look)
        for name, parameter in gpt.named_parameters():
            parameter.register_hook(partial(self._see_gradient, name))
            parameter.register_post_accumulate_grad_hook(partial(self._measure_accumulated, name))

    def _start_micro_batch(self) -> None:
        seeds, size = self._failed.dropout_seeds, self._failed.micro_batch_size
        process, first = divmod(self._micro_batches, len(self._failed.windows) // size // self._failed.processes)
        if seeds:
            torch.manual_seed(seeds[self._micro_batches])
        elif first == 0 and (state := self._dropout_states[process]) is not None:
            set_dropout_generator_state(self._device, state)
        self._micro_batches += 1
        self._where = f" (micro-batch {self._micro_batches}, process {process})" * (size < len(self._failed.windows))

    def _look(self, name: str, values: torch.Tensor) -> None:
        if self.non_finite is None:
            if torch.isfinite(values).all():
                self.lines.append(f"{name}: largest magnitude {values.abs().max().item():.3g}")
            else:
                self.non_finite = f"{name}, {_count(values)}{self._where}"

    def _see_gradient(self, name: str, gradient: torch.Tensor) -> None:
        if self._failed.dropout_seeds:
            largest = gradient.abs().max().item()
            self.largest_gradients[name] = max(self.largest_gradients.get(name, 0.0), largest)

    def _measure_accumulated(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.largest_gradients[name] = parameter.grad.abs().max().item()


def _count(values: torch.Tensor) -> str:
    return f"{int((~torch.isfinite(values)).sum()):,} of {values.numel():,} values"


def _find_failed(path: Path) -> Path:
    if FAILED_NAME.fullmatch((real := real_path(path)).name):
        return real
    try:
        found = [(int(match[1]), entry) for entry in path.iterdir() if (match := FAILED_NAME.fullmatch(entry.name))]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; expected a run directory") from None
    if not found:
        raise CheckpointError(f"{path}: no step of this run has failed")
    return max(found)[1]


def _read_failed_step(file: Path, max_seq_len: int, tokenizer: Tokenizer) -> FailedStep:
    failed = read_table(FailedStep, file)
    windows, length = failed.tokens, len(failed.tokens[0])
    if len(windows) != len(failed.windows) or any(token >= tokenizer.vocab_size for ids in windows for token in ids):
        raise DamagedCheckpointError(f"{file}: damaged: its tokens are not those of its windows")
    if not 2 <= length <= max_seq_len + 1 or any(len(ids) != length for ids in windows):
        raise DamagedCheckpointError(f"{file}: damaged: its windows are not of one length")
    micro_batches, rest = divmod(len(windows), failed.micro_batch_size)
    if rest or micro_batches % failed.processes or len(failed.dropout_seeds) not in (0, micro_batches):
        raise DamagedCheckpointError(f"{file}: damaged: its windows cannot be shared as it says")
    return failed
