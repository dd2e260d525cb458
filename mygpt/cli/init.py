"""The command that writes a recipe for a text and a time: `mygpt init`."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mygpt.cli.command import command
from mygpt.cli.train import announce_threads
from mygpt.data.formats import DEFAULT_FIELD
from mygpt.errors import CorpusError, MygptError, TokenizerError, print_note
from mygpt.recipe.flags import Positional
from mygpt.recipe.tables import NAMED_CORPORA, Recipe, Table
from mygpt.runs.files import explain_refusal, replace_bytes

LARGE = 256_000_000
"""Bytes of a text file from which it is prepared, and not read into memory by each run."""


class InitOptions(Table):
    texts: Annotated[tuple[str, ...], Positional("TEXT")]
    """A text file, a named corpus or a prepared one. Anything else that `mygpt data prepare` takes is prepared first,
    beside the recipe."""
    minutes: Annotated[float, Field(gt=0, le=1_000_000)] = 30
    """How long training may take on this machine."""
    out: Path | None = None
    """The recipe to write; absent: the text's name with .toml, in this directory."""
    field: str = DEFAULT_FIELD
    """The field of JSON, or the column of CSV and Parquet, that has the text."""


@command
def init(options: InitOptions) -> None:
    """Look at a text, time this machine for some seconds, and write a recipe for it, with the reasons."""
    out = options.out or _default_out(options.texts)
    _check_out(out)
    announce_threads(Recipe())
    from mygpt.planning.plan import choose
    from mygpt.planning.text import has_tokenizers, look_at
    from mygpt.planning.write import recipe_text, summary

    if not has_tokenizers():
        print_note("note: byte pairs as tokens reach a lower loss on all but short texts: pip install tokenizers")
    corpus, is_prepared = _find_corpus(options, out)
    plan = choose(look_at(corpus, is_prepared=is_prepared), options.minutes, print_note)
    text = recipe_text(plan, _made_by(options), out.parent)
    _check_out(out)  # again: planning took some seconds
    with explain_refusal(out):
        replace_bytes(out, text.encode())
    print("\n".join(summary(plan)))
    print_note(f"wrote {out}; train it with: {shlex.join(['mygpt', 'train', str(out)])}")


def _default_out(texts: Sequence[str]) -> Path:
    """The name of the only text, without its endings, as a recipe here."""
    name = re.sub(r"(\.\w+)?(\.gz|\.zst)?$", "", os.path.basename(os.path.abspath(texts[0])))
    if len(texts) > 1 or not name or set(name) & set("*?["):
        raise MygptError("name the recipe to write: --out NAME.toml")
    return Path(f"{name}.toml")


def _check_out(out: Path) -> None:
    """See that the recipe can be written, before some seconds of work.

    Raises:
        MygptError: it cannot, and why.
    """
    if out.suffix != ".toml":
        raise MygptError(f"--out: got {str(out)!r}, expected a name that ends in .toml")
    if not out.parent.is_dir():
        raise MygptError(f"{out}: {out.parent} is not a folder; make it, or choose another --out")
    if os.path.lexists(out):
        raise MygptError(f"{out}: exists; choose another --out, or remove it")
    with explain_refusal(out):
        partial = out.with_name(f".tmp-{out.name}")  # as it is written first
        partial.touch()
        partial.unlink()


def _made_by(options: InitOptions) -> str:
    words = ["mygpt", "init", *options.texts, "--minutes", f"{options.minutes:g}"]
    words += ["--out", str(options.out)] if options.out else []
    words += ["--field", options.field] if options.field != DEFAULT_FIELD else []
    return shlex.join(words)


def _find_corpus(options: InitOptions, out: Path) -> tuple[str, bool]:
    """The corpus that the recipe will name, and whether it is prepared, which is done here if need be."""
    from mygpt.data.dataset import is_prepared
    from mygpt.data.prepared import MANIFEST_FILE
    from mygpt.data.sources import find_sources, identify, name_in_manifest

    name = options.texts[0]
    has_tokens = is_prepared(name) and os.path.lexists(Path(name, MANIFEST_FILE))
    if len(options.texts) == 1 and (has_tokens or name in NAMED_CORPORA):
        if options.field != DEFAULT_FIELD:
            raise MygptError(f"--field {options.field}: {name} has no fields; leave it out")
        return name, has_tokens
    sources = find_sources(options.texts, options.field)
    if len(sources) == 1 and identify(sources[0])[:2] == ("text", "") and sources[0].stat().st_size < LARGE:
        path = str(sources[0])
        if name_in_manifest(sources[0]) != path:
            raise CorpusError(f"{path}: its name is not UTF-8, as a recipe is; rename it")
        return f"./{path}" if path in NAMED_CORPORA else path, False
    folder = out.with_name(f"{out.stem}-tokens")
    _prepare(sources, folder, options.field)
    return str(folder), True


def _prepare(sources: Sequence[Path], folder: Path, field: str) -> None:
    """Prepare the sources, unless that was done before.

    Raises:
        CorpusError: the folder has something else, or a source cannot be read.
    """
    from mygpt.cli.data import prepare_with_bar
    from mygpt.data.prepare import TokenizerChoice, read_all
    from mygpt.data.prepared import read_corpus_manifest
    from mygpt.data.sources import name_in_manifest
    from mygpt.disk import file_sha256
    from mygpt.planning.text import ENOUGH_FOR_WORDS, LEAST_BYTES, check_size, tokenizer_keys

    if os.path.lexists(folder):
        manifest = read_corpus_manifest(folder)
        known = [(source.path, source.sha256) for source in manifest.sources]
        if manifest.field != field or known != [(name_in_manifest(file), file_sha256(file)) for file in sources]:
            raise CorpusError(f"{folder}: was prepared from other texts; remove it, or choose another --out")
        return print_note(f"{folder} is prepared already")
    size = 0
    for piece in read_all(sources, field, []):
        size += len(piece.text.encode())
        if size >= ENOUGH_FOR_WORDS:
            break
    check_size(", ".join(map(str, sources[:3])), size, LEAST_BYTES, "byte")
    keys = tokenizer_keys(size)
    try:
        prepare_with_bar(sources, folder, TokenizerChoice(keys["tokenizer"], keys.get("vocab_size", 0), None), field)
    except TokenizerError:  # too few pairs recur
        prepare_with_bar(sources, folder, TokenizerChoice("byte", 0, None), field)
