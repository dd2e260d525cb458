"""Recipes: the TOML tables as frozen models, how they are read, checked and written.

A recipe file has the tables below; every key is unique across them, so each is also a flag of `mygpt train`
(`val_split` is `--val-split`). A key that is left out has the default given here, and the defaults together are
the plain run: constant rate, no held-out text, no clipping. `extends = "other.toml"` starts from another recipe.
"""

import difflib
import reprlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mygpt.errors import RecipeError

# torch seeds and sizes are 64-bit, and its CPU generator keeps 32 bits of a seed: stay where every value is distinct.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
CountOrOff = Annotated[int, Field(ge=0, lt=2**31)]
Probability = Annotated[float, Field(ge=0, lt=1)]

NAMED_CORPORA = ("tinyshakespeare", "python-docs")
"""Texts that are found by name; a name wins over a file that is called the same."""


class Table(BaseModel):
    """One table of a recipe: immutable, no unknown keys, no conversions (`true` is not 1), no nan or inf."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataTable(Table):
    """What is trained on."""

    corpus: Annotated[str, Field(min_length=1)] = "tinyshakespeare"
    """A text file (UTF-8), or one of the named corpora: "tinyshakespeare", "python-docs". A relative path in a recipe
    file is looked up beside that file first, then in the working directory."""
    val_split: Probability = 0.0
    """Fraction of the text held out at its end, never trained on; 0: none."""


class ModelTable(Table):
    """The architecture: a decoder-only transformer in GPT-2's style."""

    embed_dim: Count = 64
    """Width of the residual stream."""
    num_heads: Count = 4
    """Attention heads per block; must divide embed_dim."""
    num_layers: Count = 4
    """Transformer blocks."""
    max_seq_len: Count = 64
    """Longest context in tokens: the number of position embeddings."""
    dropout: Probability = 0.0
    """Probability of dropping an activation in training; 0: off."""


class TrainTable(Table):
    """The training loop."""

    steps: Count = 2000
    """Optimizer steps."""
    batch_size: Count = 16
    """Windows per optimizer step, over all processes together."""
    micro_batch_size: Count | None = None
    """Windows per forward pass on one process; absent: batch_size / processes, or with reduction = "exact" a quarter of
    batch_size. Smaller saves memory (gradients are accumulated). Must divide batch_size and, but with "exact",
    batch_size / processes."""
    seq_len: Count = 64
    """Tokens per window; at most max_seq_len."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.0
    """Clip the global L2 norm of the gradient to this; 0: no clipping."""
    log_grad_norm: bool = False
    """Print the gradient's norm before clipping; metrics.jsonl always has it."""
    print_every: Count = 500
    """Steps between printed lines; the first and the last step are always printed."""
    log_every: Count = 10
    """Steps between records in metrics.jsonl; printed steps are always recorded."""
    init_seed: Seed = 0
    """Seed of the initial weights."""
    data_seed: Seed = 42
    """Seed of the batches and of dropout."""


class OptimizerTable(Table):
    """AdamW (https://arxiv.org/abs/1711.05101), with torch's defaults; weight decay applies to every parameter."""

    lr: Annotated[float, Field(ge=0)] = 1e-3
    """Learning rate; with a schedule or warmup, its peak."""
    beta1: Probability = 0.9
    """Decay of the running mean of gradients."""
    beta2: Probability = 0.999
    """Decay of the running mean of squared gradients."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of the update; with reduction = "exact" at least 1e-11."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay, per step and unit of learning rate."""


class ScheduleTable(Table):
    """The learning rate as a function of the step."""

    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """From lr at the end of warmup: stay there, or fall to min_lr at the last step along half a cosine or a line."""
    warmup: CountOrOff = 0
    """Steps over which the rate rises linearly to lr; 0: none."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """The rate at the last step of a cosine or linear schedule."""


class ValidationTable(Table):
    """The held-out loss."""

    val_every: CountOrOff = 0
    """Steps between evaluations of the held-out loss (and one at the last step); 0: never. Needs val_split."""
    eval_batches: Count = 10
    """Random batches averaged in one evaluation; with sampling = "full" all of the held-out text is used instead."""
    sampling: Literal["shared-stream", "own-stream", "full"] = "shared-stream"
    """Where held-out windows come from. "shared-stream": drawn from the generator of the training batches, so
    evaluating shifts the batches that follow (published numbers of this kind are made so). "own-stream": from a
    generator of their own, the same windows at every evaluation. "full": all of the held-out text, cut into
    consecutive windows, so that each token is predicted once."""
    log_val_stderr: bool = False
    """Print the held-out loss with its standard error; metrics.jsonl always has it."""


class RuntimeTable(Table):
    """Where and how it runs."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """"auto": cuda where there is one, else mps, else cpu."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16": matrix products in bfloat16 (autocast); weights and optimizer stay fp32."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads per process; absent: the machine's cores / processes on it, or with reduction = "exact" 1. The last
    bits of a CPU result depend on it."""
    compile: bool = False
    """Compile the model with torch.compile: slow to start, faster per step."""
    activation_checkpointing: bool = False
    """Keep of each block only its input, and compute the rest again on the way back: less memory, more time, the same
    numbers."""
    reduction: Literal["fast", "exact"] = "fast"
    """How gradients are summed over micro-batches and processes. "fast": as floats, so that the last bits depend on the
    number of processes. "exact": as integers, the same bits on any number of processes, for more time per step."""


class CheckpointTable(Table):
    """What is kept on disk."""

    output: Annotated[str, Field(min_length=1)] = "checkpoints/default"
    """The run directory; absent from a recipe file: checkpoints/ and the file's name without its ending. The
    recipe.toml in a run directory always means that directory."""
    save_every: CountOrOff = 0
    """Steps between checkpoints; 0: only that of the last step, which is always saved."""
    keep_last: CountOrOff = 0
    """Of the checkpoints made by save_every, keep this many of the newest; 0: all."""
    save_best: bool = False
    """Also save where the held-out loss is the lowest so far: the file `best` names that step, and it is kept."""
    resume: Annotated[str, Field(min_length=1)] = "auto"
    """What to do with what is there. "auto": continue the run in output where it has a checkpoint, else start.
    "never": start, and only where there is no run. A run or step directory: start output from that checkpoint."""


class Recipe(Table):
    """A complete training run."""

    data: DataTable = DataTable()
    model: ModelTable = ModelTable()
    train: TrainTable = TrainTable()
    optimizer: OptimizerTable = OptimizerTable()
    schedule: ScheduleTable = ScheduleTable()
    validation: ValidationTable = ValidationTable()
    runtime: RuntimeTable = RuntimeTable()
    checkpoint: CheckpointTable = CheckpointTable()

    def to_toml(self) -> str:
        """This recipe as TOML that `load_recipe` reads back to an equal one; keys that are absent stay absent."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


TABLE_OF_KEY = {key: name for name, table in Recipe.model_fields.items() for key in type(table.default).model_fields}


def build_recipe(tables: Mapping[str, Any], source: str | None = None) -> Recipe:
    """A recipe from nested tables. `source` is the file that they came from; None: command-line flags.

    Raises:
        RecipeError: with one line for each key that is unknown, of the wrong type or out of range.
    """
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(problem, source) for problem in error.errors())) from None


def with_keys(recipe: Recipe, **keys: Any) -> Recipe:
    """The recipe with other values for these keys.

    Raises:
        ValidationError: a value is not one that the key may have.
    """
    tables = recipe.model_dump()
    for key, value in keys.items():
        tables[TABLE_OF_KEY[key]][key] = value
    return Recipe.model_validate(tables)


def check_recipe(recipe: Recipe, source: str = "recipe") -> None:
    """Check the relations between keys.

    Raises:
        RecipeError: with one line for each relation that does not hold.
    """
    problems = list(_broken_relations(recipe))
    if problems:
        raise RecipeError("\n".join(f"{source} [{TABLE_OF_KEY[key]}] {key}: {text}" for key, text in problems))


MIN_EXACT_EPS = 1e-11
"""The least eps with reduction = "exact", which rounds gradients to multiples of 2**-40. A gradient g that rounds to
zero is at most 2**-41 (4.5e-13), and AdamW would have moved its weight by lr * g / (g + eps): with this eps by 4% of
lr at most, with a smaller one by much of it."""


def _broken_relations(recipe: Recipe) -> Iterator[tuple[str, str]]:
    model, train, schedule, validation = recipe.model, recipe.train, recipe.schedule, recipe.validation
    if model.embed_dim % model.num_heads:
        yield "num_heads", f"got {model.num_heads}, expected a divisor of embed_dim = {model.embed_dim}"
    if train.seq_len > model.max_seq_len:
        yield (
            "seq_len",
            f"got {train.seq_len}, expected at most max_seq_len = {model.max_seq_len}; lower seq_len or raise "
            "max_seq_len",
        )
    if train.micro_batch_size and train.batch_size % train.micro_batch_size:
        yield (
            "micro_batch_size",
            f"got {train.micro_batch_size}, expected a divisor of batch_size = {train.batch_size}",
        )
    if schedule.warmup > train.steps:
        yield (
            "warmup",
            f"got {schedule.warmup}, expected at most steps = {train.steps}; lower warmup or raise steps",
        )
    if schedule.schedule == "constant" and schedule.min_lr:
        yield "min_lr", f'got {schedule.min_lr}, expected 0 with schedule = "constant"; choose "cosine" or "linear"'
    elif schedule.min_lr > recipe.optimizer.lr:
        yield "min_lr", f"got {schedule.min_lr}, expected at most lr = {recipe.optimizer.lr}"
    if recipe.runtime.reduction == "exact" and recipe.optimizer.eps < MIN_EXACT_EPS:
        yield (
            "eps",
            f'got {recipe.optimizer.eps}, expected at least {MIN_EXACT_EPS} with reduction = "exact", which rounds '
            'gradients to multiples of 2**-40, about 1e-12; raise eps, or use reduction = "fast"',
        )
    if validation.val_every and not recipe.data.val_split:
        yield (
            "val_every",
            f"got {validation.val_every}, expected 0 without held-out text; set val_split, such as 0.1",
        )
    if validation.log_val_stderr and not validation.val_every:
        yield "log_val_stderr", "got true, expected false without evaluations; set val_every, such as 500"
    if recipe.checkpoint.save_best and not validation.val_every:
        yield "save_best", "got true, expected false without evaluations; set val_every, such as 500"


def _explain(problem: Any, source: str | None) -> str:
    """One line for one of pydantic's errors: where, what was got, what was expected, and the likely fix."""
    location = [str(part) for part in problem["loc"]]
    table, key = location[0], location[-1]
    if problem["type"] == "extra_forbidden":
        if len(location) == 1:
            if table in TABLE_OF_KEY:
                return f"{source}: key '{table}' belongs in the table [{TABLE_OF_KEY[table]}]"
            return f"{source}: unknown table {table!r}{_suggest(table, Recipe.model_fields)}"
        if key in TABLE_OF_KEY:
            return f"{source} [{table}]: key '{key}' belongs in the table [{TABLE_OF_KEY[key]}]"
        own_keys = type(Recipe.model_fields[table].default).model_fields
        return f"{source} [{table}]: unknown key {key!r}{_suggest(key, own_keys)}"
    where = f"--{key.replace('_', '-')}" if source is None else f"{source} [{table}]"
    if source is not None and len(location) > 1:
        where += f" {location[1]}"
    expected = "a table" if problem["type"] == "model_type" else problem["msg"]
    for prefix in ("Input should be ", "Input should ", "String should "):
        expected = expected.removeprefix(prefix)
    return f"{where}: got {_show(problem['input'])}, expected {expected}"


def _show(value: Any) -> str:
    """A value as it is shown in a message: short, on one line."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"


def _suggest(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; expected one of {', '.join(known)}"
