"""What channels do to sound, with given parameters: fewer samples a second, a narrow band, clipped peaks.

Lossy codecs are in `speechtok.audio.lossy`. Nothing here moves the sound in time.
"""

import numpy as np

from speechtok.audio.clips import Wave
from speechtok.audio.decode import as_sound
from speechtok.audio.mixing import fft_size
from speechtok.audio.resample import MIN_RATE, resample
from speechtok.audio.stretch import fit_length
from speechtok.errors import AudioError

__all__ = ["SLOPE_DB_PER_OCTAVE", "band_pass", "clip_peaks", "through_rate"]

_ORDER = 8  # of the Butterworth magnitude at either edge
SLOPE_DB_PER_OCTAVE = 6 * _ORDER
_LOWEST_HZ = 20.0
_RINGING_PERIODS = 10  # of the lower edge; what rings longer than this is 60 dB down


def through_rate(wave: Wave, sample_rate: int, lower_rate: int) -> Wave:
    """Resample to a lower rate and back.

    From half the lower rate on nothing is left (tones come out 140 dB down); up to 0.87 of that a tone keeps its level
    within 0.01 dB. `speechtok.audio.resample` has the filter.

    Parameters
    ----------
    wave : float32 [n]
    sample_rate : int
        In Hz.
    lower_rate : int
        In Hz, 1000 ... `sample_rate`.

    Returns
    -------
    float32 [n]

    Raises
    ------
    AudioError
        If the wave is empty or no wave, or the lower rate is out of bounds or has no small ratio to the other.
    """
    wave = as_sound(wave)
    if not MIN_RATE <= lower_rate <= sample_rate:
        raise AudioError(f"lower_rate={lower_rate}: {MIN_RATE} to {sample_rate} Hz, the rate of the sound, is needed")
    return fit_length(resample(resample(wave, sample_rate, lower_rate), lower_rate, sample_rate), len(wave))


def band_pass(wave: Wave, sample_rate: int, low_hz: float, high_hz: float) -> Wave:
    """Keep a band, as a telephone does with 300 to 3400 Hz.

    The magnitude is that of Butterworth filters of order 8, ``(1 + (low / f)^16)^-1/2 (1 + (f / high)^16)^-1/2``:
    3 dB down at the edges, falling by 48 dB an octave outside. The phase is zero.

    Parameters
    ----------
    wave : float32 [n]
    sample_rate : int
        In Hz.
    low_hz, high_hz : float
        Edges; the lower one is at least 20 Hz. An upper edge far above half the sample rate does nothing.

    Returns
    -------
    float32 [n]

    Raises
    ------
    AudioError
        If the wave is empty or no wave, or the edges are too low, reversed or not finite.
    """
    wave = as_sound(wave)
    if not _LOWEST_HZ <= low_hz < high_hz < np.inf:
        raise AudioError(f"low_hz={low_hz}, high_hz={high_hz}: edges of a band above {_LOWEST_HZ:g} Hz are needed")
    size = fft_size(len(wave) + round(_RINGING_PERIODS * sample_rate / low_hz))
    hertz = np.fft.rfftfreq(size, 1 / sample_rate)
    power = 1 + (hertz / high_hz) ** (2 * _ORDER)
    power[1:] *= 1 + (low_hz / hertz[1:]) ** (2 * _ORDER)
    gain = 1 / np.sqrt(power)
    gain[0] = 0.0
    return np.fft.irfft(np.fft.rfft(wave, size) * gain, size)[: len(wave)].astype(np.float32)


def clip_peaks(wave: Wave, over_db: float) -> Wave:
    """Cut off the peaks, as a microphone does whose sound is `over_db` too loud.

    Parameters
    ----------
    wave : float32 [n]
    over_db : float
        How far the ceiling is below the largest value of the wave (dB); 0 leaves the wave as it is.

    Returns
    -------
    float32 [n]
        What is below the ceiling keeps its level; silence stays silent.

    Raises
    ------
    AudioError
        If the wave is empty or no wave, or `over_db` is negative or not finite.
    """
    wave = as_sound(wave)
    if not 0 <= over_db < np.inf:
        raise AudioError(f"over_db={over_db}: a finite number of decibels, at least 0, is needed")
    ceiling = np.abs(wave).max() * np.float32(10.0 ** (-over_db / 20))
    return np.clip(wave, -ceiling, ceiling)
