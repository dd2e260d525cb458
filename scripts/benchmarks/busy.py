"""Time per step on a busy machine, by how long OpenMP's waiting threads spin before they sleep.

    python scripts/benchmarks/busy.py recipes/hardened.toml [--steps 300] [--any-recipe-flag]

Trains the recipe beside 0, 1 and 3 other busy processes, once for each setting and round, in turns. "mygpt" is what the
program sets by itself; the others are set as a user would. Prints the median of ms a step, and checks that all runs
have the same records. Other work on the machine spoils the row of 0.
"""

import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mygpt.recipe.flags import RecipeOptions, parse_recipe

BUSY = (0, 1, 3)
"""Numbers of other busy processes."""


class Options(RecipeOptions):
    rounds: int = 3
    """Runs of each setting beside each number of busy processes."""
    spins: tuple[str, ...] = ("mygpt", "default", "0", "1000", "10000", "100000")
    """Values of GOMP_SPINCOUNT; "default": as OpenMP does without it, "mygpt": as mygpt sets it."""


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep so many processes busy while inside."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def environment(spin: str) -> dict[str, str]:
    """The variables of a run with this setting."""
    environ = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    # "ACTIVE" would spin longer; a large count is what OpenMP uses when nothing is set (libgomp's env.c).
    counts = {"mygpt": {}, "default": {"GOMP_SPINCOUNT": "300000"}}
    return environ | counts.get(spin, {"GOMP_SPINCOUNT": spin})


def measure(flags: list[str], spin: str, folder: Path) -> tuple[float, str]:
    """Milliseconds per step of a run, and the hash of its records."""
    command = [sys.executable, "-m", "mygpt", "train", *flags, "--output", str(folder)]
    subprocess.run(command, env=environment(spin), check=True, capture_output=True)
    *_, last = (folder / "timing.jsonl").read_text().splitlines()
    timing = json.loads(last)
    records = hashlib.sha256((folder / "metrics.jsonl").read_bytes()).hexdigest()
    return 1e3 * timing["elapsed_seconds"] / timing["step"], records


def main() -> None:
    recipe, options = parse_recipe(sys.argv[1:], "busy.py", Options)
    found: dict[tuple[str, int], list[float]] = {}
    hashes = set()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.toml"
        file.write_text(recipe.to_toml())
        for turn in range(options.rounds):
            for count in BUSY:
                for spin in options.spins:
                    with busy_processes(count):
                        milliseconds, records = measure([str(file)], spin, Path(folder) / f"{turn}-{count}-{spin}")
                    print(f"{count} busy, {spin}: {milliseconds:.1f} ms", file=sys.stderr, flush=True)
                    found.setdefault((spin, count), []).append(milliseconds)
                    hashes.add(records)
    print("ms a step".ljust(12), *(f"{count} busy".rjust(10) for count in BUSY))
    for spin in options.spins:
        print(spin.ljust(12), *(f"{statistics.median(found[spin, count]):10.1f}" for count in BUSY), flush=True)
    print(f"different records: {len(hashes)}")


if __name__ == "__main__":
    main()
