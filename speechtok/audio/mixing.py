"""Sounds together with given parameters: louder, in a room, with a noise."""

import numpy as np

from speechtok.audio.clips import Wave
from speechtok.audio.decode import as_sound
from speechtok.audio.stretch import fit_length
from speechtok.errors import AudioError

__all__ = ["amplify", "cut_piece", "direct_path", "fft_size", "mix_at_snr", "reverberate", "rms"]

_DIRECT = 10 ** (-10 / 20)  # of the largest value; ripples of a band limit in front of the direct path stay below
_DIRECT_SECONDS = 0.001  # the direct path is the largest value within this time


def amplify(wave: Wave, gain_db: float) -> Wave:
    """Make a sound louder or fainter.

    Parameters
    ----------
    wave : float32 [n]
    gain_db : float
        Level (dB); 20 is ten times the amplitude. Nothing is clipped.

    Returns
    -------
    float32 [n]

    Raises
    ------
    AudioError
        If the wave is empty or no wave, or the gain is not finite.
    """
    wave = as_sound(wave)
    if not np.isfinite(gain_db):
        raise AudioError(f"gain_db={gain_db} is not finite")
    return wave * np.float32(10.0 ** (gain_db / 20))


def mix_at_snr(wave: Wave, noise: Wave, snr_db: float, legacy_half_snr: bool = False) -> Wave:
    """Add noise at a signal-to-noise ratio.

    The ratio is that of the root mean squares over the whole clip, pauses included, and over the whole of the noise
    that is added: ``20 log10(rms(wave) / rms(factor * noise))``. The level of the wave is left alone, and nothing is
    clipped.

    Parameters
    ----------
    wave, noise : float32 [n]
        Sound and noise of equal length.
    snr_db : float
        Ratio (dB).
    legacy_half_snr : bool
        Take the square root of the amplitude factor, as the mixer of NAST and MS-SNSD does once it has brought sound
        and noise to equal level: the ratio that comes out is exactly ``snr_db / 2``.

    Returns
    -------
    float32 [n]

    Raises
    ------
    AudioError
        If lengths differ, the ratio is not finite, or either is silent: no factor makes a ratio then.
    """
    wave, noise = as_sound(wave), as_sound(noise, "the noise")
    if len(wave) != len(noise):
        raise AudioError(f"a wave of {len(wave)} and a noise of {len(noise)} samples; they must be equally long")
    if not np.isfinite(snr_db):
        raise AudioError(f"snr_db={snr_db} is not finite")
    levels = rms(wave), rms(noise)
    for name, level in zip(("wave", "noise"), levels, strict=True):
        if level == 0:
            raise AudioError(f"the {name} is silent; there is no signal-to-noise ratio")
    exponent = -snr_db / (40 if legacy_half_snr else 20)
    return wave + noise * np.float32(levels[0] / levels[1] * 10.0**exponent)


def direct_path(response: Wave, sample_rate: int) -> int:
    """Sample at which the direct sound of a room response arrives.

    The largest value within the millisecond that follows the first one to come within 10 dB of the largest of all: a
    reflection may be louder than the direct sound, and come 40 ms later.

    Parameters
    ----------
    response : float32 [n]
        Room response.
    sample_rate : int
        In Hz.

    Returns
    -------
    int

    Raises
    ------
    AudioError
        If the response is empty or silent.
    """
    size = np.abs(as_sound(response, "the room response"))
    if size.max() == 0:
        raise AudioError("the room response is silent")
    first = int(np.argmax(size >= size.max() * _DIRECT))
    return first + int(np.argmax(size[first : first + max(1, round(sample_rate * _DIRECT_SECONDS))]))


def reverberate(wave: Wave, response: Wave, sample_rate: int, keep_level: bool = True) -> Wave:
    """Put a sound into a room.

    The convolution is shifted so that the direct path has no delay, and cut to the length of the wave. What the
    response holds before its direct path (about 2 ms in measured ones) is kept: it is part of the band limit.

    Parameters
    ----------
    wave : float32 [n]
    response : float32 [m]
        Room response at the same sample rate.
    sample_rate : int
        In Hz.
    keep_level : bool
        Scale the result to the root mean square of the wave, over the whole clip. Otherwise the response is taken as
        it is, and a room with much reverberation is louder than one with little.

    Returns
    -------
    float32 [n]

    Raises
    ------
    AudioError
        If the wave is empty or the response is empty or silent.
    """
    wave, response = as_sound(wave), as_sound(response, "the room response")
    delay = direct_path(response, sample_rate)
    size = fft_size(len(wave) + len(response) - 1)
    product = np.fft.rfft(wave, size) * np.fft.rfft(response, size)
    wet = fit_length(np.fft.irfft(product, size)[delay : delay + len(wave)].astype(np.float32), len(wave))
    level = rms(wet)
    if keep_level and level > 0:
        wet *= np.float32(rms(wave) / level)
    return wet


def rms(wave: Wave) -> float:
    """Root mean square of a float32 [n] wave; summed in float64."""
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))


def cut_piece(clip: Wave, length: int, start: float) -> Wave:
    """Cut a float32 [length] piece out of a clip, or repeat the clip; `start` in [0, 1) is where among the places."""
    begin = int(start * (len(clip) - length + 1 if len(clip) >= length else len(clip)))
    return clip[begin : begin + length] if len(clip) >= length else np.resize(np.roll(clip, -begin), length)


def fft_size(least: int) -> int:
    """Next length whose transform is quick: a power of two, or 3, 5 or 9 times one."""
    return min(factor << max(0, (-(-least // factor) - 1).bit_length()) for factor in (1, 3, 5, 9))
