"""Augmentations under which tokenizers are compared and trained, by family.

The four families of Gat et al. 2023 (arXiv 2209.15483) with the ranges of their tables are `FAMILIES`:

- ``stretch``: tempo at a rate of U(0.8, 1.2), pitch kept (a stretched tone of 440 Hz stays within 2 cents);
- ``pitch``: pitch by U(-4, 4) semitones, duration kept (within 2 cents of what is asked for);
- ``reverb``: convolution with a room response, of simulated rooms or measured ones, the direct sound in place;
- ``noise``: noise at U(5, 15) dB, exact to 0.01 dB (``legacy_half_snr`` of the resources halves it as NAST does).

What channels do are `DEGRADATIONS`:

- ``gain``: U(-12, 12) dB, exact;
- ``resample``: to 6000, 8000, 11025 or 12000 Hz and back; from half of that on nothing is left (-140 dB);
- ``codec``: Opus or MP3 at 8, 16, 24 or 32 kbit/s, in time within 1 ms;
- ``band_limit``: from U(100, 400) to U(2500, 3800) Hz, 3 dB down there and 48 dB an octave outside;
- ``clip``: peaks cut off U(3, 15) dB below the largest value.

Several in a row are written ``"reverb+noise"``. What is drawn depends on (key, family, seed) alone: not on what was
drawn before, the process, the sound, or the families beside it. Every tokenizer that is asked about the same keys
hears the same sounds. Functions with given parameters are in `stretch`, `mixing`, `rooms`, `degrade` and `lossy`;
noise, reverb and gain for batches on any device in `augment_batch`.
"""

import hashlib
import json
import math

import numpy as np

from speechtok.audio.clips import Report, Wave
from speechtok.audio.decode import as_sound
from speechtok.audio.families import DEGRADATIONS, FAMILIES, STRENGTHS, TABLE, Draw, Strength
from speechtok.audio.resources import AugmentResources
from speechtok.errors import InputError

__all__ = [
    "DEGRADATIONS",
    "FAMILIES",
    "STRENGTHS",
    "AugmentResources",
    "Strength",
    "augment",
    "augment_with_report",
    "draws_of",
    "generator_for",
    "parts_of",
]

# What these families were called when figures that stand were measured: their draws must stay the same.
_SEEDED_AS = {"stretch": "time_stretch", "pitch": "pitch_shift"}


def generator_for(key: str, family: str, seed: int = 0) -> np.random.Generator:
    """Make the generator of one item: seeded with SHA-256 of (seed, family, key), the same in every process."""
    digest = hashlib.sha256(json.dumps([int(seed), _SEEDED_AS.get(family, family), key]).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def parts_of(family: str) -> list[str]:
    """Families of a composition, in order; InputError if there is no such family, or one occurs twice."""
    names = family.split("+")
    for name in names:
        if name not in TABLE:
            raise InputError(f"family={family!r}: one of {', '.join(TABLE)}, or several joined by '+', is needed")
    if len(set(names)) < len(names):
        raise InputError(f"family={family!r}: each may stand there once; the second would draw what the first drew")
    return names


def draws_of(
    family: str,
    sample_rate: int,
    key: str,
    seed: int = 0,
    resources: AugmentResources | None = None,
    strength: float | None = None,
) -> dict[str, Draw]:
    """With what each family of a composition is drawn, by name and in order.

    Parameters
    ----------
    family, sample_rate, key, seed, resources, strength
        See `augment_with_report`.

    Returns
    -------
    dict of str to Draw

    Raises
    ------
    InputError
        If there is no such family, one occurs twice, or a strength is not finite or given for several.
    """
    names = parts_of(family)
    if strength is not None and (len(names) > 1 or not math.isfinite(strength)):
        raise InputError(
            f"strength={strength} of {family!r}: a finite number for a single family is needed; apply one after the "
            "other, their draws stay the same"
        )
    resources = resources or AugmentResources.default()
    return {name: Draw(sample_rate, generator_for(key, name, seed), resources, strength) for name in names}


def augment_with_report(
    wave: Wave,
    sample_rate: int,
    family: str,
    key: str,
    seed: int = 0,
    resources: AugmentResources | None = None,
    strength: float | None = None,
) -> tuple[Wave, Report]:
    """Augment, and say what was drawn.

    Parameters
    ----------
    wave : float32 [n]
        Sound in [-1, 1]; int16 and several channels [n, channels] are converted.
    sample_rate : int
        In Hz.
    family : str
        One of `FAMILIES` or `DEGRADATIONS`, or several joined by ``+``, which are applied in that order, each with the
        draws that it has alone.
    key : str
        Name of the utterance.
    seed : int
        Another seed gives other draws for the same keys.
    resources : AugmentResources, optional
        Noises and rooms; by default those that need no data folder.
    strength : float, optional
        Of a single family, instead of the one that is drawn; everything else is drawn as before. ``noise``: nominal
        signal-to-noise ratio (dB); ``stretch``: rate (2 is twice as fast); ``pitch``: semitones; ``reverb``: RT60 (s),
        in simulated rooms; ``gain``: dB; ``resample``: lower rate (Hz); ``codec``: bit/s; ``band_limit``: upper edge
        (Hz); ``clip``: how far peaks are over (dB). `STRENGTHS` has units and the ranges that are drawn from.

    Returns
    -------
    wave : float32 [m]
        ``m = round(n / rate)`` after ``stretch``, else n. May leave [-1, 1].
    report : dict
        The strength under the name that `STRENGTHS` has for it (``snr_db`` as it comes out), and what else was drawn:
        ``clip`` (file of the noise, which begins at ``start``, 0 ... 1, or of the room response), ``length_m``,
        ``width_m``, ``height_m`` and ``distance_m`` of a simulated room, ``codec``, ``low_hz``. In compositions names
        are those of family and entry, as ``noise.snr_db``.

    Raises
    ------
    AudioError
        If the wave is empty or no wave, resources are missing, a strength is out of bounds, or sound or noise is silent
        where a ratio is wanted.
    InputError
        If there is no such family, or a strength does not fit it.
    """
    wave = as_sound(wave, f"the wave of {key!r}")
    draws = draws_of(family, sample_rate, key, seed, resources, strength)
    report: Report = {}
    for name, draw in draws.items():
        wave, facts = TABLE[name](wave, draw)
        report |= facts if len(draws) == 1 else {f"{name}.{entry}": value for entry, value in facts.items()}
    return wave, report


def augment(
    wave: Wave,
    sample_rate: int,
    family: str,
    key: str,
    seed: int = 0,
    resources: AugmentResources | None = None,
    strength: float | None = None,
) -> Wave:
    """Augment: the wave of `augment_with_report`, which see."""
    return augment_with_report(wave, sample_rate, family, key, seed, resources, strength)[0]
