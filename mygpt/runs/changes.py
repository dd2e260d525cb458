"""What has changed since a checkpoint, in recipe, text and machine: refused, warned of, recorded."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mygpt.data.tokenizer import TokenizerMetadata, describe_tokenizer
from mygpt.disk import code_sha256
from mygpt.errors import MismatchError, RecipeError
from mygpt.recipe.tables import HARMLESS_KEYS, PATH_KEYS, TABLE_OF_KEY, Recipe
from mygpt.runs.files import MODEL_FILE
from mygpt.runs.run import Run, Warn
from mygpt.runs.schemas import CODE_CHARACTERS, HASH_OF_PATH, ModelMetadata, RunInfo
from mygpt.runs.steps import read_metadata

# Keys of which run.json has the resolved value or the content, which is compared instead.
RESOLVED_KEYS = {
    "device",
    "threads",
    "micro_batch_size",
    "compile",
    "matmul",
    "reduction",
    "deterministic",
    *PATH_KEYS,
}
# Keys that shift the training batches with sampling = "shared-stream", and otherwise change no weight.
EVALUATION_KEYS = {"val_every", "eval_batches", "sampling"}

# Keys that choose where a run ends; `steps` is also the length of a schedule.
ENDING_KEYS = {"steps", "patience"}

OTHER_INPUT = {
    "corpus": "[data] corpus: {now} is not the text that {where} was trained on",
    "val_corpus": "[data] val_corpus: {now} is not the text that {where} held out: {was}",
    "init_from": "[train] init_from: {now} is not what {where} began with: {was}",
}
"""The message for each key that names something else than when a run was trained."""

Changes = dict[str, tuple[Any, Any]]
"""Old and new value by name."""


@dataclass(frozen=True)
class Source:
    """The run that is continued, or branched off, after one of its checkpoints."""

    run: Run
    checkpoint: Path | None
    """Its step directory; None: the run has none yet."""
    in_place: bool
    """Whether this run is continued, and not another one branched off."""

    @cached_property
    def trained_with(self) -> Recipe:
        """The recipe that trained the checkpoint, which need not be the run's newest."""
        return self.run.recipe_of(self.checkpoint) if self.checkpoint else self.run.recipe


def check_checkpoint(source: Source, recipe: Recipe, tokenizer: TokenizerMetadata, *, may_end: bool) -> int:
    """Check model, tokenizer and steps; returns the checkpoint's step, which is the last one only if it `may_end`."""
    if source.checkpoint is None:
        return 0
    # A branch has an output of its own already: another one would change nothing.
    way_out = "choose another --output" if source.in_place else "a branch goes on with what its checkpoint has"
    metadata = read_metadata(source.checkpoint / MODEL_FILE, ModelMetadata)
    problems = [
        f"[model] {key}: {source.checkpoint} has {key} = {_shown(saved)}, you gave {_shown(value)}; {way_out}"
        for (key, value), (_, saved) in zip(recipe.model, metadata.model, strict=True)
        if key != "dropout" and value != saved
    ]
    if tokenizer != metadata.tokenizer:
        here, there = describe_tokenizer(tokenizer), describe_tokenizer(metadata.tokenizer)
        problem = f"tokenizer: {source.checkpoint} has the tokenizer {there}, you gave {here}"
        if tokenizer.type == metadata.tokenizer.type == "char":
            problem = f"corpus: its characters are not the vocabulary of {source.checkpoint}"
        problems.append(f"[data] {problem}; {way_out}")
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
    source: Source, step: int, recipe: Recipe, info: RunInfo, *, allow_changes: bool, warn: Warn
) -> Changes:
    """Return what has changed since `step` was trained, with a warning; without `allow_changes` a change that matters
    raises RecipeError, and another text MismatchError."""
    old, before = source.trained_with, source.run.info.recorded_at(step)
    keys = dict(changed_keys(old, recipe))
    recorded = {name: (before[name], now) for name, now in info.recorded().items() if before.get(name, now) != now}
    where = source.checkpoint or source.run.path
    problems = [
        f"[{TABLE_OF_KEY[key]}] {key}: {where} was trained with {key} = {_shown(was)}, you gave {_shown(new)}"
        for key, (was, new) in keys.items()
    ]
    other_inputs = [key for key, name in HASH_OF_PATH.items() if name in recorded]
    for key in other_inputs:
        was, now = old.flat()[key], recipe.flat()[key]
        before_it = "with other content" if was == now else was or "nothing"
        problems.append(OTHER_INPUT[key].format(now=now or "nothing", was=before_it, where=where))
        keys[key] = (was, now)
    if problems and not allow_changes:
        way_out = "choose another --output, --overwrite the run, or continue it with --allow-changes"
        if not source.in_place:
            way_out = "set it so, or branch off with --allow-changes"
        kind = MismatchError if other_inputs else RecipeError
        raise kind("\n".join(f"{problem}; {way_out}" for problem in problems))
    for key, (was, new) in keys.items():
        before_it = was
        if key in other_inputs:
            before_it = "other weights" if key == "init_from" else "another text"
        warn(f"from step {step + 1} on: [{TABLE_OF_KEY[key]}] {key} = {new}, before {before_it}")
    follows = {"micro_batch_size"} if "batch_size" in keys else set()
    _warn_of_last_bits({name: recorded[name] for name in recorded if name not in follows}, recipe, info, warn)
    evaluation = {key: values for key, values in differing_keys(old, recipe) if key in EVALUATION_KEYS}
    return keys | evaluation | recorded


def _shown(value: Any) -> str:
    """A recipe's value as a message shows it: as TOML writes it, but for no value."""
    return "nothing" if value is None else json.dumps(value)


def warn_of_code(run: Run, step: int, warn: Warn) -> None:
    """Warn if another code of mygpt than this one trained a step of the run."""
    trained_by = run.info.recorded_at(step)
    if trained_by.get("code", now := code_sha256()[:CODE_CHARACTERS]) != now:
        which = f"{trained_by['mygpt']}, commit {trained_by['git_commit'] or 'unknown'}"
        warn(f"mygpt's code is another than that which trained {run.path} ({which}): numbers may differ")


def _warn_of_last_bits(recorded: Changes, recipe: Recipe, info: RunInfo, warn: Warn) -> None:
    inexact = {name: values for name, values in recorded.items() if name in info.environment() and name != "code"}
    if info.reduction == "exact" and "reduction" not in recorded:
        inexact.pop("processes", None)  # exact sums are the same on any number of processes
    if not inexact:
        return
    changes = ", ".join(f"{name} {was} -> {new}" for name, (was, new) in inexact.items())
    warn(f"the last bits may differ from those of a run that was never interrupted: {changes}")
    if recipe.model.dropout and {"processes", "reduction", "device"} & inexact.keys():
        warn("and dropout drops other activations from here on: its masks depend on processes, reduction and device")


def changed_keys(old: Recipe, new: Recipe) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The keys that differ between two recipes and change more than the last bits, with old and new value."""
    harmless = HARMLESS_KEYS | RESOLVED_KEYS | ENDING_KEYS  # a change of steps is looked at by itself
    validations = (old.validation, new.validation)
    if all(table.sampling != "shared-stream" or not table.val_every for table in validations):
        harmless |= EVALUATION_KEYS
    return ((key, values) for key, values in differing_keys(old, new) if key not in harmless)


def differing_keys(old: Recipe, new: Recipe) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The keys that differ, with old and new value."""
    values = new.flat()
    return ((key, (was, values[key])) for key, was in old.flat().items() if was != values[key])


def window_names(old: Recipe, new: Recipe) -> set[str]:
    """The names on which held-out windows depend: losses over other windows cannot be compared."""
    names = {"sampling", "val_split", "hold_out", "seq_len"}
    # With a val_corpus of its own, other training text changes no window.
    names |= {"held_out_sha256"} if old.data.val_corpus and new.data.val_corpus else {"corpus_sha256", "val_corpus"}
    if any(recipe.validation.sampling != "full" for recipe in (old, new)):
        names |= {"eval_batches", "batch_size"}
    return names


def warn_of_steps(old: Recipe, recipe: Recipe, step: int, warn: Warn) -> None:
    """Warn where continuing to another number of steps differs from a run of that many steps from the start."""
    was, now, validation = old.train.steps, recipe.train.steps, old.validation
    schedule = recipe.schedule
    is_same_so_far = schedule.schedule == "constant" or (
        schedule.schedule == "wsd" and step <= min(schedule.decay_starts(steps) for steps in (was, now))
    )
    if not is_same_so_far:
        warn(
            f"steps {was} -> {now}: from step {step + 1} on, the rate is that of a {schedule.schedule} schedule "
            f"over {now} steps; before, it was that of one over {was}: a run of {now} steps from the start would differ"
        )
    elif step == was and validation.val_every and was % validation.val_every and validation.sampling == "shared-stream":
        warn(
            f"steps {was} -> {now}: the held-out loss at step {was}, then the last, drew from the stream of training "
            f"batches: the next batches are not those of a run of {now} steps from the start"
        )
