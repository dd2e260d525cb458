"""The whole program in the plainest PyTorch, importing nothing of mygpt: oracle of its tests, yardstick of its speed.

python scripts/benchmarks/reference.py TEXT_FILE STEPS      # the plain run, one line per 500 steps
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Settings:
    val_split: float = 0.0
    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 4
    max_seq_len: int = 64
    steps: int = 2000
    batch_size: int = 16
    seq_len: int = 64
    max_grad_norm: float = 0.0
    lr: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    min_lr: float = 0.0
    val_every: int = 0
    eval_batches: int = 10
    log_grad_norm: bool = False


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class Block(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(size), Norm(size)
        self.query, self.key, self.value, self.output = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def attention(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        split = (batch, length, self.heads, size // self.heads)
        query, key, value = (part(x).view(split).transpose(1, 2) for part in (self.query, self.key, self.value))
        scores = query @ key.transpose(-2, -1) / math.sqrt(size // self.heads)
        future = torch.triu(torch.ones(length, length, dtype=torch.bool, device=x.device), diagonal=1)
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        return self.output((weights @ value).transpose(1, 2).reshape(batch, length, size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, vocab_size: int, s: Settings) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, s.embed_dim), nn.Embedding(s.max_seq_len, s.embed_dim)
        self.blocks = nn.ModuleList(Block(s.embed_dim, s.num_heads) for _ in range(s.num_layers))
        self.norm = Norm(s.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.norm(h) @ self.tokens.weight.T


def rate(step: int, s: Settings) -> float:
    if step < s.warmup:
        return s.lr * step / s.warmup
    if s.schedule == "constant":
        return s.lr
    if step >= s.steps:
        return s.min_lr
    done = (step - s.warmup) / (s.steps - s.warmup)
    height = 0.5 * (1 + math.cos(math.pi * done)) if s.schedule == "cosine" else 1 - done
    return s.min_lr + (s.lr - s.min_lr) * height


def run(
    text: str, s: Settings, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Iterator[tuple[int, float, float | None, float, float | None]]:
    """Train on `text`; yields (step, loss, held-out loss or None, rate, gradient norm or None) for every step."""
    letters = sorted(set(text))
    index = {letter: i for i, letter in enumerate(letters)}
    data = torch.tensor([index[letter] for letter in text])
    boundary = int((1 - s.val_split) * len(data))
    train, val = data[:boundary], data[boundary:]

    torch.manual_seed(0)
    model = Model(len(letters), s).to(device, dtype)
    torch.manual_seed(42)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr)

    def loss_on(part: Tensor) -> Tensor:
        starts = torch.randint(0, len(part) - s.seq_len - 1, (s.batch_size,))
        x = torch.stack([part[i : i + s.seq_len] for i in starts]).to(device)
        y = torch.stack([part[i + 1 : i + 1 + s.seq_len] for i in starts]).to(device)
        return nn.functional.cross_entropy(model(x).view(-1, len(letters)), y.view(-1))

    for step in range(1, s.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, s)
        loss = loss_on(train)
        optimizer.zero_grad()
        loss.backward()
        norm = None
        if s.max_grad_norm or s.log_grad_norm:
            norm = nn.utils.clip_grad_norm_(model.parameters(), s.max_grad_norm or math.inf).item()
        optimizer.step()
        held_out = None
        if s.val_every and (step % s.val_every == 0 or step == s.steps):
            model.eval()
            with torch.no_grad():
                held_out = sum(loss_on(val).item() for _ in range(s.eval_batches)) / s.eval_batches
            model.train()
        yield step, loss.item(), held_out, rate(step, s), norm


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8", newline="") as file:
        corpus = file.read()
    for step, loss, *_ in run(corpus, Settings(steps=int(sys.argv[2]))):
        if step == 1 or step % 500 == 0:
            print(f"step {step:5d}: loss = {loss:.4f}", flush=True)
