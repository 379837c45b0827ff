"""What channels do, on sounds whose answer is known: gain, sample rate, band, clipping, lossy codecs."""

import math

import numpy as np
import pytest
import soundfile

from speechtok.audio.degrade import SLOPE_DB_PER_OCTAVE, band_pass, clip_peaks, through_rate
from speechtok.audio.lossy import CODECS, MP3_RATES, through_codec, through_mp3
from speechtok.audio.mixing import amplify
from speechtok.audio.resample import resample
from speechtok.errors import AudioError, InputError

RATE = 16000


def tone(hertz: float, rate: int = RATE, seconds: float = 2.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def level(out: np.ndarray, wave: np.ndarray) -> float:
    """Level of the middle of a wave against that of another (dB)."""
    middle = slice(len(wave) // 4, -len(wave) // 4)
    return 20 * math.log10(np.std(out[middle]) / np.std(wave[middle]) + 1e-12)


@pytest.mark.parametrize("gain_db", [-31.0, 0.0, 6.0206])
def test_gain_is_exact(clip_wave, gain_db):
    out = amplify(clip_wave, gain_db)
    assert out.dtype == np.float32
    assert np.allclose(out, clip_wave.astype(np.float64) * 10 ** (gain_db / 20), rtol=1e-6, atol=0)
    with pytest.raises(AudioError, match="gain_db=inf is not finite"):
        amplify(clip_wave, math.inf)


@pytest.mark.parametrize("lower", [6000, 8000, 11025, 12000])
def test_a_lower_rate_removes_what_it_cannot_hold(lower):
    for share, low, high in ((0.3, -0.01, 0.01), (0.87, -0.01, 0.01), (1.0, -300, -120), (1.1, -300, -120)):
        wave = tone(share * lower / 2)
        out = through_rate(wave, RATE, lower)
        assert out.dtype == np.float32 and len(out) == len(wave)
        assert low <= level(out, wave) <= high
    # Not a sample late.
    kept = tone(0.3 * lower / 2)
    assert np.abs(through_rate(kept, RATE, lower) - kept)[4000:-4000].max() < 1e-3


def test_rates_that_are_refused(clip_wave):
    assert np.array_equal(through_rate(clip_wave, RATE, RATE), clip_wave)
    for rate in (999, 16001):
        with pytest.raises(AudioError, match=f"lower_rate={rate}: 1000 to 16000"):
            through_rate(clip_wave, RATE, rate)


@pytest.mark.parametrize(("low", "high"), [(300.0, 3400.0), (100.0, 2500.0)])
def test_band_has_the_stated_slopes(low, high):
    for hertz in (low / 2, low, 2 * low, 1000.0, high, 1.3 * high, 2 * high):
        wave = tone(hertz)
        expected = -10 * math.log10((1 + (low / hertz) ** 16) * (1 + (hertz / high) ** 16))
        assert level(band_pass(wave, RATE, low, high), wave) == pytest.approx(expected, abs=0.05)
    octave = level(band_pass(tone(2 * high), RATE, low, high), tone(2 * high))
    assert octave == pytest.approx(-SLOPE_DB_PER_OCTAVE, abs=0.3)
    assert level(band_pass(tone(low), RATE, low, high), tone(low)) == pytest.approx(-3, abs=0.05)


def test_band_keeps_time_and_length(clip_wave):
    inside = tone(1000.0)
    assert np.abs(band_pass(inside, RATE, 300.0, 3400.0) - inside)[4000:-4000].max() < 1e-4
    for length in (1, 7, 2047):
        assert band_pass(clip_wave[:length], RATE, 300.0, 3400.0).shape == (length,)
    # A click rings for a while on both sides, and not around the end of the transform.
    click = np.eye(1, 4000, 0, dtype=np.float32)[0]
    assert np.abs(band_pass(click, RATE, 100.0, 3400.0)[2000:]).max() < 1e-3
    for edges in ((10.0, 3000.0), (3000.0, 3000.0), (300.0, math.inf), (math.nan, 3000.0)):
        with pytest.raises(AudioError, match="edges of a band"):
            band_pass(clip_wave, RATE, *edges)


def test_clipping_cuts_at_its_ceiling(clip_wave):
    for over_db in (0.0, 3.0, 12.0):
        out = clip_peaks(clip_wave, over_db)
        ceiling = np.abs(clip_wave).max() * 10 ** (-over_db / 20)
        assert np.abs(out).max() == pytest.approx(ceiling, rel=1e-6)
        below = np.abs(clip_wave) < 0.999 * ceiling
        assert np.array_equal(out[below], clip_wave[below])
        assert (np.sign(out) == np.sign(clip_wave)).all()
    # A sine that is 6.02 dB over is clipped two thirds of the time.
    assert np.mean(np.abs(clip_peaks(tone(441.0), 6.0206)) > 0.2499) == pytest.approx(2 / 3, abs=0.01)
    assert not clip_peaks(np.zeros(10, np.float32), 6.0).any()
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(AudioError, match="over_db="):
            clip_peaks(clip_wave, wrong)


# ---------------------------------------------------------------------------------------------------------------------
# codecs


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bitrate", [8000, 16000, 32000])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_codecs_keep_time_and_sound_alike(clip_wave, codec, bitrate, rate):
    wave = resample(clip_wave, RATE, rate)
    out = through_codec(wave, rate, codec, bitrate)
    assert out.dtype == np.float32 and out.shape == wave.shape
    # The best shift is none, within a millisecond.
    size = 2 * len(wave)
    likeness = np.fft.irfft(np.fft.rfft(out, size) * np.fft.rfft(wave, size).conj(), size)
    shift = int(likeness.argmax())
    assert min(shift, size - shift) <= rate // 1000
    assert likeness.max() > 0.9 * np.linalg.norm(out) * np.linalg.norm(wave)
    assert level(out, wave) == pytest.approx(0, abs=1)


def test_fewer_bits_do_more_harm(clip_wave):
    for codec in CODECS:
        errors = [np.linalg.norm(through_codec(clip_wave, RATE, codec, rate) - clip_wave) for rate in (8000, 24000)]
        assert errors[0] > 1.5 * errors[1] > 0


@pytest.mark.parametrize("codec", CODECS)
def test_codecs_take_any_wave(codec):
    for length in (1, 7, 399, 2047):
        wave = np.random.default_rng(length).uniform(-0.5, 0.5, length).astype(np.float32)
        assert through_codec(wave, RATE, codec, 16000).shape == (length,)
    assert np.abs(through_codec(np.zeros(5000, np.float32), RATE, codec, 16000)).max() < 1e-4
    # Nothing is clipped that was above full scale.
    loud = 8 * tone(440.0)
    assert np.abs(through_codec(loud, RATE, codec, 32000)).max() == pytest.approx(4, rel=0.1)


def test_low_and_high_bitrates_of_mp3_are_in_time(clip_wave):
    """At high ones a tag tells the decoder what to skip, at low ones there is no room for it."""
    for rate in MP3_RATES:
        wave = resample(clip_wave, RATE, rate)
        for bitrate in (8000, 16000, 40000, 64000, 160000):
            out = through_mp3(wave, rate, bitrate)
            assert out.shape == wave.shape
            assert np.dot(out, wave) > 0.93 * np.linalg.norm(out) * np.linalg.norm(wave)


def test_codecs_that_are_refused(clip_wave, monkeypatch):
    for call, message in (
        ((RATE, "aac", 16000), "one of opus, mp3"),
        ((RATE, "mp3", 7999), "MP3 at 16000 Hz and 7999 bit/s"),
        ((RATE, "mp3", 160001), "MP3 at"),
        ((RATE, "opus", 5999), "Opus at"),
    ):
        with pytest.raises(InputError, match=message):
            through_codec(clip_wave, *call)
    with pytest.raises(InputError, match="MP3 at 44100"):
        through_mp3(clip_wave, 44100, 32000)
    monkeypatch.setattr("speechtok.audio.lossy.load", lambda stream, rate: np.zeros(len(clip_wave) + 5, np.float32))
    with pytest.raises(AudioError, match="does not keep time"):
        through_mp3(clip_wave, RATE, 16000)
    monkeypatch.setattr(soundfile, "check_format", lambda *_: False)
    with pytest.raises(InputError, match="no MP3 encoder"):
        through_mp3(clip_wave, RATE, 16000)


@pytest.mark.parametrize(
    "change",
    [
        lambda wave: amplify(wave, 1.0),
        lambda wave: through_rate(wave, RATE, 8000),
        lambda wave: band_pass(wave, RATE, 300.0, 3400.0),
        lambda wave: clip_peaks(wave, 3.0),
        lambda wave: through_codec(wave, RATE, "mp3", 16000),
    ],
)
def test_what_is_no_sound_is_refused(change):
    for wrong, message in ((np.zeros(0, np.float32), "is empty"), (np.full(9, np.nan, np.float32), "NaN")):
        with pytest.raises(AudioError, match=message):
            change(wrong)
