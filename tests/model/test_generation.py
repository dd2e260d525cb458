"""Sampling text."""

import pytest
import torch

from mygpt import GPT, CharTokenizer, generate
from mygpt.errors import MygptError, NonFiniteError, TokenizerError
from mygpt.model.generation import sample_token, stream_text
from mygpt.recipe.tables import ModelTable

TOKENIZER = CharTokenizer("abcdefgh")


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return GPT(ModelTable(embed_dim=16, num_heads=2, num_layers=1, max_seq_len=8, dropout=0.5), vocab_size=8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_same_seed_gives_the_same_text(gpt):
    """Another seed gives another; it begins with the prompt and has the length asked for, beyond the context too."""
    first = generate(gpt, TOKENIZER, "abc", 40, generator=seeded())
    assert first.startswith("abc")
    assert len(first) == 43
    assert generate(gpt, TOKENIZER, "abc", 40, generator=seeded()) == first
    assert generate(gpt, TOKENIZER, "abc", 40, generator=seeded(1)) != first


def test_temperature_zero_takes_the_most_likely(gpt):
    """The argmax of the logits for the last max_seq_len characters."""
    text = generate(gpt, TOKENIZER, "h", 20, temperature=0)
    gpt.eval()
    for end in range(1, 21):
        context = torch.from_numpy(TOKENIZER.encode(text[max(0, end - 8) : end])).long()
        assert TOKENIZER.vocab[gpt(context[None])[0, -1].argmax()] == text[end]


def test_top_k_excludes_the_others():
    """Only the k most likely are ever drawn; 0 means all; shares follow the softmax."""
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    drawn = {k: {int(sample_token(logits, 1.0, k, seeded(i))) for i in range(300)} for k in (1, 2, 0, 9)}
    assert drawn == {1: {1}, 2: {1, 3}, 0: {0, 1, 2, 3}, 9: {0, 1, 2, 3}}
    often = sum(int(sample_token(logits, 2.0, 0, seeded(i))) == 1 for i in range(2000)) / 2000
    assert often == pytest.approx(torch.softmax(logits / 2, 0)[1].item(), abs=0.03)


def test_characters_come_one_by_one_and_the_mode_is_restored(gpt):
    """Also when the reader stops early."""
    stream = stream_text(gpt, TOKENIZER, "a", 10)
    assert len(next(stream)) == 1
    assert not gpt.training
    stream.close()
    assert gpt.training


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: empty"),
        ("abz", r"prompt: character 'z' \(U\+007A\)"),
        (None, "prompt: got None, expected a text"),
        (b"ab", "prompt: got b'ab', expected a text"),
        (["a"], r"prompt: got \['a'\], expected a text"),
    ],
)
def test_bad_prompts_are_refused_before_sampling(gpt, prompt, message):
    """At the call, not at the first character."""
    with pytest.raises(TokenizerError, match=message):
        stream_text(gpt, TOKENIZER, prompt)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"max_new_tokens": None}, "max_new_tokens: got None, expected an integer from 0 up"),
        ({"max_new_tokens": -1}, "max_new_tokens: got -1, expected an integer from 0 up"),
        ({"top_k": 2.5}, "top_k: got 2.5, expected an integer from 0 up"),
        ({"temperature": "1"}, "temperature: got '1', expected a number from 0 up"),
        ({"temperature": float("nan")}, "temperature: got nan, expected a number from 0 up"),
    ],
)
def test_wrong_arguments_are_named(gpt, argument, message):
    """Before anything is drawn."""
    with pytest.raises(MygptError, match=f"^{message}$"):
        generate(gpt, TOKENIZER, "a", **argument)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_model_that_diverged_is_an_error(gpt, temperature):
    """Huge weights, as before a step that failed, give logits that are no numbers: the message says what to do."""
    for parameter in gpt.parameters():
        parameter.data.mul_(1e30)
    with pytest.raises(NonFiniteError, match="use an earlier checkpoint"):
        generate(gpt, TOKENIZER, "a", temperature=temperature)
