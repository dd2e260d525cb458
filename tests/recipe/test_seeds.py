"""Derived seeds: no two purposes, ranks, steps or recipe seeds share one."""

import itertools

import pytest
import torch

from mygpt.data.batches import BatchStream, Share, held_out_windows
from mygpt.recipe.seeds import held_out_seed, micro_batch_dropout_seed, process_dropout_seed
from mygpt.recipe.tables import ValidationTable
from mygpt.runs.records import read_records
from mygpt.training.train import train, train_until

DATA = torch.arange(4000) % 50


def test_no_two_derived_seeds_are_equal():
    """Neighbouring seeds, ranks, steps and micro-batches: rank 1 of seed 42 is not rank 0 of seed 43."""
    numbers = list(itertools.product((0, 1, 42, 43), (0, 1, 2, 11), (0, 1, 10)))
    seeds = [derive(*key) for derive in (micro_batch_dropout_seed, process_dropout_seed) for key in numbers]
    seeds.append(held_out_seed())
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def held_out_starts(data_seed: int) -> list[int]:
    stream = BatchStream(DATA, 16, 8, seed=data_seed, share=Share(16))
    (places,) = held_out_windows(DATA, ValidationTable(sampling="own-stream", eval_batches=2), stream)
    return places.starts.tolist()


def test_held_out_windows_do_not_depend_on_the_data_seed():
    """Every seed is evaluated on the same text, and on none of the training batches of another seed."""
    held_out = held_out_starts(0)
    assert held_out == held_out_starts(1) == held_out_starts(42)
    for seed in range(50):
        batch = torch.randint(0, len(DATA) - 9, (16,), generator=torch.Generator().manual_seed(seed))
        assert batch.tolist() != held_out[:16]


def test_dropout_of_another_data_seed_is_another(tiny, tmp_path):
    """The same weights and no other batches than dropout's own: a seed that is one higher drops other activations."""
    losses = []
    for seed in (42, 43):
        run = train(tiny(dropout=0.5, data_seed=seed, output=str(tmp_path / str(seed))))
        losses.append([record.loss for record in read_records(run)])
    assert all(a != pytest.approx(b, abs=1e-6) for a, b in zip(*losses, strict=True))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_that_moves_to_other_processes_drops_by_its_data_seed(tiny, tmp_path, monkeypatch, seed):
    """Without a generator state of its own, as on another number of processes, dropout is seeded from data_seed."""
    from mygpt.training import state

    recipe = tiny(dropout=0.5, save_every=2, data_seed=seed)
    train_until(recipe, 4)
    seeded = []
    monkeypatch.setattr(state, "dropout_name", lambda *_: "generator.elsewhere")
    monkeypatch.setattr(
        torch, "manual_seed", lambda value, original=torch.manual_seed: seeded.append(value) or original(value)
    )
    train(recipe)
    assert process_dropout_seed(seed, 0, 4) in seeded
