"""The learning rate and the optimizer."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mygpt import cosine_warmup_lr
from mygpt.recipe.tables import OptimizerTable, ScheduleTable
from mygpt.training.optim import build_optimizer, build_scheduler, learning_rate


def test_cosine_has_the_published_values():
    """The hardened recipe's rates, as it prints them; the last is exactly zero."""
    rates = [cosine_warmup_lr(step, 100, 2000, 1e-3) for step in (1, 100, 500, 1000, 1500, 2000, 3000)]
    assert [f"{rate:.2e}" for rate in rates[:-2]] == ["1.00e-05", "1.00e-03", "8.95e-04", "5.41e-04", "1.61e-04"]
    assert rates[-2:] == [0.0, 0.0]


@given(
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
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
