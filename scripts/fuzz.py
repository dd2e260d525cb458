"""Coverage-guided fuzzing of what mygpt reads, by atheris (pip install atheris); stops at the first unexpected error.

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
    from mygpt.errors import MygptError
    from mygpt.recipe import files, tables
    from mygpt.runs import loading, start
    from mygpt.runs.files import file_sha256
    from mygpt.runs.run import read_run
    from mygpt.training.train import train

FOLDER = Path(tempfile.mkdtemp(prefix="mygpt-fuzz-"))
TINY = {
    "data": {"corpus": str(FOLDER / "text.txt")},
    "model": {"embed_dim": 4, "num_heads": 1, "num_layers": 1, "max_seq_len": 4},
    "train": {"steps": 2, "batch_size": 1, "seq_len": 4},
    "runtime": {"device": "cpu", "threads": 1},
    "checkpoint": {"output": str(FOLDER / "run")},
}
NAMES = ("model.safetensors", "state.safetensors", "manifest.json", "run.json", "recipe.toml")


def fuzz_recipe(data: bytes) -> None:
    """Any bytes as a recipe file."""
    path = FOLDER / "recipe.toml"
    path.write_bytes(data)
    with contextlib.suppress(MygptError):
        tables.check_recipe(files.load_recipe(path))


def fuzz_checkpoint(data: bytes) -> None:
    """A checkpoint's file in which a piece is replaced: by bytes 3 on, at the place that bytes 1 and 2 tell."""
    if len(data) < 4:
        return
    name = NAMES[data[0] % len(NAMES)]
    run = FOLDER / "run"
    file = run / name if name in ("run.json", "recipe.toml") else run / "step-000002" / name
    whole = ORIGINALS[name]
    at = int.from_bytes(data[1:3], "big") % len(whole)
    file.write_bytes(whole[:at] + data[3:] + whole[at + len(data) - 3 :])
    manifest_file = run / "step-000002" / "manifest.json"
    if name.endswith(".safetensors"):
        manifest = json.loads(ORIGINALS["manifest.json"])
        manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        manifest_file.write_text(json.dumps(manifest))
    for job in (
        lambda: loading.load_checkpoint(run),
        lambda: loading.read_state(
            run / "step-000002", loading.read_tensors(run / "step-000002" / "model.safetensors")
        ),
        lambda: start.find_start(start.recorded_recipe(run), read_run(run), "ab", warn=lambda _: None),
    ):
        with contextlib.suppress(MygptError):
            job()
    file.write_bytes(whole)
    manifest_file.write_bytes(ORIGINALS["manifest.json"])


def main() -> None:
    targets = {"recipe": fuzz_recipe, "checkpoint": fuzz_checkpoint}
    if len(sys.argv) < 2 or sys.argv[1] not in targets:
        sys.exit(f"usage: fuzz.py {'|'.join(targets)} [LIBFUZZER FLAGS]")
    target = targets[sys.argv.pop(1)]
    (FOLDER / "text.txt").write_text("ab" * 100)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = train(tables.build_recipe(TINY))
    for name in NAMES:
        file = run / name
        ORIGINALS[name] = (file if file.exists() else run / "step-000002" / name).read_bytes()
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


ORIGINALS: dict[str, bytes] = {}

if __name__ == "__main__":
    main()
