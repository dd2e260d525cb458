"""The parts of a run: accelerator, model, optimizer, scheduler, batch stream and gradient sum, built in one place."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from mygpt.compat import (
    INIT_METHOD,
    compute_fp32_in_fp32,
    forget_accelerator,
    gloo_kept_off_stdout,
    has_accelerator,
    onednn_linear,
    settle_buckets,
)
from mygpt.data.batches import BatchStream
from mygpt.data.dataset import Dataset
from mygpt.errors import InterruptedRunError, LaunchError, MismatchError
from mygpt.model.gpt import GPT
from mygpt.processes.channel import PROCESS_TIMEOUT
from mygpt.processes.environment import is_sharded
from mygpt.processes.machine import choose_matmul, dropout_generator_state, set_dropout_generator_state
from mygpt.processes.preflight import ProcessReport
from mygpt.recipe.seeds import process_dropout_seed
from mygpt.recipe.tables import Recipe, RuntimeTable
from mygpt.runs.files import file_sha256
from mygpt.runs.loading import read_weights
from mygpt.runs.run import find_model_file
from mygpt.runs.saver import Tensors, TrainingState
from mygpt.runs.schemas import StateMetadata
from mygpt.training.gradient_sum import GradientSum
from mygpt.training.optim import build_optimizer, build_scheduler
from mygpt.training.state import (
    GeneratorStates,
    as_tensor,
    describe_optimizer,
    dropout_name,
    gather,
    load_optimizer_state,
    optimizer_state,
    restore,
)


@dataclass(frozen=True)
class Parts:
    """What trains: `build_parts` makes it."""

    recipe: Recipe
    accelerator: Accelerator
    dataset: Dataset
    """On the device, unless it is too large."""
    gradient_sum: GradientSum
    gpt: GPT
    """The bare model, whose weights have their plain names."""
    model: torch.nn.Module
    """The model as Accelerate wraps it: what is called to train."""
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    stream: BatchStream
    reports: Sequence[ProcessReport]
    """Of all processes, by rank: for messages that name one."""
    built_groups: Sequence[Mapping[str, Any]]
    """The optimizer's parameter groups as they were built."""

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of `model`; finding them takes a while, and each step needs them."""
        return list(self.model.parameters())

    @property
    def learning_rate(self) -> float:
        """That of the next optimizer step."""
        return float(self.scheduler.get_last_lr()[0])

    def generators(self) -> GeneratorStates:
        """The states of all generators from which the next step will draw on this process."""
        dropout = None if self.gradient_sum.is_exact else dropout_generator_state(self.accelerator.device)
        return GeneratorStates(self.stream.state(), dropout)

    def set_generators(self, states: GeneratorStates) -> None:
        """Put the generators of this process back to states that `generators` returned."""
        self.stream.set_state(states.stream)
        if states.dropout is not None:
            set_dropout_generator_state(self.accelerator.device, states.dropout)

    def capture(self, step: int, generators: GeneratorStates | None = None) -> tuple[Tensors, TrainingState]:
        """Weights and training state after a step, as a checkpoint holds them. Every process has to call this.

        `generators` are the generator states to save in place of the current ones. Of dropout it holds those of all
        processes or, where it is seeded for each micro-batch, none: then nothing depends on the number of processes.
        """
        accelerator, generators = self.accelerator, generators or self.generators()
        optimizer = self.optimizer_state()
        tensors = gather(accelerator, {name: as_tensor(value) for name, value in optimizer.items()})
        tensors["generator.stream"] = generators.stream
        processes = None
        if generators.dropout is not None:
            processes = accelerator.num_processes
            states = accelerator.gather(generators.dropout.to(accelerator.device)).cpu()
            for process, state in enumerate(states.chunk(processes)):
                tensors[dropout_name(accelerator.device, process)] = state
        described = describe_optimizer(self.optimizer, self.gpt, optimizer)
        metadata = StateMetadata(step=step, processes=processes, optimizer=described)
        return gather(accelerator, self.gpt.state_dict()), TrainingState(tensors, metadata)

    def optimizer_state(self) -> dict[str, Any]:
        """See the function of this name."""
        return optimizer_state(self.optimizer, self.gpt, self.built_groups)


def build_parts(
    recipe: Recipe,
    accelerator: Accelerator,
    dataset: Dataset,
    gradient_sum: GradientSum,
    checkpoint: Path | None = None,
    reports: Sequence[ProcessReport] = (),
    init_sha256: str | None = None,
) -> Parts:
    """Build the parts of a run from the beginning, or as they were after a checkpoint (a step directory).

    `init_sha256` is the hash of the model file that `init_from` must name, if that is known.

    Raises:
        DamagedCheckpointError: the checkpoint, or that of `init_from`, cannot be read.
        MismatchError: `init_from` names another model by now.
    """
    device, table = accelerator.device, recipe.train
    torch.manual_seed(table.init_seed)
    gpt = GPT(recipe.model, dataset.tokenizer.vocab_size).to(device)
    if choose_matmul(recipe.runtime, device) == "onednn":
        gpt.compute_products_with(onednn_linear)
    gpt.loss_chunk = recipe.runtime.loss_chunk
    gpt.activation_checkpointing = recipe.runtime.activation_checkpointing
    optimizer = build_optimizer(gpt, recipe.optimizer)
    built_groups = [dict(group) for group in optimizer.param_groups]
    values = optimizer_state(optimizer, gpt, built_groups)  # of one that has state before its first step
    dataset = dataset.to(device)
    stream = BatchStream(
        dataset.train,
        table.batch_size,
        table.seq_len,
        seed=table.data_seed,
        share=gradient_sum.share,
        order=table.order,
        device=device,
        check=dataset.check_unchanged,
    )
    steps_done = 0
    if checkpoint:
        steps_done, values = restore(accelerator, checkpoint, gpt, optimizer, stream, table.data_seed)
    else:
        if table.init_from:
            load_initial_weights(gpt, table.init_from, init_sha256)
        # Only dropout draws from the global generator, and the windows of each process need different masks.
        torch.manual_seed(process_dropout_seed(table.data_seed, accelerator.process_index))
    scheduler = build_scheduler(optimizer, recipe.schedule, recipe.optimizer.lr, table.steps, steps_done=steps_done)
    if recipe.runtime.compile:
        gpt.compile()
    model, optimizer, scheduler = gradient_sum.prepare(accelerator, gpt, optimizer, scheduler)
    load_optimizer_state(optimizer, gpt, values)
    wrapped = (model, optimizer, scheduler)
    parts = Parts(recipe, accelerator, dataset, gradient_sum, gpt, *wrapped, stream, reports, built_groups)
    if checkpoint and isinstance(model, DistributedDataParallel):
        before = parts.generators()
        first = [rows[: gradient_sum.micro_batch_size] for rows in stream.batch()]
        settle_buckets(accelerator, model, optimizer, *first)
        parts.set_generators(before)
    return parts


def load_initial_weights(gpt: GPT, init_from: str, sha256: str | None) -> None:
    """Give the model the weights with which a run begins; `sha256` is the hash of their file, if it is known.

    Raises:
        DamagedCheckpointError: they cannot be read.
        MismatchError: they are other ones.
    """
    file = find_model_file(Path(init_from))
    gpt.load_state_dict(read_weights(file, gpt.config, gpt.vocab_size))
    if sha256 not in (None, file_sha256(file)):
        began_with = f"its sha256 was {str(sha256)[:12]}"
        raise MismatchError(f"init_from: {file} is not what the run began with: {began_with}; put it back")


@contextmanager
def open_accelerator(table: RuntimeTable, device: torch.device, accumulation_steps: int) -> Iterator[Accelerator]:
    """An Accelerator that follows the recipe alone: what the environment or a user's configuration asks for in
    precision, accumulation or compilation would otherwise change the numbers.

    Raises:
        LaunchError: the process has an Accelerator already, whose settings would win over the recipe's; or the launch
            asks for another device.
    """
    if has_accelerator():
        raise LaunchError("this process already has an Accelerator, whose settings would win; train in another process")
    compute_fp32_in_fp32()
    with gloo_kept_off_stdout():
        accelerator = Accelerator(
            fsdp_plugin=sharding_plugin() if is_sharded() else None,
            cpu=device.type == "cpu",
            # The model is moved before its optimizer is built; having prepare() look into that imports DTensor, 0.4 s.
            device_placement=False,
            mixed_precision="bf16" if table.precision == "bf16" else "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=accumulation_steps, sync_with_dataloader=False
            ),
            dynamo_plugin=TorchDynamoPlugin(backend="no"),
            kwargs_handlers=[
                # Accelerate does not pass on its own default, ten minutes: gloo would wait thirty.
                InitProcessGroupKwargs(init_method=INIT_METHOD, timeout=PROCESS_TIMEOUT + timedelta(seconds=1))
            ],
            # A prepared scheduler would else step once per process; the loop steps it once per optimizer step.
            step_scheduler_with_optimizer=False,
        )
    orderly = accelerator.num_processes == 1
    try:
        if accelerator.device.type != device.type:
            raise LaunchError(
                f"device: got {device.type}, and the launch asks for {accelerator.device.type}; use device = "
                '"auto", or unset ACCELERATE_USE_CPU (use_cpu in the launch configuration)'
            )
        if is_sharded() and not accelerator.is_fsdp2:
            raise LaunchError("the launch configuration asks for FSDP, and Accelerate did not take it up")
        yield accelerator
        orderly = True
    except InterruptedRunError:
        orderly = True  # all processes stop together
        raise
    finally:
        # While others are in a collective, leaving the group, or waiting for the device, can hang with NCCL: a process
        # that fails reports to them first, and its end is the end of the group.
        if orderly:
            # Leaving the process group while models are alive aborts some two-process runs at exit.
            accelerator.free_memory()
            gc.collect()
            accelerator.end_training()
        forget_accelerator()


def sharding_plugin() -> FullyShardedDataParallelPlugin:
    """FSDP2 in which each block is sharded, and gathered for the time in which it is computed.

    Precision and activation checkpointing are the recipe's: see `FastSum.prepare` and `GPT`. Accelerate's own
    checkpointing draws other dropout in the second forward pass than in the first.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_offload=False,
        activation_checkpointing=False,
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=MixedPrecisionPolicy(),
        state_dict_type="SHARDED_STATE_DICT",
    )
