"""Exact sums: the same bits in any order and on any number of processes, and overflow is counted, not wrapped."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.commands import BIN, run_process, torchrun
from support.fault_points import disturb
from support.runs import TINY, contents

from mygpt.checks.compare import compare
from mygpt.processes.workers import Workers
from mygpt.recipe.seeds import micro_batch_dropout_seed
from mygpt.recipe.tables import Recipe
from mygpt.runs.run import RunDirectory
from mygpt.training.gradient_sum import RANGE, SCALE, FixedPointSum, fixed_micro_batch, gradient_sum_for
from mygpt.training.train import train

SHAPES = ((3, 5), (7,), ())


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]


def mean_over_processes(steps, shares):
    """The means that each of several processes gets, of which each adds its share of the micro-batches in `steps`."""
    own = [parameters() for _ in shares]
    sums = [FixedPointSum(params, len(steps)) for params in own]
    for total, share in zip(sums, shares, strict=True):
        for index in share:
            *gradients, loss = steps[index]
            total.add(loss, gradients)
    shares_summed = []
    for total in sums:
        total.mean_over(lambda own: shares_summed.append(own.clone()))
    whole = torch.stack(shares_summed).sum(0)
    results = []
    for total, params in zip(sums, own, strict=True):
        loss, out_of_range = total.mean_over(lambda own: own.copy_(whole))
        results.append(([*(parameter.grad for parameter in params), loss], int(out_of_range)))
    return results


def random_steps(seed, count, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) * scale for shape in (*SHAPES, ())] for _ in range(count)]


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 9),
    world=st.integers(1, 5),
    scale=st.sampled_from([1e-9, 1e-3, 1.0, 1e4]),
    data=st.data(),
)
def test_sums_do_not_depend_on_order_and_processes(seed, count, world, scale, data):
    """However the micro-batches are distributed, also when a process gets none, every process has the same means."""
    steps = random_steps(seed, count, scale)
    order = data.draw(st.permutations(range(count)))
    owner = data.draw(st.lists(st.integers(0, world - 1), min_size=count, max_size=count))
    shares = [[index for index in order if owner[index] == process] for process in range(world)]
    [(alone, _)] = mean_over_processes(steps, [range(count)])
    for means, out_of_range in mean_over_processes(steps, shares):
        assert out_of_range == 0
        for a, b in zip(means, alone, strict=True):
            assert torch.equal(a, b)
            assert a.shape == b.shape


def test_float_sums_do_depend_on_the_order():
    """The negative control: the reason for exact sums."""
    steps = random_steps(0, 3)
    a, b, c = (values[0] for values in steps)
    assert not torch.equal((a + b) + c, a + (b + c))


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 9))
@example(seed=1, count=7)
def test_the_mean_is_the_mean(seed, count):
    """To the resolution of 2**-40 and the rounding of one float."""
    steps = random_steps(seed, count)
    [(means, _)] = mean_over_processes(steps, [range(count)])
    for place, value in enumerate(means):
        expected = torch.stack([values[place] for values in steps]).double().mean(0)
        torch.testing.assert_close(value.double(), expected, rtol=2**-23, atol=1 / SCALE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, RANGE / 4 * 1.001])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_values_out_of_range_are_counted(value, place):
    """A gradient or a loss of any micro-batch, also of one before the last: every process has the count."""
    steps = random_steps(0, 4)
    steps[2][place] = torch.full_like(steps[2][place], value)
    assert [count for _, count in mean_over_processes(steps, [[0], [2, 3], [1]])] == [1, 1, 1]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("count", [1, 3, 8, 1000])
def test_the_largest_values_that_fit_do_not_wrap(count, sign):
    """Every micro-batch has the largest value."""
    largest = sign * RANGE / count
    steps = [[torch.full(shape, largest) for shape in (*SHAPES, ())]] * count
    [(means, out_of_range)] = mean_over_processes(steps, [range(count)])
    assert out_of_range == 0
    for value in means:
        torch.testing.assert_close(value, torch.full_like(value, largest), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("batch", "size"), [(16, 4), (1, 1), (3, 1), (6, 1), (8, 2), (24, 6), (7, 1), (9, 1), (10, 2)])
def test_fixed_micro_batch_lets_four_processes_share(batch, size):
    """It depends on the batch alone, divides it, and makes at least four pieces of any batch of four or more."""
    assert fixed_micro_batch(batch) == size


KEYS = TINY | {
    "reduction": "exact",
    "steps": 12,
    "dropout": 0.1,
    "max_grad_norm": 1.0,
    "schedule": "cosine",
    "warmup": 4,
    "val_split": 0.1,
    "val_every": 5,
    "log_grad_norm": True,
}


def launch_exact(processes, folder, recipe, last_step=None) -> str:
    """Train `recipe` on so many processes, up to `last_step`, and return what was printed."""
    (folder / "recipe.toml").write_text(recipe.to_toml())
    patch = f"import functools; phases.train = functools.partial(phases.train, last_step={last_step})"
    result = torchrun(processes, folder, "recipe.toml", patch=patch if last_step else "")
    assert result.returncode == 0, result.stderr
    assert "last bits may differ" not in result.stderr
    return result.stdout


@pytest.mark.parametrize("keys", [{}, {"precision": "bf16"}, {"activation_checkpointing": True}], ids=str)
def test_exact_sums_are_the_same_bits_with_any_number_of_workers(text_file, tmp_path, monkeypatch, keys):
    """Of one process; held-out losses are theirs, too. No more work than there are micro-batches."""
    runs, used = [], set()
    original = Workers.map

    def watch(self, *arguments):
        used.add(self.count)
        return original(self, *arguments)

    monkeypatch.setattr(Workers, "map", watch)
    for workers in (1, 2, 3, 9):
        monkeypatch.setattr("mygpt.training.train.choose_workers", lambda *_, workers=workers: workers)
        folder = tmp_path / str(workers)
        recipe = Recipe.of(**KEYS | keys | {"dropout": 0.0}, corpus=str(text_file), output=str(folder))
        runs.append(contents(train(recipe), without=["run.json"]))
    assert all(run == runs[0] for run in runs)
    assert used == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("device", "keys", "workers"),
    [
        ("cpu", {}, 4),
        ("cpu", {"micro_batch_size": 8}, 2),
        ("cpu", {"dropout": 0.1}, 1),
        ("cpu", {"compile": True}, 1),
        ("cuda", {}, 1),
        ("cpu", {"reduction": "fast"}, 1),
    ],
)
def test_workers_share_nothing_that_is_not_theirs(device, keys, workers):
    """One where they would share a generator, the compiler or a GPU."""
    gradient_sum = gradient_sum_for(Recipe.of(**{"reduction": "exact"} | keys), max_workers=4)
    accelerator = SimpleNamespace(device=torch.device(device), is_fsdp2=False)
    accelerator.prepare_model, accelerator.prepare = (lambda *_, **__: None), (lambda *parts: parts)
    gradient_sum.prepare(accelerator, SimpleNamespace(parameters=list), None, None)
    assert gradient_sum.workers.count == workers


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "sampling"), [(2, "shared-stream"), (3, "own-stream"), (4, "full")])
def test_exact_sums_are_the_same_bits_on_any_number_of_processes(text_file, tmp_path, capfd, processes, sampling):
    """Weights, moments, records and printed lines, with dropout, clipping, a schedule and held-out losses.

    Four micro-batches cannot be shared evenly by three processes, and need not.
    """
    recipes = {
        name: Recipe.of(**KEYS, sampling=sampling, corpus=str(text_file), output=str(tmp_path / name))
        for name in ("alone", "together")
    }
    alone = train(recipes["alone"])
    printed = capfd.readouterr().out
    assert launch_exact(processes, tmp_path, recipes["together"]) == printed
    files, expected = (contents(run, without=["run.json"]) for run in (tmp_path / "together", alone))
    assert files == expected
    assert {"metrics.jsonl", "step-000012/model.safetensors"} <= files.keys()
    # The negative control: with accumulation "fast" sums have other bits, even on one process.
    fast = Recipe.of(**KEYS | {"reduction": "fast", "dropout": 0.0}, corpus=str(text_file), output=str(tmp_path / "f"))
    exact = Recipe.of(**KEYS | {"dropout": 0.0}, corpus=str(text_file), output=str(tmp_path / "e"))
    assert compare(train(fast), train(exact)).weights.differences


@pytest.mark.slow
def test_exact_runs_move_between_numbers_of_processes(text_file, tmp_path, capfd):
    """Stopped on three processes in warmup, on two later, and ended by one: the bytes of a run never stopped."""
    keys = KEYS | {"corpus": str(text_file), "save_best": True, "keep_last": 1}
    whole = train(Recipe.of(**keys, output=str(tmp_path / "whole")))
    printed = capfd.readouterr().out
    moved = Recipe.of(**keys, output=str(tmp_path / "moved"))
    launch_exact(3, tmp_path, moved, last_step=3)
    launch_exact(2, tmp_path, moved, last_step=8)
    capfd.readouterr()
    train(moved)
    assert capfd.readouterr().out == printed
    assert contents(tmp_path / "moved", without=["run.json"]) == contents(whole, without=["run.json"])
    stretches = RunDirectory(tmp_path / "moved").info.stretches
    assert [(stretch.after_step, stretch.environment.processes) for stretch in stretches] == [(0, 3), (3, 2), (8, 1)]
    # And it verifies on a third number.
    again = run_process([BIN / "torchrun", "--nproc-per-node", 4, "-m", "mygpt", "verify", "moved"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("identical: ")


def test_each_step_and_micro_batch_has_its_own_dropout(tiny, monkeypatch):
    """Whichever process computes it; the seed is the one that `mygpt replay` has on record for the step."""
    recipe, seeds = tiny(reduction="exact", dropout=0.1, steps=3, micro_batch_size=2), []
    disturb("forward", lambda *_: seeds.append(torch.initial_seed()), count=None, patch=monkeypatch.setattr)
    train(recipe)
    data_seed = recipe.train.data_seed
    assert seeds == [micro_batch_dropout_seed(data_seed, step, index) for step in (1, 2, 3) for index in (0, 1)]
