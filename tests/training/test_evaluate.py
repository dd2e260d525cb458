"""The held-out loss and its standard error."""

import math
import statistics

import numpy as np
import pytest
import torch
from scipy import stats

from mygpt import GPT, estimate_val_loss, get_batch
from mygpt.data.batches import WindowSet, consecutive_windows, draw_starts, random_windows, windows
from mygpt.data.tokenizer import ByteTokenizer
from mygpt.estimates import ratio_estimate
from mygpt.recipe.tables import ModelTable
from mygpt.runs.records import perplexity
from mygpt.training.evaluate import held_out_loss

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
        held_out_loss(gpt, torch.full((20,), 99), [WindowSet(torch.tensor([0]), 8)], 1)
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
    result = held_out_loss(gpt, data, consecutive_windows(data, 8), 3)
    assert result.loss.mean == pytest.approx(statistics.mean(losses), abs=1e-6)


def test_bits_per_byte_are_those_of_the_text(gpt):
    """Every window, though they begin within a character: the loss of all targets in bits, over the text's bytes."""
    text = "añ€😀 b" * 20
    data = torch.from_numpy(ByteTokenizer().encode(text)).long()
    lengths_V = torch.from_numpy(ByteTokenizer(end_of_text=True).byte_lengths)
    gpt = GPT(TABLE, vocab_size=257).eval()
    result = held_out_loss(gpt, data, consecutive_windows(data, 7), 3, byte_lengths_V=lengths_V)
    assert result.bits_per_byte.mean == pytest.approx(result.loss.mean / math.log(2))
    assert result.bits_per_byte.stderr == pytest.approx(result.loss.stderr / math.log(2))
    # A token of two characters, one of a part of one, and the end of a document, which has no bytes but a loss.
    data[5::9] = 256
    lengths_V[97], lengths_V[0xF0] = 6, 2
    result = held_out_loss(gpt, data, consecutive_windows(data, 7), 3, byte_lengths_V=lengths_V)
    expected_bytes = sum(int(lengths_V[token]) for token in data[1:])
    total = held_out_loss(gpt, data, consecutive_windows(data, 7), 3).loss.mean * (len(data) - 1)
    assert result.bits_per_byte.mean == pytest.approx(total / math.log(2) / expected_bytes)
    assert (
        held_out_loss(gpt, data, [WindowSet(torch.tensor([4]), 1)], 1, byte_lengths_V=lengths_V).bits_per_byte is None
    )


def test_perplexity_of_a_diverged_model_is_infinite():
    """And no overflow."""
    assert perplexity(1e6) == math.inf


def test_standard_error_is_that_of_the_windows(gpt, data):
    """For windows of one length: the sample deviation of their losses, divided by the root of their number."""
    places = WindowSet(draw_starts(data, 12, 8), 8)
    gpt.eval()
    losses = [gpt(x[None], y[None]).item() for x, y in zip(*windows(data, places.starts, places.seq_len), strict=True)]
    result = held_out_loss(gpt, data, [places], 5).loss
    assert result.mean == pytest.approx(statistics.mean(losses), abs=1e-6)
    assert result.stderr == pytest.approx(statistics.stdev(losses) / 12**0.5, rel=1e-4)
    assert held_out_loss(gpt, data, [WindowSet(torch.tensor([3]), 8)], 5).loss.stderr is None


def test_standard_error_is_the_spread_of_estimates(gpt, data):
    """Estimates from fresh batches scatter as widely as the standard error says."""
    generator = torch.Generator().manual_seed(3)
    results = [held_out_loss(gpt, data, random_windows(data, 16, 8, 1, generator), 16).loss for _ in range(200)]
    scatter = statistics.stdev(result.mean for result in results)
    assert scatter == pytest.approx(statistics.mean(result.stderr for result in results), rel=0.2)


def correlated(correlation, windows, texts):
    """Losses of consecutive windows (texts, windows): an autoregressive process of mean 128 and variance 1."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((texts, windows)) * math.sqrt(1 - correlation**2)
    losses = np.empty((texts, windows))
    losses[:, 0] = generator.standard_normal(texts)
    for at in range(1, windows):
        losses[:, at] = correlation * losses[:, at - 1] + noise[:, at]
    return losses + 128


def coverage(results, truth, *, quantile=None) -> float:
    """The share of 95% intervals that contain the truth, by Student's t or with the given quantile."""
    quantiles = [quantile or stats.t.ppf(0.975, result.dof) for result in results]
    held = [abs(result.mean - truth) <= q * result.stderr for result, q in zip(results, quantiles, strict=True)]
    return sum(held) / len(held)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6, 0.8])
def test_errors_of_consecutive_windows_respect_their_correlation(correlation):
    """The variance of the mean of an autoregressive process is known: the error finds it, and 95% intervals hold.

    Taken for independent, the windows would have an error half as large at a correlation of 0.6, and a third at 0.8.
    """
    windows, texts, seq_len = 1742, 2000, 64
    loss_MN, length_N = correlated(correlation, windows, texts), np.full(windows, float(seq_len))
    results = [ratio_estimate(loss_N, length_N, consecutive=True) for loss_N in loss_MN]
    lags = np.arange(1, windows)
    variance = (1 + 2 * ((1 - lags / windows) * correlation**lags).sum()) / windows / seq_len**2
    assert statistics.mean(result.stderr**2 for result in results) == pytest.approx(variance, rel=0.12)
    assert {result.dof for result in results} == {5}
    assert 0.93 <= coverage(results, 128 / seq_len) <= 0.97
    independent = [ratio_estimate(loss_N, length_N, consecutive=False) for loss_N in loss_MN[:100]]
    ratio = math.sqrt((1 - correlation) / (1 + correlation))
    assert statistics.mean(result.stderr for result in independent) / math.sqrt(variance) == pytest.approx(
        ratio, rel=0.05
    )


@pytest.mark.parametrize("windows", [12, 20, 40, 100])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6])
def test_errors_of_few_consecutive_windows_respect_it_too(correlation, windows):
    """A short text: fewer batches, and Student's t, so that the interval is wide and still contains the truth."""
    loss_MN, length_N = correlated(correlation, windows, 2000), np.ones(windows)
    results = [ratio_estimate(loss_N, length_N, consecutive=True) for loss_N in loss_MN]
    assert coverage(results, 128) >= 0.91


@pytest.mark.parametrize("windows", [2, 3, 16])
def test_intervals_from_few_windows_need_students_t(windows):
    """Independent windows, as few as two: with 1.96 the interval is too short, with Student's t it covers 95%."""
    loss_MN, length_N = correlated(0.0, windows, 4000), np.ones(windows)
    results = [ratio_estimate(loss_N, length_N, consecutive=False) for loss_N in loss_MN]
    assert {result.dof for result in results} <= set(range(1, windows))
    assert 0.94 <= coverage(results, 128) <= 0.97
    assert coverage(results, 128, quantile=1.96) < 0.94


def test_the_short_last_window_counts_by_its_length():
    """A window of one token in a text of 101: the estimate is the mean over tokens, also where this one is far off."""
    length_N = np.array([10.0] * 10 + [1.0])
    loss_N = 2 * length_N
    loss_N[-1] += 1
    result = ratio_estimate(loss_N, length_N, consecutive=True)
    assert result.mean == pytest.approx((2 * 101 + 1) / 101)
    assert result.stderr < 0.02
    one = ratio_estimate(loss_N[:1], length_N[:1], consecutive=True)
    assert (one.stderr, one.dof) == (None, None)


def test_full_sampling_counts_as_consecutive(gpt, data):
    """Its error is that of batches of windows; the error of random windows is that of single windows."""
    assert held_out_loss(gpt, data, consecutive_windows(data, 8), 3).loss.dof == 1  # 26 windows: two batches
    places = random_windows(data, 16, 8, 1, torch.Generator().manual_seed(3))
    assert held_out_loss(gpt, data, places, 16).loss.dof > 10


@pytest.mark.parametrize("windows", [16, 160])
def test_intervals_of_skewed_losses_hold(windows):
    """Losses of windows are skewed: with n - 1 degrees of freedom the interval of one batch is too narrow."""
    rng = np.random.default_rng(0)
    loss_MN = rng.gamma(1.5, size=(4000, windows)) + 2.5  # skewness 1.6
    results = [ratio_estimate(loss_N, np.ones(windows), consecutive=False) for loss_N in loss_MN]
    assert 0.93 <= coverage(results, 4.0) <= 0.97
    usual = coverage([result._replace(dof=windows - 1) for result in results], 4.0)
    assert usual < (0.93 if windows == 16 else 0.96)


PIECE = 21


@pytest.mark.parametrize("seq_len", [4, 5, 8, 19])
def test_windows_stay_within_pieces(seq_len):
    """Of a held-out text in pieces: with "full" each token but the first of a piece is a target once."""
    data = torch.arange(10 * PIECE)
    targets = []
    for group in consecutive_windows(data, seq_len, PIECE):
        _, rows = windows(data, group.starts, group.seq_len)
        targets += rows.flatten().tolist()
        assert (group.starts // PIECE == (group.starts + group.seq_len) // PIECE).all()
    assert sorted(targets) == [token for token in range(10 * PIECE) if token % PIECE]
    (drawn,) = random_windows(data, 50, seq_len, 40, torch.Generator().manual_seed(0), PIECE)
    assert (drawn.starts // PIECE == (drawn.starts + seq_len) // PIECE).all()
    assert drawn.starts.min() < PIECE
    assert drawn.starts.max() + seq_len == 10 * PIECE - 1


def test_each_piece_counts_as_one_number(gpt):
    """The error is that of the mean over independent pieces, however their windows are correlated."""
    data = torch.randint(0, 20, (10 * PIECE,), generator=torch.Generator().manual_seed(1))
    result = held_out_loss(gpt, data, consecutive_windows(data, 8, PIECE), 3, piece_tokens=PIECE)
    by_piece = [held_out_loss(gpt, piece, consecutive_windows(piece, 8), 3).loss.mean for piece in data.view(10, PIECE)]
    assert result.loss.mean == pytest.approx(statistics.mean(by_piece), abs=1e-6)
    assert result.loss.stderr == pytest.approx(statistics.stdev(by_piece) / 10**0.5, rel=1e-4)
    assert result.windows.population == "unseen passages of this text"
