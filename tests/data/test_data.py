"""The split, the batch stream and the held-out windows."""

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mygpt import get_batch
from mygpt.data.batches import BatchStream, Share, consecutive_windows, held_out_windows, windows
from mygpt.data.dataset import BLOCK, after_last, gaps_between, load_dataset, place_pieces, split
from mygpt.data.tokenizer import ByteTokenizer
from mygpt.errors import CorpusError
from mygpt.recipe.tables import DataTable, ValidationTable

DATA = torch.arange(1000)


@pytest.mark.parametrize(("val_split", "boundary"), [(0.1, 900), (0.3, 700), (0.0, 1000), (1 / 3, 666)])
def test_the_end_is_held_out(val_split, boundary):
    """The training part is the first int((1 - val_split) * n) tokens."""
    train, val = split(DATA, val_split, seq_len=8)
    assert train.tolist() == list(range(boundary))
    assert val.tolist() == list(range(boundary, 1000))


@pytest.mark.parametrize("val_split", [0.0, 0.01, 0.99])
def test_parts_too_short_for_a_window_are_refused(val_split):
    """Each part that is used must be longer than seq_len + 1, so that a window can be drawn from it."""
    data = DATA[:9] if val_split == 0 else DATA
    with pytest.raises(CorpusError, match=r"part has \d+ of the corpus's"):
        split(data, val_split, seq_len=9)


def test_short_part_is_measured_in_what_its_tokenizer_makes(tmp_path):
    """Bytes of another run's tokenizer are tokens, though the recipe's own would be characters."""
    (tmp_path / "a.txt").write_text("short")
    table = DataTable(corpus=str(tmp_path / "a.txt"))
    with pytest.raises(CorpusError, match="the training part has 5 of the corpus's 5 characters"):
        load_dataset(table, 16)
    with pytest.raises(CorpusError, match="the training part has 5 of the corpus's 5 tokens"):
        load_dataset(table, 16, tokenizer=ByteTokenizer())


def test_get_batch_is_the_course_batch():
    """Starts are drawn in one call, from the global generator by default; targets are one token later."""
    torch.manual_seed(42)
    starts = torch.randint(0, 1000 - 8 - 1, (4,))
    torch.manual_seed(42)
    inputs, targets = get_batch(DATA, 4, 8)
    assert inputs.tolist() == [list(range(s, s + 8)) for s in starts.tolist()]
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(get_batch(DATA, 4, 8, torch.Generator().manual_seed(42)).inputs, inputs)
    assert get_batch(DATA.to(torch.uint8), 4, 8).inputs.dtype == torch.int64


def test_only_pinned_memory_is_copied_without_waiting(monkeypatch):
    """From other memory mps copies what the host has put there since; and only CUDA pins memory."""
    original, calls = torch.Tensor.to, []

    def to(tensor, device, non_blocking=False):
        calls.append((device.type, non_blocking))
        return original(tensor, device) if device.type == "meta" else tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    for kind in ("cpu", "mps"):
        windows(DATA, torch.tensor([1, 5]), 4, torch.device(kind))
    windows(DATA.new_empty(1000, device="meta"), torch.tensor([1, 5]), 4)
    assert calls == [("cpu", False), ("cpu", False), ("mps", False), ("meta", False)]
    calls.clear()
    windows(DATA, torch.tensor([1, 5]), 4, torch.device("cuda"))
    assert calls == [("cpu", False), "pinned", ("cuda", True)]


@given(
    world=st.sampled_from([1, 2, 3, 4]),
    micro_batch=st.integers(1, 3),
    micro_batches=st.integers(1, 9),
    seq_len=st.integers(1, 30),
    length=st.integers(40, 500),
    batches=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_of_all_processes_join_to_the_one_process_batch(
    world, micro_batch, micro_batches, seq_len, length, batches, seed
):
    """The global batch does not depend on the number of processes, at any position of the stream.

    Each has whole micro-batches of it; their numbers differ by at most one, so that some may have none.
    """
    data, size = torch.arange(length), micro_batch * micro_batches
    rows = [Share(micro_batch, process, world) for process in range(world)]
    alone = BatchStream(data, size, seq_len, seed=seed, share=Share(micro_batch))
    together = [BatchStream(data, size, seq_len, seed=seed, share=own) for own in rows]
    assert [index for own in rows for index in own.micro_batches(size)] == list(range(micro_batches))
    for _ in range(batches):
        whole, parts = alone.batch(), [stream.batch() for stream in together]
        for own, part in zip(rows, parts, strict=True):
            assert len(part.inputs) == micro_batch * len(own.micro_batches(size))
            assert micro_batches // world <= len(own.micro_batches(size)) <= -(-micro_batches // world)
        for expected, joined in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
            assert torch.equal(joined, expected)


@given(length=st.integers(3, 200), seq_len=st.integers(1, 40))
def test_full_sampling_has_every_target_once(length, seq_len):
    """Cut into windows, each token but the first is a target exactly once."""
    data = torch.arange(length)
    parts = [windows(data, places.starts, places.seq_len) for places in consecutive_windows(data, seq_len)]
    assert sorted(t for part in parts for t in part.targets.flatten().tolist()) == list(range(1, length))
    assert all(torch.equal(part.inputs + 1, part.targets) for part in parts)


def test_only_shared_stream_moves_the_training_batches():
    """The other samplings do not advance the stream; own-stream gives the same windows every time."""
    stream = BatchStream(DATA, 4, 8, seed=42, share=Share(4))

    def sample(sampling):
        table = ValidationTable(sampling=sampling, eval_batches=2)
        before = stream.generator.get_state()
        (places,) = held_out_windows(DATA, table, stream)[:1]
        return places.starts.tolist(), torch.equal(before, stream.generator.get_state())

    own, own_untouched = sample("own-stream")
    shared, shared_untouched = sample("shared-stream")
    assert sample("full")[1]
    assert own_untouched
    assert not shared_untouched
    assert sample("own-stream")[0] == own != shared
    assert len(own) == 2 * 4


@given(
    length=st.integers(20, 400),
    batch_size=st.integers(1, 12),
    seq_len=st.integers(1, 18),
    world=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50)
def test_epoch_has_every_window_once(length, batch_size, seq_len, world, seed):
    """In any number of processes; the next epoch has them in another order; a state continues in the middle."""
    shares = [Share(1, rank, world) for rank in range(world)]
    data = torch.arange(length)
    make = [BatchStream(data, batch_size, seq_len, seed=seed, share=own, order="epoch") for own in shares]
    count = (length - 1) // seq_len
    batches = -(-2 * count // batch_size)
    seen = []
    for _ in range(batches):
        state = make[0].state()
        parts = [stream.batch() for stream in make]
        seen += torch.cat([part.inputs for part in parts])[:, 0].tolist()
        assert all((part.targets == part.inputs + 1).all() for part in parts)
        again = BatchStream(data, batch_size, seq_len, seed=seed, share=shares[0], order="epoch")
        again.set_state(state)
        assert again.batch().inputs.tolist() == parts[0].inputs.tolist()
    every = list(range(0, count * seq_len, seq_len))
    assert sorted(seen[:count]) == sorted(seen[count : 2 * count]) == every
    if count > 20:
        assert seen[:count] != seen[count : 2 * count]


def test_documents_are_held_out_whole():
    """The training part ends with the last document that ends in its share of the tokens."""
    tokens = torch.full((100,), 1)
    tokens[[29, 69, 99]] = 0
    train, val = split(tokens, 0.2, 8, "char", end_of_text=0)
    assert (len(train), len(val)) == (70, 30)
    with pytest.raises(
        CorpusError, match=r"^hold_out: no document ends in the training part; lower val_split, or hold out tokens$"
    ):
        split(tokens, 0.8, 8, "char", end_of_text=0)
    assert after_last(torch.cat([tokens, torch.ones(2 * BLOCK, dtype=torch.int64)]), 0) == 100


def test_pieces_are_held_out_at_random_places(tmp_path):
    """32 of one length, in order, apart from each other, the same each time; the rest is trained on."""
    places = place_pieces(10_000, 0.1)
    assert len(places) == 32
    assert {len(piece) for piece in places} == {31}
    assert all(before.stop <= after.start for before, after in pairwise(places))
    assert places == place_pieces(10_000, 0.1)
    gaps = gaps_between(places, 10_000)
    assert sorted([*chain.from_iterable(places), *chain.from_iterable(gaps)]) == list(range(10_000))
    # Anywhere in the text: thirds of it have about a third of the pieces.
    thirds = [sum(piece.start * 3 // 10_000 == third for piece in places) for third in range(3)]
    assert min(thirds) >= 4

    text = "".join(chr(0x4E00 + number) for number in range(10_000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    table = DataTable(corpus=str(tmp_path / "text.txt"), val_split=0.1, hold_out="pieces")
    dataset = load_dataset(table, 8)
    assert dataset.piece_tokens == 31
    assert dataset.val.tolist() == list(chain.from_iterable(places))
    assert sorted([*dataset.train.tolist(), *dataset.val.tolist()]) == list(range(10_000))
    with pytest.raises(CorpusError, match="the first held-out piece has 31 of the corpus's 10,000 characters"):
        load_dataset(table, 30)
