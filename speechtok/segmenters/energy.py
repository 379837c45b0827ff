"""Seed segments from loudness alone: syllables are peaks of energy, and begin where the energy before them falls.

Self-segmentation (`speechtok.training.sylber`) starts from them. Dips of the envelope are the usual choice (Mermelstein
1975, "Automatic segmentation of speech into syllabic units"), but they lie in the middle of the consonants between two
vowels, while syllables begin with them; the steepest fall is where the vowel ends. On development speech that alone
raises the F1 of boundaries at 50 ms.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError

__all__ = ["EnergySeeds", "highest_peaks", "smooth"]

_RATE, _BINS = 100, 80  # of Kaldi's filter bank, 20 to 8000 Hz
_PREEMPHASIS = 0.97  # of Kaldi's filter bank
_SILENCE = 1.0  # amplitude; noise of one 16-bit step has more than 30
# Hz: vowels and sonorants; voicing; all that is not hum.
_SONORANT, _VOICED, _ALL = (300.0, 3000.0), (60.0, 500.0), (100.0, 7500.0)


def smooth(values: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Gaussian of `sigma` entries over float64 [T]; the sum of its weights inside of the array is 1 everywhere."""
    if sigma <= 0 or len(values) == 0:
        return values
    kernel = np.exp(-0.5 * (np.arange(-int(4 * sigma), int(4 * sigma) + 1) / sigma) ** 2)
    reach = len(kernel) // 2
    total, weight = (np.convolve(x, kernel)[reach : reach + len(values)] for x in (values, np.ones(len(values))))
    return np.asarray(total / weight)


def highest_peaks(values: NDArray[np.float64], distance: float) -> list[int]:
    """Local maxima above 0, the highest first and none within `distance` entries of one taken; in order of time."""
    padded = np.concatenate(([0], values, [0]))
    rising = np.flatnonzero((values > padded[:-2]) & (values >= padded[2:]))
    taken: list[int] = []
    for peak in sorted(rising.tolist(), key=lambda i: -values[i]):
        if all(abs(peak - other) >= distance for other in taken):
            taken.append(peak)
    return sorted(taken)


def _mel(hertz: float) -> float:
    return 1127.0 * float(np.log1p(hertz / 700.0))


def _bins() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres of the filter bank's bins (Hz), and the logarithm of what pre-emphasis did to their power."""
    low, high = _mel(20.0), _mel(8000.0)
    centres = 700.0 * np.expm1((low + (high - low) / (_BINS + 1) * np.arange(1, _BINS + 1)) / 1127.0)
    response = np.abs(1 - _PREEMPHASIS * np.exp(-2j * np.pi * centres / 16000.0)) ** 2
    return centres, np.log(response)


@dataclass(frozen=True)
class EnergySeeds:
    """Segments around the peaks of the energy from 300 to 3000 Hz. A file is judged as a whole; there is no stream.

    Parameters
    ----------
    smoothing : float
        Standard deviation of the Gaussian that smooths the envelope (s).
    distance : float
        Of two peaks (s); of nearer ones the lower is dropped.
    peak_floor : float
        Least height of a peak, relative to the 95th percentile of the envelope of the file.
    voicing : float
        Least energy from 60 to 500 Hz at a peak, relative to its own 95th percentile: bursts and fricatives, which
        close words often enough, have less.
    voice_floor : float
        Frames whose envelope of 100 to 7500 Hz is below this share of its 95th percentile are quiet.
    pause : float
        Quiet stretches that last at least this long (s) are pauses, the others closures of stops.
    onset : float
        A segment behind a pause begins this long (s) before its first loud frame: consonants begin faintly.
    """

    smoothing: float = 0.022
    distance: float = 0.08
    peak_floor: float = 0.05
    voicing: float = 0.15
    voice_floor: float = 0.03
    pause: float = 0.12
    onset: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < np.inf:
                raise InputError(f"{name} is {value}; give a finite value of at least 0")

    def __call__(self, frames: NDArray[np.floating]) -> NDArray[np.int64]:
        """Cut an utterance.

        Parameters
        ----------
        frames : float [T, 80]
            Output of `speechtok.audio.features.kaldi_fbank`: natural logarithms of mel powers at 100 Hz.

        Returns
        -------
        int64 [S, 2]
            First frame and end (exclusive) of each segment, in order, never overlapping.

        Raises
        ------
        InputError
            If frames are of another shape.
        """
        if frames.ndim != 2 or frames.shape[1] != _BINS:
            raise InputError(f"frames have shape {frames.shape}; give the log-mel frames [T, {_BINS}] of one utterance")
        if len(frames) == 0:
            return np.zeros((0, 2), np.int64)
        envelope = smooth(_envelope(frames, _SONORANT), self.smoothing * _RATE)
        level = max(_SILENCE, self.peak_floor * np.quantile(envelope, 0.95))
        voiced = smooth(_envelope(frames, _VOICED), self.smoothing * _RATE)
        least = self.voicing * np.quantile(voiced, 0.95)
        peaks = highest_peaks(np.where(envelope > level, envelope, 0.0), self.distance * _RATE)
        peaks = [peak for peak in peaks if voiced[peak] >= least]
        if not peaks:
            return np.zeros((0, 2), np.int64)
        loudness = _envelope(frames, _ALL)
        quiet = self._pauses(smooth(loudness, 1.0), peaks)
        fall = np.diff(np.log(smooth(loudness, self.smoothing * _RATE) + 1e-6))
        starts = [self._behind_pause(quiet, 0, peaks[0])]
        for before, peak in pairwise(peaks):
            if quiet[before:peak].any():
                starts.append(self._behind_pause(quiet, before, peak))
            else:
                dip = before + int(np.argmin(envelope[before:peak]))
                starts.append(before + 1 + int(np.argmin(fall[before : max(dip, before + 1)])))
        ends = []
        for peak, following in zip(peaks, [*starts[1:], len(frames)], strict=True):
            pause = np.flatnonzero(quiet[peak:following])
            ends.append(peak + int(pause[0]) if len(pause) else following)
        return np.array([starts, ends], np.int64).T

    def _pauses(self, loudness: NDArray[np.float64], peaks: list[int]) -> NDArray[np.bool_]:
        """Frames of pauses: quiet stretches that are long, or touch an end of the sound."""
        quiet = loudness <= self.voice_floor * np.quantile(loudness, 0.95)
        quiet[peaks] = False
        turns = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(np.int8)))
        for begin, end in turns.reshape(-1, 2).tolist():
            if end - begin < self.pause * _RATE and begin > 0 and end < len(quiet):
                quiet[begin:end] = False
        return quiet

    def _behind_pause(self, quiet: NDArray[np.bool_], before: int, peak: int) -> int:
        """Start of the segment of a peak with a pause, or the start of the sound, between it and `before`."""
        pause = np.flatnonzero(quiet[before:peak])
        if len(pause) == 0:
            return before
        # The peak before, if there is one, keeps its own frame.
        return max(before + (before > 0), before + int(pause[-1]) + 1 - round(self.onset * _RATE))


def _envelope(frames: NDArray[np.floating], band: tuple[float, float]) -> NDArray[np.float64]:
    """Amplitude of a band without pre-emphasis, float64 [T]."""
    centres, gain = _bins()
    inside = (centres >= band[0]) & (centres <= band[1])
    return np.sqrt(np.exp(frames[:, inside].astype(np.float64) - gain[inside]).sum(1))
