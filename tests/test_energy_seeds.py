"""Seed segments from loudness: synthetic syllables whose places are known."""

import numpy as np
import pytest
import torch

from speechtok.audio.features import kaldi_fbank
from speechtok.errors import InputError
from speechtok.segmenters.energy import EnergySeeds, highest_peaks, smooth

RATE = 16000


def babble(spans: list[tuple[float, float]], seconds: float) -> np.ndarray:
    """Buzzes of 120 Hz with soft edges at the given places, over faint noise."""
    time = np.arange(int(seconds * RATE)) / RATE
    wave = 1e-4 * np.random.default_rng(0).normal(size=len(time))
    buzz = sum(np.sin(2 * np.pi * 120 * k * time) for k in range(3, 25)) / 25
    for begin, end in spans:
        edge = np.clip(np.minimum(time - begin, end - time) / 0.03, 0, 1)
        wave += edge * buzz
    return wave.astype(np.float32)


def mel(wave: np.ndarray) -> np.ndarray:
    return kaldi_fbank(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))[0][0].numpy()


def seconds(spans: np.ndarray) -> np.ndarray:
    return spans * 0.01 + 0.0125


def test_each_syllable_is_one_segment_that_begins_where_the_one_before_falls() -> None:
    # Two that nearly touch, a pause of half a second, two more.
    places = [(0.30, 0.50), (0.55, 0.75), (1.25, 1.45), (1.50, 1.75)]
    found = seconds(EnergySeeds()(mel(babble(places, 2.2))))
    assert len(found) == 4
    # Inside of a run a segment begins where the vowel before it ends; behind a pause 50 ms before its first loud frame.
    assert found[1, 0] == pytest.approx(0.50, abs=0.03)
    assert found[3, 0] == pytest.approx(1.45, abs=0.03)
    assert found[0, 0] == pytest.approx(0.30 - 0.05, abs=0.03)
    assert found[2, 0] == pytest.approx(1.25 - 0.05, abs=0.03)
    assert found[1, 1] == pytest.approx(0.75, abs=0.04)
    assert np.allclose(found[0, 1], found[1, 0])
    assert found[1, 1] < found[2, 0]


def test_closures_are_no_pauses() -> None:
    places = [(0.3, 0.5), (0.6, 0.8)]  # 100 ms of silence between them, as in "apa"
    wave = mel(babble(places, 1.2))
    closed, paused = (seconds(EnergySeeds(pause=pause)(wave)) for pause in (0.15, 0.05))
    assert closed[0, 1] == closed[1, 0]
    assert paused[0, 1] < paused[1, 0]


def test_bursts_and_fricatives_are_no_syllables() -> None:
    wave = babble([(0.3, 0.5)], 1.2)
    noise = np.random.default_rng(0).normal(size=len(wave))
    hiss = np.fft.irfft(np.fft.rfft(noise) * (np.fft.rfftfreq(len(wave), 1 / RATE) > 1500), len(wave))
    wave[int(0.7 * RATE) : int(0.8 * RATE)] += 0.2 * hiss[int(0.7 * RATE) : int(0.8 * RATE)].astype(np.float32)
    frames = mel(wave)
    assert len(EnergySeeds()(frames)) == 1
    assert len(EnergySeeds(voicing=0.0)(frames)) == 2


def test_quiet_peaks_are_left_out() -> None:
    wave = babble([(0.3, 0.5), (1.0, 1.2)], 1.6)
    wave[int(0.9 * RATE) :] *= 0.03
    frames = mel(wave)
    assert len(EnergySeeds(peak_floor=0.005, voicing=0.005)(frames)) == 2
    assert len(EnergySeeds(peak_floor=0.1, voicing=0.005)(frames)) == 1


def test_segments_are_ordered_and_inside_whatever_the_sound() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        frames = generator.normal(8, generator.uniform(0, 4), (int(generator.integers(1, 300)), 80))
        frames = np.cumsum(frames - 8, axis=0) * 0.2 + 8 if generator.random() < 0.5 else frames
        spans = EnergySeeds()(frames)
        assert spans.dtype == np.int64
        assert (spans[:, 0] < spans[:, 1]).all()
        assert (spans[1:, 0] >= spans[:-1, 1]).all()
        assert spans.size == 0 or (spans[0, 0] >= 0 and spans[-1, 1] <= len(frames))


def test_nothing_in_nothing_out_and_bad_input() -> None:
    assert EnergySeeds()(np.zeros((0, 80))).shape == (0, 2)
    assert EnergySeeds()(mel(np.zeros(RATE, np.float32))).shape == (0, 2)  # digital silence
    noise = np.random.default_rng(0).integers(-1, 2, RATE).astype(np.float32) / 32768
    assert len(EnergySeeds()(mel(noise))) > 0  # the faintest noise is sound: floors are relative
    with pytest.raises(InputError, match="80"):
        EnergySeeds()(np.zeros((10, 79)))
    with pytest.raises(InputError, match="pause"):
        EnergySeeds(pause=-1.0)


def test_peaks_keep_their_distance() -> None:
    values = np.array([0, 3, 0, 2, 0, 0, 5, 4.9, 5, 0, 1.0])
    assert highest_peaks(values, 1) == [1, 3, 6, 8, 10]
    assert highest_peaks(values, 3) == [1, 6, 10]
    assert highest_peaks(np.zeros(5), 1) == []


def test_smoothing_keeps_constants_and_the_mean_of_the_middle() -> None:
    assert np.allclose(smooth(np.full(50, 3.0), 2.5), 3.0)
    impulse = np.zeros(101)
    impulse[50] = 1.0
    assert smooth(impulse, 2.0).sum() == pytest.approx(1.0)
    assert smooth(impulse, 2.0)[52] / smooth(impulse, 2.0)[50] == pytest.approx(np.exp(-0.5))
    assert smooth(impulse, 0.0) is impulse
