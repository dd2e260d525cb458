"""The split, the batch stream and the held-out windows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mygpt import get_batch
from mygpt.data import BatchStream, Rows, all_windows, held_out_batches, split
from mygpt.errors import CorpusError
from mygpt.recipe import ValidationTable

DATA = torch.arange(1000)


@pytest.mark.parametrize(("val_split", "boundary"), [(0.1, 900), (0.3, 700), (0.0, 1000), (1 / 3, 666)])
def test_the_end_is_held_out(val_split, boundary):
    """The training part is the first int((1 - val_split) * n) tokens."""
    train, val = split(DATA, val_split, seq_len=8)
    assert train.tolist() == list(range(boundary))
    assert val.tolist() == list(range(boundary, 1000))


@pytest.mark.parametrize("val_split", [0.0, 0.01, 0.99])
def test_parts_too_short_for_a_window_are_refused(val_split):
    """Each part that is used must be longer than seq_len + 1, the least from which a place can be drawn."""
    data = DATA[:9] if val_split == 0 else DATA
    with pytest.raises(CorpusError, match=r"part has \d+ of the corpus's"):
        split(data, val_split, seq_len=9)


def test_get_batch_is_the_course_batch():
    """Places are drawn in one call, from the global generator if none is given; targets are one later."""
    torch.manual_seed(42)
    starts = torch.randint(0, 1000 - 8 - 1, (4,))
    torch.manual_seed(42)
    inputs, targets = get_batch(DATA, 4, 8)
    assert inputs.tolist() == [list(range(s, s + 8)) for s in starts.tolist()]
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(get_batch(DATA, 4, 8, torch.Generator().manual_seed(42)).inputs, inputs)
    assert get_batch(DATA.to(torch.uint8), 4, 8).inputs.dtype == torch.int64


@given(
    world=st.sampled_from([1, 2, 3, 4]),
    rows_each=st.integers(1, 4),
    seq_len=st.integers(1, 30),
    length=st.integers(40, 500),
    batches=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_of_all_processes_join_to_the_one_process_batch(world, rows_each, seq_len, length, batches, seed):
    """The global batch does not depend on the number of processes, at any position of the stream."""
    data, size = torch.arange(length), world * rows_each
    alone = BatchStream(data, size, seq_len, seed=seed, rows=Rows())
    together = [BatchStream(data, size, seq_len, seed=seed, rows=Rows(r, world)) for r in range(world)]
    for _ in range(batches):
        whole, parts = alone.batch(), [stream.batch() for stream in together]
        assert all(len(part.inputs) == rows_each for part in parts)
        for expected, joined in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
            assert torch.equal(joined, expected)


@given(length=st.integers(3, 200), seq_len=st.integers(1, 40), batch=st.integers(1, 5), world=st.integers(1, 4))
def test_full_sampling_has_every_target_once(length, seq_len, batch, world):
    """Cut into windows, each token but the first is a target exactly once, over all processes together."""
    parts = [b for r in range(world) for b in all_windows(torch.arange(length), batch, seq_len, Rows(r, world))]
    assert sorted(t for part in parts for t in part.targets.flatten().tolist()) == list(range(1, length))
    assert all(torch.equal(part.inputs + 1, part.targets) for part in parts)


def test_only_shared_stream_moves_the_training_batches():
    """Other ways of sampling leave the stream where it was; own-stream gives the same windows every time."""
    stream = BatchStream(DATA, 4, 8, seed=42, rows=Rows())

    def sample(sampling):
        table = ValidationTable(sampling=sampling, eval_batches=2)
        before = stream.generator.get_state()
        batches = [batch.inputs.tolist() for batch in held_out_batches(DATA, table, stream, seed=42)]
        return batches, torch.equal(before, stream.generator.get_state())

    own, own_untouched = sample("own-stream")
    shared, shared_untouched = sample("shared-stream")
    assert sample("full")[1]
    assert own_untouched
    assert not shared_untouched
    assert sample("own-stream")[0] == own != shared
    assert len(own) == 2
