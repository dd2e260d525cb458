"""Hash what sixteen small runs write and print, to see whether a change of the code changed a bit.

    python scripts/same_bits.py > before.json          # on the old code
    python scripts/same_bits.py --compare before.json  # on the new code, same machine and versions

Together the runs use every kind of sampling and schedule, dropout, accumulation, clipping, exact sums on one and three
processes, fast ones on one and two, sharded weights, bf16, torch.compile, runs stopped by SIGTERM and by SIGKILL and
continued, and a change of the number of processes. Prints the sha256 of every model.safetensors, state.safetensors,
manifest.json, metrics.jsonl and of stdout. `--program FOLDER` runs the mygpt of another checkout.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

CHECKOUT = Path(__file__).parent.parent
HASHED = ("model.safetensors", "state.safetensors", "manifest.json", "metrics.jsonl")

# Sends itself the signal `number` at call `calls` of the model, which is the same place every time.
TRAIN = """
import os, sys
number, calls = int(sys.argv.pop(1)), int(sys.argv.pop(1))
import mygpt
forward, left = mygpt.GPT.forward, [calls]
def counted(*args):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), number)
    return forward(*args)
if number:
    mygpt.GPT.forward = counted
from mygpt.cli.main import main
main(["train", *sys.argv[1:]])
"""

TINY = """--embed-dim 16 --num-heads 2 --num-layers 2 --max-seq-len 16 --seq-len 16 --batch-size 12 --steps 12
    --threads 1 --log-every 1 --device cpu --print-every 5 --max-grad-norm 1 --val-split 0.2
    --val-every 4 --log-grad-norm"""
COSINE, LINEAR = "--schedule cosine --warmup 3", "--schedule linear --warmup 2 --min-lr 1e-4"
EXACT = "--reduction exact --micro-batch-size 2 --dropout 0.2 --save-every 5"
STOPPED = f"{COSINE} --dropout 0.2 --micro-batch-size 6 --save-every 4 --keep-last 1 --save-best"

# Name: number of processes, flags, and (signal, call of the model) for each time that the command is given.
RUNS: dict[str, tuple[int, str, list[tuple[int, int]]]] = {
    "plain": (1, "--val-every 0 --val-split 0 --max-grad-norm 0", [(0, 0)]),
    "shared-stream-cosine": (1, COSINE, [(0, 0)]),
    "own-stream-linear": (1, f"{LINEAR} --sampling own-stream --eval-batches 3 --log-val-stderr", [(0, 0)]),
    "full-constant-dropout": (1, "--warmup 4 --sampling full --dropout 0.2 --log-val-stderr", [(0, 0)]),
    "accumulation": (1, f"{COSINE} --micro-batch-size 3 --dropout 0.1 --activation-checkpointing", [(0, 0)]),
    "bf16": (1, f"{COSINE} --precision bf16", [(0, 0)]),
    "compile": (1, f"{COSINE} --compile --val-every 12", [(0, 0)]),
    "exact-1": (1, EXACT, [(0, 0)]),
    "exact-3": (3, EXACT, [(0, 0)]),
    "fast-2": (2, f"{COSINE} --dropout 0.2 --micro-batch-size 3", [(0, 0)]),
    "sharded-2": (2, f"{COSINE} --precision bf16 --micro-batch-size 3 --save-every 6", [(0, 0)]),
    "stopped": (1, STOPPED, [(15, 30)]),
    "stopped-resumed": (1, STOPPED, [(15, 30), (0, 0)]),
    "killed-resumed": (1, STOPPED, [(9, 50), (9, 12), (0, 0)]),
    "resumed-3": (3, f"{COSINE} --dropout 0.2", [(15, 5), (0, 0)]),
    "non-finite": (1, "--lr 1e30 --dropout 0.2 --micro-batch-size 6", [(0, 0)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", type=Path, help="the output of an earlier call")
    parser.add_argument("--program", type=Path, default=CHECKOUT, help="the checkout whose mygpt is run")
    parser.add_argument("runs", nargs="*", help="names of runs; default: all")
    options = parser.parse_args()
    text = "\n".join(topics[name] for name in sorted(topics))[:20_000]
    hashes = {}
    for name in options.runs or RUNS:
        with tempfile.TemporaryDirectory(prefix="same-bits-") as folder:
            (Path(folder) / "text.txt").write_text(text)
            hashes[name] = run(options.program.resolve(), Path(folder), name)
        print(f"{name}: {len(hashes[name])} hashes", file=sys.stderr)
    if options.compare is None:
        print(json.dumps(hashes, indent=1))
        return
    before = json.loads(options.compare.read_text())
    different = [
        f"{name}: {file}"
        for name, files in hashes.items()
        for file in sorted(files.keys() | before[name].keys())
        if files.get(file) != before[name].get(file)
    ]
    print("\n".join(["different:", *different]) if different else f"identical: {len(hashes)} runs")
    sys.exit(bool(different))


def run(program: Path, folder: Path, name: str) -> dict[str, str]:
    """Run one of `RUNS` in a folder; returns the sha256 of each file and of what each command printed."""
    processes, flags, signals = RUNS[name]
    environment = {"PYTHONPATH": str(program), "OMP_NUM_THREADS": "1"}
    script = folder / "train.py"
    script.write_text(TRAIN)
    command = [sys.executable, str(script)]
    if processes > 1:
        command = ["torchrun", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d", "--rdzv-endpoint"]
        command += ["localhost:0", str(script)]
    if name.startswith("sharded"):
        script.write_text("import sys; del sys.argv[1:3]\n" + next(program.glob("tests/**/sharded.py")).read_text())
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    hashes = {}
    for turn, (number, calls) in enumerate(signals):
        done = subprocess.run(
            [*command, str(number), str(calls), "text.txt", *TINY.split(), *flags.split(), "--output", "run"],
            cwd=folder,
            env=os.environ | environment,
            capture_output=True,
            check=False,
        )
        if done.returncode and not number and name != "non-finite":
            sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr.decode()}")
        if number != signal.SIGKILL:  # it may meet the thread that saves before or after its end
            hashes[f"stdout {turn}"] = hashlib.sha256(done.stdout).hexdigest()
    for file in sorted((folder / "run").rglob("*")):
        if file.name in HASHED:
            hashes[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashes


if __name__ == "__main__":
    main()
