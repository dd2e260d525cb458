"""The tables of a recipe as frozen models, and the checks of their values and of the relations between keys.

Every key is unique across the tables, so each is also a flag of `mygpt train` (`val_split` is `--val-split`) and an
argument of `Recipe.of`. A key that is left out has the default given here, and the defaults together are the plain
run: constant learning rate, no held-out text, no clipping.
"""

import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from mygpt.errors import RecipeError
from mygpt.recipe.names import KEY_OF_FOREIGN_NAME, suggest

# torch seeds and sizes are 64-bit, and its CPU generator keeps 32 bits of a seed: stay where every value is distinct.
MAX_SEED = 2**32
Seed = Annotated[int, Field(ge=0, lt=MAX_SEED)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
CountOrOff = Annotated[int, Field(ge=0, lt=2**31)]
Probability = Annotated[float, Field(ge=0, lt=1)]

NAMED_CORPORA = ("tinyshakespeare", "python-docs")
"""Corpora that are found by name; a name wins over a file of the same name."""


class Table(BaseModel):
    """One table of a recipe: immutable, no unknown keys, no conversions (`true` is not 1), no nan or inf."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataTable(Table):
    """The training text."""

    corpus: Annotated[str, Field(min_length=1)] = "tinyshakespeare"
    """A text file (UTF-8), a folder that `mygpt data prepare` made, or one of the named corpora: "tinyshakespeare",
    "python-docs". A relative path in a recipe file is looked up beside that file first, then in the working
    directory."""
    tokenizer: Literal["char", "byte", "bpe", "gpt2"] = "char"
    """What a token is: a character, a byte of the text's UTF-8, or that of a byte-pair encoding. A "bpe" is trained on
    the part of the text that is not held out, or read from tokenizer_file. "gpt2" is GPT-2's, through tiktoken."""
    vocab_size: Annotated[int, Field(ge=257, lt=2**31)] | None = None
    """Tokens of a "bpe" that is trained; absent: 1024."""
    tokenizer_file: Annotated[str, Field(min_length=1)] | None = None
    """The tokenizer.json of a byte-level "bpe", in the format of Hugging Face's tokenizers. A relative path is looked
    up as that of the corpus."""
    val_split: Probability = 0.0
    """Fraction of the text that is held out and never trained on; 0: none."""
    val_corpus: Annotated[str, Field(min_length=1)] | None = None
    """A text, or a prepared corpus, that is held out as a whole, in place of a part of the corpus; named as that is.
    The vocabulary of "char" is then that of both texts."""
    hold_out: Literal["tokens", "documents", "pieces"] = "tokens"
    """What is held out. "tokens": exactly this share of the tokens, at the end. "documents": whole documents at the
    end, so that none is in both parts; needs a corpus of `mygpt data prepare`. "pieces": 32 pieces of equal length at
    random places of a text, the same for all runs; then the error of sampling = "full" is that of the loss on unseen
    passages of this text, and holds also where one part of the text is not like another."""

    @property
    def has_held_out(self) -> bool:
        """Whether some text is held out."""
        return bool(self.val_split or self.val_corpus)

    @property
    def flags_that_evaluate(self) -> str:
        """With which a run that has no evaluations gets some."""
        return "--val-every 500" if self.has_held_out else "--val-split 0.1 --val-every 500"


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
    init: Literal["torch", "gpt2"] = "torch"
    """The initial weights: those of torch, or those of GPT-2. torch's are large for embeddings. GPT-2's are normal with
    deviation 0.02, in layers that add to the residual stream divided by the root of their number, and biases are 0."""
    activation: Literal["gelu", "gelu-tanh"] = "gelu"
    """In the MLP: exact GELU, or the approximation by tanh with which GPT-2 was trained."""
    biases: Literal["mlp", "all", "none"] = "mlp"
    """Which layers have biases. "mlp": the MLP and the norms. "all": attention, too, as in GPT-2. "none": no layer."""
    tied_head: bool = True
    """Whether the head uses the weights of the token embedding, or has its own."""
    vocab_multiple: Count = 1
    """Round the rows of embedding and head up to a multiple of this, for faster products on a GPU, such as 64. No text
    has the tokens that this adds; they get no probability."""


class TrainTable(Table):
    """The training loop."""

    steps: Count = 2000
    """Optimizer steps."""
    batch_size: Count = 16
    """Windows per optimizer step, over all processes together."""
    micro_batch_size: Count | None = None
    """Windows per forward pass on one process; absent: batch_size / processes, or with reduction = "exact" a quarter of
    batch_size. Smaller saves memory (gradients are accumulated). Must divide batch_size and, unless reduction is
    "exact", batch_size / processes."""
    seq_len: Count = 64
    """Tokens per window; at most max_seq_len."""
    order: Literal["random", "epoch"] = "random"
    """How training windows are chosen. "random": each is drawn from all positions of the text. "epoch": the text is cut
    into consecutive windows, and each is trained on once per epoch, in an order that data_seed shuffles."""
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
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Begin at step 1 with the weights of another model, and a new optimizer and schedule. It is a run (its newest
    checkpoint), RUN/best, a step directory or a model.safetensors. The architecture must be the same, but for dropout,
    and the text is encoded with that model's tokenizer. A relative path is looked up as that of the corpus."""
    data_seed: Seed = 42
    """Seed of the batches and of dropout."""


class OptimizerTable(Table):
    """AdamW (https://arxiv.org/abs/1711.05101), with torch's defaults."""

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
    decay: Literal["all", "matrices"] = "all"
    """Which weights decay: all, or those of products and embeddings and no bias or norm, as in GPT-2."""


class ScheduleTable(Table):
    """The learning rate as a function of the step."""

    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """After warmup: keep the rate at lr, or lower it to min_lr at the last step along half a cosine or a line. "wsd"
    (warmup, stable, decay): keep it, and lower it along a line over the last wsd_decay."""
    warmup: CountOrOff = 0
    """Steps over which the rate rises linearly to lr; 0: none."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """The rate at the last step of a schedule that lowers it."""
    wsd_decay: Count | None = None
    """Steps over which "wsd" lowers the rate; absent: a fifth of steps."""

    def decay_starts(self, steps: int) -> int:
        """The last step before "wsd" lowers the rate."""
        return steps - (self.wsd_decay or max(1, min(steps // 5, steps - self.warmup)))


class ValidationTable(Table):
    """The held-out loss."""

    val_every: CountOrOff = 0
    """Steps between evaluations of the held-out loss (and one at the last step); 0: never. Needs val_split or
    val_corpus."""
    eval_batches: Count = 10
    """Random batches in one evaluation; sampling = "full" evaluates all of the held-out text instead."""
    sampling: Literal["shared-stream", "own-stream", "full"] = "shared-stream"
    """How held-out windows are chosen. "shared-stream": drawn from the generator of the training batches, so that an
    evaluation shifts the batches that follow (as in published numbers of this kind). "own-stream": drawn from a
    separate generator, the same windows at every evaluation. "full": all of the held-out text, cut into consecutive
    windows, so that each token is predicted once."""
    patience: CountOrOff = 0
    """Early stopping: evaluations in a row that may bring no improvement before the run ends; 0: off. An improvement is
    a held-out loss that is lower, by more than the 95% interval of the paired difference, than the last improvement.
    The best checkpoint is kept, as with save_best. Needs sampling = "own-stream" or "full"."""
    log_val_stderr: bool = False
    """Print the held-out loss with its standard error; metrics.jsonl always has it."""
    log_bits_per_byte: bool = False
    """Print the held-out loss in bits per byte, too, which can be compared between tokenizers; metrics.jsonl always has
    it."""
    log_perplexity: bool = False
    """Print the perplexity of the held-out text, e to its loss; metrics.jsonl always has it."""


class RuntimeTable(Table):
    """Device, precision, threads and other settings of the computation."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """"auto": cuda if the machine has it, else mps, else cpu; or cpu if the launch asks for it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16": matrix products in bfloat16 (autocast); weights and optimizer stay fp32."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads per process; absent: the machine's cores / its processes, or 1 with reduction = "exact". The last
    bits of a CPU result depend on it."""
    matmul: Literal["auto", "blas", "onednn"] = "auto"
    """What computes fp32 products on a CPU: torch's BLAS library (MKL, OpenBLAS or Accelerate) or oneDNN. "auto":
    oneDNN on AMD processors from Zen 5 on, where MKL does not use AVX-512, else BLAS; run.json says which. The last
    bits depend on it."""
    compile: bool = False
    """Compile the model with torch.compile: slow to start, faster per step."""
    deterministic: bool = True
    """On cuda, use only kernels that give the same bits every time. With false any kernel may be used, which can be
    faster, and two runs of the recipe differ in their last bits. CPUs always give the same bits."""
    loss_chunk: CountOrOff = 0
    """Tokens whose logits are in memory at a time, for large vocabularies. Less memory, and the head is computed twice.
    0: all of a forward pass. The last bits depend on it."""
    activation_checkpointing: bool = False
    """Keep only the input of each block, and recompute its activations in the backward pass. Less memory, more time,
    the same numbers."""
    reduction: Literal["fast", "exact"] = "fast"
    """How gradients are summed over micro-batches and processes. "fast": as floats, so that the last bits depend on the
    number of processes. "exact": as integers, with the same bits on any number of processes; steps take longer."""


class CheckpointTable(Table):
    """The run directory and the checkpoints in it."""

    output: Annotated[str, Field(min_length=1)] = "checkpoints/default"
    """The run directory; absent from a recipe file: checkpoints/ and the file's name without its extension. The
    recipe.toml in a run directory always means that directory."""
    save_every: CountOrOff = 0
    """Steps between checkpoints; 0: none. The last step is always saved."""
    save_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds of training that a kill may cost. So long after the last checkpoint another is saved, between those of
    save_every. It is removed when the next one is there, and so leaves no trace in a complete run; 0: none. While a
    checkpoint is still being written, no other is begun for this."""
    keep_last: CountOrOff = 0
    """How many of the newest checkpoints made by save_every to keep; 0: all."""
    save_best: bool = False
    """Also save each step with the lowest held-out loss so far. The file `best` names the newest of these, which is
    always kept."""
    resume: Annotated[str, Field(min_length=1)] = "auto"
    """"auto": continue the run in output if it has a checkpoint, else start. "never": start, but only if output holds
    no run. A run or step directory: start output from that checkpoint."""


ExpectedRows = Annotated[
    tuple[Annotated[tuple[Count, float, Annotated[float, Field(ge=0)]], Field(strict=False)], ...],
    Field(strict=False),
]
"""Step, mean and standard deviation over seeds, by step."""


class ExpectedTable(Table):
    """What the recipe as it stands should come to. `mygpt init` predicts it, or runs with several seeds came to it. A
    complete run says how close it came, and `mygpt check RUN` at any time. A recipe that extends this one, and a flag
    that changes the training, drop it."""

    expected_minutes: Annotated[float, Field(gt=0)] | None = None
    """From the first step to the last, with evaluations."""
    expected_bits_per_byte: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """The range of the held-out loss at the last step, by its lower and upper end."""
    expected_val: ExpectedRows | None = None
    """Held-out losses in nats per token, as [[step, mean, deviation], ...]. They are over runs with other seeds."""
    expected_loss: ExpectedRows | None = None
    """The same of the training loss. Each is the mean over the 100 steps up to that step."""
    expected_seeds: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    """How many runs these rows are from."""
    expected_text: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None = None
    """How the sha256 of the text begins on which they were trained. Of another text they say nothing."""


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
    expected: ExpectedTable = ExpectedTable()

    @model_validator(mode="before")
    @classmethod
    def _expect_tables(cls, tables: Any, info: ValidationInfo) -> Any:
        """Say how keys are given without their tables, which a file and flags have."""
        is_own_call = info.context is None and info.mode == "python" and isinstance(tables, dict)
        keys = sorted(tables.keys() & TABLE_OF_KEY) if is_own_call else []
        # [schedule] is a table, and has a key of that name.
        keys = [key for key in keys if key not in cls.model_fields or not isinstance(tables[key], (dict, Table))]
        if keys:
            keys_given = ", ".join(f"{key}={show_value(tables[key])}" for key in keys)
            raise RecipeError(f"Recipe: expected tables; Recipe.of takes keys: Recipe.of({keys_given})")
        return tables

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint with the lowest held-out loss is kept."""
        return self.checkpoint.save_best or self.validation.patience > 0

    @classmethod
    def of(cls, **keys: Any) -> "Recipe":
        """The recipe with these keys, given without their tables: `Recipe.of(lr=1e-3, val_split=0.1)`.

        Raises:
            RecipeError: with one line for each key that is unknown, of the wrong type or out of range.
        """
        return cls().replace(**keys)

    def replace(self, **keys: Any) -> "Recipe":
        """This recipe with other values for these keys: `recipe.replace(steps=10)`; raises as `of` does."""
        return build_recipe(_with_keys(self, keys, "recipe"), source="recipe")

    def flat(self) -> dict[str, Any]:
        """Every key with its value, without the tables."""
        return {key: value for _, table in self for key, value in table}

    def to_tables(self) -> dict[str, dict[str, Any]]:
        """The keys that have a value, by table."""
        tables = self.model_dump(exclude_none=True)
        return {name: keys for name, keys in tables.items() if keys}

    def to_toml(self) -> str:
        """This recipe as TOML that `load_recipe` reads back to an equal one; keys that are absent stay absent."""
        return tomli_w.dumps(self.to_tables())


KEYS_OF_TABLE = {name: list(type(table.default).model_fields) for name, table in Recipe.model_fields.items()}
TABLE_OF_KEY = {key: table for table, keys in KEYS_OF_TABLE.items() for key in keys}
PATH_KEYS = ("corpus", "val_corpus", "tokenizer_file", "init_from")
"""Keys that name a file or a folder to read."""
ALL_KEYS = "`mygpt recipe show default` prints all keys"

HARMLESS_KEYS = {
    *CheckpointTable.model_fields,
    *ExpectedTable.model_fields,
    *("print_every", "log_every", "log_grad_norm", "log_val_stderr", "log_bits_per_byte", "log_perplexity"),
    "activation_checkpointing",
}
"""Keys that choose what is shown and kept, and change no number."""

SEED_KEYS = {"init_seed", "data_seed"}
"""Keys in which runs of a recipe differ that differ only by chance."""

STUDY_KEYS = {"output", "resume", "threads", *ExpectedTable.model_fields, *SEED_KEYS}
"""Keys that a study sets itself, or that say nothing of its recipes."""

SPEED_KEYS = {*RuntimeTable.model_fields, "micro_batch_size"}
"""Keys that change how long training takes, and losses hardly at all."""

UNNAMED_KEYS = HARMLESS_KEYS | SPEED_KEYS - {"precision", "loss_chunk", "reduction"} | {"steps", "patience"}
"""Keys with which a run can be continued, so that a change of them does not change the name of its output."""


def build_recipe(tables: Mapping[str, Any], source: str | None = None) -> Recipe:
    """A recipe from nested tables. `source` is the file that they came from; None: command-line flags.

    Raises:
        RecipeError: with one line for each key that is unknown, of the wrong type or out of range.
    """
    try:
        return Recipe.model_validate(tables, context={"source": source})
    except ValidationError as error:
        problems = error.errors()
        # Such as the name of a file, after which an output is named.
        if name := next((problem["input"] for problem in problems if problem["type"] == "string_unicode"), ""):
            raise RecipeError(f"{name}: its name is not UTF-8, as a recipe is; rename it") from None
        raise RecipeError("\n".join(_explain(problem, source) for problem in problems)) from None


def _with_keys(recipe: Recipe, keys: Mapping[str, Any], source: str | None) -> dict[str, dict[str, Any]]:
    """The tables of a recipe with these values."""
    if unknown := keys.keys() - TABLE_OF_KEY:
        lines = (f"{source}: unknown key {key!r}{suggest(key, TABLE_OF_KEY, ALL_KEYS)}" for key in sorted(unknown))
        raise RecipeError("\n".join(lines))
    tables = recipe.model_dump()
    for key, value in keys.items():
        tables[TABLE_OF_KEY[key]][key] = _plain(value)
    return tables


def _plain(value: Any) -> Any:
    """A path as text, and a number of numpy or torch as Python's own."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def check_recipe(recipe: Recipe, source: str = "recipe") -> None:
    """Check the relations between keys.

    Raises:
        RecipeError: with one line for each relation that does not hold.
    """
    got = recipe.flat()
    lines = [
        f"{source} [{TABLE_OF_KEY[key]}] {key}: got {json.dumps(got[key])}, expected {expected}"
        for key, expected in _broken_relations(recipe)
    ]
    if lines:
        raise RecipeError("\n".join(lines))


REFINING_EVALUATION = ("log_val_stderr", "log_bits_per_byte", "log_perplexity", "save_best", "patience")
"""Keys that mean something only with evaluations."""


def refinements_to_drop(given: Mapping[str, Any]) -> set[str]:
    """The keys that mean nothing any more where the `given` ones, laid over others, turn evaluations off."""
    return {*REFINING_EVALUATION} - given.keys() if given.get("val_every") == 0 else set()


def lay_over(recipe: Recipe, keys: Mapping[str, Any], source: str | None = None) -> Recipe:
    """The recipe with other values for these keys, and without what loses its meaning by that.

    Expectations of the recipe go if a key changes the training; one among the keys stays. `source` is as in
    `build_recipe`, which this raises the errors of.
    """
    was, laid_over = recipe.flat(), build_recipe(_with_keys(recipe, keys, source), source)
    laid_over = laid_over.replace(**{key: Recipe().flat()[key] for key in refinements_to_drop(keys)})
    changed = {key for key, value in laid_over.flat().items() if value != was[key]} - SEED_KEYS
    changed -= HARMLESS_KEYS - SPEED_KEYS
    stale = set(ExpectedTable.model_fields) if changed - SPEED_KEYS else set()
    if changed or laid_over.checkpoint.resume not in ("auto", "never"):
        stale.add("expected_minutes")
    return laid_over.replace(**dict.fromkeys(stale - keys.keys()))


def seed_keys(seed: Any, name: str) -> dict[str, Any]:
    """Both seeds, for a seed that the user gives by this name.

    Raises:
        RecipeError: it is no seed.
    """
    seed = _plain(seed)
    if type(seed) is not int or not 0 <= seed < MAX_SEED:
        raise RecipeError(f"{name}: got {show_value(seed)}, expected an integer from 0 to {MAX_SEED - 1}")
    return dict.fromkeys(SEED_KEYS, seed)


MIN_EXACT_EPS = 1e-11
"""The least eps with reduction = "exact", which rounds gradients to multiples of 2**-40. A gradient g that rounds to
zero is at most 2**-41 (4.5e-13), and AdamW would have moved its weight by lr * g / (g + eps): with this eps by at most
4% of lr, with a much smaller one by almost lr."""


def _broken_relations(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each key whose value conflicts with another key, and the value expected instead."""
    model, train, schedule, validation = recipe.model, recipe.train, recipe.schedule, recipe.validation
    data = recipe.data
    if data.tokenizer_file and data.tokenizer != "bpe":
        yield "tokenizer_file", 'nothing, or tokenizer = "bpe"'
    if data.vocab_size and (data.tokenizer != "bpe" or data.tokenizer_file):
        yield "vocab_size", 'nothing, or tokenizer = "bpe" without tokenizer_file: other vocabularies have their size'
    if model.embed_dim % model.num_heads:
        yield "num_heads", f"a divisor of embed_dim = {model.embed_dim}"
    if train.seq_len > model.max_seq_len:
        yield "seq_len", f"at most max_seq_len = {model.max_seq_len}; lower seq_len or raise max_seq_len"
    if train.micro_batch_size and train.batch_size % train.micro_batch_size:
        yield "micro_batch_size", f"a divisor of batch_size = {train.batch_size}"
    if schedule.warmup > train.steps:
        fitting = max(1, train.steps // 20)
        yield "warmup", f"at most steps = {train.steps}; lower warmup (such as --warmup {fitting}) or raise steps"
    if schedule.schedule == "constant" and schedule.min_lr:
        yield "min_lr", '0 with schedule = "constant"; choose "cosine", "linear" or "wsd"'
    elif schedule.min_lr > recipe.optimizer.lr:
        yield "min_lr", f"at most lr = {recipe.optimizer.lr}"
    if schedule.wsd_decay and schedule.schedule != "wsd":
        yield "wsd_decay", 'nothing, or schedule = "wsd"'
    elif schedule.schedule == "wsd" and schedule.warmup + (schedule.wsd_decay or 1) > train.steps:
        yield "wsd_decay", f"at most steps - warmup = {train.steps - schedule.warmup}"
    if recipe.runtime.reduction == "exact" and not recipe.runtime.deterministic:
        yield "deterministic", 'true with reduction = "exact", whose bits are always the same'
    if recipe.runtime.matmul == "onednn" and recipe.runtime.precision == "bf16":
        yield "matmul", '"auto" with precision = "bf16", whose products torch computes with oneDNN where it can'
    if recipe.runtime.reduction == "exact" and recipe.optimizer.eps < MIN_EXACT_EPS:
        rounding = 'with reduction = "exact", which rounds gradients to multiples of 2**-40, about 1e-12'
        yield "eps", f'at least {MIN_EXACT_EPS} {rounding}; raise eps, or use reduction = "fast"'
    if validation.val_every and not data.has_held_out:
        yield "val_every", "0 without held-out text; set val_split, such as 0.1, or val_corpus"
    if data.val_corpus and data.val_split:
        yield "val_split", "0 with val_corpus, which is all that is held out"
    if data.val_corpus and data.hold_out != "tokens":
        yield "hold_out", '"tokens" with val_corpus, all of which is held out'
    ends = recipe.expected.expected_bits_per_byte
    if ends and not 0 < ends[0] <= ends[1]:
        yield "expected_bits_per_byte", "the lower end of the range, which is above 0, and then the upper"
    for key, rows in (("expected_val", recipe.expected.expected_val), ("expected_loss", recipe.expected.expected_loss)):
        steps = [step for step, *_ in rows or ()]
        if rows is not None and (not steps or steps != sorted(set(steps))):
            yield key, "at least one [step, mean, deviation], by rising steps"
    has_rows = recipe.expected.expected_val or recipe.expected.expected_loss
    if has_rows and not recipe.expected.expected_seeds:
        yield "expected_seeds", "the number of runs that expected_val and expected_loss are from"
    if not validation.val_every:
        for key in REFINING_EVALUATION:
            if value := recipe.flat()[key]:
                off = json.dumps(type(value)(0))
                yield key, f"{off} without evaluations; set val_every, such as 500, or {key} = {off}"
    elif validation.patience and validation.sampling == "shared-stream":
        yield (
            "patience",
            '0 with sampling = "shared-stream", whose windows differ each time; use "own-stream" or "full"',
        )


def _explain(problem: Any, source: str | None) -> str:
    """One line for one of pydantic's errors: where, what was got, what was expected, and the likely fix."""
    table, *keys = map(str, problem["loc"])
    if problem["type"] == "extra_forbidden":
        name, where = (keys[0], f"{source} [{table}]") if keys else (table, source)
        if name in TABLE_OF_KEY:
            return f"{where}: key '{name}' belongs in the table [{TABLE_OF_KEY[name]}]"
        kind, known = ("key", KEYS_OF_TABLE[table]) if keys else ("table", list(KEYS_OF_TABLE))
        if (meant := KEY_OF_FOREIGN_NAME.get(name)) and meant not in known:
            return f"{where}: unknown {kind} {name!r}; did you mean '{meant}' in the table [{TABLE_OF_KEY[meant]}]?"
        return f"{where}: unknown {kind} {name!r}{suggest(name, known)}"
    where = f"--{keys[0].replace('_', '-')}" if source is None else " ".join([f"{source} [{table}]", *keys[:1]])
    return f"{where}: {describe_problem(problem)}"


def describe_problem(problem: Any) -> str:
    """What one of pydantic's errors is about: what was got, and what was expected."""
    of_type = {"model_type": "a table", "missing": "more values"}
    expected = of_type.get(problem["type"], problem["msg"])
    for prefix in ("Input should be ", "Input should ", "String should have ", "String should "):
        expected = expected.removeprefix(prefix)
    value = problem["input"]
    expected = expected.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return f"got {json.dumps(value) if isinstance(value, bool) else show_value(value)}, expected {expected}"


def show_value(value: Any) -> str:
    """A value as it is shown in a message: short, on one line."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"
