"""Fuzzes the files that mygpt reads, guided by coverage, until the first unexpected error; needs atheris.

    python scripts/fuzz.py recipe -max_total_time=300
    python scripts/fuzz.py checkpoint -max_total_time=300

Everything after the target is for libFuzzer.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("fuzz.py: needs atheris: pip install atheris")

with atheris.instrument_imports(include=["mygpt", "tomllib", "safetensors"]):
    from mygpt.data.tokenizer import CharTokenizer
    from mygpt.errors import MygptError
    from mygpt.recipe import files, tables
    from mygpt.runs import loading, start
    from mygpt.runs.files import file_sha256
    from mygpt.runs.run import RunDirectory
    from mygpt.training.train import train

FOLDER = Path(tempfile.mkdtemp(prefix="mygpt-fuzz-"))
RUN, STEP = FOLDER / "run", FOLDER / "run" / "step-000002"
MODEL = {"embed_dim": 4, "num_heads": 1, "num_layers": 1, "max_seq_len": 4}
TINY = tables.Recipe.of(
    **MODEL, steps=2, batch_size=1, seq_len=4, threads=1, device="cpu", corpus=str(FOLDER / "text.txt"), output=str(RUN)
)
NAMES = ("model.safetensors", "state.safetensors", "manifest.json", "run.json", "recipe.toml")


def fuzz_recipe(data: bytes) -> None:
    """Any bytes as a recipe file."""
    path = FOLDER / "recipe.toml"
    path.write_bytes(data)
    with contextlib.suppress(MygptError):
        tables.check_recipe(files.load_recipe(path))


def fuzz_checkpoint(data: bytes) -> None:
    """A file of a run with a piece replaced: byte 0 chooses the file, bytes 1 and 2 the offset, the rest is written."""
    if len(data) < 4:
        return
    name = NAMES[data[0] % len(NAMES)]
    file, whole = path_of(name), ORIGINALS[name]
    at = int.from_bytes(data[1:3], "big") % len(whole)
    file.write_bytes(whole[:at] + data[3:] + whole[at + len(data) - 3 :])
    if name.endswith(".safetensors"):
        manifest = json.loads(ORIGINALS["manifest.json"])
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        path_of("manifest.json").write_text(json.dumps(manifest))
    for job in (
        lambda: loading.load_checkpoint(RUN),
        lambda: loading.read_state(STEP, loading.read_tensors(STEP / "model.safetensors")),
        lambda: start.find_start(
            RunDirectory(RUN).recipe, RunDirectory(RUN).info, CharTokenizer("ab").metadata, warn=lambda _: None
        ),
    ):
        with contextlib.suppress(MygptError):
            job()
    file.write_bytes(whole)
    path_of("manifest.json").write_bytes(ORIGINALS["manifest.json"])


def path_of(name: str) -> Path:
    return (RUN if name in ("run.json", "recipe.toml") else STEP) / name


def main() -> None:
    targets = {"recipe": fuzz_recipe, "checkpoint": fuzz_checkpoint}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        sys.exit(f"usage: fuzz.py {'|'.join(targets)} [LIBFUZZER FLAGS]")
    target = targets[sys.argv.pop(1)]
    (FOLDER / "text.txt").write_text("ab" * 100)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(TINY)
    ORIGINALS.update({name: path_of(name).read_bytes() for name in NAMES})
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


ORIGINALS: dict[str, bytes] = {}

if __name__ == "__main__":
    main()
