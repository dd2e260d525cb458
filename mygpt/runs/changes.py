"""Where a run begins: anew, or after a checkpoint, once what has changed since then is known. Imports no torch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mygpt.errors import MismatchError, RecipeError
from mygpt.recipe.tables import TABLE_OF_KEY, CheckpointTable, Recipe
from mygpt.runs.files import MODEL_FILE
from mygpt.runs.schemas import RunInfo
from mygpt.runs.steps import read_metadata

# Keys that say what is shown and kept, and change no number; what `steps` changes is told apart.
HARMLESS_KEYS = {
    *CheckpointTable.model_fields,
    *("print_every", "log_every", "log_grad_norm", "log_val_stderr", "activation_checkpointing", "steps"),
}
# Keys whose meaning on this machine, or whose content, run.json has: that is what is compared.
RESOLVED_KEYS = {"device", "threads", "micro_batch_size", "compile", "reduction", "corpus"}
# Keys that shift the training batches with sampling = "shared-stream", and else change no weight.
EVALUATION_KEYS = {"val_every", "eval_batches", "sampling"}

Warn = Callable[[str], None]


class Source(NamedTuple):
    """The run from which one continues, and after which of its checkpoints; None: it has none yet."""

    run: Path
    checkpoint: Path | None
    in_place: bool
    """Whether it is the run itself that goes on."""


def check_checkpoint(source: Source, recipe: Recipe, vocab: str, *, may_end: bool) -> int:
    """See that the checkpoint fits the recipe, whose last step it is only if it `may_end`, and the vocabulary; returns
    its step."""
    if source.checkpoint is None:
        return 0
    # A branch has an output of its own already: another one would change nothing.
    way_out = "choose another --output" if source.in_place else "a branch goes on with what its checkpoint has"
    metadata = read_metadata(source.checkpoint / MODEL_FILE)
    problems = [
        f"[model] {key}: got {value}, expected {saved}, as in {source.checkpoint}; {way_out}"
        for (key, value), (_, saved) in zip(recipe.model, metadata.model, strict=True)
        if key != "dropout" and value != saved
    ]
    if vocab != metadata.tokenizer.vocab:
        problems.append(f"[data] corpus: its characters are not the vocabulary of {source.checkpoint}; {way_out}")
    if problems:
        raise MismatchError("\n".join(problems))
    step, steps = metadata.step, recipe.train.steps
    if step > steps or (step == steps and not may_end):
        more_than = "at least" if may_end else "more than"
        way_out = ", or choose another --output" if source.in_place else ""
        raise RecipeError(
            f"[train] steps: got {steps}, expected {more_than} {step}, the step of {source.checkpoint}; raise "
            f"--steps{way_out}"
        )
    return step


def check_changes(
    source: Source,
    old: Recipe,
    before: dict[str, Any],
    recipe: Recipe,
    info: RunInfo,
    allow_changes: bool,
    warn: Warn,
) -> dict[str, tuple[Any, Any]]:
    """Refuse, or tell, what differs from the recipe `old` and the environment `before` in which the source was trained;
    returns old and new values by name."""
    where, now = source.checkpoint or source.run, info.recorded()
    keys = dict(changed_keys(old, recipe))
    problems = [
        f"[{TABLE_OF_KEY[key]}] {key}: got {new}, expected {was}, as {where} was trained"
        for key, (was, new) in keys.items()
    ]
    changed = {name: (before[name], value) for name, value in now.items() if before.get(name, value) != value}
    is_other_text = "corpus_sha256" in changed
    if is_other_text:
        problems.append(f"[data] corpus: {recipe.data.corpus} is not the text that {where} was trained on")
        keys["corpus"] = (old.data.corpus, recipe.data.corpus)
    if problems and not allow_changes:
        way_out = "choose another --output, --overwrite the run, or continue it with --allow-changes"
        if not source.in_place:
            way_out = "set it so, or branch off with --allow-changes"
        kind = MismatchError if is_other_text else RecipeError
        raise kind("\n".join(f"{problem}; {way_out}" for problem in problems))
    for problem in problems:
        warn(problem)
    # Exact sums do not depend on who computed what.
    exact = before["reduction"] == info.reduction == "exact"
    inexact = changed.keys() & info.environment().keys() - ({"processes"} if exact else set())
    if inexact:
        told = ", ".join(f"{name} {was} -> {new}" for name, (was, new) in changed.items() if name in inexact)
        warn(f"the last bits may differ from those of a run that was never interrupted: {told}")
        if recipe.model.dropout and {"processes", "reduction", "device"} & inexact:
            warn("and dropout, whose masks belong to a process or a micro-batch, drops other activations from here on")
    evaluation = {key: values for key, values in _differing(old, recipe) if key in EVALUATION_KEYS}
    return keys | evaluation | changed


def changed_keys(old: Recipe, new: Recipe) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The keys that differ between two recipes and change more than the last bits, with old and new value."""
    harmless = HARMLESS_KEYS | RESOLVED_KEYS
    validations = (old.validation, new.validation)
    if all(table.sampling != "shared-stream" or not table.val_every for table in validations):
        harmless |= EVALUATION_KEYS
    return ((key, values) for key, values in _differing(old, new) if key not in harmless)


def _differing(old: Recipe, new: Recipe) -> Iterator[tuple[str, tuple[Any, Any]]]:
    values = new.flat()
    for key, was in old.flat().items():
        if was != values[key]:
            yield key, (was, values[key])


def window_names(old: Recipe, new: Recipe) -> set[str]:
    """What held-out windows depend on: losses over other windows are no longer comparable."""
    names = {"sampling", "val_split", "seq_len", "corpus_sha256"}
    if any(recipe.validation.sampling != "full" for recipe in (old, new)):
        names |= {"eval_batches", "batch_size"}
    return names


def tell_steps(old: Recipe, recipe: Recipe, step: int, warn: Warn) -> None:
    """Say where going on to another number of steps is not what a run of that many from the start would be."""
    was, now, validation = old.train.steps, recipe.train.steps, old.validation
    if recipe.schedule.schedule != "constant":
        warn(
            f"steps {was} -> {now}: from step {step + 1} on, the rate is that of a {recipe.schedule.schedule} schedule "
            f"over {now} steps; before, it fell as over {was}: not the run that {now} steps from the start would be"
        )
    elif step == was and validation.val_every and was % validation.val_every and validation.sampling == "shared-stream":
        warn(
            f"steps {was} -> {now}: the held-out loss at step {was}, then the last, drew from the stream of training "
            f"batches: those that follow are not those of a run of {now} steps from the start"
        )
