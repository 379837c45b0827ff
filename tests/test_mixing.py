"""Stretch, pitch shift, reverberation and noise with given parameters, against librosa, scipy and known answers."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import fftconvolve

from speechtok.audio.mixing import direct_path, mix_at_snr, reverberate
from speechtok.audio.stretch import pitch_shift, time_stretch
from speechtok.errors import AudioError
from tests.toy_augment import RATE, Rooms, cents, pitch_of, tone

# ---------------------------------------------------------------------------------------------------------------------
# stretch and pitch


@pytest.mark.parametrize("rate", [0.8, 0.93, 1.0, 1.137, 1.2, 2.5])
def test_time_stretch_is_librosas(clip_wave, rate):
    librosa = pytest.importorskip("librosa")
    ours = time_stretch(clip_wave, rate)
    # In float64: librosa's sum of phases loses the upper bins in float32.
    theirs = librosa.effects.time_stretch(clip_wave.astype(np.float64), rate=rate)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 3e-4 * np.abs(clip_wave).max()


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 5000), rate=st.floats(0.5, 2.0))
def test_time_stretch_of_any_length_is_librosas(length, rate):
    librosa = pytest.importorskip("librosa")
    wave = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
    ours = time_stretch(wave, rate)
    assert len(ours) == max(1, round(length / rate))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # librosa's, that the wave is shorter than a frame
        if round(length / rate) > 0:
            theirs = librosa.effects.time_stretch(wave.astype(np.float64), rate=rate)
            assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("rate", [0.8, 0.9, 1.1, 1.2])
@pytest.mark.parametrize("hertz", [440.0, 1234.5, 5000.0])
def test_time_stretch_changes_length_and_not_pitch(rate, hertz):
    wave = tone(hertz)
    out = time_stretch(wave, rate)
    assert len(out) == round(len(wave) / rate)
    assert abs(cents(pitch_of(out), hertz)) < 2
    middle = slice(len(out) // 4, -len(out) // 4)
    # Bins around a tone that are not quite in step, for ever since its sudden start, cost up to 0.9 dB; librosa too.
    assert np.std(out[middle]) == pytest.approx(np.std(wave), rel=0.1)


def test_long_waves_cross_blocks_without_a_seam():
    """Blocks are 128 frames: an error in what they hand on would show as a click in a tone."""
    out = time_stretch(tone(440.0, 15.0), 0.87).astype(np.float64)
    inner = out[8192:-8192]
    # A tone obeys x[n + 1] + x[n - 1] = 2 cos(w) x[n].
    rest = inner[2:] + inner[:-2] - 2 * np.cos(2 * np.pi * 440 / RATE) * inner[1:-1]
    assert np.abs(rest).max() < 1e-4


@pytest.mark.parametrize("semitones", [-4.0, -2.3, -0.05, 0.05, 1.0, 3.99])
@pytest.mark.parametrize("hertz", [311.0, 2000.0])
def test_pitch_shift_moves_a_tone_and_keeps_the_length(semitones, hertz):
    wave = tone(hertz)
    out = pitch_shift(wave, semitones)
    assert out.dtype == np.float32 and len(out) == len(wave)
    assert abs(cents(pitch_of(out), hertz) - 100 * semitones) < 2
    middle = slice(len(out) // 4, -len(out) // 4)
    assert np.std(out[middle]) == pytest.approx(np.std(wave), rel=0.1)


@pytest.mark.parametrize("semitones", [-4.0, 2.5])
def test_pitch_shift_is_like_librosas(clip_wave, semitones):
    librosa = pytest.importorskip("librosa")
    ours = pitch_shift(clip_wave, semitones)
    theirs = librosa.effects.pitch_shift(clip_wave.astype(np.float64), sr=RATE, n_steps=semitones, res_type="fft")
    # Another resampler and a ratio off by a fraction of a cent: spectra agree, samples drift.
    sizes = [np.abs(librosa.stft(wave.astype(np.float64), n_fft=1024))[:400] for wave in (ours, theirs)]
    assert np.linalg.norm(sizes[0] - sizes[1]) < 0.05 * np.linalg.norm(sizes[1])


@settings(max_examples=60, deadline=None)
@given(semitones=st.floats(-24, 24), length=st.integers(1, 3000))
def test_every_pitch_shift_can_be_done(semitones, length):
    wave = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
    out = pitch_shift(wave, semitones)
    assert len(out) == length and np.isfinite(out).all()


def test_parameters_that_do_nothing_do_nothing(clip_wave):
    assert np.abs(time_stretch(clip_wave, 1.0) - clip_wave).max() < 1e-6
    assert np.abs(pitch_shift(clip_wave, 0.0) - clip_wave).max() < 1e-6
    impulse = np.zeros(50, np.float32)
    impulse[7] = 0.3
    assert np.abs(reverberate(clip_wave, impulse, RATE) - clip_wave).max() < 1e-6
    assert np.abs(reverberate(clip_wave, impulse, RATE, keep_level=False) - 0.3 * clip_wave).max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# rooms


@pytest.fixture(scope="module")
def response():
    return Rooms().draw(np.random.default_rng(0), RATE)[0]


def test_an_impulse_gives_the_response(response):
    wave = np.zeros(10000, np.float32)
    wave[3000] = 1.0
    out = reverberate(wave, response, RATE, keep_level=False)
    assert np.abs(out[3000 - 20 : 3000 - 20 + len(response)] - response).max() < 1e-6
    assert out.argmax() == 3000  # the direct path has no delay
    level = reverberate(wave, response, RATE)
    assert np.abs(level[2980 : 2980 + len(response)] - response / np.linalg.norm(response)).max() < 1e-6


@pytest.mark.parametrize("length", [1, 100, 4001, 71600])
def test_reverb_is_a_convolution(clip_wave, response, length):
    wave = clip_wave[-length:]
    expected = fftconvolve(wave.astype(np.float64), response)[20 : 20 + length]
    raw = reverberate(wave, response, RATE, keep_level=False)
    assert raw.dtype == np.float32 and len(raw) == length
    assert np.abs(raw - expected).max() < 1e-5
    kept = reverberate(wave, response, RATE)
    assert np.sqrt(np.mean(kept**2)) == pytest.approx(np.sqrt(np.mean(wave**2)), rel=1e-5)
    assert np.abs(kept / np.linalg.norm(kept) - expected / np.linalg.norm(expected)).max() < 1e-4


def test_direct_path_may_be_weaker_than_a_reflection():
    response = np.zeros(4000, np.float32)
    response[[98, 100, 900]] = 0.4, 0.6, 1.0
    assert direct_path(response, RATE) == 100
    response[98:101] = 0.2
    assert direct_path(response, RATE) == 900
    with pytest.raises(AudioError, match="silent"):
        direct_path(np.zeros(5, np.float32), RATE)


def test_silence_stays_silent_in_a_room(response):
    assert not reverberate(np.zeros(1000, np.float32), response, RATE).any()


# ---------------------------------------------------------------------------------------------------------------------
# noise


@pytest.mark.parametrize("snr_db", [-3.0, 5.0, 12.3, 30.0])
@pytest.mark.parametrize("level", [1e-3, 1.0])
def test_ratio_of_the_mixer(clip_wave, snr_db, level):
    noise = level * np.random.default_rng(0).standard_normal(len(clip_wave)).astype(np.float32)

    def realised(**options):
        added = mix_at_snr(clip_wave, noise, snr_db, **options).astype(np.float64) - clip_wave
        return 10 * math.log10(np.mean(clip_wave.astype(np.float64) ** 2) / np.mean(added**2))

    assert realised() == pytest.approx(snr_db, abs=0.01)
    assert realised(legacy_half_snr=True) == pytest.approx(snr_db / 2, abs=0.01)


def test_mixer_refuses_what_has_no_ratio(clip_wave):
    silence = np.zeros_like(clip_wave)
    for pair, message in (
        ((silence, clip_wave), "the wave is silent"),
        ((clip_wave, silence), "the noise is silent"),
        ((clip_wave, clip_wave[:-1]), "equally long"),
    ):
        with pytest.raises(AudioError, match=message):
            mix_at_snr(*pair, 5.0)
    with pytest.raises(AudioError, match="not finite"):
        mix_at_snr(clip_wave, clip_wave, math.nan)
