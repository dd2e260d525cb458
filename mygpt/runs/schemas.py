"""What mygpt writes of its files: of a model, a training state, a checkpoint and a run. Imports no torch."""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from mygpt.errors import DamagedCheckpointError, NewerFormatError
from mygpt.recipe.tables import Count, ModelTable, Recipe, Table

FORMAT: Final = 2
"""Of checkpoints: raised when an older mygpt could not read a newer one's. Format 1 is read, too: its manifests do not
hold the recipe, the corpus, and whether the run is finished."""


class TokenizerMetadata(Table):
    """What a tokenizer is made again from."""

    type: Literal["char"] = "char"
    vocab: Annotated[str, Field(min_length=1)]


class _Metadata(Table):
    """What mygpt writes of a file's content as canonical JSON: the same content is always the same text."""

    format: Literal[1, 2] = FORMAT
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
    finished: bool | None = None
    """Whether the run ended with this step, and not by a signal; None in format 1."""
    recipe: Recipe | None = None
    """What the step was trained with; None in format 1. Corpus, output and resume are left out, so that the same recipe
    gives the same bytes in any directory: where this is read they have their defaults, which mean nothing."""
    corpus_sha256: str | None = None
    """Of the text that it was trained on; None in format 1."""
    files: dict[Literal["model.safetensors", "state.safetensors"], FileEntry]

    def to_json(self) -> str:
        paths = {"recipe": {"data": {"corpus"}, "checkpoint": {"output", "resume"}}}
        return json.dumps(self.model_dump(exclude=paths), sort_keys=True, separators=(",", ":"))


class Resumed(Table):
    """That a run went on after a checkpoint, and what was different from then on."""

    after_step: Annotated[int, Field(ge=0)]
    checkpoint: str | None = None
    """The step directory of another run after which this one began, absolute; None: its own."""
    manifest_sha256: str | None = None
    """Of that step directory's manifest.json, and so of all that is in it."""
    changed: dict[str, tuple[Any, Any]] = Field(default_factory=dict)
    """Old and new value by name: of recipe keys, of `environment`, of git_commit and corpus_sha256."""
    recipe: Recipe | None = None
    """With which the steps up to then were trained; None as mygpt 0.1 wrote it."""


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
    recipe: Recipe | None = None
    """The newest, as recipe.toml has it: here it is replaced together with what is recorded of its changes. None as
    mygpt 0.1 wrote it."""
    resumed: tuple[Resumed, ...] = ()

    def environment(self) -> dict[str, Any]:
        """What the last bits of a result depend on, by name."""
        names = (
            *("cpu", "cpu_capability", "accelerator"),
            *("device", "compile", "threads", "processes", "sharded", "micro_batch_size", "reduction"),
        )
        return {**self.versions, **{name: getattr(self, name) for name in names}}

    def to_json(self) -> str:
        # The output is where this file lies.
        output = {"checkpoint": {"output"}}
        resumed = {"__all__": {"recipe": output}} if self.resumed else True
        return self.model_dump_json(indent=2, exclude={"recipe": output, "resumed": resumed}) + "\n"

    def recorded(self) -> dict[str, Any]:
        """What is compared when a run goes on, by name."""
        return {**self.environment(), "git_commit": self.git_commit, "corpus_sha256": self.corpus_sha256}

    def recorded_at(self, step: int) -> dict[str, Any]:
        """`recorded` as it was when `step` was trained: the run may have gone on elsewhere since, and before."""
        values = self.recorded()
        for resumed in self.before(step):
            values |= {name: now for name, (_, now) in resumed.changed.items() if name in values}
        return values

    def before(self, step: int) -> tuple[Resumed, ...]:
        """The times that the run went on before it trained `step`."""
        return tuple(resumed for resumed in self.history if resumed.after_step < step)

    @property
    def history(self) -> tuple[Resumed, ...]:
        """`resumed` in the order of steps, without continuations that were given up, which mygpt 0.1 left there."""
        kept: list[Resumed] = []
        for resumed in self.resumed:
            kept = [entry for entry in kept if entry.after_step < resumed.after_step] + [resumed]
        return tuple(kept)


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
    if problem["type"] == "extra_forbidden":
        raise NewerFormatError(f"{file}: has {where}, which this mygpt does not know; use a newer mygpt")
    if where == "format" and isinstance(problem["input"], int) and problem["input"] > FORMAT:
        raise NewerFormatError(
            f"{file}: of format {problem['input']}, and this mygpt reads up to {FORMAT}; use a newer mygpt"
        )
    raise DamagedCheckpointError(f"{file}: damaged: metadata {where or 'content'}: {problem['msg']}")
