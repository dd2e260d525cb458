"""The model, compared with the plainest implementation."""

import pytest
import reference
import torch

from mygpt import GPT
from mygpt.recipe.tables import ModelTable

SETTINGS = {"embed_dim": 24, "num_heads": 3, "num_layers": 2, "max_seq_len": 10}


def both(dtype=torch.float32):
    models = []
    for make in (
        lambda: GPT(ModelTable(**SETTINGS), vocab_size=11),
        lambda: reference.Model(11, reference.Settings(**SETTINGS)),
    ):
        torch.manual_seed(0)
        models.append(make().to(dtype))
    return models


def test_default_size():
    """The published number of weights; the output layer shares the weights of the token embedding."""
    assert GPT(ModelTable(), vocab_size=65).num_params() == 207_296


def test_initial_weights_equal_separate_projections():
    """One wide layer for query, key and value draws the same numbers, in the same order, as three layers."""
    gpt, plain = both()
    for ours, theirs in zip(gpt.blocks, plain.blocks, strict=True):
        wide = torch.cat([theirs.query.weight, theirs.key.weight, theirs.value.weight])
        assert torch.equal(ours.attention.query_key_value.weight, wide)
        assert torch.equal(ours.attention.output.weight, theirs.output.weight)
        assert torch.equal(ours.mlp.up.bias, theirs.up.bias)
        assert torch.equal(ours.mlp.down.weight, theirs.down.weight)
    assert torch.equal(gpt.token_embedding.weight, plain.tokens.weight)
    assert torch.equal(gpt.position_embedding.weight, plain.positions.weight)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_logits_equal_the_plain_model(dtype, atol):
    """Fused attention and norms compute the same function: to rounding in float64."""
    gpt, plain = both(dtype)
    tokens = torch.randint(0, 11, (5, 10))
    torch.testing.assert_close(gpt(tokens), plain(tokens), rtol=0, atol=atol)


def test_no_position_sees_the_future():
    """Changing a token changes no logit before it."""
    gpt, _ = both(torch.float64)
    tokens = torch.randint(0, 11, (1, 10))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 11
    before, after = gpt(tokens), gpt(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_loss_is_the_mean_cross_entropy_of_the_logits():
    """With targets the model returns the scalar that training needs."""
    gpt, _ = both()
    tokens, targets = torch.randint(0, 11, (2, 4, 10))
    expected = torch.nn.functional.cross_entropy(gpt(tokens).view(-1, 11), targets.view(-1))
    torch.testing.assert_close(gpt(tokens, targets), expected)


def test_a_hook_sees_the_logits_of_the_loss():
    """They pass through a module without weights, so that a hook finds where they became non-finite."""
    gpt, _ = both()
    tokens, seen = torch.randint(0, 11, (2, 10)), []
    gpt.logits.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    gpt(tokens, tokens)
    assert torch.equal(seen[0], gpt(tokens))
    assert not any(name.startswith("logits") for name in gpt.state_dict())


def test_dropout_acts_in_training_only():
    """In eval mode the same input gives the same logits."""
    gpt = GPT(ModelTable(**SETTINGS, dropout=0.5), vocab_size=11)
    tokens = torch.randint(0, 11, (2, 10))
    assert not torch.equal(gpt(tokens), gpt(tokens))
    gpt.eval()
    assert torch.equal(gpt(tokens), gpt(tokens))
