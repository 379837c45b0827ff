"""The four augmentations under which tokenizers are compared and trained: stretch, pitch, room, noise.

Gat et al. 2023 (arXiv 2209.15483) with the ranges of their tables: time-stretch at a rate of U(0.8, 1.2),
pitch-shift by U(-4, 4) semitones, convolution with a room response, noise at U(5, 15) dB.

What is drawn depends on (key, family, seed) alone: not on what was drawn before, the process, or the wave. Every
tokenizer that is asked about the same keys hears the same sounds. `mix_at_snr`, `reverberate` and the functions of
`speechtok.audio.stretch` apply given parameters.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechtok.audio.clips import ClipSource, Report, Wave, clips_of_split
from speechtok.audio.decode import as_mono
from speechtok.audio.stretch import fit_length, pitch_shift, time_stretch
from speechtok.errors import AudioError, InputError

__all__ = [
    "FAMILIES",
    "AugmentResources",
    "augment",
    "augment_with_report",
    "direct_path",
    "generator_for",
    "mix_at_snr",
    "reverberate",
]

STRETCH = (0.8, 1.2)
SEMITONES = (-4.0, 4.0)
SNR_DB = (5.0, 15.0)

SILENCE_RMS = 1e-4  # -80 dB of full scale: a piece of noise below is drawn again
_TRIES = 20
_DIRECT = 10 ** (-10 / 20)  # of the largest value; ripples of a band limit in front of the direct path stay below
_DIRECT_SECONDS = 0.001  # the direct path is the largest value within this time


@dataclass(frozen=True)
class AugmentResources:
    """What the families draw from besides numbers.

    Parameters
    ----------
    noises, rooms : ClipSource, optional
        Noises to add; room responses to convolve with.
    legacy_half_snr : bool
        Halve every signal-to-noise ratio, as NAST does (see `mix_at_snr`).
    """

    noises: ClipSource | None = None
    rooms: ClipSource | None = None
    legacy_half_snr: bool = False

    @classmethod
    def from_folder(
        cls, data_root: str | os.PathLike[str], split: str, legacy_half_snr: bool = False
    ) -> "AugmentResources":
        """Take noises and measured room responses from a data folder.

        Parameters
        ----------
        data_root : path
            Holds ``noise/metadata.jsonl`` and ``rir/metadata.jsonl``.
        split : {"train", "valid", "test"}
            A kind of which this split has no files is left out, and refused when it is asked for.
        legacy_half_snr : bool
            See the class.

        Raises
        ------
        InputError
            If a listing is missing or damaged, or neither has files of that split.
        """
        noises = clips_of_split(Path(data_root) / "noise", split)
        rooms = clips_of_split(Path(data_root) / "rir", split, group_by="room")
        if noises is None and rooms is None:
            raise InputError(f"{data_root}: neither noise nor room responses of split {split!r}")
        return cls(noises, rooms, legacy_half_snr)


# ---------------------------------------------------------------------------------------------------------------------
# with given parameters


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
    wave, noise = _checked(wave, "the wave"), _checked(noise, "the noise")
    if len(wave) != len(noise):
        raise AudioError(f"a wave of {len(wave)} and a noise of {len(noise)} samples; they must be equally long")
    if not np.isfinite(snr_db):
        raise AudioError(f"snr_db={snr_db} is not finite")
    levels = _rms(wave), _rms(noise)
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
    size = np.abs(_checked(response, "the room response"))
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
    wave, response = _checked(wave, "the wave"), _checked(response, "the room response")
    delay = direct_path(response, sample_rate)
    size = _fft_size(len(wave) + len(response) - 1)
    product = np.fft.rfft(wave, size) * np.fft.rfft(response, size)
    wet = fit_length(np.fft.irfft(product, size)[delay : delay + len(wave)].astype(np.float32), len(wave))
    level = _rms(wet)
    if keep_level and level > 0:
        wet *= np.float32(_rms(wave) / level)
    return wet


# ---------------------------------------------------------------------------------------------------------------------
# families: wave, sample rate, generator, resources -> wave and what was drawn


def _draw_time_stretch(
    wave: Wave, sample_rate: int, generator: np.random.Generator, resources: AugmentResources
) -> tuple[Wave, Report]:
    rate = _uniform(generator, STRETCH)
    return time_stretch(wave, rate), {"rate": rate}


def _draw_pitch_shift(
    wave: Wave, sample_rate: int, generator: np.random.Generator, resources: AugmentResources
) -> tuple[Wave, Report]:
    semitones = _uniform(generator, SEMITONES)
    return pitch_shift(wave, semitones), {"semitones": semitones}


def _draw_reverb(
    wave: Wave, sample_rate: int, generator: np.random.Generator, resources: AugmentResources
) -> tuple[Wave, Report]:
    if resources.rooms is None:
        raise AudioError("reverb needs room responses: give resources that have some (the split may have none)")
    response, facts = resources.rooms.draw(generator, sample_rate)
    return reverberate(wave, response, sample_rate), facts


def _draw_noise(
    wave: Wave, sample_rate: int, generator: np.random.Generator, resources: AugmentResources
) -> tuple[Wave, Report]:
    if resources.noises is None:
        raise AudioError("noise needs noise clips: give resources that have some (the split may have none)")
    snr_db = _uniform(generator, SNR_DB)
    # Parts of some clips are silent. How often is drawn again depends on the length of the wave, but not on its sound.
    for _ in range(_TRIES):
        clip, facts = resources.noises.draw(generator, sample_rate)
        start = float(generator.random())
        noise = _piece(clip, len(wave), start)
        if _rms(noise) > SILENCE_RMS:
            mixed = mix_at_snr(wave, noise, snr_db, resources.legacy_half_snr)
            return mixed, {"snr_db": snr_db / 2 if resources.legacy_half_snr else snr_db, **facts, "start": start}
    raise AudioError(f"{_TRIES} pieces of noise in a row were silent (below -80 dB of full scale)")


Family = Callable[[Wave, int, np.random.Generator, AugmentResources], tuple[Wave, Report]]

_TABLE: dict[str, Family] = {
    "time_stretch": _draw_time_stretch,
    "pitch_shift": _draw_pitch_shift,
    "reverb": _draw_reverb,
    "noise": _draw_noise,
}
FAMILIES = tuple(_TABLE)


def generator_for(key: str, family: str, seed: int = 0) -> np.random.Generator:
    """Make the generator of one item: seeded with SHA-256 of (seed, family, key), the same in every process."""
    digest = hashlib.sha256(json.dumps([int(seed), family, key]).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def augment_with_report(
    wave: Wave, sample_rate: int, family: str, key: str, seed: int = 0, resources: AugmentResources | None = None
) -> tuple[Wave, Report]:
    """Augment, and say what was drawn.

    Parameters
    ----------
    wave : float32 [n]
        Sound in [-1, 1]; int16 and several channels [n, channels] are converted.
    sample_rate : int
        In Hz.
    family : str
        One of `FAMILIES`.
    key : str
        Name of the utterance.
    seed : int
        Another seed gives other draws for the same keys.
    resources : AugmentResources, optional
        Needed by ``"reverb"`` and ``"noise"``.

    Returns
    -------
    wave : float32 [m]
        ``m = round(n / rate)`` for ``"time_stretch"``, else n. May leave [-1, 1].
    report : dict
        ``rate``; ``semitones``; ``clip`` (the room response); or ``snr_db`` (as it comes out), ``clip`` and ``start``
        (where the noise begins, 0 ... 1).

    Raises
    ------
    AudioError
        If the wave is empty or no wave, resources are missing, or sound or noise is silent where a ratio is wanted.
    InputError
        If there is no such family.
    """
    if family not in _TABLE:
        raise InputError(f"family={family!r}: one of {', '.join(FAMILIES)} is needed")
    wave = _checked(wave, f"the wave of {key!r}")
    return _TABLE[family](wave, sample_rate, generator_for(key, family, seed), resources or AugmentResources())


def augment(
    wave: Wave, sample_rate: int, family: str, key: str, seed: int = 0, resources: AugmentResources | None = None
) -> Wave:
    """Augment: the wave of `augment_with_report`, which see."""
    return augment_with_report(wave, sample_rate, family, key, seed, resources)[0]


def _uniform(generator: np.random.Generator, ends: tuple[float, float]) -> float:
    return float(ends[0] + (ends[1] - ends[0]) * generator.random())


def _checked(wave: Wave, name: str) -> Wave:
    wave = as_mono(wave, name)
    if len(wave) == 0:
        raise AudioError(f"{name} is empty")
    return wave


def _rms(wave: Wave) -> float:
    """Root mean square; summed in float64."""
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))


def _piece(clip: Wave, length: int, start: float) -> Wave:
    """Cut a piece out of a clip, or repeat the clip; `start` in [0, 1) says where among the possible places."""
    begin = int(start * (len(clip) - length + 1 if len(clip) >= length else len(clip)))
    return clip[begin : begin + length] if len(clip) >= length else np.resize(np.roll(clip, -begin), length)


def _fft_size(least: int) -> int:
    """Next length whose transform is quick: a power of two, or 3, 5 or 9 times one."""
    return min(factor << max(0, (-(-least // factor) - 1).bit_length()) for factor in (1, 3, 5, 9))
