"""Augmentation by family: draws, ranges, strengths, compositions."""

import json
import math

import numpy as np
import pytest

from speechtok.audio.augment import (
    DEGRADATIONS,
    FAMILIES,
    STRENGTHS,
    AugmentResources,
    augment,
    augment_with_report,
    generator_for,
)
from speechtok.audio.degrade import band_pass, clip_peaks, through_rate
from speechtok.audio.lossy import through_codec
from speechtok.audio.mixing import amplify
from speechtok.audio.stretch import pitch_shift, time_stretch
from speechtok.errors import AudioError, InputError
from tests.toy_augment import RATE, RESOURCES, Tones, pitch_of, tone


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


def test_generators_are_told_apart():
    values = {
        float(generator_for(key, family, seed).random())
        for key, family, seed in (("a", "noise", 0), ("a", "noise", 1), ("b", "noise", 0), ("a", "reverb", 0))
    }
    assert len(values) == 4
