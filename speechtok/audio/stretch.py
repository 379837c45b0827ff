"""Longer or shorter at the same pitch, higher or lower at the same length.

`time_stretch` is the phase vocoder (Flanagan and Golden 1966; Dolson 1986) with the settings of
``librosa.effects.time_stretch``, so that figures can be held against published ones. Analysis and synthesis share one
hop, hence the phase of a bin advances from one output frame to the next by exactly what it advanced between the two
input frames: a product of unit phasors, without angles and unwrapping. Frames are processed in blocks that stay in
the cache, and memory does not grow with the wave.
"""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from speechtok.audio.decode import as_sound
from speechtok.audio.resample import MIN_RATE, resample
from speechtok.errors import AudioError

__all__ = ["fit_length", "pitch_shift", "time_stretch"]

Wave = NDArray[np.float32]

FFT, HOP = 2048, 512  # samples, at any sample rate, as in librosa
MAX_RATIO = 8.0
MAX_SEMITONES = 24.0
# Ratios are rounded to fractions with denominators up to this: below 0.9 cents, and the resampling filters stay small.
_MAX_DENOMINATOR = 1000
_BLOCK = 128  # frames


def time_stretch(wave: Wave, rate: float) -> Wave:
    """Change the tempo and keep the pitch.

    Parameters
    ----------
    wave : float32 [n]
        Sound of any sample rate.
    rate : float
        Speed, 1/8 ... 8: 2 is twice as fast and half as long.

    Returns
    -------
    float32 [max(1, round(n / rate))]
        Sharp onsets are smeared over the frame of 2048 samples, as with every plain phase vocoder.

    Raises
    ------
    AudioError
        If the wave is empty or no wave, or the rate is out of bounds.
    """
    wave = as_sound(wave)
    if not 1 / MAX_RATIO <= rate <= MAX_RATIO:
        raise AudioError(f"rate={rate}: a speed between {1 / MAX_RATIO} and {MAX_RATIO:g} is needed")
    length = max(1, round(len(wave) / rate))
    frames = 1 + len(wave) // HOP  # centred at 0, HOP, ...; what lies outside of the wave is zero
    steps = np.arange(0, frames, rate)[: -(-(length + FFT) // HOP)]
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT) / FFT)).astype(np.float32)
    padded = np.zeros(FFT + (frames + 1) * HOP, np.float32)
    padded[FFT // 2 : FFT // 2 + len(wave)] = wave
    cuts = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP]
    # Overlap-add buffers, one row for each hop.
    overlap = FFT // HOP
    out = np.zeros((max(len(steps), -(-length // HOP)) + overlap, HOP), np.float32)
    weight = np.zeros_like(out)
    phase = None
    for begin in range(0, len(steps), _BLOCK):
        step = steps[begin : begin + _BLOCK]
        index = step.astype(np.int64)
        first, last = index[0], index[-1] + 2
        spectrum = np.fft.rfft(cuts[first:last] * window, axis=-1)  # [frames, bins]
        spectrum[max(0, frames - first) :] = 0  # behind the last frame
        index -= first
        size = np.abs(spectrum)
        unit = np.divide(spectrum, size, out=np.ones_like(spectrum), where=size > 0)
        share = (step - np.floor(step)).astype(np.float32)[:, None]
        size = (1 - share) * size[index] + share * size[index + 1]
        turns = np.empty((len(step) + 1, size.shape[1]), np.complex64)
        turns[0] = unit[0] if phase is None else phase
        np.multiply(unit[index + 1], unit[index].conj(), out=turns[1:])
        phases = np.multiply.accumulate(turns, axis=0)
        phase = phases[-1] / np.abs(phases[-1])  # products of many rounded unit phasors drift off the circle
        pieces = np.fft.irfft(size * phases[:-1], n=FFT, axis=-1) * window
        for part in range(overlap):
            rows = slice(begin + part, begin + part + len(step))
            out[rows] += pieces[:, part * HOP : (part + 1) * HOP]
            weight[rows] += window[part * HOP : (part + 1) * HOP] ** 2
    np.divide(out, weight, out=out, where=weight > np.finfo(np.float32).tiny)
    return fit_length(out.reshape(-1)[FFT // 2 :], length)


def pitch_shift(wave: Wave, semitones: float) -> Wave:
    """Change the pitch and keep length and level: stretch by the ratio of the pitches, then resample by it.

    Formants move along with the pitch. Nothing is normalised afterwards.

    Parameters
    ----------
    wave : float32 [n]
        Sound of any sample rate.
    semitones : float
        -24 ... 24; positive is higher. The ratio ``2 ** (semitones / 12)`` is rounded to a fraction; the pitch is
        off by less than 0.9 cents.

    Returns
    -------
    float32 [n]

    Raises
    ------
    AudioError
        If the wave is empty or no wave, or the shift is out of bounds.
    """
    wave = as_sound(wave)
    if not -MAX_SEMITONES <= semitones <= MAX_SEMITONES:
        raise AudioError(f"semitones={semitones}: a shift between -{MAX_SEMITONES:g} and {MAX_SEMITONES:g} is needed")
    ratio = Fraction(2.0 ** (semitones / 12)).limit_denominator(_MAX_DENOMINATOR)
    stretched = time_stretch(wave, 1 / float(ratio))
    # The resampler wants sample rates; only their ratio matters.
    scale = math.ceil(MIN_RATE / min(ratio.numerator, ratio.denominator))
    rates = ratio.numerator * scale, ratio.denominator * scale
    return fit_length(resample(stretched, *rates), len(wave))


def fit_length(wave: Wave, length: int) -> Wave:
    """Cut a float32 [n] wave, or append zeros to it: float32 [length], a copy."""
    out = np.zeros(length, np.float32)
    out[: len(wave)] = wave[:length]
    return out
