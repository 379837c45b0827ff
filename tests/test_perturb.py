"""Perturbations of log-mel frames: identity, known shifts, realised ratios, rows that do not see each other."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from speechtok.audio.features import KALDI_FLOOR, kaldi_fbank
from speechtok.audio.perturb import (
    BINS,
    PerturbConfig,
    PerturbParameters,
    add_noise,
    channel_curve,
    draw,
    fit_noise,
    perturb,
    speech_power,
    warp_matrix,
)
from speechtok.errors import AudioError

MEL = 1127 * np.log1p(np.array([20.0, 8000.0]) / 700)
STEP = (MEL[1] - MEL[0]) / (BINS + 1)


def bin_of(hertz: float) -> float:
    """Fractional bin of a frequency; written from the definition of the front end, not with the library's helpers."""
    return (1127 * math.log1p(hertz / 700) - MEL[0]) / STEP - 1


def hertz_of(position: float) -> float:
    return 700 * math.expm1((MEL[0] + STEP * (position + 1)) / 1127)


@pytest.fixture(scope="module")
def speech(clip_wave):
    """Two rows of real frames, the second one shorter."""
    wave = torch.zeros(2, 64000)
    wave[0] = torch.from_numpy(clip_wave[:64000])
    wave[1, :40000] = torch.from_numpy(clip_wave[20000:60000])
    return kaldi_fbank(wave, torch.tensor([64000, 40000]))


@pytest.fixture(scope="module")
def hiss():
    wave = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 64000))).float() * 0.01
    return kaldi_fbank(wave, torch.tensor([64000, 64000]))[0]


def test_parameters_that_do_nothing_do_nothing(speech):
    features, lengths = speech
    for idle in (PerturbParameters(), PerturbParameters(curve=(0.0, 0.0))):
        out = perturb(features, lengths, [idle] * 2)
        assert (out - features).abs().max() < 1e-5
    assert torch.equal(out[1, lengths[1] :], torch.zeros_like(out[1, lengths[1] :]))


@pytest.mark.parametrize("factor", [0.85, 0.93, 1.0, 1.1, 1.18])
@pytest.mark.parametrize("position", [10, 25, 40, 55])
def test_warp_moves_a_peak_to_its_new_frequency(factor, position):
    # A wide bump, so that its centre can be found between bins.
    bump = torch.exp(-0.5 * ((torch.arange(BINS) - position) / 2.0) ** 2)
    moved = (bump @ warp_matrix(torch.tensor([factor]))[0]).double()
    top = int(moved.argmax())
    left, middle, right = moved[top - 1 : top + 2].log().tolist()
    found = top + 0.5 * (left - right) / (left - 2 * middle + right)
    assert hertz_of(position) * factor < 4800 * min(factor, 1)  # the straight part of the warp
    assert abs(found - bin_of(hertz_of(position) * factor)) < 0.25


@pytest.mark.parametrize("factor", [0.85, 1.18])
def test_warp_bends_towards_half_the_sample_rate(factor):
    """Linear in mel is a frame whose values say where they come from."""
    source = torch.arange(BINS, dtype=torch.float32) @ warp_matrix(torch.tensor([factor]))[0]
    hertz = [hertz_of(position) for position in source.tolist()]
    for index in range(5, BINS):
        here = hertz_of(index)
        knee = 4800 * min(factor, 1)
        expected = here / factor if here <= knee else 8000 - (8000 - here) * (8000 - knee / factor) / (8000 - knee)
        if hertz_of(0) < expected < hertz_of(BINS - 1):
            assert hertz[index] == pytest.approx(expected, rel=1e-4)


def test_warp_rows_are_interpolations():
    matrix = warp_matrix(torch.tensor([0.85, 1.0, 1.18]))
    assert torch.allclose(matrix.sum(1), torch.ones(3, BINS), atol=1e-6)
    assert matrix.min() >= 0
    assert torch.allclose(matrix[1], torch.eye(BINS), atol=1e-6)
    for bad in ([0.4], [2.1], [math.nan]):
        with pytest.raises(AudioError, match="between 0.5 and 2"):
            warp_matrix(torch.tensor(bad))


def test_warp_agrees_with_speech_that_was_resampled(clip_wave):
    """Playing a wave faster moves all its frequencies: frames of the two agree up to the change of tempo."""
    from speechtok.audio.resample import resample

    factor = 1.1
    faster = resample(clip_wave, 17600, 16000)  # 10% faster and higher
    frames = [
        kaldi_fbank(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))[0].double().exp().mean(1).log()[0]
        for wave in (clip_wave, faster)
    ]
    warped = (frames[0].float() @ warp_matrix(torch.tensor([factor]))[0]).double()
    below = slice(5, int(bin_of(4800)))
    shape = [spectrum[below] - spectrum[below].mean() for spectrum in (frames[0], frames[1], warped)]
    before, after = ((shape[1] - other).square().mean().sqrt() for other in (shape[0], shape[2]))
    assert after < 0.5 * before


@pytest.mark.parametrize("snr", [0.0, 7.5, 20.0])
def test_realised_ratio(speech, hiss, snr):
    features, lengths = speech
    out = add_noise(features, lengths, hiss, torch.tensor([snr, math.inf]))
    assert torch.equal(out[1], features[1])
    added = (out[0].double().exp() - features[0].double().exp()).sum(-1)
    power = features[0].double().exp().sum(-1)
    loud = power > power.mean() / 100
    assert 0 < loud.sum() <= len(loud)
    assert 10 * math.log10(power[loud].mean() / added.mean()) == pytest.approx(snr, abs=0.05)


def test_pauses_do_not_count_as_speech(speech):
    features, _ = speech
    power = speech_power(features[:1], torch.tensor([features.shape[1]]))
    quiet = torch.full((1, 300, BINS), math.log(KALDI_FLOOR))
    longer = torch.cat([features[:1], quiet], 1)
    # A long pause takes 2.4 dB off the mean power; here, faint frames that now count are all that changes.
    assert speech_power(longer, torch.tensor([longer.shape[1]])).item() == pytest.approx(power.item(), rel=0.1)
    assert longer.exp().sum(-1).mean() < 0.6 * features[:1].exp().sum(-1).mean()


def test_silence_is_no_trouble(speech, hiss):
    features, lengths = speech
    silence = torch.full_like(features, math.log(KALDI_FLOOR))
    snr = torch.tensor([5.0, 5.0])
    assert torch.equal(add_noise(features, lengths, silence, snr), features)
    onto_silence = add_noise(silence, lengths, hiss, snr)
    assert torch.isfinite(onto_silence).all()
    assert onto_silence.max() < math.log(KALDI_FLOOR) + 10
    nothing = perturb(features, torch.tensor([0, 0]), [PerturbParameters(snr=5.0)] * 2, hiss)
    assert torch.equal(nothing, torch.zeros_like(features))


def test_gain_and_curve_in_decibels(speech):
    features, lengths = speech
    out = perturb(features, lengths, [PerturbParameters(gain_db=6.0), PerturbParameters(curve=(3.0,))])
    decibel = (out - features) * (10 / math.log(10))
    assert torch.allclose(decibel[0, : lengths[0]], torch.tensor(6.0), atol=1e-4)
    tilt = decibel[1, : lengths[1]].mean(0)
    assert tilt[0] == pytest.approx(3.0, abs=0.01)
    assert tilt[-1] == pytest.approx(-3.0, abs=0.01)
    assert torch.all(tilt[1:] < tilt[:-1])


def test_curve_has_no_level():
    curve = channel_curve(torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.0, 5.0]]))
    assert curve.mean(1).abs().max() < 1e-5
    assert curve[1].abs().max() == pytest.approx(5.0, rel=0.01)


def test_nothing_falls_below_the_floor():
    silence = torch.full((1, 5, BINS), math.log(KALDI_FLOOR))
    out = perturb(silence, torch.tensor([5]), [PerturbParameters(gain_db=-20.0)])
    assert torch.equal(out, silence)


def test_rows_do_not_see_each_other(speech, hiss):
    features, lengths = speech
    config = PerturbConfig(noise_probability=1.0)
    parameters = [draw(np.random.default_rng(seed), config) for seed in (3, 4)]
    together = perturb(features, lengths, parameters, hiss)
    for row in range(2):
        count = lengths[row]
        alone = perturb(
            features[row : row + 1, :count], lengths[row : row + 1], [parameters[row]], hiss[row : row + 1, :count]
        )
        assert torch.allclose(together[row, :count], alone[0], atol=2e-5)
    clean = dataclasses.replace(parameters[0], snr=math.inf)
    beside = perturb(features, lengths, [clean, parameters[1]], hiss)
    assert torch.allclose(beside[1], together[1], atol=2e-5)
    assert not torch.allclose(beside[0], together[0], atol=1e-2)


def test_frames_behind_the_end_have_no_say(speech, hiss):
    features, lengths = speech
    parameters = [draw(np.random.default_rng(5), PerturbConfig(noise_probability=1.0))] * 2
    expected = perturb(features, lengths, parameters, hiss)
    features, noise = features.clone(), hiss.clone()
    features[1, lengths[1] :] = 30.0
    noise[1, lengths[1] :] = 30.0
    assert torch.equal(perturb(features, lengths, parameters, noise), expected)


def test_draws():
    config = PerturbConfig()
    rows = [draw(np.random.default_rng(seed), config) for seed in range(2000)]
    assert rows[7] == draw(np.random.default_rng(7), config)
    warps = np.log([row.warp for row in rows])
    assert -0.15 <= warps.min() < -0.14 and 0.14 < warps.max() <= 0.15 and abs(warps.mean()) < 0.01
    snrs = np.array([row.snr for row in rows])
    noisy = np.isfinite(snrs)
    assert 0.45 < noisy.mean() < 0.55
    assert 5 <= snrs[noisy].min() < 5.5 and 19.5 < snrs[noisy].max() <= 20
    curves = np.array([row.curve for row in rows])
    assert np.all(np.abs(curves) <= 4 / np.arange(1, 5))
    assert np.all(np.abs(curves).max(0) > 0.95 * 4 / np.arange(1, 5))
    gains = np.array([row.gain_db for row in rows])
    assert -6 <= gains.min() < -5.9 and 5.9 < gains.max() <= 6
    assert all(0 <= row.noise_clip < 1 and 0 <= row.noise_start < 1 for row in rows)


def test_the_number_of_draws_does_not_depend_on_what_was_drawn():
    after = []
    for probability in (0.0, 1.0):
        generator = np.random.default_rng(0)
        draw(generator, PerturbConfig(noise_probability=probability))
        after.append(generator.random())
    assert after[0] == after[1]


def test_noise_is_cut_or_repeated():
    noise = torch.arange(5.0)[:, None].expand(5, BINS)
    assert fit_noise(noise, 3, 0.0)[:, 0].tolist() == [0, 1, 2]
    assert fit_noise(noise, 3, 0.99)[:, 0].tolist() == [2, 3, 4]
    assert fit_noise(noise, 5, 0.99)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert fit_noise(noise, 8, 0.6)[:, 0].tolist() == [3, 4, 0, 1, 2, 3, 4, 0]
    with pytest.raises(AudioError, match="without frames"):
        fit_noise(noise[:0], 3, 0.0)


def test_what_does_not_fit_is_refused(speech, hiss):
    features, lengths = speech
    with pytest.raises(AudioError, match="1 parameters for 2 rows"):
        perturb(features, lengths, [PerturbParameters()])
    with pytest.raises(AudioError, match="are needed"):
        perturb(features[..., :79], lengths, [PerturbParameters()] * 2)
    with pytest.raises(AudioError, match=r"rows \[1\] want noise"):
        perturb(features, lengths, [PerturbParameters(), PerturbParameters(snr=3.0)])
    with pytest.raises(AudioError, match="want noise"):
        perturb(features, lengths, [PerturbParameters(snr=3.0)] * 2, hiss[:, :5])
    with pytest.raises(AudioError, match="does not fit"):
        add_noise(features, lengths, hiss[:, :5], torch.tensor([3.0, 3.0]))
    for wrong in (
        {"vtlp": -0.1},
        {"vtlp": math.nan},
        {"noise_probability": 1.5},
        {"snr": (9.0, 3.0)},
        {"tilt_db": math.inf},
    ):
        with pytest.raises(AudioError):
            PerturbConfig(**wrong)
