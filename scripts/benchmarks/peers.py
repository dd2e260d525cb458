"""Time per training step of mygpt and its peers: same model, data, batch and clipping, each in a process of its own.

    python scripts/benchmarks/peers.py                       # the sizes 0.2M and 10M; on a GPU also 124M
    python scripts/benchmarks/peers.py --nanogpt CHECKOUT    # also nanoGPT, from a checkout of its repository

The contenders take turns of a few steps while the others wait, since a machine's speed drifts: read the ratios. The
peers run in an environment that this makes from the package index, with the torch of this one, or in the one that
`--python` names. nanoGPT and GPT-2 lack some biases or have some more, and litgpt's positions are rotary and its head
is not tied; at these sizes neither matters for the time.

"peak" is the share of the rate of large products, which are timed in turns as well: 6 FLOPs per weight and token and
those of attention. Memory is the process's, on a GPU that of the device. "first" are the seconds from the start of the
process to the end of its first step.
"""

import argparse
import hashlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

PACKAGES = ("transformers==5.24.0", "accelerate==1.15.0", "litgpt==0.5.9", "lightning==2.6.6")
CHECKOUT = Path(__file__).parents[2]
LEARNING_RATE, MAX_NORM = 1e-3, 1.0
PRODUCTS = 10
"""Large products in what counts as a step of them."""


class Size(NamedTuple):
    """A model and its batch."""

    embed_dim: int
    layers: int
    heads: int
    seq_len: int
    batch_size: int
    vocab_size: int = 65
    precision: str = "fp32"


SIZES = {
    "0.2M": Size(64, 4, 4, 64, 16),
    "10M": Size(384, 6, 6, 256, 8),
    "124M": Size(768, 12, 12, 1024, 32, vocab_size=50304, precision="bf16"),
}


# ---- What each contender does; these run in processes of their own


class Turns:
    """Lets this process take its turns: it is told the number of steps, and tells how long they took."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._answers, self._left = device, os.fdopen(os.dup(1), "w"), 1
        os.dup2(2, 1)  # what libraries print is no answer
        self._began = time.perf_counter()

    def step_done(self) -> None:
        self._left -= 1
        if self._left:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        print(json.dumps({"seconds": seconds, "memory": memory}), file=self._answers, flush=True)
        steps = sys.stdin.readline().strip()
        if not steps:
            os._exit(0)
        self._left, self._began = int(steps), time.perf_counter()


Step = Callable[[], None]


def batches(size: Size, tokens: Path, device: torch.device) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Random windows as nanoGPT's train.py gathers them."""
    data = np.load(tokens, mmap_mode="r")

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(data) - size.seq_len, (size.batch_size,))
        x = torch.stack([torch.from_numpy(data[i : i + size.seq_len].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + size.seq_len].astype(np.int64)) for i in starts])
        if device.type == "cuda":
            x, y = (rows.pin_memory().to(device, non_blocking=True) for rows in (x, y))
        return x, y

    return batch


def plain_loop(model: Any, optimizer: Any, loss_of: Callable[..., torch.Tensor], batch: Any, size: Size) -> Step:
    device_type = next(model.parameters()).device.type

    def step() -> None:
        x, y = batch()
        with torch.autocast(device_type, torch.bfloat16, enabled=size.precision == "bf16"):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def reference(size: Size, tokens: Path, device: torch.device) -> Step:
    """The plainest implementation, reference.py."""
    sys.path.insert(0, str(Path(__file__).parent))
    import reference as plainest

    shape: dict[str, Any] = {"embed_dim": size.embed_dim, "num_heads": size.heads, "num_layers": size.layers}
    shape |= {"max_seq_len": size.seq_len, "seq_len": size.seq_len, "batch_size": size.batch_size}
    settings = plainest.Settings(**shape, steps=10**9, max_grad_norm=MAX_NORM, lr=LEARNING_RATE)
    text = "".join(chr(0x100 + int(token)) for token in np.load(tokens))
    steps = plainest.run(text, settings, device=device)
    return lambda: next(steps) and None


def mygpt(size: Size, tokens: Path, device: torch.device, **keys: Any) -> Iterator[Step]:
    """The parts and the step of `mygpt train`."""
    from mygpt.data.dataset import Dataset
    from mygpt.data.tokenizer import CharTokenizer
    from mygpt.processes.machine import set_up
    from mygpt.recipe.tables import Recipe
    from mygpt.training.gradient_sum import gradient_sum_for
    from mygpt.training.loop import train_step
    from mygpt.training.parts import build_parts, open_accelerator

    recipe = Recipe.of(
        embed_dim=size.embed_dim,
        num_layers=size.layers,
        num_heads=size.heads,
        max_seq_len=size.seq_len,
        seq_len=size.seq_len,
        batch_size=size.batch_size,
        **{"precision": size.precision, "max_grad_norm": MAX_NORM, "device": device.type, **keys},
    )
    set_up(recipe.runtime, device)
    data = torch.from_numpy(np.load(tokens))
    tokenizer = CharTokenizer("".join(chr(0x100 + token) for token in range(size.vocab_size)))
    gradient_sum = gradient_sum_for(recipe)
    with open_accelerator(recipe.runtime, device, gradient_sum.accumulation_steps) as accelerator:
        dataset = Dataset(tokenizer, data, data[:0], "")
        parts, steps = build_parts(recipe, accelerator, dataset, gradient_sum), itertools.count(1)

        def step() -> None:
            train_step(parts, parts.stream.batch(), next(steps))
            parts.scheduler.step()

        yield step


def own_model(size: Size) -> Any:
    """mygpt's model of this size."""
    from mygpt.model.gpt import GPT
    from mygpt.recipe.tables import ModelTable

    table = ModelTable(embed_dim=size.embed_dim, num_layers=size.layers, num_heads=size.heads, max_seq_len=size.seq_len)
    return GPT(table, size.vocab_size)


def plain(size: Size, tokens: Path, device: torch.device, compiled: bool = False) -> Step:
    """mygpt's model in a loop of plain PyTorch: what a careful user would write by hand."""
    model = own_model(size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    return plain_loop(
        model, optimizer, torch.compile(model) if compiled else model, batches(size, tokens, device), size
    )


def nanogpt(size: Size, tokens: Path, device: torch.device, checkout: str, compiled: bool = False) -> Step:
    sys.path.insert(0, checkout)
    import model as nano  # type: ignore[import-not-found]

    shape = {"n_layer": size.layers, "n_head": size.heads, "n_embd": size.embed_dim, "block_size": size.seq_len}
    model = nano.GPT(nano.GPTConfig(**shape, vocab_size=size.vocab_size, dropout=0.0, bias=False)).to(device)
    optimizer = model.configure_optimizers(0.1, LEARNING_RATE, (0.9, 0.95), device.type)
    forward = torch.compile(model) if compiled else model
    return plain_loop(model, optimizer, lambda x, y: forward(x, y)[1], batches(size, tokens, device), size)


class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """All windows, of which the data loaders of the two trainers draw at random."""

    def __init__(self, size: Size, tokens: Path):
        self.data, self.seq_len = torch.from_numpy(np.load(tokens).astype(np.int64)), size.seq_len

    def __len__(self) -> int:
        return len(self.data) - self.seq_len - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.data[index : index + self.seq_len + 1]
        return {"input_ids": window[:-1], "labels": window[:-1], "targets": window[1:]}


def hf_trainer(size: Size, tokens: Path, device: torch.device, turns: Turns) -> None:
    import transformers

    shape = {"n_layer": size.layers, "n_head": size.heads, "n_embd": size.embed_dim, "n_positions": size.seq_len}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(
        **shape, **dropout, vocab_size=size.vocab_size, attn_implementation="sdpa", bos_token_id=0, eos_token_id=0
    )

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step_done()

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=size.batch_size,
            max_steps=10**9,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_NORM,
            optim="adamw_torch_fused",
            bf16=size.precision == "bf16",
            use_cpu=device.type == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=500,
        )
        model = transformers.GPT2LMHeadModel(config)
        trainer = transformers.Trainer(model, arguments, train_dataset=Windows(size, tokens), callbacks=[Callback()])
        trainer.train()


def litgpt(size: Size, tokens: Path, device: torch.device, turns: Turns) -> None:
    import lightning
    from litgpt import GPT
    from litgpt.config import Config

    config = Config(
        block_size=size.seq_len,
        n_layer=size.layers,
        n_head=size.heads,
        n_embd=size.embed_dim,
        vocab_size=size.vocab_size,
        padded_vocab_size=size.vocab_size,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        intermediate_size=4 * size.embed_dim,
        parallel_residual=False,
    )

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = GPT(config)

        def training_step(self, batch: dict[str, torch.Tensor], _index: int) -> torch.Tensor:
            logits = self.gpt(batch["input_ids"])
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, fused=True)

    class Callback(lightning.Callback):
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            turns.step_done()

    trainer = lightning.Trainer(
        accelerator=device.type if device.type == "cpu" else "gpu",
        devices=1,
        max_steps=10**9,
        precision="bf16-mixed" if size.precision == "bf16" else "32-true",
        gradient_clip_val=MAX_NORM,
        callbacks=[Callback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(Windows(size, tokens), batch_size=size.batch_size, shuffle=True)
    trainer.fit(Module(), loader)


def product_side(device: torch.device) -> int:
    """Rows and columns of what counts as a large product."""
    return 8192 if device.type == "cuda" else 1024


def products(size: Size, device: torch.device) -> Step:
    """Large products, whose rate is the machine's peak."""
    side = product_side(device)
    dtype = torch.bfloat16 if size.precision == "bf16" else torch.float32
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))

    def step() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b)

    return step


def work(name: str, size: Size, tokens: Path, device: torch.device, nanogpt_checkout: str) -> None:
    """Take turns as this contender until the parent closes the pipe."""
    turns = Turns(device)
    if name == "HF Trainer":
        return hf_trainer(size, tokens, device, turns)
    if name == "litgpt, Lightning":
        return litgpt(size, tokens, device, turns)
    kind, _, compiled = name.partition(", ")
    if kind == "mygpt":
        step = next(steps := mygpt(size, tokens, device, compile=bool(compiled)))  # noqa: F841 - it holds the parts
    elif kind == "plain":
        step = plain(size, tokens, device, bool(compiled))
    elif kind == "nanoGPT":
        step = nanogpt(size, tokens, device, nanogpt_checkout, bool(compiled))
    else:
        step = reference(size, tokens, device) if kind == "reference" else products(size, device)
    while True:
        step()
        turns.step_done()


# ---- The parent


class Contender:
    """A process that computes steps when it is asked to."""

    def __init__(self, python: str, name: str, arguments: list[str]):
        self.name, self._started_at = name, time.perf_counter()
        command = [python, __file__, "--work", name, *arguments]
        environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "TOKENIZERS_PARALLELISM": "false"}
        pipe = subprocess.PIPE
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log, env=environment, text=True, bufsize=1
        )
        self.first = self.memory = 0.0
        self.seconds: list[float] = []
        """Per step, of each turn."""

    def is_ready(self) -> bool:
        """Wait for the first step; False if the process has ended instead."""
        if (answer := self._answer()) is None:
            return False
        self.first = time.perf_counter() - self._started_at
        self.memory = answer["memory"]
        return True

    def turn(self, steps: int) -> float:
        """Seconds per step of a turn."""
        assert self._process.stdin
        print(steps, file=self._process.stdin, flush=True)
        if (answer := self._answer()) is None:
            raise SystemExit(f"{self.name} has ended: {self.last_words()}")
        self.memory = answer["memory"]
        return float(answer["seconds"]) / steps

    def _answer(self) -> dict[str, float] | None:
        assert self._process.stdout
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def last_words(self) -> str:
        self._log.seek(0)
        return (self._log.read().strip().splitlines() or ["nothing said"])[-1]

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def peers_python() -> str:
    """The Python of an environment with the peers and this torch, made in the user's cache where it is missing."""
    wanted = [f"torch=={torch.__version__.partition('+')[0]}", *PACKAGES]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "mygpt" / f"peers-{hashlib.sha256(' '.join(wanted).encode()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making {folder} with {', '.join(wanted)}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        for packages in (wanted[:1], wanted):  # torch first, from the index that the user's pip prefers
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "complete").touch()
    return str(python)


def compare(size_name: str, contenders: dict[str, str], options: argparse.Namespace, device: torch.device) -> None:
    """Time the contenders, each with the Python named beside it, and print the table of a size."""
    size = SIZES[size_name]
    if size.precision != "fp32":  # which is all that reference.py has
        contenders = {name: python for name, python in contenders.items() if name != "reference"}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        np.save(tokens, np.random.default_rng(0).integers(0, size.vocab_size, 2_000_000, dtype=np.uint16))
        arguments = ["--size", size_name, "--tokens", str(tokens), "--device", device.type]
        arguments += ["--nanogpt", options.nanogpt] if options.nanogpt else []
        ready: list[Contender] = []
        for name, python in {"products": sys.executable, **contenders}.items():
            contender = Contender(python, name, arguments)
            if contender.is_ready():
                contender.turn(options.steps)  # the caches are cold
                ready.append(contender)
            else:
                print(f"{name} is left out: {contender.last_words()}", file=sys.stderr)
        for _ in range(options.rounds):
            for contender in ready:
                contender.seconds.append(contender.turn(options.steps))
        for contender in ready:
            contender.end()
    large, *ready = ready
    peak = PRODUCTS * 2 * product_side(device) ** 3 / statistics.median(large.seconds)
    flops_per_token = own_model(size).flops_per_token(size.seq_len)
    yardstick = next((one for one in ready if one.name == "nanoGPT"), ready[0])
    print(f"\n{size_name}: {size.batch_size} windows of {size.seq_len} tokens, {size.precision}; ", end="")
    print(f"large products {peak / 1e9:,.0f} GFLOP/s; ratios to {yardstick.name}, medians of {options.rounds} turns")
    print(f"{'':<20}{'ms/step':>10}{'ratio':>8}{'from - to':>14}{'tokens/s':>12}{'peak':>7}{'memory':>10}{'first':>8}")
    for one in ready:
        seconds = statistics.median(one.seconds)
        ratios = sorted(a / b for a, b in zip(one.seconds, yardstick.seconds, strict=True))
        spread = f"{ratios[len(ratios) // 4]:.2f} - {ratios[-1 - len(ratios) // 4]:.2f}"
        tokens_per_second = size.batch_size * size.seq_len / seconds
        share = flops_per_token * tokens_per_second / peak
        print(
            f"{one.name:<20}{seconds * 1e3:>10.2f}{statistics.median(ratios):>8.2f}{spread:>14}"
            f"{tokens_per_second:>12,.0f}{share:>7.0%}{one.memory / 2**20:>6,.0f} MiB{one.first:>6.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help=f"of {', '.join(SIZES)}, separated by commas")
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT's repository")
    parser.add_argument("--python", help="the Python of an environment that has the peers' packages")
    parser.add_argument("--only", help="contenders, separated by semicolons")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=10, help="steps in a turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("--work", "--size", "--tokens"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.work:
        work(options.work, SIZES[options.size], Path(options.tokens), device, options.nanogpt)
        return
    ours = ("reference", "plain", "plain, compiled", "mygpt", "mygpt, compiled")
    peers = ["HF Trainer", "litgpt, Lightning", *(["nanoGPT", "nanoGPT, compiled"] if options.nanogpt else [])]
    names = options.only.split(";") if options.only else [*peers, *ours]
    needs_peers = any(name in names for name in peers[:2]) and not options.python
    python = options.python or (peers_python() if needs_peers else sys.executable)
    contenders = {name: sys.executable if name in ours else python for name in names}
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else platform.processor() or 'cpu'}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}")
    fitting = [name for name in SIZES if name != "124M" or device.type == "cuda"]
    for size_name in options.sizes.split(",") if options.sizes else fitting:
        compare(size_name, contenders, options, device)


if __name__ == "__main__":
    main()
