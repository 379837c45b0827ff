"""Morphs between two sounds of the same shape, such as two words that rhyme.

Frames are aligned with dynamic time warping; times and log spectra then go in equal steps from one sound to the other,
and phases are made to fit (Griffin and Lim 1984).
"""

import numba
import numpy as np
from numpy.typing import NDArray

from speechtok.errors import AudioError, InputError

__all__ = ["morph"]

Wave = NDArray[np.float32]
Floats = NDArray[np.float64]

_SECONDS = 0.05  # of the shortest sound
_HOPS = 4  # in a window of 10 ms, which resolves formants and not harmonics
_FLOOR = 1e-3  # of magnitudes, relative to the root mean square of the sound
_ROUNDS = 30  # of Griffin and Lim
_CEPSTRA, _SMOOTH = 13, 8  # coefficients that frames are aligned by, and frames that these are averaged over


def morph(first: Wave, second: Wave, sample_rate: int, *, steps: int = 11) -> list[Wave]:
    """Make a continuum between two sounds.

    Parameters
    ----------
    first, second : float32 [N] and [M]
        Best of one speaker and at about one pitch: frames are aligned, pulses are not.
    sample_rate : int
        Of both, 8000 to 48000 (Hz).
    steps : int
        At least 2. The first and the last are the sounds themselves, resynthesised as the others are.

    Returns
    -------
    list of float32
        Waves whose lengths go in equal steps from N to M; so does their root mean square.

    Raises
    ------
    AudioError
        If a sound is silent, shorter than 50 ms or no mono wave.
    InputError
        If an option is out of bounds.
    """
    if steps < 2 or not 8000 <= sample_rate <= 48000:
        raise InputError(f"{steps} steps at {sample_rate} Hz; give 2 steps or more and 8000 to 48000 Hz")
    for wave in (first, second):
        if wave.ndim != 1 or len(wave) < _SECONDS * sample_rate or not np.abs(wave).max() > 0:
            raise AudioError(f"the sound is silent, shorter than {_SECONDS} s or no mono wave; it has no morphs")
    hop = round(0.01 * sample_rate / _HOPS)
    levels = [float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) for wave in (first, second)]
    logs = []
    for wave, level in zip((first, second), levels, strict=True):
        size = np.abs(_stft(wave.astype(np.float64) / level, hop, 1 + len(wave) // hop))
        logs.append(np.log(np.maximum(size, _FLOOR)))
    path = _path(_distances(*logs))
    waves = []
    for share in np.linspace(0, 1, steps):
        length = round((1 - share) * len(first) + share * len(second))
        # Each frame of this step lies somewhere on the path, whose clock is a mean of the two sounds' clocks.
        clock = (1 - share) * path[:, 0] + share * path[:, 1]
        at = np.interp(np.arange(1 + length // hop), clock + 1e-9 * np.arange(len(clock)), np.arange(len(clock)))
        left, right = path[np.rint(at).astype(np.int64)].T
        size = np.exp((1 - share) * logs[0][left] + share * logs[1][right])
        made = np.zeros(length)
        sound = _griffin_lim(size, hop)[:length]
        made[: len(sound)] = sound
        level = (1 - share) * levels[0] + share * levels[1]
        waves.append((made * level / max(1e-9, float(np.sqrt(np.mean(made**2))))).astype(np.float32))
    return waves


def _distances(first: Floats, second: Floats) -> Floats:
    """Of all pairs of frames, [N, M], by cepstra that are smooth in time: single bins and frames follow the pulses."""
    smooth = np.ones(_SMOOTH) / _SMOOTH
    one, other = (
        np.stack([np.convolve(row, smooth, "same") for row in np.fft.irfft(log, axis=1)[:, 1 : _CEPSTRA + 1].T], 1)
        for log in (first, second)
    )
    return np.asarray(np.linalg.norm(one[:, None] - other[None], axis=2))


@numba.njit(cache=True)
def _path(distances):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Cheapest way through distances [N, M] by steps (1, 0), (0, 1) and, twice as dear, (1, 1): int64 [P, 2]."""
    rows, columns = distances.shape
    cost = np.full((rows + 1, columns + 1), np.inf)
    cost[0, 0] = 0.0
    for i in range(rows):
        for j in range(columns):
            here = distances[i, j]
            cost[i + 1, j + 1] = min(cost[i, j] + 2 * here, cost[i, j + 1] + here, cost[i + 1, j] + here)
    path = np.empty((rows + columns, 2), np.int64)
    i, j, count = rows - 1, columns - 1, 0
    while True:
        path[count, 0], path[count, 1] = i, j
        count += 1
        if i == 0 and j == 0:
            break
        # In `cost`, entry (i + 1, j + 1) belongs to the frames (i, j).
        if i > 0 and j > 0 and cost[i, j] + distances[i, j] <= min(cost[i, j + 1], cost[i + 1, j]):
            i, j = i - 1, j - 1
        elif j == 0 or (i > 0 and cost[i, j + 1] <= cost[i + 1, j]):
            i -= 1
        else:
            j -= 1
    return path[:count][::-1]


def _fft(hop: int) -> int:
    return int(2 ** np.ceil(np.log2(_HOPS * hop)))


def _window(hop: int) -> Floats:
    return np.hanning(_HOPS * hop + 1)[:-1]


def _stft(wave: Floats, hop: int, count: int) -> NDArray[np.complex128]:
    """Spectra [count, F]; frame i is centred at sample ``i * hop``."""
    size = _HOPS * hop
    padded = np.zeros((count - 1) * hop + size)
    kept = wave[: len(padded) - size // 2]
    padded[size // 2 : size // 2 + len(kept)] = kept
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    return np.asarray(np.fft.rfft(frames * _window(hop), _fft(hop), axis=1))


def _istft(spectra: NDArray[np.complex128], hop: int) -> Floats:
    """Least-squares inverse of `_stft`: float64 [(count - 1) * hop]."""
    size, window = _HOPS * hop, _window(hop)
    frames = np.fft.irfft(spectra, _fft(hop), axis=1)[:, :size] * window
    total, weight = np.zeros((2, len(spectra) + _HOPS - 1, hop))
    for part in range(_HOPS):
        total[part : part + len(spectra)] += frames[:, part * hop : (part + 1) * hop]
        weight[part : part + len(spectra)] += window[part * hop : (part + 1) * hop] ** 2
    return (total / np.maximum(weight, 1e-3)).ravel()[size // 2 : -(size // 2)]


def _griffin_lim(size: Floats, hop: int) -> Floats:
    """Wave whose spectra have about these magnitudes; the same for the same magnitudes."""
    angle = np.exp(2j * np.pi * np.random.default_rng(0).random(size.shape))
    for _ in range(_ROUNDS):
        spectra = _stft(_istft(size * angle, hop), hop, len(size))
        angle = spectra / np.maximum(np.abs(spectra), 1e-12)
    return _istft(size * angle, hop)
