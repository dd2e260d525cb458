"""Derived seeds: no two purposes, ranks, steps or recipe seeds have the same one, and their values stay."""

import inspect
import itertools

import pytest
import torch
from safetensors.torch import load_file

from mygpt.data.batches import BatchStream, Share, epoch_starts, held_out_windows
from mygpt.data.dataset import place_pieces
from mygpt.recipe import seeds as derivations
from mygpt.recipe.seeds import held_out_seed, micro_batch_dropout_seed, process_dropout_seed
from mygpt.recipe.tables import ValidationTable
from mygpt.training.train import train

DATA = torch.arange(4000) % 50


def test_no_two_derived_seeds_are_equal():
    """Neighbouring seeds, ranks, steps and micro-batches: rank 1 of seed 42 is not rank 0 of seed 43."""
    numbers = list(itertools.product((0, 1, 42, 43), (0, 1, 2, 11), (0, 1, 10)))
    seeds = [derive(*key) for derive in (micro_batch_dropout_seed, process_dropout_seed) for key in numbers]
    seeds.append(held_out_seed())
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


DERIVED = {
    ("micro_batch_dropout_seed", 42, 1, 0): 2598386506,
    ("micro_batch_dropout_seed", 43, 7, 3): 1678816966,
    ("process_dropout_seed", 42, 0): 2087245904,
    ("process_dropout_seed", 42, 1, 500): 108552274,
    ("batch_seed_after", 42, 500): 1970545686,
    ("epoch_seed", 42, 0): 1069074430,
    ("epoch_seed", 7, 3): 1555232989,
    ("held_out_seed",): 3086830640,
    ("held_out_pieces_seed",): 1802571891,
}
"""Seeds by the function that derives them and its arguments, as they have been since mygpt 0.2."""


@pytest.mark.parametrize(("key", "seed"), DERIVED.items(), ids=str)
def test_derived_seeds_stay_as_they_are(key, seed):
    """Another value would change dropout masks, batches or held-out windows, and with them published numbers."""
    name, *arguments = key
    found = getattr(derivations, name)(*arguments)
    assert found == seed, f"{name}{(*arguments,)} is another seed: published numbers would change"


def test_every_derived_seed_is_pinned():
    """A new function in mygpt/recipe/seeds.py needs a line above."""
    public = {
        name for name, value in vars(derivations).items() if inspect.isfunction(value) and not name.startswith("_")
    }
    assert public == {name for name, *_ in DERIVED}


def held_out_starts(data_seed: int) -> list[int]:
    stream = BatchStream(DATA, 16, 8, seed=data_seed, share=Share(16))
    (places,) = held_out_windows(DATA, ValidationTable(sampling="own-stream", eval_batches=2), stream)
    return places.starts.tolist()


def test_held_out_windows_do_not_depend_on_the_data_seed():
    """Every data seed has the same held-out windows, which no data seed draws as a training batch."""
    held_out = held_out_starts(0)
    assert held_out == held_out_starts(1) == held_out_starts(42)
    for seed in range(50):
        batch = torch.randint(0, len(DATA) - 9, (16,), generator=torch.Generator().manual_seed(seed))
        assert batch.tolist() != held_out[:16]


def test_order_of_an_epoch_and_held_out_pieces_stay():
    """What is drawn with these seeds is pinned, too: another order of windows would change published numbers."""
    assert epoch_starts(0, 16, 41, 5, 42).tolist() == [
        *(0, 30, 5, 15, 10, 25, 35, 20),
        *(0, 30, 25, 35, 5, 10, 15, 20),
    ]
    assert [piece.start for piece in place_pieces(1000, 0.32)][::8] == [19, 220, 422, 743]


def test_dropout_of_exact_sums_is_seeded_for_each_micro_batch(tiny, monkeypatch):
    """By the data seed, the step and the number of the micro-batch."""
    expected, seeded = [micro_batch_dropout_seed(7, step, index) for step in (1, 2) for index in (0, 1)], []
    monkeypatch.setattr(
        torch, "manual_seed", lambda value, original=torch.manual_seed: seeded.append(value) or original(value)
    )
    train(tiny(dropout=0.5, steps=2, reduction="exact", micro_batch_size=2, data_seed=7))
    assert [seed for seed in seeded if seed in expected] == expected


def test_dropout_depends_on_the_data_seed_alone(tiny, tmp_path):
    """Its generator, after the same number of draws, is another with the next data_seed, and the same with another
    init_seed."""
    generators = []
    for name, seeds in {"a": {}, "b": {"init_seed": 7}, "c": {"data_seed": 43}}.items():
        run = train(tiny(dropout=0.5, steps=1, **seeds, output=str(tmp_path / name)))
        generators.append(load_file(run / "step-000001" / "state.safetensors")["generator.cpu.0"])
    assert torch.equal(generators[0], generators[1])
    assert not torch.equal(generators[0], generators[2])


@pytest.mark.parametrize("seed", [1, 2])
def test_run_that_moves_to_other_processes_drops_by_its_data_seed(tiny, monkeypatch, seed):
    """Where the checkpoint has no generator state for a process, dropout is seeded from data_seed."""
    from mygpt.training import state

    recipe = tiny(dropout=0.5, save_every=2, data_seed=seed)
    train(recipe, last_step=4)
    seeded = []
    monkeypatch.setattr(state, "dropout_name", lambda *_: "generator.elsewhere")
    monkeypatch.setattr(
        torch, "manual_seed", lambda value, original=torch.manual_seed: seeded.append(value) or original(value)
    )
    train(recipe)
    assert process_dropout_seed(seed, 0, 4) in seeded
