"""Samples text from a model, token by token."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from numbers import Integral, Real

import torch
from torch import nn

from mygpt.data.tokenizer import Tokenizer
from mygpt.errors import MygptError, NonFiniteError, TokenizerError
from mygpt.model.gpt import GPT
from mygpt.recipe.tables import show_value

Sample = Callable[[torch.Tensor], torch.Tensor]


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int = 10,
    generator: torch.Generator | None = None,
) -> str:
    """The prompt and its continuation; see `stream_text` for the arguments."""
    return prompt + "".join(stream_text(model, tokenizer, prompt, max_new_tokens, temperature, top_k, generator))


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int = 10,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """The text that continues `prompt`, as the tokens that complete its characters are drawn.

    Each token is drawn from the softmax of logits / `temperature` (0: the most likely one) over the `top_k` most likely
    ones (0: all), with `generator`, a CPU generator, or torch's global one. The model sees the last max_seq_len tokens.
    It is left in the mode in which it was.

    Raises:
        TokenizerError: the prompt is no text, is empty or has a character outside the vocabulary.
        MygptError: another argument is no number, or out of range.
        NonFiniteError: on drawing, if the model's logits are not finite.
    """
    if not isinstance(prompt, str):
        raise TokenizerError(f"prompt: got {show_value(prompt)}, expected a text")
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
        if not isinstance(value, Integral) or value < 0:
            raise MygptError(f"{name}: got {show_value(value)}, expected an integer from 0 up")
    if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise MygptError(f"temperature: got {show_value(temperature)}, expected a number from 0 up")
    if not prompt:
        raise TokenizerError("prompt: empty; expected at least one character to continue")
    tokens = torch.as_tensor(tokenizer.encode(prompt, name="prompt")).long()
    sample = partial(sample_token, temperature=temperature, top_k=top_k, generator=generator)
    drawn = stream_tokens(model, tokens[None], model.config.max_seq_len, max_new_tokens, sample)
    return tokenizer.stream_decode(int(ids_B1) for ids_B1 in drawn)


@torch.no_grad()
def stream_tokens(
    model: nn.Module, tokens_BT: torch.Tensor, max_seq_len: int, max_new_tokens: int, sample: Sample
) -> Iterator[torch.Tensor]:
    """The ids that continue each row of `tokens_BT`, (B, 1) at a time; `sample` draws one id from logits (V,)."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            # Positions are absolute, so once the window slides all of them have to be computed again: a key-value
            # cache would save nothing.
            logits_BV = model(tokens_BT[..., -max_seq_len:].to(device))[:, -1].float().cpu()
            ids_B1 = torch.stack([sample(logits_V) for logits_V in logits_BV])
            tokens_BT = torch.cat([tokens_BT, ids_B1.to(tokens_BT.device)], dim=1)
            yield ids_B1
    finally:
        model.train(was_training)


def sample_token(
    logits_V: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator | None
) -> torch.Tensor:
    """One token id, shape (1,), drawn as `stream_text` says.

    Raises:
        NonFiniteError: a logit is infinite or not a number.
    """
    if not torch.isfinite(logits_V).all():
        raise NonFiniteError("the model's logits are not finite: its training diverged; use an earlier checkpoint")
    if temperature == 0:
        return logits_V.argmax(keepdim=True)
    if 0 < top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    # With the largest logit at 0, a small temperature can overflow only towards -inf, which has probability 0.
    logits_V = (logits_V - logits_V.max()).double() / temperature
    return torch.multinomial(torch.softmax(logits_V, dim=-1), 1, generator=generator)
