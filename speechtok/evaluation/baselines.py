"""Cutters that know nothing of syllables: the rows that all others are read against."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.features import kaldi_fbank
from speechtok.errors import InputError
from speechtok.evaluation.boundaries import Cutter, Family, Wave
from speechtok.segmenters.energy import EnergySeeds, highest_peaks, smooth

__all__ = ["SMOOTHINGS", "energy", "energy_onsets", "energy_seed", "uniform_grid"]

Spans = NDArray[np.float64]

SMOOTHINGS = (0.010, 0.015, 0.020, 0.025, 0.030)  # seconds; those that `energy` tries

_HOP, _WINDOW = 0.01, 0.025  # seconds, of the envelope and of the filter bank
_BAND = 300.0, 3000.0  # Hz: vowels and sonorants, neither hum nor hiss


def uniform_grid(rate: float, *, sample_rate: int = 16000) -> Cutter:
    """Equal segments from the start to the end of the sound, `rate` per second; the last may be shorter."""
    if not (np.isfinite(rate) and rate > 0):
        raise InputError(f"the rate is {rate} per second; it must be positive")

    def cut(wave: Wave) -> Spans:
        seconds = len(wave) / sample_rate
        starts = np.arange(np.ceil(seconds * rate)) / rate
        return np.stack([starts, np.append(starts[1:], seconds)[: len(starts)]], 1)

    return Cutter(f"uniform-{rate:g}", cut, sample_rate)


def energy_seed(
    *, smoothing: float = 0.025, min_distance: float = 0.1, floor: float = 0.02, sample_rate: int = 16000
) -> Cutter:
    """Segments between the dips of the envelope of 300 to 3000 Hz.

    The envelope is the root of the energy of that band in windows of 25 ms every 10 ms, smoothed by a Gaussian. Each
    of its peaks is a segment; neighbours meet at the lowest point between them. Where the envelope is below the floor
    there is no segment.

    Parameters
    ----------
    smoothing : float
        Standard deviation of the Gaussian (s); larger gives fewer segments.
    min_distance : float
        Of two peaks (s); of nearer ones the lower is dropped.
    floor : float
        Silence, relative to the 95th percentile of the envelope of the file.
    sample_rate : int
        Hz, at least 8000.
    """
    if min(smoothing, min_distance, floor) < 0 or sample_rate < 8000:
        raise InputError("smoothing, distance and floor must not be negative, and the band needs 8000 Hz or more")

    return Cutter(
        f"energy-{smoothing * 1000:g}ms",
        lambda wave: _between_dips(
            _envelope(wave, sample_rate), len(wave) / sample_rate, smoothing, min_distance, floor
        ),
        sample_rate,
    )


def energy(*, min_distance: float = 0.1, floor: float = 0.02, sample_rate: int = 16000) -> Family:
    """`energy_seed` with the smoothing of `SMOOTHINGS` that suits other speech best, 0.025 s without any."""

    def cut(prepared: tuple[NDArray[np.float64], float], setting: Mapping[str, Any]) -> Spans:
        return _between_dips(*prepared, setting["smoothing"], min_distance, floor)

    return Family(
        "energy",
        lambda wave: (_envelope(wave, sample_rate), len(wave) / sample_rate),
        lambda prepared: [{"smoothing": smoothing} for smoothing in SMOOTHINGS],
        cut,
        sample_rate,
        default={"smoothing": 0.025},
        facts={"min_distance": min_distance, "floor": floor, "grid": {"smoothing": list(SMOOTHINGS)}},
    )


def energy_onsets(seeds: EnergySeeds | None = None) -> Cutter:
    """Segments of `EnergySeeds` (its defaults without `seeds`), which begin where loudness falls: 16 kHz only.

    Self-segmentation starts from them, so what it learns shows against this row.
    """
    chosen = EnergySeeds() if seeds is None else seeds

    def cut(wave: Wave) -> Spans:
        mel, _ = kaldi_fbank(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))
        # Frame i is centred on i hops and half a window; neighbours meet half a hop before.
        return np.asarray(chosen(mel[0].numpy()) * _HOP + (_WINDOW - _HOP) / 2)

    return Cutter("energy-onsets", cut, facts={"setting": asdict(chosen)})


def _between_dips(
    envelope: NDArray[np.float64], seconds: float, smoothing: float, min_distance: float, floor: float
) -> Spans:
    """Segments of a sound of so many seconds, see `energy_seed`."""
    envelope = smooth(envelope, smoothing / _HOP)
    if len(envelope) == 0 or envelope.max() <= 0:
        return np.zeros((0, 2))
    loud = envelope > floor * np.quantile(envelope, 0.95)
    peaks = highest_peaks(np.where(loud, envelope, 0), min_distance / _HOP)
    dips = [a + int(np.argmin(envelope[a:b])) for a, b in pairwise(peaks)]
    borders = [0, *dips, len(envelope)]
    spans = []
    for peak, begin, end in zip(peaks, borders[:-1], borders[1:], strict=True):
        # The stretch around the peak that is above the floor.
        before, after = np.flatnonzero(~loud[begin:peak]), np.flatnonzero(~loud[peak:end])
        spans.append((begin + before[-1] + 1 if len(before) else begin, peak + after[0] if len(after) else end))
    return np.minimum(np.array(spans, np.float64).reshape(-1, 2) * _HOP, seconds)


def _envelope(wave: Wave, sample_rate: int) -> NDArray[np.float64]:
    """Amplitude of the band, float64 [T]: entry i belongs to the time ``i * _HOP``."""
    hop, window = round(_HOP * sample_rate), round(_WINDOW * sample_rate)
    padded = np.pad(wave, window // 2)
    if len(padded) < window:
        return np.zeros(0)
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    spectra = np.fft.rfft(frames * np.hanning(window), axis=1)
    frequencies = np.fft.rfftfreq(window, 1 / sample_rate)
    band = (frequencies >= _BAND[0]) & (frequencies <= _BAND[1])
    return np.asarray(np.sqrt((np.abs(spectra[:, band]) ** 2).sum(1)))
