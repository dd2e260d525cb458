"""The model: a decoder-only, pre-norm transformer in GPT-2's style.

Suffixes name the axes of a tensor: B batch, T tokens, D embed_dim, H heads, K head_dim, V vocabulary.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mygpt.recipe.tables import ModelTable


class GPT(nn.Module):
    """Predicts the next token at every position.

    Weights are drawn from the global generator in the order of the modules below.
    """

    def __init__(self, config: ModelTable, vocab_size: int):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.activation_checkpointing = False
        """Whether to keep only the input of each block, and recompute its activations in the backward pass."""
        self.loss_chunk = 0
        """Tokens whose logits are in memory at a time while a loss is computed; 0: all."""
        rows = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
        self.token_embedding = nn.Embedding(rows, config.embed_dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.embed_dim, bias=config.biases != "none")
        self.head = None if config.tied_head else nn.Linear(config.embed_dim, rows, bias=False)
        self.logits = Product(vocab_size)
        if config.init == "gpt2":
            self._init_as_gpt2()

    def _init_as_gpt2(self) -> None:
        """Source: Radford et al. (2019), section 2.3, and the released code for the deviation."""
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                adds_to_stream = name.endswith(("attention.output.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * len(self.blocks)) ** 0.5 if adds_to_stream else 0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(weight)

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V) or, with targets, their mean cross-entropy in nats (a scalar).

        `tokens_BT` and `targets_BT` are int64 token ids; T is at most max_seq_len.
        """
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.dropout(self.token_embedding(tokens_BT) + self.position_embedding(positions_T))
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, use_reentrant=False)
            else:
                x_BTD = block(x_BTD)
        x_BTD = self.norm(x_BTD)
        weight_VD = self.token_embedding.weight if self.head is None else self.head.weight
        if targets_BT is not None and self.loss_chunk:
            return self._loss_in_chunks(x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten())
        logits_BTV: torch.Tensor = self.logits(x_BTD, weight_VD)
        return logits_BTV if targets_BT is None else next_token_loss(logits_BTV, targets_BT)

    def _loss_in_chunks(self, x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """As `next_token_loss`; logits are computed again in the backward pass, so that those of one chunk suffice."""

        def chunk_loss(x_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.logits(x_ND, weight_VD), targets_N, reduction="sum")

        chunks = zip(x_ND.split(self.loss_chunk), targets_N.split(self.loss_chunk), strict=True)
        losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum() / len(targets_N)

    def compute_products_with(self, linear: Callable[..., torch.Tensor]) -> None:
        """Have `linear` compute the products with weights, in place of F.linear, whose arguments it takes."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.forward = partial(_forward_linear, module, linear)  # type: ignore[method-assign]
            elif isinstance(module, Product):
                module.linear = linear

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of a forward and a backward pass in windows of `seq_len`, per token.

        6 for every weight of a product, and those of attention without regard to its mask, so that other programs'
        figures can be compared. Source: Chowdhery et al., "PaLM" (https://arxiv.org/abs/2204.02311), appendix B.
        """
        size, layers = self.config.embed_dim, self.config.num_layers
        rows = len(self.token_embedding.weight)
        return 6 * (12 * layers * size**2 + rows * size) + 12 * layers * size * seq_len


def _forward_linear(module: nn.Linear, linear: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)


def next_token_loss(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy in nats (a scalar) of int64 targets."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


class Product(nn.Module):
    """x @ weight.T, up to column `size`, with the weight of another module. A module, so that hooks see the logits."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.linear: Callable[..., torch.Tensor] = F.linear

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        product = self.linear(x, weight)
        # Rows that fill up a multiple stand for no token.
        return product if len(weight) == self.size else product[..., : self.size]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelTable):
        super().__init__()
        bias = config.biases != "none"
        self.attention_norm = nn.LayerNorm(config.embed_dim, bias=bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.embed_dim, bias=bias)
        self.mlp = MLP(config)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Attention(nn.Module):
    """Causal multi-head self-attention with scale 1/sqrt(head_dim)."""

    def __init__(self, config: ModelTable):
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        bias = config.biases == "all"
        self.query_key_value = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=bias)
        self.output = nn.Linear(config.embed_dim, config.embed_dim, bias=bias)
        self.output_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        query_BHTK, key_BHTK, value_BHTK = (
            part_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part_BTD in self.query_key_value(x_BTD).chunk(3, dim=-1)
        )
        mixed_BHTK = F.scaled_dot_product_attention(
            query_BHTK, key_BHTK, value_BHTK, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        return self.output_dropout(self.output(mixed_BHTK.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Linear to 4 * embed_dim, GELU, linear back."""

    def __init__(self, config: ModelTable):
        super().__init__()
        bias = config.biases != "none"
        self.approximation = "tanh" if config.activation == "gelu-tanh" else "none"
        self.up = nn.Linear(config.embed_dim, 4 * config.embed_dim, bias=bias)
        self.down = nn.Linear(4 * config.embed_dim, config.embed_dim, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down(F.gelu(self.up(x_BTD), approximate=self.approximation)))
