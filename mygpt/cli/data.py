"""The commands that make and describe prepared corpora: `mygpt data prepare` and `mygpt data info`."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from mygpt.cli.command import JsonOptions, command, print_json
from mygpt.cli.main import choose
from mygpt.data.formats import DEFAULT_FIELD
from mygpt.errors import InterruptedRunError, MygptError, counted, print_note
from mygpt.recipe.flags import Positional
from mygpt.recipe.tables import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mygpt.data.prepare import TokenizerChoice
    from mygpt.data.prepared import Prepared

USAGE = """\
usage: mygpt data prepare SOURCE... --out DIR   tokenize texts of any size for training: --corpus DIR
       mygpt data info DIR                      describe a prepared corpus

mygpt data COMMAND --help tells more.
"""


data_command = partial(command, group="mygpt data")


class PrepareOptions(Table):
    sources: Annotated[tuple[str, ...], Positional("SOURCE")]
    """Files, patterns and folders: .txt, .md (one document each), .jsonl (one a line), .json (lines or an array), .csv
    and .parquet (one a row); all but the last also as .gz and .zst."""
    out: Path
    """The folder to make."""
    tokenizer: Literal["char", "byte", "bpe", "gpt2"] = "bpe"
    """What a token is; see `mygpt train --help`."""
    vocab_size: int | None = None
    """Tokens of a "bpe" that is trained; absent: 1024. It is trained on all text, or a sample of 64 million characters
    spread over it."""
    tokenizer_file: Path | None = None
    """The tokenizer.json of a byte-level "bpe"."""
    field: str = DEFAULT_FIELD
    """The field of JSON, or the column of CSV and Parquet, that has the text."""


class InfoOptions(JsonOptions):
    folder: Annotated[Path, Positional("DIR")]
    """A prepared corpus."""


@data_command
def prepare(options: PrepareOptions) -> None:
    """Tokenize texts of any size; the same command continues one that was killed."""
    from mygpt.data.prepare import TokenizerChoice
    from mygpt.data.sources import find_sources
    from mygpt.data.tokenizer import DEFAULT_VOCAB_SIZE

    if options.tokenizer_file and options.tokenizer != "bpe":
        raise MygptError('--tokenizer-file: only with --tokenizer "bpe"')
    if options.vocab_size is not None and (options.tokenizer != "bpe" or options.tokenizer_file):
        raise MygptError('--vocab-size: only with --tokenizer "bpe" without --tokenizer-file')
    vocab_size = DEFAULT_VOCAB_SIZE if options.vocab_size is None else options.vocab_size
    choice = TokenizerChoice(options.tokenizer, vocab_size, options.tokenizer_file)
    corpus = prepare_with_bar(find_sources(options.sources, options.field), options.out, choice, options.field)
    print("\n".join(_description(corpus)))


def prepare_with_bar(sources: "Sequence[Path]", out: Path, choice: "TokenizerChoice", field: str) -> "Prepared":
    """Make and open a prepared corpus, with a progress bar and a last line on stderr; raises as `prepare` does."""
    from tqdm import tqdm

    from mygpt.data.prepare import prepare
    from mygpt.data.prepared import open_prepared

    started_at = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        try:
            manifest = prepare(sources, out, choice, field=field, progress=bar.update)
        except KeyboardInterrupt:
            raise InterruptedRunError("stopped; the same command continues", exit_code=130) from None
    seconds = time.perf_counter() - started_at
    rate = f"{manifest.text_bytes / 1e6 / seconds:,.1f} MB/s"
    corpus = open_prepared(out, verify=False)
    if corpus.tokenizer.end_of_text is None:
        print_note("note: the tokenizer has no <|endoftext|>: nothing stands between documents")
    print_note(f"prepared {out} in {seconds:.1f} s ({rate})")
    return corpus


@data_command
def info(options: InfoOptions) -> None:
    """Describe a prepared corpus."""
    from mygpt.data.prepared import open_prepared

    corpus = open_prepared(options.folder, verify=False)
    if options.as_json:
        print_json({"vocab_size": corpus.tokenizer.vocab_size, **corpus.manifest.model_dump()})
        return
    print("\n".join(_description(corpus)))


def _description(corpus: "Prepared") -> list[str]:
    from mygpt.data.tokenizer import describe_tokenizer

    manifest = corpus.manifest
    sample = corpus.decode(corpus.tokens[:60])
    values = {
        "tokens": f"{manifest.tokens:,} ({manifest.dtype})",
        "documents": f"{manifest.documents:,}",
        "text": f"{manifest.text_bytes:,} bytes, {manifest.text_bytes / manifest.tokens:.2f} a token",
        "tokenizer": f"{describe_tokenizer(corpus.tokenizer.metadata)}, {corpus.tokenizer.vocab_size:,} tokens",
        "sources": ", ".join(
            [counted(len(manifest.sources), "file"), counted(sum(each.bytes for each in manifest.sources), "byte")]
        ),
        "sha256": manifest.tokens_sha256,
        "begins with": repr(sample),
    }
    return [f"{label + ':':<14}{value}" for label, value in values.items()]


def data(arguments: list[str]) -> int | None:
    commands = {"prepare": prepare, "info": info}
    name = choose(arguments, "mygpt data", commands, USAGE)
    return commands[name](arguments[1:]) if name else None
