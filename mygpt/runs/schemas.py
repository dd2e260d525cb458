"""Schemas of run.json, of manifests, and of the metadata in model and state files."""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from mygpt.data.tokenizer import TokenizerMetadata
from mygpt.errors import DamagedCheckpointError, NewerFormatError
from mygpt.recipe.tables import PATH_KEYS, TABLE_OF_KEY, Count, ModelTable, Recipe, Table
from mygpt.runs.files import read_bytes

FORMAT: Final = 2
"""Format of checkpoints, raised when an older mygpt could not read newer ones. Format 1, of mygpt 0.1, can be read: its
manifests lack recipe, corpus_sha256 and finished."""


HASH_OF_PATH = {"corpus": "corpus_sha256", "val_corpus": "held_out_sha256", "init_from": "init_sha256"}
"""For keys that name what is read, the hash of that in run.json: it counts, and not the path."""


class _Metadata(Table):
    """Metadata of a checkpoint's file, as canonical JSON: equal values are equal text."""

    left_out: ClassVar[dict[str, Any]] = {}
    """Fields that are not written."""

    format: Literal[1, 2] = FORMAT
    step: Annotated[int, Field(ge=0)]
    """The optimizer step after which it was saved."""

    def to_json(self) -> str:
        return json.dumps(self.model_dump(exclude=self.left_out), sort_keys=True, separators=(",", ":"))


class ModelMetadata(_Metadata):
    """Metadata of a model file: with the weights, all that generating needs."""

    model: ModelTable
    tokenizer: TokenizerMetadata


class Best(Table):
    """The evaluation with the lowest held-out loss."""

    step: Annotated[int, Field(ge=1)]
    val: float


class Evaluated(Best):
    """An evaluation: the held-out loss in nats per token, and its standard error."""

    stderr: Annotated[float, Field(ge=0)] | None
    dof: Annotated[float, Field(gt=0)] | None


class HeldOutMetadata(Table):
    """What a run remembers of its evaluations; see `History` in runs/held_out.py."""

    consecutive: bool
    piece_tokens: Annotated[int, Field(ge=0)] = 0
    """See `Windows` there."""
    evaluations: Annotated[tuple[Evaluated, ...], Field(min_length=1)]
    """By step; the last is the newest."""
    lowest: int
    marks: tuple[int, ...]
    first: int = 0
    reference: int
    waited: int


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
    best: Best | None = None
    """Only with `save_best` or `patience`."""
    held_out: HeldOutMetadata | None = None
    """None before the first evaluation."""
    optimizer: Annotated[OptimizerMetadata | None, Field(exclude_if=lambda value: value is None)] = None
    """None: AdamW, with the tensors MOMENTS of every parameter (runs/loading.py)."""

    @property
    def best_step(self) -> int | None:
        return self.best.step if self.best else None


class FileEntry(Table):
    """Size and hash of a checkpoint's file."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


End = Literal["steps", "patience"]
"""Why a run ended: it did all steps, or early stopping."""
Reason = Literal["scheduled", "best", "timed", "interrupted", "failed"]


class Manifest(_Metadata):
    """manifest.json: why a checkpoint was saved, with which recipe, and what its files must be."""

    left_out: ClassVar[dict[str, Any]] = {
        "recipe": {
            **{table: {key for key in PATH_KEYS if TABLE_OF_KEY[key] == table} for table in ("data", "train")},
            "checkpoint": {"output", "resume"},
        }
    }

    reason: Reason
    """scheduled: by `save_every`, or the last step. best: the lowest held-out loss so far. timed: by
    `save_seconds`. interrupted: by a signal. failed: before a step that was not finite. Those of "best", "timed" and
    "interrupted" are removed once superseded."""
    finished: bool | None = None
    """Whether the run ended with this step, and not by a signal; None in format 1."""
    ended_by: End | None = None
    """Why the run ended with this step; None: it did not, or an older mygpt wrote this."""
    recipe: Recipe | None = None
    """The recipe that trained this step; None in format 1. Its paths (PATH_KEYS, output, resume) are not written,
    so that the same run gives the same bytes in any directory: as read, they hold meaningless defaults."""
    corpus_sha256: str | None = None
    """Of the training text; None in format 1."""
    held_out_sha256: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    """Of `val_corpus`; None: there is none."""
    files: dict[Literal["model.safetensors", "state.safetensors"], FileEntry]


class Resumed(Table):
    """A point at which a run continued with changes, or branched off another run."""

    after_step: Annotated[int, Field(ge=0)]
    checkpoint: str | None = None
    """The step directory of the other run, absolute; None: it continued after a checkpoint of its own."""
    manifest_sha256: str | None = None
    """Of that step directory's manifest.json, and so of all that is in it."""
    changed: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    """Old and new value by name: of recipe keys, of `environment`, of git_commit and the hashes of what was read."""
    recipe: Recipe | None = None
    """The recipe that trained the steps before; None if mygpt 0.1 wrote this."""


class Recreated(Table):
    """Of which run, and up to which step, `mygpt at` made a run directory."""

    run: str
    """The directory of that run, absolute."""
    after_step: Annotated[int, Field(ge=1)]


CODE_CHARACTERS = 12
"""Of the hash of mygpt's code, where it is compared and shown."""


class RunInfo(Table):
    """run.json: all that the bits of a run depend on beside its recipe, and its history."""

    model_config = ConfigDict(extra="ignore")

    versions: dict[str, str]
    platform: str
    cpu: str
    cpu_capability: str
    accelerator: str | None
    git_commit: str | None
    code_sha256: str | None = None
    """Of mygpt's own Python files; None: an older mygpt wrote this."""
    command: tuple[str, ...]
    launch_id: str | None = None
    """Of the Slurm job or torchrun's launch that began the run; None: it had no id, or an older mygpt wrote this."""
    device: str
    compile: bool
    threads: Annotated[int, Field(ge=1, le=1024)]
    matmul: Literal["blas", "onednn"] = "blas"
    """What computed products on a CPU."""
    processes: Count
    sharded: bool = False
    """Whether each process held a part of the weights (FSDP)."""
    micro_batch_size: Count
    """Windows per forward pass on one process."""
    reduction: Literal["fast", "exact"] = "fast"
    deterministic: bool = True
    """Whether the same run gives the same bits again."""
    corpus_sha256: str
    held_out_sha256: str | None = None
    """Of `val_corpus`; None: there is none."""
    init_sha256: str | None = None
    """Of the model file that `init_from` named; None: the weights were random."""
    recipe: Recipe | None = None
    """The newest recipe, as in recipe.toml, but replaced atomically with `resumed`. None if mygpt 0.1 wrote this."""
    resumed: tuple[Resumed, ...] = ()
    recreated: Recreated | None = None
    """Only of a run that `mygpt at` or `mygpt fork` made."""

    def to_json(self) -> str:
        # The output is the directory in which this file lies.
        output = {"checkpoint": {"output"}}
        resumed = {"__all__": {"recipe": output}} if self.resumed else True
        left_out = {"recipe": output, "resumed": resumed, "recreated": self.recreated is None}
        return self.model_dump_json(indent=2, exclude={name: part for name, part in left_out.items() if part}) + "\n"

    def environment(self) -> dict[str, Any]:
        """All that the last bits of a result depend on, by name."""
        names = (
            *("cpu", "cpu_capability", "accelerator", "matmul"),
            *("device", "compile", "threads", "processes", "sharded", "micro_batch_size", "reduction", "deterministic"),
        )
        code = {"code": self.code_sha256[:CODE_CHARACTERS]} if self.code_sha256 else {}
        return {**self.versions, **code, **{name: getattr(self, name) for name in names}}

    def recorded(self) -> dict[str, Any]:
        """All that is compared when a run is continued, by name."""
        hashes = {name: getattr(self, name) for name in HASH_OF_PATH.values()}
        return {**self.environment(), "git_commit": self.git_commit, **hashes}

    def recorded_at(self, step: int) -> dict[str, Any]:
        """`recorded`, with the values that held when `step` was trained."""
        values = self.recorded()
        for resumed in self.before(step):
            values |= {name: now for name, (_, now) in resumed.changed.items() if name in values}
        return values

    def before(self, step: int) -> tuple[Resumed, ...]:
        """The part of the history before `step` was trained."""
        return tuple(resumed for resumed in self.history if resumed.after_step < step)

    @property
    def codes(self) -> list[str | None]:
        """The code of mygpt that trained it, and each other one with which it continued; None: it is not known."""
        changes = (resumed.changed["code"] for resumed in self.history if "code" in resumed.changed)
        return [self.environment().get("code"), *(now for _, now in changes)]

    @property
    def history(self) -> tuple[Resumed, ...]:
        """`resumed` by step, without the abandoned continuations that mygpt 0.1 left there."""
        kept: list[Resumed] = []
        for resumed in self.resumed:
            kept = [entry for entry in kept if entry.after_step < resumed.after_step] + [resumed]
        return tuple(kept)

    @property
    def origin(self) -> Resumed | None:
        """The point at which this run branched off another one; None: it did not."""
        return self.resumed[0] if self.resumed and self.resumed[0].checkpoint else None


T = TypeVar("T", bound=Table)


def read_table(kind: type[T], file: Path) -> T:
    """Read a JSON file as a table of this kind.

    Raises:
        DamagedCheckpointError: it cannot be read, or holds something else.
        NewerFormatError: a later version of mygpt wrote it.
    """
    return parse_table(kind, read_bytes(file), file)


def parse_table(kind: type[T], text: str | bytes, file: Path) -> T:
    """As `read_table`, of JSON that was read from `file`."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        raise NewerFormatError(f"{file}: has {where}, which this mygpt does not know; use a newer mygpt")
    if where == "format" and isinstance(problem["input"], int) and problem["input"] > FORMAT:
        raise NewerFormatError(
            f"{file}: of format {problem['input']}, and this mygpt reads up to {FORMAT}; use a newer mygpt"
        )
    metadata = "" if file.suffix == ".json" else "metadata "
    raise DamagedCheckpointError(f"{file}: damaged: {metadata}{where or 'content'}: {problem['msg']}")
