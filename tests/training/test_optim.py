"""The learning rate and the optimizer."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mygpt import GPT, cosine_warmup_lr
from mygpt.recipe.tables import ModelTable, OptimizerTable, ScheduleTable
from mygpt.training.optim import build_optimizer, build_scheduler, learning_rate


def test_cosine_has_the_published_values():
    """The hardened recipe's rates, as it prints them; the last is exactly zero."""
    rates = [cosine_warmup_lr(step, 100, 2000, 1e-3) for step in (1, 100, 500, 1000, 1500, 2000, 3000)]
    assert [f"{rate:.2e}" for rate in rates[:-2]] == ["1.00e-05", "1.00e-03", "8.95e-04", "5.41e-04", "1.61e-04"]
    assert rates[-2:] == [0.0, 0.0]


@given(
    schedule=st.sampled_from(["constant", "cosine", "linear", "wsd"]),
    steps=st.integers(1, 300),
    warmup_share=st.floats(0, 1),
    low=st.floats(0, 1),
)
def test_rates_rise_to_the_peak_and_fall_to_the_minimum(schedule, steps, warmup_share, low):
    """In every schedule: linear up to `warmup`, never above the peak, and min_lr at the last step."""
    warmup = int(steps * warmup_share)
    table = ScheduleTable(schedule=schedule, warmup=warmup, min_lr=low if schedule != "constant" else 0.0)
    rates = [learning_rate(step, table, 1.0, steps) for step in range(1, steps + 1)]
    assert rates[: max(0, warmup - 1)] == [step / warmup for step in range(1, warmup)]
    falling = rates[max(0, warmup - 1) :]
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert max(rates) <= 1.0
    assert rates[-1] == (1.0 if schedule == "constant" else low)


def test_wsd_keeps_the_rate_until_its_last_steps():
    """A fifth of the steps by default, along a line; or as many as the recipe says."""
    rates = [learning_rate(t, ScheduleTable(schedule="wsd", warmup=10), 1.0, 100) for t in range(1, 101)]
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == pytest.approx([1 - step / 20 for step in range(1, 21)])
    rates = [learning_rate(t, ScheduleTable(schedule="wsd", wsd_decay=4, min_lr=0.2), 1.0, 10) for t in range(1, 11)]
    assert rates == pytest.approx([1.0] * 6 + [0.8, 0.6, 0.4, 0.2])


def test_decay_of_matrices_spares_biases_and_norms():
    """A step with gradients of zero shrinks what decays, and leaves the rest as it is."""
    torch.manual_seed(0)
    gpt = GPT(ModelTable(embed_dim=16, num_heads=2, num_layers=1, max_seq_len=8, biases="all"), 5)
    before = {name: weight.clone() for name, weight in gpt.state_dict().items()}
    optimizer = build_optimizer(gpt, OptimizerTable(weight_decay=0.1, decay="matrices"))
    gpt(torch.zeros(1, 2, dtype=torch.long)).sum().mul(0).backward()
    optimizer.step()
    for name, weight in gpt.state_dict().items():
        torch.testing.assert_close(weight, before[name] * (0.9 if weight.dim() > 1 else 1.0))


def test_linear_has_the_area_of_the_cosine():
    """Both have the same total rate, so they can be compared."""
    cosine, linear = (ScheduleTable(schedule=name, warmup=100) for name in ("cosine", "linear"))
    area = [sum(learning_rate(t, table, 1e-3, 2000) for t in range(1, 2001)) for table in (cosine, linear)]
    assert area[0] == pytest.approx(area[1], rel=1e-3)


def test_scheduler_sets_the_rate_to_the_last_bit():
    """The optimizer's rate at step t is learning_rate(t) itself, not a product that rounds."""
    table = ScheduleTable(schedule="cosine", warmup=7)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimizerTable())
    scheduler = build_scheduler(optimizer, table, 1 / 3, steps=50)
    for step in range(1, 51):
        assert optimizer.param_groups[0]["lr"] == learning_rate(step, table, 1 / 3, 50)
        optimizer.step()
        scheduler.step()
