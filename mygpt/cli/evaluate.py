"""The commands that judge the losses of a run: `mygpt eval` and `check`."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from mygpt.cli.command import JsonOptions, command, print_json
from mygpt.cli.train import announce_threads
from mygpt.errors import CheckpointError, MygptError, RecipeError, counted, print_note
from mygpt.estimates import Estimate
from mygpt.processes.environment import is_main_process
from mygpt.recipe.flags import Positional
from mygpt.recipe.tables import Count, Recipe, check_recipe
from mygpt.runs.changes import warn_of_code
from mygpt.runs.run import RunDirectory, find_model_file, run_of
from mygpt.runs.schemas import ModelMetadata
from mygpt.runs.steps import read_metadata


class EvalOptions(JsonOptions):
    checkpoint: Annotated[Path, Positional("RUN|CHECKPOINT")]
    """A run directory (its newest checkpoint), RUN/best, a step directory or a model.safetensors."""
    corpus: str | None = None
    """A text, a prepared corpus or a named one, all of which is evaluated; absent: what the run held out. If its sha256
    is that of the run's own text, which has been moved, what the run held out of it is evaluated."""
    sampling: Literal["full", "own-stream"] = "full"
    """"full": all of the text, in consecutive windows. "own-stream": eval_batches random batches of it."""
    eval_batches: Count | None = None
    """Of "own-stream"; absent: 10."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


@command
def eval(options: EvalOptions) -> None:  # noqa: A001 - the name of the command
    """The loss of a model on held-out text, with its standard error."""
    if options.eval_batches and options.sampling == "full":
        raise MygptError("--eval-batches: all of the text is evaluated; add --sampling own-stream for random batches")
    if not is_main_process():
        return  # it is done on one process
    keys: dict[str, Any] = {
        "sampling": options.sampling,
        "eval_batches": options.eval_batches or 10,
        "device": options.device,
    }
    recipe = _recipe_for(options.checkpoint, options.corpus, **keys)
    announce_threads(recipe)
    from mygpt.checks.evaluation import evaluate_saved

    is_own_text = options.corpus is None or _is_own_text(options.checkpoint, options.corpus)
    if options.corpus and is_own_text:
        recipe = _recipe_for(options.checkpoint, options.corpus, is_own_text=True, **keys)
        print_note(f"{options.corpus} is the text of the run: what it held out of this text is evaluated")
    found = evaluate_saved(recipe, is_own_text=is_own_text)
    estimates = {name: getattr(found, name) for name in ("loss", "bits_per_byte", "bits_per_character")}
    if options.as_json:
        facts = {name: getattr(found, name) for name in ("step", "text", "tokens", "windows", "population")}
        documents = {name: estimate and estimate.document() for name, estimate in estimates.items()}
        print_json({"checkpoint": found.file, **facts, **documents, "perplexity": found.perplexity})
        return
    print(f"model: step {found.step}, {found.file}")
    print(f"text: {found.text}; {counted(found.tokens, 'token')} in {counted(found.windows, 'window')}")
    for name, estimate in estimates.items():
        if estimate:
            print(f"{name.replace('_', ' ')}: {_shown(estimate)}{' nats per token' * (name == 'loss')}")
    if found.perplexity is not None:
        print(f"perplexity: {found.perplexity:.2f}")
    print(f"errors: they say how well this estimates the loss on {found.population}")


def _is_own_text(path: Path, corpus: str) -> bool:
    """Whether a corpus is the text of which the run of the model at `path` has held something out.

    A note says so if it is a text that the run was trained on, all of it.
    """
    from mygpt.data.dataset import corpus_sha256

    if (run := run_of(find_model_file(path))) is None:
        return False
    sha256 = corpus_sha256(corpus)
    if run.recipe.data.has_held_out and sha256 == run.info.held_out_text:
        return True
    if sha256 == run.info.corpus_sha256:
        print_note(f"note: {corpus} is the text that the run was trained on: its loss says nothing about unseen text")
    return False


def _recipe_for(path: Path, corpus: str | None, *, is_own_text: bool = False, **keys: Any) -> Recipe:
    """The recipe with which the model at `path` is evaluated: that of its run, where it is in one. A note says so if
    another code of mygpt trained it.

    `corpus` is all held out, in place of what the run held out; `is_own_text`: it is the run's text, at another path.
    `keys` are laid over the recipe.

    Raises:
        CheckpointError: there is no model there.
        RecipeError: the recipe holds nothing out, and there is no `corpus`; or a key has a value that it may not have.
    """
    file = find_model_file(path)
    metadata = read_metadata(file, ModelMetadata)
    recipe = Recipe.of(**metadata.model.model_dump(), seq_len=metadata.model.max_seq_len)
    if run := run_of(file):
        warn_of_code(run, metadata.step, print_note)
        recipe = run.recipe.replace(threads=run.info.stretch_of(metadata.step).environment.threads)
    elif corpus is None:
        raise CheckpointError(f"{path}: belongs to no run, so no text is held out; give a text with --corpus")
    if is_own_text:
        recipe = recipe.replace(**{"val_corpus" if recipe.data.val_corpus else "corpus": corpus})
    if corpus is not None and not is_own_text:
        recipe = recipe.replace(corpus=corpus, val_corpus=corpus, val_split=0.0, hold_out="tokens")
    elif recipe.data.val_corpus:
        recipe = recipe.replace(corpus=recipe.data.val_corpus)  # what it was trained on is not needed
    elif not recipe.data.has_held_out:
        raise RecipeError(f"{path}: its recipe holds no text out; give a text that it was not trained on with --corpus")
    own_tokenizer = {"tokenizer": "char", "vocab_size": None, "tokenizer_file": None}
    recipe = recipe.replace(**own_tokenizer, **keys, init_from=str(file), compile=False, val_every=1)
    check_recipe(recipe, source=str(path))
    return recipe


def _shown(estimate: Estimate) -> str:
    if estimate.stderr is None:
        return f"{estimate.mean:.4f}"
    low, high = estimate.interval
    return f"{estimate.mean:.4f} +- {estimate.stderr:.4f} (95% interval {low:.4f} to {high:.4f})"


class CheckOptions(JsonOptions):
    run: Annotated[Path, Positional("RUN")]
    """A run directory."""


@command
def check(options: CheckOptions) -> int:
    """Whether a run's losses are normal."""
    from mygpt.checks.check import check

    lines = list(check(options.run))
    warn_of_code(RunDirectory(options.run), sys.maxsize, print_note)
    is_normal = all(is_normal for _, is_normal in lines)
    if options.as_json:
        parts = [(*line.partition(": "), is_normal) for line, is_normal in lines]
        findings = [{"topic": topic, "text": text, "is_normal": is_normal} for topic, _, text, is_normal in parts]
        print_json(
            {"run": options.run, "is_normal": is_normal, "findings": findings, **_numbers(RunDirectory(options.run))}
        )
    else:
        print("\n".join(line for line, _ in lines))
    return int(not is_normal)


def _numbers(run: RunDirectory) -> dict[str, Any]:
    """The last record of a run, and where its losses are beside those of other seeds."""
    from mygpt.checks.check import has_records
    from mygpt.reports.outcome import places

    records = run.records if has_records(run.path) else []
    known = {kind: [place._asdict() for place in found] for kind, found in places(run.recipe.expected, records)}
    return {"last_record": records[-1].model_dump() if records else None, "places": known}
