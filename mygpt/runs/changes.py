"""What has changed since a checkpoint, in recipe, text and machine: refused in a run, and warned of."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mygpt.data.tokenizer import TokenizerMetadata, describe_tokenizer
from mygpt.disk import code_sha256
from mygpt.errors import MismatchError, RecipeError
from mygpt.recipe.tables import HARMLESS_KEYS, PATH_KEYS, TABLE_OF_KEY, Recipe
from mygpt.runs.files import MODEL_FILE
from mygpt.runs.run import RunDirectory, Warn
from mygpt.runs.schemas import CODE_CHARACTERS, Environment, ModelMetadata, RunInfo
from mygpt.runs.steps import read_manifest, read_metadata, step_directory

RESOLVED_KEYS = {"device", "threads", "micro_batch_size", "compile", "matmul", "deterministic", *PATH_KEYS}
"""Keys of which run.json has the resolved value or the content, which is compared instead."""

MAY_CHANGE = HARMLESS_KEYS | RESOLVED_KEYS | {"steps", "patience"}
"""Keys that may change in a run. Another value of any other key makes another run."""

KEPT_BY_BRANCHES = {"init_seed", "init_from"}
"""Keys that a branch keeps: its weights are those of a checkpoint."""

OTHER_INPUT = {
    "corpus": "[data] corpus: {now} is not the text that {where} was trained on",
    "val_corpus": "[data] val_corpus: {now} is not the text that {where} held out: {was}",
    "init_from": "[train] init_from: {now} is not what {where} began with: {was}",
}
"""The message for each key that names something else than when a run was trained."""


def check_checkpoint(
    checkpoint: Path, recipe: Recipe, tokenizer: TokenizerMetadata, *, in_place: bool, may_end: bool
) -> int:
    """Check model, tokenizer and steps; returns the checkpoint's step, which is the last one only if it `may_end`.

    `in_place`: the run of the checkpoint goes on; otherwise another one branches off.
    """
    # A branch has an output of its own already: another one would change nothing.
    way_out = "choose another --output" if in_place else "a branch goes on with what its checkpoint has"
    metadata = read_metadata(checkpoint / MODEL_FILE, ModelMetadata)
    problems = [
        f"[model] {key}: {checkpoint} has {key} = {_shown(saved)}, you gave {_shown(value)}; {way_out}"
        for (key, value), (_, saved) in zip(recipe.model, metadata.model, strict=True)
        if key != "dropout" and value != saved
    ]
    if tokenizer != metadata.tokenizer:
        here, there = describe_tokenizer(tokenizer), describe_tokenizer(metadata.tokenizer)
        problem = f"tokenizer: {checkpoint} has the tokenizer {there}, you gave {here}"
        if tokenizer.type == metadata.tokenizer.type == "char":
            problem = f"corpus: its characters are not the vocabulary of {checkpoint}"
        problems.append(f"[data] {problem}; {way_out}")
    if problems:
        raise MismatchError("\n".join(problems))
    step, steps = metadata.step, recipe.train.steps
    if step > steps or (step == steps and not may_end):
        more_than = "at least" if may_end else "more than"
        way_out = ", or choose another --output" if in_place else ""
        raise RecipeError(
            f"[train] steps: got {steps}, expected {more_than} {step}, the step of {checkpoint}; raise --steps{way_out}"
        )
    return step


def check_unchanged(run: RunDirectory, step: int, recipe: Recipe, info: RunInfo) -> None:
    """Check that a run can go on after a step with this recipe and these inputs; step 0: it has no checkpoint yet.

    Raises:
        RecipeError, MismatchError: its recipe, or what it read, is another; with the command that branches off.
    """
    was, now, where = run.recipe.flat(), recipe.flat(), step_directory(run.path, step) if step else run.path
    problems = {
        key: f"[{TABLE_OF_KEY[key]}] {key}: {where} was trained with {key} = {_shown(old)}, you gave {_shown(new)}"
        for key, (old, new) in differing_keys(run.recipe, recipe)
        if key not in MAY_CHANGE
    }
    inputs = [key for key, sha256 in info.inputs.items() if sha256 != run.info.inputs[key]]
    for key in inputs:
        before = "with other content" if was[key] == now[key] else was[key] or "nothing"
        problems[key] = OTHER_INPUT[key].format(now=now[key] or "nothing", was=before, where=where)
    if not problems:
        return
    way_on = "choose another --output, or --overwrite the run"
    if step and not KEPT_BY_BRANCHES & problems.keys():
        others = {key for key, _ in differing_keys(run.recipe_for(step), recipe)} - HARMLESS_KEYS - {*PATH_KEYS}
        command = _fork_command(run.path, step, {key: now[key] for key in now if key in problems.keys() | others})
        if any(was[key] == now[key] for key in inputs):  # a fork would look for the old text there
            command = f"--resume {shlex.quote(str(where))} --output NEW, beside your flags,"
        missing = [f"--steps above {step}"] if now["steps"] <= step else []
        if read_manifest(where).ended_by == "patience" and now["patience"] == was["patience"]:
            missing.append("--patience 0")
        beside = f" with {' and '.join(missing)}" if missing else ""
        way_on = f"{command}{beside} goes on from there in a run of its own; or {way_on}"
    kind = MismatchError if inputs else RecipeError
    raise kind("\n".join(problems.values()) + f"; one run has one recipe: {way_on}")


def _fork_command(run: Path, step: int, keys: dict[str, Any]) -> str:
    """The command that goes on after a step of a run with other values for these keys."""
    flags = []
    for key, value in keys.items():
        name = key.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return f"`{shlex.join(['mygpt', 'fork', str(run), str(step), *flags])}`"


def warn_of_branch(run: RunDirectory, step: int, recipe: Recipe, info: RunInfo, warn: Warn) -> None:
    """Warn of what is changed in a branch that begins after a step of another run."""
    changed = {key: old for key, (old, _) in differing_keys(run.recipe_for(step), recipe) if key not in MAY_CHANGE}
    inputs = run.info.inputs
    changed |= {key: "another text" for key, sha256 in info.inputs.items() if sha256 != inputs[key]}
    for key, old in changed.items():
        warn(f"from step {step + 1} on: [{TABLE_OF_KEY[key]}] {key} = {recipe.flat()[key]}, before {old}")
    before, now = run.info.stretch_of(step).environment, info.stretches[0].environment
    if "batch_size" in changed:  # the micro-batch follows
        before = before.model_copy(update={"micro_batch_size": now.micro_batch_size})
    warn_of_last_bits(before, now, recipe, warn)


def _shown(value: Any) -> str:
    """A recipe's value as a message shows it: as TOML writes it, but for no value."""
    return "nothing" if value is None else json.dumps(value)


def warn_of_code(run: RunDirectory, step: int, warn: Warn) -> None:
    """Warn if another code of mygpt than this one trained a step of the run."""
    trained_by = run.info.stretch_of(step).environment
    if trained_by.code != code_sha256()[:CODE_CHARACTERS]:
        which = f"{trained_by.versions.get('mygpt')}, commit {trained_by.git_commit or 'unknown'}"
        warn(f"mygpt's code is another than that which trained {run.path} ({which}): numbers may differ")


def warn_of_last_bits(before: Environment, now: Environment, recipe: Recipe, warn: Warn) -> None:
    """Warn if steps in another environment than before may have other last bits."""
    changed = before.changes(now)
    changed.pop("code", None)  # see `warn_of_code`
    if recipe.runtime.reduction == "exact":
        changed.pop("processes", None)  # exact sums are the same on any number of processes
    if not changed:
        return
    changes = ", ".join(f"{name} {was} -> {new}" for name, (was, new) in changed.items())
    warn(f"the last bits may differ from those of a run that was never interrupted: {changes}")
    if recipe.model.dropout and {"processes", "device"} & changed.keys():
        warn("and dropout drops other activations from here on: its masks depend on processes and device")


def differing_keys(old: Recipe, new: Recipe) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The keys that differ, with old and new value."""
    values = new.flat()
    return ((key, (was, values[key])) for key, was in old.flat().items() if was != values[key])


def has_same_windows(run: RunDirectory, step: int, recipe: Recipe, info: RunInfo) -> bool:
    """Whether a branch after a step of `run` has the same held-out windows: the losses of others cannot be compared."""
    old, was = run.recipe_for(step), run.info
    names = {"sampling", "val_split", "hold_out", "seq_len"}
    if any(recipe.validation.sampling != "full" for recipe in (old, recipe)):
        names |= {"eval_batches", "batch_size"}
    # With a val_corpus of its own, other training text changes no window.
    same_text = was.held_out_sha256 == info.held_out_sha256
    if not (was.held_out_sha256 and info.held_out_sha256):
        same_text = same_text and was.corpus_sha256 == info.corpus_sha256
    return same_text and not names & dict(differing_keys(old, recipe)).keys()


def warn_of_steps(run: RunDirectory, step: int, recipe: Recipe, warn: Warn) -> None:
    """Warn where continuing to another number of steps differs from a run of that many steps from the start."""
    old = run.recipe_for(step)
    was, now, validation = old.train.steps, recipe.train.steps, old.validation
    if was == now:
        return
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
