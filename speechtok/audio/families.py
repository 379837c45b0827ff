"""Families of augmentations: what each draws, from which range, and what its strength is.

A family takes the same values from its generator whatever the strength, the sample rate and the sound; a given strength
replaces the one that was drawn, and nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from speechtok.audio.clips import Report, Wave
from speechtok.audio.degrade import band_pass, clip_peaks, through_rate
from speechtok.audio.lossy import CODECS, through_codec
from speechtok.audio.mixing import amplify, cut_piece, mix_at_snr, reverberate, rms
from speechtok.audio.resources import AugmentResources
from speechtok.audio.rooms import SimulatedRooms
from speechtok.audio.stretch import pitch_shift, time_stretch
from speechtok.errors import AudioError, InputError

__all__ = ["DEGRADATIONS", "FAMILIES", "STRENGTHS", "TABLE", "Draw", "Strength", "draw_gain", "draw_noise", "draw_room"]

RESAMPLED_HZ = (6000, 8000, 11025, 12000)
BITRATES = (8000, 16000, 24000, 32000)  # bit/s
LOWER_EDGE_HZ = (100.0, 400.0)

SILENCE_RMS = 1e-4  # -80 dB of full scale: a piece of noise below is drawn again
_TRIES = 20

T = TypeVar("T")


@dataclass(frozen=True)
class Strength:
    """What makes a family strong or weak.

    Parameters
    ----------
    entry : str
        Of reports.
    unit : str
    low, high : float
        Ends of the range that is drawn from; of reverberation, in simulated rooms.
    """

    entry: str
    unit: str
    low: float
    high: float


STRENGTHS = {
    "stretch": Strength("rate", "times as fast", 0.8, 1.2),
    "pitch": Strength("semitones", "semitones", -4.0, 4.0),
    "reverb": Strength("rt60", "s", 0.1, 1.0),
    "noise": Strength("snr_db", "dB", 5.0, 15.0),
    "gain": Strength("gain_db", "dB", -12.0, 12.0),
    "resample": Strength("sample_rate", "Hz", RESAMPLED_HZ[0], RESAMPLED_HZ[-1]),
    "codec": Strength("bitrate", "bit/s", BITRATES[0], BITRATES[-1]),
    "band_limit": Strength("high_hz", "Hz", 2500.0, 3800.0),
    "clip": Strength("over_db", "dB", 3.0, 15.0),
}


@dataclass(frozen=True)
class Draw:
    """What a family is drawn with.

    Parameters
    ----------
    sample_rate : int
        Of the sound (Hz).
    generator : numpy.random.Generator
    resources : AugmentResources
    strength : float, optional
        Instead of the one that is drawn.
    """

    sample_rate: int
    generator: np.random.Generator
    resources: AugmentResources
    strength: float | None = None

    def between(self, low: float, high: float) -> float:
        """Uniform draw."""
        return float(low + (high - low) * self.generator.random())

    def one_of(self, values: Sequence[T]) -> T:
        """One of some values, all equally likely."""
        return values[int(self.generator.random() * len(values))]

    def strength_of(self, family: str) -> float:
        """The given strength, or a draw from the family's range; a value is taken from the generator in any case."""
        drawn = self.between(STRENGTHS[family].low, STRENGTHS[family].high)
        return drawn if self.strength is None else float(self.strength)


def draw_gain(draw: Draw) -> tuple[float, Report]:
    """Gain in dB, and the report."""
    gain_db = draw.strength_of("gain")
    return gain_db, {"gain_db": gain_db}


def draw_room(draw: Draw) -> tuple[Wave, Report]:
    """Room response, float32 [n], and the report; AudioError without rooms, InputError if they have no strength."""
    rooms = draw.resources.rooms
    if rooms is None:
        raise AudioError("reverb needs room responses: give resources that have some (the split may have none)")
    if draw.strength is None:
        return rooms.draw(draw.generator, draw.sample_rate)
    if not isinstance(rooms, SimulatedRooms):
        raise InputError(
            f"reverb of {draw.strength} s: measured responses have the reverberation that they have; give resources "
            "with SimulatedRooms(), or no strength"
        )
    return rooms.draw(draw.generator, draw.sample_rate, draw.strength)


def draw_noise(draw: Draw, length: int) -> tuple[Wave, float, Report]:
    """Noise, float32 [length], the nominal ratio in dB, and the report; AudioError without noises but silent ones."""
    noises, legacy = draw.resources.noises, draw.resources.legacy_half_snr
    if noises is None:
        raise AudioError("noise needs noise clips: give resources that have some (the split may have none)")
    snr_db = draw.strength_of("noise")
    # Parts of some clips are silent. How often is drawn again depends on the length of the wave, but not on its sound.
    for _ in range(_TRIES):
        clip, facts = noises.draw(draw.generator, draw.sample_rate)
        start = float(draw.generator.random())
        noise = cut_piece(clip, length, start)
        if rms(noise) > SILENCE_RMS:
            return noise, snr_db, {"snr_db": snr_db / 2 if legacy else snr_db, **facts, "start": start}
    raise AudioError(f"{_TRIES} pieces of noise in a row were silent (below -80 dB of full scale)")


def _stretch(wave: Wave, draw: Draw) -> tuple[Wave, Report]:
    rate = draw.strength_of("stretch")
    return time_stretch(wave, rate), {"rate": rate}


def _pitch(wave: Wave, draw: Draw) -> tuple[Wave, Report]:
    semitones = draw.strength_of("pitch")
    return pitch_shift(wave, semitones), {"semitones": semitones}


def _reverb(wave: Wave, draw: Draw) -> tuple[Wave, Report]:
    response, report = draw_room(draw)
    return reverberate(wave, response, draw.sample_rate), report


def _noise(wave: Wave, draw: Draw) -> tuple[Wave, Report]:
    noise, snr_db, report = draw_noise(draw, len(wave))
    return mix_at_snr(wave, noise, snr_db, draw.resources.legacy_half_snr), report


def _gain(wave: Wave, draw: Draw) -> tuple[Wave, Report]:
    gain_db, report = draw_gain(draw)
    return amplify(wave, gain_db), report


def _resample(wave: Wave, draw: Draw) -> tuple[Wave, Report]:
    drawn = min(draw.one_of(RESAMPLED_HZ), draw.sample_rate)
    rate = drawn if draw.strength is None else round(draw.strength)
    return through_rate(wave, draw.sample_rate, rate), {"sample_rate": float(rate)}


def _codec(wave: Wave, draw: Draw) -> tuple[Wave, Report]:
    codec, drawn = draw.one_of(CODECS), draw.one_of(BITRATES)
    bitrate = float(drawn if draw.strength is None else draw.strength)
    return through_codec(wave, draw.sample_rate, codec, bitrate), {"codec": codec, "bitrate": bitrate}


def _band_limit(wave: Wave, draw: Draw) -> tuple[Wave, Report]:
    low, high = draw.between(*LOWER_EDGE_HZ), draw.strength_of("band_limit")
    return band_pass(wave, draw.sample_rate, low, high), {"low_hz": low, "high_hz": high}


def _clip(wave: Wave, draw: Draw) -> tuple[Wave, Report]:
    over_db = draw.strength_of("clip")
    return clip_peaks(wave, over_db), {"over_db": over_db}


TABLE: dict[str, Callable[[Wave, Draw], tuple[Wave, Report]]] = {
    "stretch": _stretch,
    "pitch": _pitch,
    "reverb": _reverb,
    "noise": _noise,
    "gain": _gain,
    "resample": _resample,
    "codec": _codec,
    "band_limit": _band_limit,
    "clip": _clip,
}
FAMILIES = ("stretch", "pitch", "reverb", "noise")  # those of Gat et al., which figures are reported on
DEGRADATIONS = ("gain", "resample", "codec", "band_limit", "clip")
