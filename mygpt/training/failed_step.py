"""A step whose numbers broke: what is kept of it, and running it again to see where they broke first."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, ValidationError
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from mygpt.data.batches import draw_starts
from mygpt.data.dataset import Dataset
from mygpt.data.tokenizer import CharTokenizer
from mygpt.errors import CheckpointError, DamagedCheckpointError
from mygpt.model.gpt import GPT
from mygpt.processes.machine import make_deterministic, set_dropout_generator_state, set_threads
from mygpt.recipe.seeds import micro_batch_dropout_seed
from mygpt.recipe.tables import Count, Recipe, Table
from mygpt.runs.files import FAILED_NAME, MODEL_FILE, STATE_FILE, remove
from mygpt.runs.loading import read_tensors, read_weights
from mygpt.runs.saver import Tensors, TrainingState, model_metadata, write_checkpoint
from mygpt.runs.schemas import Manifest
from mygpt.runs.steps import read_metadata, verify_checkpoint
from mygpt.training.state import dropout_name

BATCH_FILE = "batch.json"


class FailedStep(Table):
    """batch.json: the step, and the windows that it was computed from."""

    step: int
    problem: str
    starts: Annotated[tuple[int, ...], Field(min_length=1)]
    """Where the windows begin in the training part of the corpus, in characters."""
    windows: Annotated[tuple[str, ...], Field(min_length=1)]
    """Their text: seq_len characters, and the one after."""
    micro_batch_size: Count
    processes: Count
    """Each with its share of the windows, and dropout drawing from a generator of its own."""
    dropout_seeds: tuple[int, ...] = ()
    """With reduction = "exact", that of each micro-batch, in place of these generators."""
    device: str
    precision: Literal["fp32", "bf16"]
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of the process that wrote this; None: a record of before it was kept."""
    compile: bool = False
    activation_checkpointing: bool = False


def record_failure(
    run: Path,
    problem: str,
    weights: Tensors,
    state: TrainingState,
    dataset: Dataset,
    recipe: Recipe,
    micro_batch_size: int,
    device: str,
) -> None:
    """Keep a step that broke before its update as `run`/failed-step-NNNNNN; `state` is that before it.

    Raises:
        DamagedCheckpointError: the disk refused it.
    """
    table, runtime = recipe.train, recipe.runtime
    step, seq_len = state.metadata.step + 1, table.seq_len
    generator = torch.Generator()
    generator.set_state(state.tensors["generator.stream"])
    starts = draw_starts(dataset.train, table.batch_size, seq_len, generator).tolist()
    failed = FailedStep(
        step=step,
        problem=problem,
        starts=tuple(starts),
        windows=tuple(dataset.tokenizer.decode(dataset.train[at : at + seq_len + 1].cpu()) for at in starts),
        micro_batch_size=micro_batch_size,
        processes=state.metadata.processes or 1,
        dropout_seeds=tuple(
            micro_batch_dropout_seed(table.data_seed, step, index)
            for index in range(table.batch_size // micro_batch_size)
        )
        if runtime.reduction == "exact"
        else (),
        device=device,
        precision=runtime.precision,
        threads=torch.get_num_threads(),
        compile=runtime.compile,
        activation_checkpointing=runtime.activation_checkpointing,
    )
    target = run / f"failed-step-{step:06d}"
    if target.is_symlink() or target.exists():
        remove(target)
    write_checkpoint(
        target,
        {name: weight.cpu() for name, weight in weights.items()},
        model_metadata(recipe.model, dataset.tokenizer, step - 1),
        TrainingState({name: tensor.cpu() for name, tensor in state.tensors.items()}, state.metadata),
        Manifest(
            step=step,
            reason="failed",
            finished=False,
            recipe=recipe,
            corpus_sha256=dataset.sha256,
            files={},
        ),
        {BATCH_FILE: failed.model_dump_json(indent=2) + "\n"},
    )


class Finding(NamedTuple):
    """What running a failed step again has shown."""

    failed: FailedStep
    lines: list[str]
    """What was computed on the way, up to where it broke."""
    broken: str | None
    """What was non-finite first; None: nothing."""
    not_repeated: tuple[str, ...] = ()
    """How the failed step was computed otherwise than here."""


def replay(path: Path, device: torch.device) -> Finding:
    """Run the failed step at `path`, a run or a failed-step directory, again, with its number of threads.

    It runs eagerly and keeps all activations, so that every module's output is seen once: what of the failed step's
    settings it does not repeat is in the finding.

    Raises:
        CheckpointError: no step has failed there.
        DamagedCheckpointError: what was kept of it cannot be read.
    """
    directory = _find_failed(path)
    verify_checkpoint(directory, "failed-step-")
    try:
        failed = FailedStep.model_validate_json((directory / BATCH_FILE).read_bytes())
    except OSError as error:
        raise DamagedCheckpointError(f"{directory / BATCH_FILE}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise DamagedCheckpointError(f"{directory / BATCH_FILE}: damaged: {error.errors()[0]['msg']}") from None
    metadata = read_metadata(directory / MODEL_FILE)
    tokenizer = CharTokenizer(metadata.tokenizer.vocab)
    length = len(failed.windows[0])
    if not 2 <= length <= metadata.model.max_seq_len + 1 or any(len(text) != length for text in failed.windows):
        raise DamagedCheckpointError(f"{directory / BATCH_FILE}: damaged: its windows are not of one length")
    weights = read_weights(directory / MODEL_FILE, metadata.model, tokenizer.vocab_size, finite=False)
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            return Finding(failed, [], f"the weights of {name}, {_count(weight)}, already before the step")
    if failed.threads is not None:
        set_threads(failed.threads, failed.processes)
    make_deterministic(device)
    not_repeated = tuple(_not_repeated(failed, device))
    gpt = GPT(metadata.model, tokenizer.vocab_size).to(device)
    gpt.load_state_dict(weights)
    generators = read_tensors(directory / STATE_FILE)
    tokens = torch.stack([torch.from_numpy(tokenizer.encode(text)).long() for text in failed.windows]).to(device)
    watch = _Watch(gpt)
    micro_batches = 0
    total = -(-len(tokens) // failed.micro_batch_size)
    for process, share in enumerate(tokens.tensor_split(failed.processes)):
        state = generators.get(dropout_name(device, process))
        if state is not None:
            set_dropout_generator_state(device, state)
        elif metadata.model.dropout and (not failed.dropout_seeds or failed.device != device.type):
            watch.lines.append(f"dropout drew on {failed.device}: here on {device.type} it drops other activations")
        for rows in share.split(failed.micro_batch_size):
            if failed.dropout_seeds:
                torch.manual_seed(failed.dropout_seeds[micro_batches])
            micro_batches += 1
            with torch.autocast(device.type, torch.bfloat16, enabled=failed.precision == "bf16"):
                logits = gpt(rows[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
            watch.see("loss", loss)
            if not watch.broken:
                (loss / total).backward()
            if watch.broken:
                where = f" (micro-batch {micro_batches}, process {process})" if len(rows) < len(tokens) else ""
                return Finding(failed, watch.lines, watch.broken + where, not_repeated)
    norm = get_total_norm([p.grad for p in gpt.parameters() if p.grad is not None])
    if torch.isfinite(norm):
        watch.lines.append(f"gradient norm: {norm.item():.4g}")
        return Finding(failed, watch.lines, None, not_repeated)
    largest = max(gpt.named_parameters(), key=lambda item: float(item[1].grad.abs().max()))  # type: ignore[union-attr]
    return Finding(
        failed,
        watch.lines,
        f"the norm of gradients that are all finite: its square overflows; the largest is in {largest[0]}, "
        f"{largest[1].grad.abs().max().item():.3g}",  # type: ignore[union-attr]
        not_repeated,
    )


def _not_repeated(failed: FailedStep, device: torch.device) -> Iterator[str]:
    if failed.device != device.type:
        yield f"computed on {failed.device}; replayed on {device.type}"
    if failed.compile:
        yield "computed compiled; replayed without"
    if failed.activation_checkpointing:
        yield "computed with activation checkpointing; replayed without"


class _Watch:
    """Sees every module's output on the way forward and every gradient on the way back, in the order made."""

    def __init__(self, gpt: GPT):
        self.broken: str | None = None
        self.lines: list[str] = []
        for name, module in gpt.named_modules():
            if name:  # the output of the whole is that of its module `logits`
                module.register_forward_hook(self._forward_hook(name))
        for name, parameter in gpt.named_parameters():
            parameter.register_hook(self._gradient_hook(f"weights of {name}"))

    def see(self, name: str, output: torch.Tensor) -> None:
        """Look at a value on the way forward, and later at its gradient."""
        self._look(name, output.detach())
        if output.requires_grad:
            output.register_hook(self._gradient_hook(f"output of {name}"))

    def _forward_hook(self, name: str) -> Any:
        return lambda _module, _inputs, output: self.see(name, output)

    def _gradient_hook(self, name: str) -> Any:
        return lambda gradient: self._look(f"gradient with respect to the {name}", gradient)

    def _look(self, name: str, values: torch.Tensor) -> None:
        if self.broken is None:
            if torch.isfinite(values).all():
                self.lines.append(f"{name}: largest magnitude {values.abs().max().item():.3g}")
            else:
                self.broken = f"{name}, {_count(values)}"


def _count(values: torch.Tensor) -> str:
    return f"{int((~torch.isfinite(values)).sum()):,} of {values.numel():,} values"


def _find_failed(path: Path) -> Path:
    if FAILED_NAME.fullmatch(path.resolve().name):
        return path.resolve()
    try:
        found = [(int(match[1]), entry) for entry in path.iterdir() if (match := FAILED_NAME.fullmatch(entry.name))]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; expected a run directory") from None
    if not found:
        raise CheckpointError(f"{path}: no step of this run has failed")
    return max(found)[1]
