"""Sampling text from a model."""

from collections.abc import Iterator

import torch

from mygpt.data.tokenizer import CharTokenizer
from mygpt.errors import TokenizerError
from mygpt.model.gpt import GPT


def generate(
    model: GPT,
    tokenizer: CharTokenizer,
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
    tokenizer: CharTokenizer,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int = 10,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """The characters that continue `prompt`, one by one.

    Each is drawn from the softmax of logits / `temperature` (0: the most likely one) over the `top_k` most likely
    characters (0: all), with `generator`, a CPU generator, or torch's global one. The model sees the last
    max_seq_len characters. It is left in the mode in which it was.

    Raises:
        TokenizerError: the prompt is empty or has a character outside the vocabulary.
    """
    if not prompt:
        raise TokenizerError("prompt: empty; expected at least one character to continue")
    tokens = torch.as_tensor(tokenizer.encode(prompt, what="prompt")).long()
    return _stream(model, tokenizer, tokens, max_new_tokens, temperature, top_k, generator)


@torch.no_grad()
def _stream(
    model: GPT,
    tokenizer: CharTokenizer,
    tokens: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator | None,
) -> Iterator[str]:
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            # The positions are learned and absolute, so once the window slides every position's work is new: there
            # is nothing for a key-value cache to keep.
            context_1T = tokens[-model.config.max_seq_len :][None].to(device)
            logits_V = model(context_1T)[0, -1].float().cpu()
            token = sample_token(logits_V, temperature, top_k, generator)
            tokens = torch.cat([tokens, token])
            yield tokenizer.decode(token)
    finally:
        model.train(was_training)


def sample_token(
    logits_V: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator | None
) -> torch.Tensor:
    """One token id, shape (1,), drawn as `stream_text` says."""
    if temperature == 0:
        return logits_V.argmax(keepdim=True)
    if 0 < top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    # Relative to the largest, in float64: no temperature above 0 is so low that the division overflows upwards.
    logits_V = (logits_V - logits_V.max()).double() / temperature
    return torch.multinomial(torch.softmax(logits_V, dim=-1), 1, generator=generator)
