"""Schemas of run.json, of manifests, and of the metadata in model and state files."""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from mygpt.data.tokenizer import TokenizerMetadata
from mygpt.errors import DamagedCheckpointError, FormatError
from mygpt.recipe.tables import Count, CountOrOff, ModelTable, Recipe, Table
from mygpt.runs.files import read_bytes

FORMAT: Final = 3
"""Format of run.json and of checkpoints. No other one is read."""

HASH_OF_PATH = {"corpus": "corpus_sha256", "val_corpus": "held_out_sha256", "init_from": "init_sha256"}
"""The field of run.json that has the hash of what each of these keys names. The hash counts, not the path."""


class _Metadata(Table):
    """Metadata of a checkpoint's file, as canonical JSON: equal values are equal text."""

    format: Literal[3] = FORMAT
    step: Annotated[int, Field(ge=0)]
    """The optimizer step after which it was saved."""

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))


class ModelMetadata(_Metadata):
    """Metadata of a model file: with the weights, all that generating needs."""

    model: ModelTable
    tokenizer: TokenizerMetadata


class Best(Table):
    """The evaluation with the lowest held-out loss."""

    step: Annotated[int, Field(ge=1)]
    val: float


class OptimizerMetadata(Table):
    """What a state file holds of an optimizer."""

    name: str
    """The name of its class."""
    kinds: dict[str, Literal["tensor", "int", "float", "bool"]]
    """What each of its tensors stands for, by name: itself, or a plain number of this type."""


class StateMetadata(_Metadata):
    """Metadata of a state file, which holds optimizer and generator states."""

    processes: Annotated[int, Field(ge=1)] | None
    """How many processes' dropout generators it holds; None with reduction = "exact", which needs none."""
    optimizer: Annotated[OptimizerMetadata | None, Field(exclude_if=lambda value: value is None)] = None
    """None: AdamW, with the tensors MOMENTS of every parameter (runs/loading.py)."""


class FileEntry(Table):
    """Size and hash of a checkpoint's file."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


End = Literal["steps", "patience"]
"""Why a run is finished: it did all steps, or early stopping ended it."""
Reason = Literal["scheduled", "best", "timed", "interrupted", "failed"]


class Manifest(_Metadata):
    """manifest.json: why a checkpoint was saved, and what its files must be."""

    reason: Reason
    """scheduled: by `save_every`, or the last step. best: the lowest held-out loss so far. timed: by
    `save_seconds`. interrupted: by a signal, or by `last_step`. failed: before a step that was not finite. Those of
    "best", "timed" and "interrupted" are removed once superseded."""
    ended_by: End | None = None
    """Why the run was finished with this step; None: it was not, as after a signal."""
    files: dict[Literal["model.safetensors", "state.safetensors"], FileEntry]


CODE_CHARACTERS = 12
"""How many characters of the hash of mygpt's code are compared and shown."""


class Environment(Table):
    """All that the last bits of a result depend on beside the recipe, as it was found or resolved."""

    versions: dict[str, str]
    cpu: str
    cpu_capability: str
    accelerator: str | None
    git_commit: str | None
    code_sha256: str
    """The hash of mygpt's own Python files."""
    device: str
    compile: bool
    threads: Annotated[int, Field(ge=1, le=1024)]
    matmul: Literal["blas", "onednn"]
    """What computed products on a CPU."""
    processes: Count
    sharded: bool
    """Whether each process held a part of the weights (FSDP)."""
    micro_batch_size: Count
    """Windows per forward pass on one process."""
    deterministic: bool
    """Whether the same run gives the same bits again."""

    @property
    def code(self) -> str:
        """The beginning of `code_sha256`."""
        return self.code_sha256[:CODE_CHARACTERS]

    def values(self) -> dict[str, Any]:
        """All values by name, without the commit, which changes no bits by itself."""
        fields = self.model_dump(exclude={"versions", "git_commit", "code_sha256"})
        return {**self.versions, "code": self.code, **fields}

    def changes(self, now: Self) -> dict[str, tuple[Any, Any]]:
        """The `values` that differ in another environment: the old and the new one, by name."""
        was = self.values()
        return {name: (was.get(name), new) for name, new in now.values().items() if was.get(name) != new}


class Stretch(Table):
    """Steps of a run that were trained in one environment, with one end in view."""

    after_step: Annotated[int, Field(ge=0)]
    """The step after which it begins. It ends where the next one begins."""
    steps: Count
    """How many steps the run was to have: schedules depend on it."""
    patience: CountOrOff
    environment: Environment


class Origin(Table):
    """The checkpoint of another run with which a branch began."""

    checkpoint: str
    """Its step directory: absolute, or relative to the run if it lies in it."""
    manifest_sha256: str
    """The hash of its manifest.json, and so of all that is in it."""
    after_step: Annotated[int, Field(ge=0)]
    tokens: Annotated[int, Field(ge=0)]
    """On how many the steps up to it were trained."""


class Recreated(Table):
    """The run, and its step, that `mygpt at` made again in a run directory."""

    run: str
    """The directory of that run, absolute."""
    after_step: Annotated[int, Field(ge=1)]


class RunInfo(Table):
    """run.json: the recipe of a run, and all else that its bits depend on."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[3]
    platform: str
    command: tuple[str, ...]
    launch_id: str | None
    """The id of the Slurm job or of torchrun's launch that started the run; None: it had no id."""
    corpus_sha256: str
    held_out_sha256: str | None
    """The hash of `val_corpus`; None: the recipe names none."""
    init_sha256: str | None
    """The hash of the model file that `init_from` named; None: the weights were random."""
    recipe: Recipe
    """As in recipe.toml, but replaced atomically with `stretches`."""
    origin: Origin | None = None
    """Only a branch has one."""
    recreated: Recreated | None = None
    """Only a run that `mygpt at` made has this."""
    stretches: Annotated[tuple[Stretch, ...], Field(min_length=1)]
    """In the order of their steps."""

    def to_json(self) -> str:
        absent = {name for name in ("origin", "recreated") if getattr(self, name) is None}
        # The output is the directory in which this file lies.
        left_out: dict[str, Any] = {"recipe": {"checkpoint": {"output"}}, **dict.fromkeys(absent, True)}
        return self.model_dump_json(indent=2, exclude=left_out) + "\n"

    @property
    def inputs(self) -> dict[str, str | None]:
        """The hash of what each key of `HASH_OF_PATH` named."""
        return {key: getattr(self, name) for key, name in HASH_OF_PATH.items()}

    @property
    def held_out_text(self) -> str:
        """The hash of the text that is held out, or of which a part is."""
        return self.held_out_sha256 or self.corpus_sha256

    @property
    def origin_step(self) -> int:
        """The step of the checkpoint with which a branch began; 0 of another run."""
        return self.origin.after_step if self.origin else 0

    def tokens_until(self, step: int) -> int:
        """On how many tokens the steps up to this one are trained; those before a branch may have had other batches."""
        train, before = self.recipe.train, self.origin.tokens if self.origin else 0
        return before + (step - self.origin_step) * train.batch_size * train.seq_len

    def stretches_until(self, step: int) -> tuple[Stretch, ...]:
        """The stretches that trained the steps up to this one."""
        return self.stretches[:1] + tuple(stretch for stretch in self.stretches[1:] if stretch.after_step < step)

    def stretch_of(self, step: int) -> Stretch:
        """The stretch that trained a step, or that would train it."""
        return self.stretches_until(step)[-1]


T = TypeVar("T", bound=Table)


def read_table(kind: type[T], file: Path) -> T:
    """Read a JSON file as a table of this kind.

    Raises:
        DamagedCheckpointError: the file cannot be read, or holds something else.
        FormatError: another version of mygpt wrote the file.
    """
    return parse_table(kind, read_bytes(file), file)


def parse_table(kind: type[T], text: str | bytes, file: Path) -> T:
    """The table in JSON that was read from `file`; see `read_table`."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors()
    # A file of another format can differ in many fields: its format says why.
    problem = next((problem for problem in problems if problem["loc"] == ("format",)), problems[0])
    where, found = ".".join(map(str, problem["loc"])), problem["input"]
    if problem["type"] == "extra_forbidden":
        raise FormatError(f"{file}: has {where}, which this mygpt does not know; use a newer mygpt")
    if where == "format" and (problem["type"] == "missing" or isinstance(found, int)):
        is_newer = isinstance(found, int) and found > FORMAT
        shown = found if isinstance(found, int) else "1 or 2"
        way_on = "use a newer mygpt" if is_newer else "use the mygpt that wrote it, or train the run again"
        raise FormatError(f"{file}: of format {shown}, and this mygpt reads format {FORMAT}; {way_on}")
    metadata = "" if file.suffix == ".json" else "metadata "
    raise DamagedCheckpointError(f"{file}: damaged: {metadata}{where or 'content'}: {problem['msg']}")
