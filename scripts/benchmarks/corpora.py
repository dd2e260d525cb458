"""What corpora of any size cost: MB/s and memory of `mygpt data prepare`, and of training on what it made.

    python scripts/benchmarks/corpora.py --megabytes 100 1000

The text is Python's documentation over and over. Each command runs in a process of its own, whose memory is looked at
50 times a second: "own" is what it has allocated, "resident" also counts the pages of mapped files, which the system
takes back when it needs them. At last it compares the ids of 10 MB with those of the tokenizers library for the text as
one string and, if it is installed, with those of tiktoken. Needs Linux, and pip install tokenizers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from mygpt.data import bpe
from mygpt.data.corpus import load_corpus
from mygpt.data.prepared import open_prepared

MYGPT = [sys.executable, "-m", "mygpt"]
STEPS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100], help="sizes of the text")
    parser.add_argument("--tokenizers", nargs="+", default=["byte", "char", "bpe"], help="which to measure")
    parser.add_argument("--folder", help="where to write; absent: a temporary directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    text = load_corpus("python-docs").text
    print(f"{'tokenizer':<10}{'MB':>6}{'MB/s':>8}{'own MiB':>9}{'resident':>9}   training: tokens/s, own MiB, resident")
    for size in options.megabytes:
        source = folder / f"{size}.txt"
        with source.open("w", encoding="utf-8") as file:
            for _ in range(round(size * 1e6 / len(text.encode()))):
                file.write(text)
        for kind in options.tokenizers:
            out = folder / f"{kind}-{size}"
            seconds, own, resident = run("data", "prepare", source, "--tokenizer", kind, "--out", out)
            rate = source.stat().st_size / 1e6 / seconds
            keys = [
                "--steps",
                STEPS,
                "--val-split",
                0.001,
                "--device",
                "cpu",
                "--output",
                folder / "run",
                "--overwrite",
            ]
            _, train_own, train_resident = run("train", out, *keys)
            timing = json.loads((folder / "run" / "timing.jsonl").read_text().splitlines()[-1])
            print(
                f"{kind:<10}{size:>6}{rate:>8.1f}{own:>9.0f}{resident:>9.0f}   "
                f"{timing['tokens_per_second']:>8,.0f} {train_own:>6.0f} {train_resident:>6.0f}",
                flush=True,
            )
        source.unlink()
    if "bpe" in options.tokenizers:
        compare_ids(folder / f"bpe-{options.megabytes[0]}", (text * 20)[:10_000_000])


def run(*arguments: Any) -> tuple[float, float, float]:
    """Seconds, and the peaks of own and of resident memory in MiB, of a command."""
    started_at, peaks = time.perf_counter(), [0.0, 0.0]
    process = subprocess.Popen([*MYGPT, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def watch() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            values = dict(line.split(":", 1) for line in lines)
            for index, name in enumerate(("RssAnon", "VmRSS")):
                if name in values:  # not of a process that is ending
                    peaks[index] = max(peaks[index], int(values[name].split()[0]) / 1024)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, messages = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(messages.decode())
    return time.perf_counter() - started_at, peaks[0], peaks[1]


def compare_ids(folder: Path, text: str) -> None:
    tokenizer = open_prepared(folder, verify=False).tokenizer
    assert isinstance(tokenizer, bpe.BPETokenizer)
    import tokenizers

    library = tokenizers.Tokenizer.from_str(tokenizer.metadata.json_text)
    ids = tokenizer.encode(text).tolist()
    same = library.encode_batch_fast([text], add_special_tokens=False)[0].ids == ids
    print(f"{len(text):,} characters, {len(ids):,} ids: {'equal to' if same else 'NOT those of'} the library's")
    try:
        import tiktoken
    except ImportError:
        return
    ranks = {token: rank - 1 for rank, token in enumerate(tokenizer.tokens) if rank}  # the special token is the first
    words = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    theirs = tiktoken.Encoding("own", pat_str=words, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(text)
    same = [token + 1 for token in theirs] == ids
    print(f"{'equal to' if same else 'NOT those of'} tiktoken's")


if __name__ == "__main__":
    main()
