"""Augmentation: stretch, pitch, rooms and noise against librosa, scipy and known answers; draws, strengths, folders."""

import json
import math
import warnings

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import fftconvolve

from speechtok.audio.augment import (
    DEGRADATIONS,
    FAMILIES,
    STRENGTHS,
    AugmentResources,
    augment,
    augment_with_report,
    generator_for,
)
from speechtok.audio.clips import FileClips, clips_of_split
from speechtok.audio.decode import load
from speechtok.audio.degrade import band_pass, clip_peaks, through_rate
from speechtok.audio.lossy import through_codec
from speechtok.audio.mixing import amplify, direct_path, mix_at_snr, reverberate
from speechtok.audio.rooms import SimulatedRooms
from speechtok.audio.stretch import pitch_shift, time_stretch
from speechtok.errors import AudioError, InputError
from tests.conftest import ROOT

RATE = 16000


def tone(hertz: float, seconds: float = 2.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def pitch_of(wave: np.ndarray) -> float:
    """Frequency of a tone in Hz: the top of a zero-padded spectrum of its middle, refined by a parabola."""
    middle = wave[len(wave) // 4 : -len(wave) // 4]
    size = 1 << 19
    spectrum = np.log(np.abs(np.fft.rfft(middle * np.hanning(len(middle)), size)) + 1e-12)
    top = int(spectrum.argmax())
    left, here, right = spectrum[top - 1 : top + 2]
    return (top + 0.5 * (left - right) / (left - 2 * here + right)) * RATE / size


def cents(a: float, b: float) -> float:
    return 1200 * math.log2(a / b)


class Tones:
    """A source of noises without files."""

    def __init__(self, seconds: float = 3.0, level: float = 1.0):
        self.seconds, self.level = seconds, level

    def draw(self, generator, sample_rate):
        hertz = 100 + 1000 * float(generator.random())
        time = np.arange(int(self.seconds * sample_rate)) / sample_rate
        return (self.level * np.sin(2 * np.pi * hertz * time)).astype(np.float32), {"hertz": hertz}


class Rooms:
    """Exponential decay behind a direct path: what a simulator of rooms could look like."""

    def draw(self, generator, sample_rate):
        decay = 0.05 + 0.2 * float(generator.random())
        time = np.arange(sample_rate // 4) / sample_rate
        response = 0.1 * np.sin(time * 9e4) * np.exp(-time / decay)
        response[20] = 1.0
        return response.astype(np.float32), {"decay": decay}


RESOURCES = AugmentResources(noises=Tones(), rooms=Rooms())


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


@pytest.mark.parametrize("seconds", [0.01, 20.0])
def test_noise_is_repeated_or_cut(clip_wave, seconds):
    resources = AugmentResources(noises=Tones(seconds))
    out, report = augment_with_report(clip_wave, RATE, "noise", "a", resources=resources)
    added = out - clip_wave
    ratio = 10 * math.log10(np.mean(clip_wave**2) / np.mean(added**2))
    assert ratio == pytest.approx(report["snr_db"], abs=0.1)
    clip, _ = Tones(seconds).draw(np.random.default_rng(0), RATE)  # for its length only
    if seconds < 1:
        assert np.abs(added[len(clip) :] - added[: -len(clip)]).max() < 1e-5
    else:
        assert pitch_of(added) == pytest.approx(report["hertz"], rel=1e-3)


def test_silent_pieces_of_noise_are_drawn_again(clip_wave):
    class HalfSilent(Tones):
        def draw(self, generator, sample_rate):
            clip, facts = super().draw(generator, sample_rate)
            return (clip if facts["hertz"] > 600 else 0 * clip), facts

    for key in map(str, range(8)):
        report = augment_with_report(clip_wave, RATE, "noise", key, resources=AugmentResources(noises=HalfSilent()))[1]
        assert report["hertz"] > 600
    with pytest.raises(AudioError, match="in a row were silent"):
        augment(clip_wave, RATE, "noise", "a", resources=AugmentResources(noises=Tones(level=0.0)))


# ---------------------------------------------------------------------------------------------------------------------
# draws


def test_draws_are_these_for_ever():
    """Figures are only comparable while the same key gives the same draw."""
    wave = tone(200.0, 0.1)
    drawn = [augment_with_report(wave, RATE, family, "utt-1", 3, RESOURCES)[1] for family in FAMILIES]
    assert drawn[0] == {"rate": pytest.approx(1.0427538158159078)}
    assert drawn[1] == {"semitones": pytest.approx(-1.0630295407071282)}
    assert drawn[2] == {"decay": pytest.approx(0.07093004091859799)}
    assert drawn[3]["snr_db"] == pytest.approx(5.823737504196864)
    assert drawn[3]["start"] == pytest.approx(0.9188646179634261)


def test_draws_do_not_depend_on_order_or_wave(clip_wave):
    calls = [(family, key, seed) for family in FAMILIES for key in ("a", "b", "é") for seed in (0, 1)]
    first = {call: augment_with_report(clip_wave, RATE, *call, RESOURCES) for call in calls}
    for call in reversed(calls):
        wave, report = augment_with_report(clip_wave, RATE, *call, RESOURCES)
        assert report == first[call][1]
        assert np.array_equal(wave, first[call][0])
        assert augment_with_report(clip_wave[:20000] * 0.1, RATE, *call, RESOURCES)[1] == report
        assert augment_with_report(clip_wave, 24000, *call, RESOURCES)[1] == report
    assert len({json.dumps(report, sort_keys=True) for _, report in first.values()}) == len(calls)


def test_draws_fill_their_ranges():
    wave = tone(200.0, 0.05)
    for family, field, low, high in (
        ("stretch", "rate", 0.8, 1.2),
        ("pitch", "semitones", -4.0, 4.0),
        ("noise", "snr_db", 5.0, 15.0),
    ):
        values = np.array(
            [augment_with_report(wave, RATE, family, str(i), resources=RESOURCES)[1][field] for i in range(200)]
        )
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high >= values.max() > high - 0.05 * (high - low)
        assert abs(values.mean() - (low + high) / 2) < 0.1 * (high - low)


def test_legacy_ratio_reaches_the_family(clip_wave):
    reports = []
    for legacy in (False, True):
        resources = AugmentResources(noises=Tones(), legacy_half_snr=legacy)
        out, report = augment_with_report(clip_wave, RATE, "noise", "a", resources=resources)
        ratio = 10 * math.log10(np.mean(clip_wave**2) / np.mean((out - clip_wave) ** 2))
        assert ratio == pytest.approx(report["snr_db"], abs=0.1)
        reports.append(report)
    assert reports[1]["snr_db"] == pytest.approx(reports[0]["snr_db"] / 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 7, 399, 2047, 2049])
def test_short_waves(family, length):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, length).astype(np.float32)
    out, report = augment_with_report(wave, RATE, family, "a", resources=RESOURCES)
    assert out.dtype == np.float32 and np.isfinite(out).all()
    assert len(out) == (max(1, round(length / report["rate"])) if family == "stretch" else length)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_that_are_refused_or_left_alone(family, clip_wave):
    for wrong, message in (
        (np.zeros(0, np.float32), "is empty"),
        (np.zeros(100, np.int32), "dtype int32"),
        (np.full(100, np.nan, np.float32), "NaN"),
        (np.zeros((2, 3, 4), np.float32), "shape"),
    ):
        with pytest.raises(AudioError, match=message):
            augment(wrong, RATE, family, "a", resources=RESOURCES)
    before = clip_wave[:8000].copy()
    from_float = augment(before, RATE, family, "a", resources=RESOURCES)
    assert np.array_equal(before, clip_wave[:8000])
    whole = np.round(before * 32768).astype(np.int16)
    assert np.abs(augment(whole, RATE, family, "a", resources=RESOURCES) - from_float).max() < 1e-3


@pytest.mark.parametrize("family", ["stretch", "pitch", "reverb"])
def test_silence_stays_silent(family):
    assert not augment(np.zeros(5000, np.float32), RATE, family, "a", resources=RESOURCES).any()


def test_what_is_missing_or_unknown_is_refused(clip_wave):
    for family in ("noise", "reverb"):
        with pytest.raises(AudioError, match=f"{family} needs"):
            augment(clip_wave, RATE, family, "a", resources=AugmentResources())
    with pytest.raises(InputError, match="one of stretch"):
        augment(clip_wave, RATE, "echo", "a")
    for rate in (0.0, -1.0, 9.0, math.nan, math.inf):
        with pytest.raises(AudioError, match="rate="):
            time_stretch(clip_wave, rate)
    for semitones in (25.0, math.nan):
        with pytest.raises(AudioError, match="semitones="):
            pitch_shift(clip_wave, semitones)


# ---------------------------------------------------------------------------------------------------------------------
# degradations, strengths, compositions


def test_degradations_draw_these_for_ever():
    wave = tone(200.0, 0.1)
    drawn = {name: augment_with_report(wave, RATE, name, "utt-1", 3, RESOURCES)[1] for name in DEGRADATIONS}
    assert drawn == {
        "gain": {"gain_db": pytest.approx(7.184025367400842)},
        "resample": {"sample_rate": 6000.0},
        "codec": {"codec": "opus", "bitrate": 8000.0},
        "band_limit": {"low_hz": pytest.approx(205.7682704857089), "high_hz": pytest.approx(3203.728710971888)},
        "clip": {"over_db": pytest.approx(7.23873460422613)},
    }


def test_degradations_do_what_they_report(clip_wave):
    for key in ("a", "b", "c"):
        results = {name: augment_with_report(clip_wave, RATE, name, key) for name in DEGRADATIONS}
        report = {name: facts for name, (_, facts) in results.items()}
        expected = {
            "gain": amplify(clip_wave, report["gain"]["gain_db"]),
            "resample": through_rate(clip_wave, RATE, int(report["resample"]["sample_rate"])),
            "codec": through_codec(clip_wave, RATE, report["codec"]["codec"], report["codec"]["bitrate"]),
            "band_limit": band_pass(clip_wave, RATE, report["band_limit"]["low_hz"], report["band_limit"]["high_hz"]),
            "clip": clip_peaks(clip_wave, report["clip"]["over_db"]),
        }
        for name, (wave, _) in results.items():
            assert np.array_equal(wave, expected[name])


def test_a_lower_rate_than_any_that_is_drawn_changes_nothing():
    wave = tone(200.0, 0.1)[:800]
    for key in map(str, range(8)):
        out, report = augment_with_report(wave, 5000, "resample", key)
        assert report == {"sample_rate": 5000.0} and np.array_equal(out, wave)


@pytest.mark.parametrize(
    ("family", "strength"),
    [
        ("stretch", 0.9), ("pitch", 1.5), ("reverb", 0.35), ("noise", -2.5), ("gain", 3.0), ("resample", 7350.0),
        ("codec", 12000.0), ("band_limit", 3300.0), ("clip", 9.0),
    ],
)  # fmt: skip
def test_strength_is_fixed_and_all_else_drawn(family, strength, clip_wave):
    """What is drawn besides the strength is that of the plain call; so curves compare the same rooms and noises."""
    entry = STRENGTHS[family].entry
    wave = clip_wave[:16000]
    for key in ("a", "b"):
        drawn = augment_with_report(wave, RATE, family, key)[1]
        out, report = augment_with_report(wave, RATE, family, key, strength=strength)
        assert report == drawn | {entry: strength}
        assert STRENGTHS[family].low <= drawn[entry] <= STRENGTHS[family].high
        again = augment(wave, RATE, family, key, strength=drawn[entry])
        assert np.array_equal(again, augment(wave, RATE, family, key)) and not np.array_equal(again, out)


def test_strength_of_noise_is_the_ratio(clip_wave):
    for strength in (0.0, 20.0):
        for legacy in (False, True):
            resources = AugmentResources.default(legacy)
            out, report = augment_with_report(clip_wave, RATE, "noise", "a", 0, resources, strength)
            ratio = 20 * math.log10(np.linalg.norm(clip_wave) / np.linalg.norm(out - clip_wave))
            assert ratio == pytest.approx(strength / (2 if legacy else 1), abs=0.01)
            assert report["snr_db"] == strength / (2 if legacy else 1)


def test_strengths_that_are_refused(clip_wave):
    with pytest.raises(InputError, match="measured responses"):
        augment(clip_wave, RATE, "reverb", "a", resources=RESOURCES, strength=0.5)
    for family, strength in (("noise", math.nan), ("reverb+noise", 3.0)):
        with pytest.raises(InputError, match="a finite number for a single family"):
            augment(clip_wave, RATE, family, "a", strength=strength)
    for family, strength in (("stretch", 9.0), ("pitch", 30.0), ("reverb", 3.0), ("resample", 16001.0), ("clip", -1.0)):
        with pytest.raises(AudioError, match=f"{strength:g}"):
            augment(clip_wave, RATE, family, "a", strength=strength)


def test_compositions_are_one_after_the_other(clip_wave):
    wave = clip_wave[:16000]
    out, report = augment_with_report(wave, RATE, "reverb+noise+codec", "a", 5)
    expected, facts = wave, {}
    for name in ("reverb", "noise", "codec"):
        expected, found = augment_with_report(expected, RATE, name, "a", 5)
        facts |= {f"{name}.{entry}": value for entry, value in found.items()}
    assert np.array_equal(out, expected) and report == facts
    assert not np.array_equal(out, augment(wave, RATE, "noise+reverb+codec", "a", 5))
    # Noise fits what it is added to, also where the length changed before.
    assert len(augment(wave, RATE, "stretch+noise", "a", strength=None)) != len(wave)
    for wrong, message in (("reverb+echo", "one of stretch"), ("", "one of stretch"), ("noise+noise", "once")):
        with pytest.raises(InputError, match=message):
            augment(wave, RATE, wrong, "a")


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.fixture
def folder(tmp_path):
    """Six noises in two splits, four responses of two rooms, none of them for validation."""
    rng = np.random.default_rng(0)
    for kind, count in (("noise", 6), ("rir", 4)):
        (tmp_path / kind).mkdir()
        rows = []
        for index in range(count):
            wave = rng.uniform(-0.5, 0.5, 24000) * np.exp(-np.arange(24000) / (2000 if kind == "rir" else 1e6))
            soundfile.write(tmp_path / kind / f"{index}.flac", wave, 24000)
            split = "train" if kind == "rir" or index < 4 else "valid"
            rows.append({"path": f"{index}.flac", "split": split, "room": "hall" if index else "kitchen"})
        (tmp_path / kind / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_files_of_a_split(folder, clip_wave):
    resources = AugmentResources.from_folder(folder, "train")
    drawn = {augment_with_report(clip_wave, RATE, "noise", str(i), resources=resources)[1]["clip"] for i in range(40)}
    assert drawn == {f"{i}.flac" for i in range(4)}
    valid = AugmentResources.from_folder(folder, "valid")
    drawn = {augment_with_report(clip_wave, RATE, "noise", str(i), resources=valid)[1]["clip"] for i in range(20)}
    assert drawn == {"4.flac", "5.flac"}
    with pytest.raises(AudioError, match="reverb needs"):
        augment(clip_wave, RATE, "reverb", "a", resources=valid)


def test_every_room_counts_once(folder):
    rooms = clips_of_split(folder / "rir", "train", "room")
    generator = np.random.default_rng(0)
    drawn = [rooms.draw(generator, RATE)[1]["clip"] for _ in range(400)]
    assert 0.4 < drawn.count("0.flac") / 400 < 0.6  # the only response of its room
    flat = clips_of_split(folder / "rir", "train")
    drawn = [flat.draw(generator, RATE)[1]["clip"] for _ in range(400)]
    assert 0.18 < drawn.count("0.flac") / 400 < 0.32


def test_order_of_the_listing_does_not_matter(folder, clip_wave):
    before = augment(clip_wave, RATE, "noise", "a", resources=AugmentResources.from_folder(folder, "train"))
    listing = folder / "noise" / "metadata.jsonl"
    listing.write_text("\n".join(reversed(listing.read_text().splitlines())))
    after = augment(clip_wave, RATE, "noise", "a", resources=AugmentResources.from_folder(folder, "train"))
    assert np.array_equal(before, after)


def test_clips_come_at_the_rate_asked_for_and_are_kept(folder):
    noises = clips_of_split(folder / "noise", "train")
    first, _ = noises.draw(np.random.default_rng(0), RATE)
    assert len(first) == 16000 and first.dtype == np.float32
    assert noises.draw(np.random.default_rng(0), RATE)[0] is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1.0
    assert len(noises.draw(np.random.default_rng(0), 24000)[0]) == 24000


def test_damaged_folders_are_refused(folder):
    with pytest.raises(InputError, match="one of train"):
        AugmentResources.from_folder(folder, "dev")
    with pytest.raises(InputError, match="neither noise nor room"):
        AugmentResources.from_folder(folder, "test")
    with pytest.raises(InputError, match="cannot be read"):
        AugmentResources.from_folder(folder / "nowhere", "train")
    listing = folder / "noise" / "metadata.jsonl"
    for line, message in (
        ("{", "no object"),
        ("[1]", "no object"),
        ('{"path": "a.wav"}', "no object"),
        ('{"path": "../a.wav", "split": "train"}', "leads out"),
        ('{"path": "/a.wav", "split": "train"}', "leads out"),
    ):
        listing.write_text(line + "\n")
        with pytest.raises(InputError, match=message):
            AugmentResources.from_folder(folder, "train")
    for paths, groups in (([], None), (["a"], [])):
        with pytest.raises(InputError, match="at least one file"):
            FileClips(folder, paths, groups)


def test_real_noises_and_rooms(shared, clip_wave):
    resources = AugmentResources.from_folder(shared, "test")
    for key in map(str, range(12)):
        out, report = augment_with_report(clip_wave, RATE, "noise", key, resources=resources)
        ratio = 20 * math.log10(np.linalg.norm(clip_wave) / np.linalg.norm(out - clip_wave))
        assert ratio == pytest.approx(report["snr_db"], abs=0.1)
        wet, report = augment_with_report(clip_wave, RATE, "reverb", key, resources=resources)
        assert np.linalg.norm(wet) == pytest.approx(np.linalg.norm(clip_wave), rel=1e-4)
        # A click stays where it is: hardly anything comes before it, and something of weight comes with it.
        click = np.eye(1, 64000, 1000, dtype=np.float32)[0]
        heard = np.abs(augment(click, RATE, "reverb", key, resources=resources))
        assert np.sum(heard[: 1000 - RATE // 200] ** 2) < 1e-2 * np.sum(heard**2)
        assert heard[1000] >= 0.3 * heard.max()
    with pytest.raises(AudioError, match="reverb needs"):
        augment(clip_wave, RATE, "reverb", "a", resources=AugmentResources.from_folder(shared, "valid"))


def test_generators_are_told_apart():
    values = {
        float(generator_for(key, family, seed).random())
        for key, family, seed in (("a", "noise", 0), ("a", "noise", 1), ("b", "noise", 0), ("a", "reverb", 0))
    }
    assert len(values) == 4


# ---------------------------------------------------------------------------------------------------------------------
# without a data folder, or with any


def test_defaults_need_no_folder(clip_wave):
    drawn = set()
    for key in map(str, range(60)):
        out, report = augment_with_report(clip_wave, RATE, "noise", key)
        assert out.shape == clip_wave.shape
        drawn.add(report["clip"])
    shipped = ROOT / "assets" / "noise"
    rows = [json.loads(line) for line in (shipped / "metadata.jsonl").read_text().splitlines()]
    assert drawn == {row["path"] for row in rows} == {path.name for path in shipped.glob("*.opus")}
    assert 8 <= len(rows) <= 12 and sum(path.stat().st_size for path in shipped.iterdir()) < 300_000
    for row in rows:
        assert row["licence"] == "CC0 1.0" and row["author"] and row["source_path"]
        clip = load(shipped / row["path"], 24000)
        assert len(clip) == 24000 * row["duration_s"] and 3 <= row["duration_s"] <= 5
        # No second of it is silent.
        assert min(np.std(clip[begin : begin + 24000]) for begin in range(0, len(clip), 24000)) > 1e-3
    report = augment_with_report(clip_wave, RATE, "reverb", "a")[1]
    assert 0.1 <= report["rt60"] <= 1.0
    assert AugmentResources.default().noises is AugmentResources.from_folders().noises  # decoded once


def test_folders_with_a_listing_give_a_split(folder, clip_wave):
    resources = AugmentResources.from_folders(folder / "noise", folder / "rir", "train")
    other = AugmentResources.from_folder(folder, "train")
    for family in ("noise", "reverb"):
        for key in "abc":
            assert np.array_equal(
                augment(clip_wave, RATE, family, key, resources=resources),
                augment(clip_wave, RATE, family, key, resources=other),
            )
    with pytest.raises(InputError, match=r"rir.metadata.jsonl names no file of split 'valid'"):
        AugmentResources.from_folders(rooms=folder / "rir", split="valid")
    with pytest.raises(InputError, match="one of train"):
        AugmentResources.from_folders(noise=folder / "noise", split="dev")


def test_folders_without_a_listing_are_searched(folder, tmp_path, clip_wave):
    bare = tmp_path / "bare"
    for name, source in (("b/2.FLAC", "noise/0.flac"), ("1.flac", "noise/1.flac"), ("a/b/3.flac", "noise/2.flac")):
        (bare / name).parent.mkdir(parents=True, exist_ok=True)
        (bare / name).write_bytes((folder / source).read_bytes())
    (bare / "notes.txt").write_text("not a sound")
    resources = AugmentResources.from_folders(noise=bare)
    drawn = [augment_with_report(clip_wave, RATE, "noise", str(i), resources=resources)[1]["clip"] for i in range(30)]
    assert set(drawn) == {"1.flac", "a/b/3.flac", "b/2.FLAC"}
    assert isinstance(resources.rooms, SimulatedRooms)
    (bare / "a" / "b" / "3.flac").write_bytes(b"no sound at all")
    broken = AugmentResources.from_folders(noise=bare)
    with pytest.raises(AudioError, match=r"3\.flac: cannot be decoded"):
        augment(clip_wave, RATE, "noise", str(drawn.index("a/b/3.flac")), resources=broken)


def test_folders_that_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "empty holds no sound file"), ("nowhere", "nowhere is no folder")):
        with pytest.raises(InputError, match=message):
            AugmentResources.from_folders(noise=tmp_path / name)
        with pytest.raises(InputError, match=message):
            AugmentResources.from_folders(rooms=tmp_path / name)


def test_only_so_much_is_kept(folder, monkeypatch):
    monkeypatch.setattr("speechtok.audio.clips._KEPT_SAMPLES", 16000)
    noises = clips_of_split(folder / "noise", "train")
    drawn = [noises.draw(np.random.default_rng(seed), RATE) for seed in range(20)]
    kept = {facts["clip"] for clip, facts in drawn if clip is noises._cache.get((facts["clip"], RATE))}
    assert len(kept) == 1 and len({facts["clip"] for _, facts in drawn}) > 1
