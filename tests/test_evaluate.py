"""The held-out loss and its standard error."""

import statistics

import pytest
import torch

from mygpt import GPT, estimate_val_loss, get_batch
from mygpt.data import Places, all_places, draw_starts, random_places, windows
from mygpt.evaluate import held_out_loss
from mygpt.recipe import ModelTable

TABLE = ModelTable(embed_dim=16, num_heads=2, num_layers=1, max_seq_len=8, dropout=0.3)


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return GPT(TABLE, vocab_size=20)


@pytest.fixture
def data():
    return torch.randint(0, 20, (203,), generator=torch.Generator().manual_seed(1))


def test_estimate_is_the_mean_over_random_batches(gpt, data):
    """The course's function: batches from the global generator, in eval mode, without gradients."""
    torch.manual_seed(7)
    gpt.eval()
    expected = statistics.mean(gpt(*get_batch(data, 4, 8)).item() for _ in range(10))
    gpt.train()
    torch.manual_seed(7)
    assert estimate_val_loss(gpt, data, 4, 8) == pytest.approx(expected, abs=1e-6)
    assert all(p.grad is None for p in gpt.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(gpt, data, training):
    """Also when the evaluation fails."""
    gpt.train(training)
    estimate_val_loss(gpt, data, 4, 8, n_eval_batches=1)
    assert gpt.training is training
    with pytest.raises(IndexError):
        held_out_loss(gpt, torch.full((20,), 99), [Places(torch.tensor([0]), 8)], 1)
    assert gpt.training is training


def test_full_is_the_mean_over_every_target(gpt, data):
    """The exact value: each target once, with the short last window weighed by its length."""
    gpt.eval()
    losses = []
    for start in range(0, 202, 8):
        part = data[start : start + 9]
        logits = gpt(part[None, :-1])[0]
        losses += torch.nn.functional.cross_entropy(logits, part[1:], reduction="none").tolist()
    assert len(losses) == 202
    result = held_out_loss(gpt, data, all_places(data, 8), 3)
    assert result.mean == pytest.approx(statistics.mean(losses), abs=1e-6)


def test_standard_error_is_that_of_the_windows(gpt, data):
    """For windows of one length: the sample deviation of their losses over the root of their number."""
    places = Places(draw_starts(data, 12, 8), 8)
    gpt.eval()
    losses = [gpt(x[None], y[None]).item() for x, y in zip(*windows(data, *places), strict=True)]
    result = held_out_loss(gpt, data, [places], 5)
    assert result.mean == pytest.approx(statistics.mean(losses), abs=1e-6)
    assert result.stderr == pytest.approx(statistics.stdev(losses) / 12**0.5, rel=1e-4)
    assert held_out_loss(gpt, data, [Places(torch.tensor([3]), 8)], 5).stderr is None


def test_standard_error_tells_the_spread_of_estimates(gpt, data):
    """Estimates from fresh batches scatter as widely as the standard error says."""
    generator = torch.Generator().manual_seed(3)
    results = [held_out_loss(gpt, data, random_places(data, 16, 8, 1, generator), 16) for _ in range(200)]
    scatter = statistics.stdev(result.mean for result in results)
    assert scatter == pytest.approx(statistics.mean(result.stderr for result in results), rel=0.2)
