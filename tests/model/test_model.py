"""The model, compared with the plainest implementation."""

import functools

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


def copy_block(block, theirs):
    """Give torch's layer the weights of our block."""
    pairs = {
        "self_attn.in_proj_": block.attention.query_key_value,
        "self_attn.out_proj.": block.attention.output,
        "linear1.": block.mlp.up,
        "linear2.": block.mlp.down,
        "norm1.": block.attention_norm,
        "norm2.": block.mlp_norm,
    }
    weights = {
        f"{prefix}{name}": weight for prefix, module in pairs.items() for name, weight in module.state_dict().items()
    }
    theirs.load_state_dict(weights)


@pytest.mark.parametrize("biases", ["all", "none"])
@pytest.mark.parametrize("activation", ["gelu", "gelu-tanh"])
def test_block_equals_that_of_torch(biases, activation):
    """With and without biases, by both GELUs: torch's own pre-norm layer with the same weights."""
    table = ModelTable(**SETTINGS, biases=biases, activation=activation)
    block = GPT(table, 11).double().blocks[0]
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh" if activation == "gelu-tanh" else "none")
    theirs = torch.nn.TransformerEncoderLayer(
        24, 3, 96, 0.0, gelu, batch_first=True, norm_first=True, bias=biases == "all", dtype=torch.float64
    )
    copy_block(block, theirs)
    x_BTD = torch.randn(2, 7, 24, dtype=torch.float64)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    torch.testing.assert_close(block(x_BTD), theirs(x_BTD, mask, is_causal=True), rtol=0, atol=1e-12)


def test_gpt2_has_its_number_of_weights():
    """The published model of 124M, and the deviations of its initial weights."""
    table = ModelTable(
        embed_dim=768, num_heads=12, num_layers=12, max_seq_len=1024, biases="all", activation="gelu-tanh", init="gpt2"
    )
    gpt = GPT(table, vocab_size=50_257)
    assert gpt.num_params() == 124_439_808
    assert gpt.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert gpt.blocks[3].mlp.down.weight.std().item() == pytest.approx(0.02 / 24**0.5, rel=0.01)
    assert gpt.blocks[3].attention.output.weight.std().item() == pytest.approx(0.02 / 24**0.5, rel=0.01)
    assert gpt.blocks[3].attention.query_key_value.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert not any(weight.any() for name, weight in gpt.named_parameters() if name.endswith("bias"))


def test_filled_up_vocabulary_changes_no_logit():
    """Rows that fill up a multiple are computed and dropped: losses and text are those of the vocabulary."""
    torch.manual_seed(0)
    plain, filled = GPT(ModelTable(**SETTINGS), 11), GPT(ModelTable(**SETTINGS, vocab_multiple=8), 11)
    assert filled.token_embedding.weight.shape == (16, 24)
    weights = plain.state_dict()
    weights["token_embedding.weight"] = torch.cat([weights["token_embedding.weight"], torch.randn(5, 24)])
    filled.load_state_dict(weights)
    tokens = torch.randint(0, 11, (2, 10))
    torch.testing.assert_close(filled(tokens), plain(tokens))
    torch.testing.assert_close(filled(tokens, tokens), plain(tokens, tokens))


def test_head_of_its_own():
    """Its weights are not the embedding's, and they alone make the logits."""
    gpt = GPT(ModelTable(**SETTINGS, tied_head=False), 11)
    assert gpt.num_params() == GPT(ModelTable(**SETTINGS), 11).num_params() + 11 * 24
    torch.nn.init.zeros_(gpt.head.weight)
    assert not gpt(torch.zeros(1, 3, dtype=torch.long)).any()


@pytest.mark.parametrize("chunk", [1, 7, 20, 1000])
@pytest.mark.parametrize("keys", [{}, {"tied_head": False, "vocab_multiple": 8}], ids=["tied", "own"])
def test_loss_in_chunks_is_the_loss(chunk, keys):
    """And so are its gradients, to rounding."""
    gpt = GPT(ModelTable(**SETTINGS, **keys), 11).double()
    tokens, targets = torch.randint(0, 11, (2, 2, 10))
    results = []
    for gpt.loss_chunk in (0, chunk):
        gpt.zero_grad()
        loss = gpt(tokens, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in gpt.parameters())])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(gpt(tokens, targets), results[0][0], rtol=0, atol=1e-12)
