"""Signal metrics against torchmetrics, librosa and formulas by hand."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtok.audio.decode import load
from speechtok.audio.resample import resample
from speechtok.errors import InputError
from speechtok.metrics.signal import mel_distance, multi_scale_mel_distance, pesq, si_sdr, stoi, validate

pytest.importorskip("pesq", reason="pesq is not installed: it needs a C compiler")


@pytest.fixture(scope="module")
def pair(clip) -> tuple[np.ndarray, np.ndarray]:
    """Real speech at 24 kHz, and the same with noise 10 dB below."""
    wave = load(clip, 24000)[: 24000 * 4]
    noise = np.random.default_rng(0).normal(size=len(wave)).astype(np.float32)
    return wave, wave + noise * np.float32(np.sqrt(np.square(wave).mean() / 10))


def test_si_sdr_is_that_of_torchmetrics(pair) -> None:
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as oracle

    reference, estimate = pair
    shifted = 0.3 * estimate + 0.2
    for given_ in (estimate, shifted, np.roll(reference, 3), -reference + estimate):
        one, two = (torch.from_numpy(x.astype(np.float64)) for x in (given_, reference))
        assert si_sdr(reference, given_) == pytest.approx(float(oracle(one, two, zero_mean=True)), abs=1e-6)
    assert si_sdr(reference, estimate) == pytest.approx(10.0, abs=0.2)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100.0), st.floats(-40.0, 60.0))
def test_si_sdr_of_an_orthogonal_distortion(seed: int, scale: float, wanted: float) -> None:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(np.column_stack([np.ones(64), rng.normal(size=(64, 2))]))[0]
    reference, distortion = basis[:, 1], basis[:, 2]
    estimate = scale * (reference + 10 ** (-wanted / 20) * distortion) + 3.0
    assert si_sdr(7.0 * reference - 1.0, estimate) == pytest.approx(wanted, abs=1e-6)


def test_ends_of_the_scale(pair) -> None:
    wave = np.array([1.0, -2.0, 1.0, 0.0])
    assert si_sdr(wave, wave) == math.inf
    assert si_sdr(wave, np.zeros(4)) == -math.inf
    with pytest.raises(InputError, match="silent"):
        si_sdr(np.full(4, 0.5), wave)
    reference = pair[0]
    assert mel_distance(reference, reference, 24000) == 0.0
    assert multi_scale_mel_distance(reference, reference, 24000) == 0.0
    assert stoi(reference, reference, 24000) == pytest.approx(1.0, abs=1e-6)
    assert pesq(reference, reference, 24000) > 4.6


def log_mels(wave: np.ndarray, window: int, bins: int) -> np.ndarray:
    librosa = pytest.importorskip("librosa")
    spectrum = np.abs(librosa.stft(wave.astype(np.float64), n_fft=window, hop_length=window // 4, pad_mode="reflect"))
    return np.log(np.maximum(librosa.filters.mel(sr=24000, n_fft=window, n_mels=bins) @ spectrum, 1e-5))


@pytest.mark.filterwarnings("ignore:Empty filters")
def test_mel_distances_are_those_of_librosa(pair) -> None:
    reference, estimate = pair
    wanted = np.abs(log_mels(reference, 1024, 80) - log_mels(estimate, 1024, 80)).mean()
    assert mel_distance(reference, estimate, 24000) == pytest.approx(wanted, rel=1e-4)
    scales = [(2 ** (5 + i), 5 * 2**i) for i in range(7)]
    wanted = sum(np.abs(log_mels(reference, *one) - log_mels(estimate, *one)).mean() for one in scales) / np.log(10)
    assert multi_scale_mel_distance(reference, estimate, 24000) == pytest.approx(wanted, rel=1e-4)
    # Ten times as loud is one unit of log10 wherever nothing is below the floor.
    tone = np.random.default_rng(0).normal(size=24000).astype(np.float32)
    assert multi_scale_mel_distance(tone, 10 * tone, 24000, ((1024, 40),)) == pytest.approx(1.0, abs=1e-5)
    assert mel_distance(tone, 10 * tone, 24000) == pytest.approx(math.log(10), abs=1e-5)


def test_speech_metrics_are_those_of_the_packages(pair) -> None:
    packages = pytest.importorskip("pesq"), pytest.importorskip("pystoi")
    reference, estimate = pair
    at16 = [resample(wave, 24000, 16000) for wave in pair]
    assert pesq(reference, estimate, 24000) == pytest.approx(packages[0].pesq(16000, *at16, "wb"))
    assert pesq(*at16, 16000) == pesq(reference, estimate, 24000)
    assert stoi(reference, estimate, 24000) == pytest.approx(packages[1].stoi(reference, estimate, 24000), abs=1e-6)
    worse = reference + 3 * (estimate - reference)
    assert stoi(reference, worse, 24000) < stoi(reference, estimate, 24000) < 1.0
    assert pesq(reference, worse, 24000) < pesq(reference, estimate, 24000) < 4.0


def test_what_cannot_be_measured_is_said(pair, monkeypatch) -> None:
    reference, estimate = pair
    for one, two in ((reference, estimate[:-1]), (reference[None], estimate[None]), (reference[:0], estimate[:0])):
        with pytest.raises(InputError, match="same number of samples"):
            validate(one, two)
    with pytest.raises(InputError, match="estimate must hold finite"):
        si_sdr(reference, np.full_like(reference, np.nan))
    with pytest.raises(InputError, match="reference must hold finite floats"):
        si_sdr(reference.astype(np.int16), estimate)
    short, silent = reference[24000:30000], np.zeros(24000, np.float32)
    for wave in (short, silent, np.concatenate([short, silent])):
        with pytest.raises(InputError, match=r"needs 0\.4 s"):
            stoi(wave, wave, 24000)
    for one, two in ((silent, reference[:24000]), (reference[:24000], silent), (reference[:2400], estimate[:2400])):
        with pytest.raises(InputError, match="PESQ needs speech"):
            pesq(one, two, 24000)
    for name, measure in (("pystoi", stoi), ("pesq", pesq)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InputError, match=r"install speechtok\[eval\]"):
            measure(reference, estimate, 24000)
