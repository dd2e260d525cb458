"""What mygpt writes of its files: of a model, a training state, a checkpoint and a run. Imports no torch."""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from mygpt.errors import DamagedCheckpointError, NewerFormatError
from mygpt.recipe import Count, ModelTable, Table

FORMAT: Final = 1
"""Of checkpoints: raised when an older mygpt could not read a newer one's."""


class TokenizerMetadata(Table):
    """What a tokenizer is made again from."""

    type: Literal["char"] = "char"
    vocab: Annotated[str, Field(min_length=1)]


class _Metadata(Table):
    """What mygpt writes of a file's content as canonical JSON: the same content is always the same text."""

    format: Literal[1] = FORMAT
    step: Annotated[int, Field(ge=0)]
    """The optimizer step after which it was saved."""

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))


class ModelMetadata(_Metadata):
    """What a model file says of itself, beside its weights."""

    model: ModelTable
    tokenizer: TokenizerMetadata


class Best(Table):
    """The evaluation with the lowest held-out loss."""

    step: Annotated[int, Field(ge=1)]
    val: float


class StateMetadata(_Metadata):
    """What a state file says of itself, beside optimizer moments and generator states."""

    processes: Annotated[int, Field(ge=1)] | None
    """Whose dropout generators it holds; None with reduction = "exact", where there are none."""
    best: Best | None = None
    """Only with `save_best`."""

    @property
    def best_step(self) -> int | None:
        return self.best.step if self.best else None


class FileEntry(Table):
    """What a manifest says of one file."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


Reason = Literal["scheduled", "best", "interrupted", "failed"]


class Manifest(_Metadata):
    """What a step directory must hold to be whole."""

    reason: Reason
    """Why it was saved: by `save_every` or as the last step; as the best so far; by a signal; before a step that
    broke. Those of "best" and "interrupted" go when they are superseded."""
    files: dict[Literal["model.safetensors", "state.safetensors"], FileEntry]


class Resumed(Table):
    """That a run went on after a checkpoint, and what was different from then on."""

    after_step: Annotated[int, Field(ge=0)]
    checkpoint: str | None = None
    """The step directory of another run after which this one began, absolute; None: its own."""
    manifest_sha256: str | None = None
    """Of that step directory's manifest.json, and so of all that is in it."""
    changed: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    """Old and new value by name."""


class RunInfo(Table):
    """run.json: what, beside the recipe, the bits of a run depend on, and where it came from."""

    model_config = ConfigDict(extra="ignore")

    versions: dict[str, str]
    platform: str
    cpu: str
    cpu_capability: str
    accelerator: str | None
    git_commit: str | None
    command: tuple[str, ...]
    device: str
    compile: bool
    threads: Annotated[int, Field(ge=1, le=1024)]
    processes: Count
    sharded: bool = False
    """Whether each process held a part of the weights (FSDP)."""
    micro_batch_size: Count
    """Windows per forward pass on one process."""
    reduction: Literal["fast", "exact"] = "fast"
    corpus_sha256: str
    resumed: tuple[Resumed, ...] = ()

    def environment(self) -> dict[str, Any]:
        """What the last bits of a result depend on, by name."""
        names = (
            *("cpu", "cpu_capability", "accelerator", "git_commit"),
            *("device", "compile", "threads", "processes", "sharded", "micro_batch_size", "reduction"),
        )
        return {**self.versions, **{name: getattr(self, name) for name in names}}

    def to_json(self) -> str:
        return self.model_dump_json(indent=2, exclude=None if self.resumed else {"resumed"}) + "\n"

    def effective(self, *names: str) -> dict[str, Any]:
        """The values of these names when the run last went on."""
        values = {**self.environment(), "corpus_sha256": self.corpus_sha256}
        for resumed in self.resumed:
            values |= {name: value for name, (_, value) in resumed.changed.items()}
        return {name: values[name] for name in names if name in values}


M = TypeVar("M", bound=_Metadata)


def parse_metadata(kind: type[M], text: str | bytes, file: Path) -> M:
    """The metadata that `file` holds as JSON.

    Raises:
        DamagedCheckpointError: it is not of this kind.
        NewerFormatError: a later version of mygpt wrote it.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    if where == "format" and isinstance(problem["input"], int) and problem["input"] > FORMAT:
        raise NewerFormatError(
            f"{file}: of format {problem['input']}, and this mygpt reads up to {FORMAT}; use a newer mygpt"
        )
    raise DamagedCheckpointError(f"{file}: damaged: metadata {where or 'content'}: {problem['msg']}")
