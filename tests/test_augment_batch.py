"""Augmentation of batches: the same draws and waves as one by one, on every device that is there."""

import math

import numpy as np
import pytest
import torch

from speechtok.audio.augment import AugmentResources, augment_with_report
from speechtok.audio.augment_batch import augment_batch, mix_at_snr, reverberate
from speechtok.errors import AudioError, InputError

RATE = 16000
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def batch(clip_wave):
    """Rows of different lengths; what lies behind their ends is to be ignored."""
    counts = [len(clip_wave), 40000, 16001, 3]
    waves = np.full((4, len(clip_wave)), 0.7, np.float32)
    for row, count in zip(waves, counts, strict=True):
        row[:count] = clip_wave[20000 : 20000 + count] if count < len(clip_wave) else clip_wave
    return torch.from_numpy(waves), torch.tensor(counts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("family", "strength"),
    [("noise", None), ("noise", 3.0), ("reverb", None), ("reverb", 0.5), ("gain", None), ("reverb+noise+gain", None)],
)
def test_rows_are_those_of_single_waves(batch, family, strength, legacy, device):
    waves, lengths = batch
    resources = AugmentResources.default(legacy)
    keys = ["a", "b", "c", "d"]
    out, reports = augment_batch(waves.to(device), lengths, RATE, family, keys, 3, resources, strength)
    assert out.shape == waves.shape and out.dtype == torch.float32 and out.device.type == device
    for row, wave, count, key, report in zip(out.cpu(), waves, lengths.tolist(), keys, reports, strict=True):
        expected, facts = augment_with_report(wave[:count].numpy(), RATE, family, key, 3, resources, strength)
        assert report == facts
        assert np.abs(row[:count].numpy() - expected).max() < 1e-5
        assert not row[count:].any()


def test_silent_rows_stay_silent(batch):
    waves, lengths = batch
    waves = waves * torch.tensor([0.0, 1.0, 1.0, 1.0])[:, None]
    for family in ("noise", "reverb", "reverb+noise"):
        out, _ = augment_batch(waves, lengths, RATE, family, list("abcd"))
        assert not out[0].any() and out.isfinite().all() and out[1].any()
    noise = torch.zeros_like(waves)
    assert torch.equal(mix_at_snr(waves, lengths, noise, torch.zeros(4)), waves)


def test_a_click_shifts_nothing(batch):
    waves, lengths = batch
    kept = waves * (torch.arange(waves.shape[1]) < lengths[:, None])
    click = torch.zeros(4, 9)
    click[:, 2] = -0.5
    assert (reverberate(kept, lengths, click, torch.full((4,), 2)) + kept).abs().max() < 1e-6


def test_batches_that_are_refused(batch):
    waves, lengths = batch
    for wrong in (
        (waves[0], lengths[:1], ["a"]),
        (waves, lengths[:3], list("abcd")),
        (waves, lengths, list("abc")),
        (waves[:0], lengths[:0], []),
    ):
        with pytest.raises(AudioError, match="B lengths and keys"):
            augment_batch(wrong[0], wrong[1], RATE, "gain", wrong[2])
    for count in (0, waves.shape[1] + 1):
        with pytest.raises(AudioError, match="lengths from 1 to"):
            augment_batch(waves, torch.tensor([count, 1, 1, 1]), RATE, "gain", list("abcd"))
    for family, message in (("stretch", "noise, reverb, gain are batched"), ("echo", "one of stretch")):
        with pytest.raises(InputError, match=message):
            augment_batch(waves, lengths, RATE, family, list("abcd"))
    with pytest.raises(InputError, match="finite number"):
        augment_batch(waves, lengths, RATE, "gain", list("abcd"), strength=math.nan)
    with pytest.raises(AudioError, match="noise needs"):
        augment_batch(waves, lengths, RATE, "noise", list("abcd"), resources=AugmentResources())
