"""Resampling against torchaudio's filter of the same name, and its independence of chunks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import resample_poly

from speechtok.audio.resample import Resampler, resample
from speechtok.errors import AudioError

RATES = [(48000, 16000), (44100, 16000), (8000, 16000), (16000, 24000), (22050, 16000), (192000, 16000), (4000, 16000)]


@pytest.mark.parametrize(("source", "target"), RATES)
def test_tone_keeps_pitch_phase_and_level(source, target):
    frequency = 700.0
    tone = np.sin(2 * np.pi * frequency * np.arange(source) / source).astype(np.float32)
    out = resample(tone, source, target)
    assert len(out) == target
    expected = np.sin(2 * np.pi * frequency * np.arange(target) / target)
    edge = target // 10
    assert np.abs(out - expected)[edge:-edge].max() < 2e-6


def test_what_the_target_cannot_hold_is_removed():
    tone = np.sin(2 * np.pi * 9000 * np.arange(48000) / 48000).astype(np.float32)
    assert np.abs(resample(tone, 48000, 16000)[1000:-1000]).max() < 1e-4


def test_is_torchaudios_filter_of_that_name():
    torchaudio = pytest.importorskip("torchaudio")
    import torch

    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 20_000).astype(np.float32)
    for source, target in RATES:
        theirs = torchaudio.functional.resample(
            torch.from_numpy(wave).double(), source, target, lowpass_filter_width=64, rolloff=0.9475937167399596,
            resampling_method="sinc_interp_kaiser", beta=14.769656459379492,
        ).numpy()  # fmt: skip
        ours = resample(wave, source, target)
        assert len(ours) == len(theirs)
        assert np.abs(ours - theirs).max() < 2e-6


def test_agrees_with_scipy_in_the_pass_band():
    rng = np.random.default_rng(0)
    # Noise below 3 kHz, so that the roll-off of either filter does not matter.
    spectrum = np.fft.rfft(rng.standard_normal(44100))
    spectrum[3000:] = 0
    wave = np.fft.irfft(spectrum, 44100).astype(np.float32)
    ours, theirs = (
        resample(wave, 44100, 16000),
        resample_poly(wave.astype(np.float64), 160, 441, window=("kaiser", 14.0)),
    )
    assert len(ours) == len(theirs)
    # scipy's default filter is short; agreement to 1e-3 of the level is its own error.
    assert np.abs(ours - theirs)[500:-500].max() < 2e-3 * np.abs(wave).max()


@settings(max_examples=60, deadline=None)
@given(
    rates=st.sampled_from([*RATES, (44101, 16000), (16000, 16000)]),
    length=st.integers(0, 6000),
    sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=12),
)
def test_any_chunking_gives_the_same_bits(rates, length, sizes):
    wave = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    whole = resample(wave, *rates)
    assert len(whole) == -(-length * rates[1] // rates[0])
    resampler, parts, position, turn = Resampler(*rates), [], 0, 0
    while position < length:
        parts.append(resampler.push(wave[position : position + sizes[turn % len(sizes)]]))
        position += sizes[turn % len(sizes)]
        turn += 1
    parts.append(resampler.flush())
    assert np.array_equal(np.concatenate(parts), whole)


def test_absurd_rates_are_refused():
    with pytest.raises(AudioError, match="no small"):
        Resampler(767_999, 16000)
    with pytest.raises(AudioError, match="whole number"):
        Resampler(16000.0, 16000)
    for rate in (0, 1, 999, 10**7):
        with pytest.raises(AudioError, match="outside"):
            Resampler(rate, 16000)
    for rate in (0, -1):
        with pytest.raises(AudioError, match="outside"):
            Resampler(rate, rate)


@pytest.mark.parametrize("rate", [1, 500, 10**7])
def test_equal_rates_pass_samples_as_they_are(rate):
    wave = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    assert np.array_equal(resample(wave, rate, rate), wave)
