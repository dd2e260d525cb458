"""The command that writes a recipe for a text and a time: `mygpt init`."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from mygpt.cli.command import command
from mygpt.cli.train import announce_threads
from mygpt.errors import CorpusError, MygptError
from mygpt.recipe.tables import NAMED_CORPORA, Recipe

LARGE = 256_000_000
"""Bytes of a text file from which it is prepared, and not read into memory by each run."""


@dataclass(frozen=True)
class InitOptions:
    texts: Positional[tuple[str, ...]]
    """A text file, a named corpus or a prepared one. Anything else that `mygpt data prepare` takes is prepared first,
    beside the recipe."""
    minutes: float = 30
    """How long training may take on this machine."""
    out: Path | None = None
    """The recipe to write; absent: the text's name with .toml, in this directory."""
    field: str = "text"
    """The field of JSON Lines, or the column of Parquet, that has the text."""


@command
def init(options: InitOptions) -> None:
    """Look at a text, time this machine for some seconds, and write a recipe for it, with the reasons."""
    if not options.texts:
        raise MygptError("expected a text: mygpt init TEXT")
    out = options.out or Path(f"{Path(options.texts[0]).stem}.toml")
    if not 0 < options.minutes < 1e6:
        raise MygptError(f"--minutes: got {options.minutes:g}, expected a number above 0")
    if out.suffix != ".toml":
        raise MygptError(f"--out: got {str(out)!r}, expected a name that ends in .toml")
    if not out.parent.is_dir():
        raise MygptError(f"{out}: {out.parent} is not a folder; make it, or choose another --out")
    if os.path.lexists(out):
        raise MygptError(f"{out}: exists; choose another --out, or remove it")
    announce_threads(Recipe())
    from mygpt.planning.plan import choose
    from mygpt.planning.text import look_at, tokenizer_keys
    from mygpt.planning.write import recipe_text, summary

    corpus, is_prepared = _corpus(options, out)
    text = look_at(corpus, is_prepared=is_prepared)
    keys = {} if is_prepared else tokenizer_keys(text.bytes, text.sample)
    plan = choose(text, options.minutes, keys, lambda line: print(line, file=sys.stderr, flush=True))
    made_by = shlex.join(["mygpt", "init", *options.texts, "--minutes", f"{options.minutes:g}"])
    with out.open("x", encoding="utf-8") as file:
        file.write(recipe_text(plan, made_by, out.parent))
    print("\n".join(summary(plan)))
    print(f"wrote {out}; train it with: {shlex.join(['mygpt', 'train', str(out)])}", file=sys.stderr)


def _corpus(options: InitOptions, out: Path) -> tuple[str, bool]:
    """The corpus that the recipe will name, and whether it is prepared, which is done here if need be."""
    from mygpt.cli.data import prepare_with_bar
    from mygpt.data.dataset import is_prepared
    from mygpt.data.prepare import TokenizerChoice
    from mygpt.data.prepared import MANIFEST_FILE
    from mygpt.data.sources import find_sources, is_plain
    from mygpt.planning.text import tokenizer_keys

    name = options.texts[0]
    if len(options.texts) == 1:
        if is_prepared(name) and os.path.lexists(Path(name, MANIFEST_FILE)):
            return name, True
        if name in NAMED_CORPORA:
            return name, False
    sources = find_sources(options.texts)
    size = sum(source.stat().st_size for source in sources)
    if len(sources) == 1 and is_plain(sources[0]) and size < LARGE:
        return str(sources[0]), False
    folder = out.with_name(f"{out.stem}-tokens")
    if os.path.lexists(folder):
        raise CorpusError(f"{folder}: exists; use it with `mygpt init {shlex.quote(str(folder))}`, or remove it")
    keys = tokenizer_keys(size)
    choice = TokenizerChoice(keys["tokenizer"], keys.get("vocab_size", 0), None)
    prepare_with_bar(sources, folder, choice, options.field)
    return str(folder), True
