"""Bitrates by hand."""

import numpy as np
import pytest

from speechtok.errors import InputError
from speechtok.metrics.bitrate import entropy_bitrate, evaluate, nominal, units_per_second


def test_nominal():
    assert nominal(50, 512) == 450
    assert nominal(75, 1024, 8) == 6000  # EnCodec at 24 kHz with 8 codebooks


def test_entropy_by_hand():
    """Shares 1/2, 1/4, 1/4 are 1.5 bits per unit."""
    sequences = [np.array([0, 1, 0, 2]), np.array([0, 0, 1, 2])]
    assert entropy_bitrate(sequences, 4.0, deduplicated=False) == pytest.approx(8 / 4 * 1.5)
    # Runs: 0 1 0 2 and 0 1 2; shares 3/7, 2/7, 2/7.
    share = np.array([3, 2, 2]) / 7
    bits = -(share * np.log2(share)).sum()
    assert entropy_bitrate(sequences, 4.0, deduplicated=True) == pytest.approx(7 / 4 * bits)
    # Only unit 0 has runs of two lengths: 1, 1 and 2.
    duration_bits = 3 / 7 * -(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3))
    found = entropy_bitrate(sequences, 4.0, deduplicated=True, durations=True)
    assert found == pytest.approx(7 / 4 * (bits + duration_bits))


def test_runs_end_with_their_file():
    assert units_per_second([np.array([5, 5]), np.array([5])], 1.5, deduplicated=True) == pytest.approx(2 / 1.5)
    assert units_per_second([np.array([5, 5]), np.array([5])], 1.5, deduplicated=False) == pytest.approx(2)


def test_uniform_units_reach_the_nominal_rate():
    units = np.arange(64).repeat(100)
    found = evaluate([np.random.default_rng(0).permutation(units)], 64.0, rate=100, vocab_size=64)
    assert found["entropy_bitrate"] == pytest.approx(600)
    assert found["nominal_bitrate"] == pytest.approx(600)
    assert found["entropy_bitrate_runs"] < 600
    assert found["entropy_bitrate_runs_and_durations"] > found["entropy_bitrate_runs"]
    assert found["runs_per_second"] < found["units_per_second"] == 100


def test_codebooks_are_summed():
    book, other = np.array([0, 1, 2, 3] * 4), np.array([0, 1] * 8)
    found = evaluate([np.stack([book, other])], 2.0, rate=8, vocab_size=4)
    assert found["entropy_bitrate"] == pytest.approx(8 * (2 + 1))
    assert found["nominal_bitrate"] == 8 * 2 * 2
    assert found["units_per_second"] == 8
    assert "runs_per_second" not in found
    with pytest.raises(InputError, match="one codebook"):
        entropy_bitrate([np.stack([book, other])], 2.0, deduplicated=True)


@pytest.mark.parametrize(
    ("sequences", "seconds", "message"),
    [
        ([np.array([1])], 0.0, "positive"),
        ([np.array([1])], float("nan"), "positive"),
        ([], 1.0, "no units"),
        ([np.zeros(0, int)], 1.0, "no units"),
        ([np.array([0.5])], 1.0, "integers"),
        ([np.zeros((2, 3), int), np.zeros((1, 3), int)], 1.0, "codebooks"),
        ([np.zeros((1, 2, 3), int)], 1.0, "codebooks"),
    ],
)
def test_bad_input(sequences, seconds, message):
    with pytest.raises(InputError, match=message):
        evaluate(sequences, seconds, rate=50, vocab_size=10)


def test_options_that_contradict():
    with pytest.raises(InputError, match="deduplicated"):
        entropy_bitrate([np.array([1, 2])], 1.0, deduplicated=False, durations=True)
    with pytest.raises(InputError, match="positive"):
        nominal(0, 100)
