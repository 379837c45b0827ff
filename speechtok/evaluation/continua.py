"""Categorical perception: continua in equal steps between two syllables, and how sharply a vector follows them.

Listeners hear equal acoustic steps between two syllables as one or the other, with a flip on the way (Liberman et al.
1957). The probe asks the same of any function from a wave to a vector. There are two kinds of continua:

- `synthesize`: syllables that rhyme and differ in their first or last consonant, by formant synthesis
  (`speechtok.audio.formants`). All parameters go in equal steps from one to the other; noise is the same in all steps.
- `word_pairs` of one speaker in an aligned folder, morphed into each other (`speechtok.audio.morph`).

`speechtok.evaluation.categorical` makes such functions of tokenizers and encoders. Where listeners would flip is not
known: unlike those of Sylber (arXiv 2410.07168) these continua are not adjusted until it is the middle. Claim orderings
of functions on the same continua, not values.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from speechtok.audio.decode import load
from speechtok.audio.formants import SAMPLE_RATE, speak
from speechtok.audio.morph import morph
from speechtok.errors import InputError
from speechtok.evaluation.alignments import SILENCE, Span, Utterance
from speechtok.evaluation.syllables import VOWELS
from speechtok.metrics.categorical import Similarity, discriminability_index

__all__ = [
    "CONTRASTS",
    "RIMES",
    "SAMPLE_RATE",
    "STEPS",
    "Contrast",
    "Word",
    "evaluate",
    "morphed",
    "synthesize",
    "word_pairs",
]

Wave = NDArray[np.float32]
Floats = NDArray[np.float64]

STEPS = 11

# Vowels: start and end of the first three formants (Hz). Single vowels are Peterson and Barney's (1952) men.
_VOWELS = {
    "AA": ((730, 1090, 2440), (730, 1090, 2440)),
    "IY": ((270, 2290, 3010), (270, 2290, 3010)),
    "EH": ((530, 1840, 2480), (530, 1840, 2480)),
    "UW": ((300, 870, 2240), (300, 870, 2240)),
    "EY": ((480, 1900, 2550), (320, 2200, 2800)),
    "AY": ((730, 1150, 2450), (380, 2000, 2600)),
}


@dataclass(frozen=True)
class _Consonant:
    """Targets of a consonant next to a vowel.

    Parameters
    ----------
    locus : (float, float, float)
        Formants (Hz) from which those of the vowel start.
    hold, transition : float
        Duration of the closure or constriction, and of the way to the vowel (s).
    voice, friction : float
        Amplitudes while it is held.
    noise : (float, float)
        Centre and bandwidth of frication (Hz).
    burst : float
        Amplitude of the burst (10 ms) with which it opens; the same noise.
    lag : float
        Aspiration instead of voice after the release (s).
    """

    locus: tuple[float, float, float]
    hold: float = 0.06
    transition: float = 0.05
    voice: float = 0.0
    friction: float = 0.0
    noise: tuple[float, float] = (2500.0, 1500.0)
    burst: float = 0.0
    lag: float = 0.0


# Round values of the order of Klatt's (1980) tables; they are fitted to no voice.
_CONSONANTS = {
    "B": _Consonant((200, 900, 2200), voice=0.08, burst=0.15, noise=(800, 800)),
    "D": _Consonant((200, 1750, 2700), voice=0.08, burst=0.25, noise=(4000, 1500)),
    "G": _Consonant((200, 2200, 2350), voice=0.08, burst=0.3, noise=(2100, 600)),
    "P": _Consonant((200, 900, 2200), burst=0.2, noise=(800, 800), lag=0.055),
    "T": _Consonant((200, 1750, 2700), burst=0.35, noise=(4000, 1500), lag=0.065),
    "K": _Consonant((200, 2200, 2350), burst=0.4, noise=(2100, 600), lag=0.075),
    "S": _Consonant((250, 1700, 2600), hold=0.12, transition=0.04, friction=0.5, noise=(5800, 1500)),
    "SH": _Consonant((250, 1900, 2500), hold=0.12, transition=0.04, friction=0.5, noise=(3000, 1200)),
    "Z": _Consonant((250, 1700, 2600), hold=0.1, transition=0.04, voice=0.25, friction=0.25, noise=(5800, 1500)),
    "W": _Consonant((290, 650, 2150), hold=0.05, transition=0.09, voice=0.7),
    "R": _Consonant((310, 1060, 1380), hold=0.05, transition=0.09, voice=0.7),
    "L": _Consonant((310, 1050, 2880), hold=0.05, transition=0.06, voice=0.6),
}


@dataclass(frozen=True)
class Contrast:
    """Two consonants, and whether they stand before (onset) or behind (coda) the vowel."""

    first: str
    second: str
    place: Literal["onset", "coda"] = "onset"


# Pairs that differ in place, in voicing, in frication, and in the formants of sonorants.
CONTRASTS = (
    Contrast("B", "D"),
    Contrast("D", "G"),
    Contrast("B", "P"),
    Contrast("D", "T"),
    Contrast("G", "K"),
    Contrast("S", "SH"),
    Contrast("S", "Z"),
    Contrast("R", "L"),
    Contrast("W", "R"),
    Contrast("B", "W"),
    Contrast("S", "SH", "coda"),
    Contrast("B", "D", "coda"),
)
# What the two syllables of a pair have in common: a vowel.
RIMES = tuple(_VOWELS)


def _onset(one: _Consonant, vowel: str, duration: float) -> list[tuple[float, list[float]]]:
    """Rows of a track, each with the time until the next (s); as many for every consonant, so that tracks can be mixed.

    A row is: three formants, voice, breath, friction, centre and width of friction (see `speechtok.audio.formants`).
    """
    begin, end = (np.array(formants, float) for formants in _VOWELS[vowel])
    locus = np.array(one.locus, float)
    # Formants move on while the release is still aspirated.
    released = locus + (begin - locus) * min(1.0, one.lag / one.transition)
    aspirated = (0.0, 0.25) if one.lag else (max(one.voice, 0.5), 0.0)
    return [
        (0.01, [*locus, 0, 0, 0, *one.noise]),
        (one.hold, [*locus, one.voice, 0, one.friction, *one.noise]),
        (0.002, [*locus, one.voice, 0, one.friction, *one.noise]),
        (0.01, [*locus, one.voice, 0, max(one.burst, one.friction), *one.noise]),
        (0.005, [*locus, one.voice, 0, max(one.burst, one.friction), *one.noise]),
        (max(one.lag, 0.002), [*locus, *aspirated, 0, *one.noise]),
        (0.005, [*released, *aspirated, 0, *one.noise]),
        (max(0.005, one.transition - one.lag), [*released, 1, 0, 0, *one.noise]),
        (0.7 * duration, [*begin, 1, 0, 0, *one.noise]),
        (0.3 * duration, [*end, 1, 0, 0, *one.noise]),
        (0.0, [*end, 0, 0, 0, *one.noise]),
    ]


def _coda(one: _Consonant, vowel: str, duration: float) -> list[tuple[float, list[float]]]:
    """As `_onset`, for a consonant behind the vowel: it is held, and opens with a burst without aspiration."""
    begin, end = (np.array(formants, float) for formants in _VOWELS[vowel])
    return [
        (0.02, [*begin, 0, 0, 0, *one.noise]),
        (0.8 * duration, [*begin, 1, 0, 0, *one.noise]),
        (one.transition, [*end, 1, 0, 0, *one.noise]),
        (0.005, [*one.locus, max(one.voice, 0.5), 0, 0, *one.noise]),
        (one.hold, [*one.locus, one.voice, 0, one.friction, *one.noise]),
        (0.002, [*one.locus, one.voice, 0, one.friction, *one.noise]),
        (0.01, [*one.locus, 0, 0, max(one.burst, one.friction), *one.noise]),
        (0.01, [*one.locus, 0, 0, max(one.burst, one.friction), *one.noise]),
        (0.0, [*one.locus, 0, 0, 0, *one.noise]),
    ]


def synthesize(
    contrast: Contrast,
    vowel: str,
    *,
    steps: int = STEPS,
    pitch: tuple[float, float] = (120.0, 100.0),
    duration: float = 0.25,
    seed: int = 0,
) -> list[Wave]:
    """Continuum between two synthetic syllables.

    Parameters
    ----------
    contrast : Contrast
        Consonants of the first and of the last step, of those of `CONTRASTS`.
    vowel : str
        One of `RIMES`.
    steps : int
        At least 2.
    pitch : (float, float)
        At the start and the end (Hz).
    duration : float
        Of the vowel (s).
    seed : int
        Of the noise.

    Returns
    -------
    list of float32 [N]
        `steps` waves at `SAMPLE_RATE`, of lengths that change in equal steps too; peak 0.3.

    Raises
    ------
    InputError
        If a sound is unknown or a number out of bounds.
    """
    unknown = ({contrast.first, contrast.second} - set(_CONSONANTS)) | ({vowel} - set(_VOWELS))
    if unknown:
        raise InputError(f"{', '.join(sorted(unknown))}: use {', '.join(_CONSONANTS)} with {', '.join(_VOWELS)}")
    if steps < 2 or not 0.05 <= duration <= 5:
        raise InputError(f"{steps} steps of {duration} s: give 2 steps or more and 0.05 to 5 s")
    build = _onset if contrast.place == "onset" else _coda
    tracks = []
    for consonant in (contrast.first, contrast.second):
        rows = build(_CONSONANTS[consonant], vowel, duration)
        lengths = [length for length, _ in rows[:-1]]
        tracks.append((np.cumsum([0.0, *lengths]), np.array([row for _, row in rows], float)))
    (times_a, a), (times_b, b) = tracks
    return [
        speak((1 - share) * times_a + share * times_b, (1 - share) * a + share * b, pitch, seed)
        for share in np.linspace(0, 1, steps)
    ]


@dataclass(frozen=True)
class Word:
    """A word in a file: path, speaker, the word with its times (s), and its phones."""

    path: str
    speaker: str
    word: Span
    phones: tuple[str, ...]


def word_pairs(utterances: Sequence[Utterance], *, shortest: float = 0.2, limit: int = 52) -> list[tuple[Word, Word]]:
    """Words of one syllable and one speaker that differ in one consonant, the longest tokens of each.

    Parameters
    ----------
    utterances : sequence of Utterance
    shortest : float
        Seconds; shorter words are mostly reduced.
    limit : int
        Pairs; every pair of words is taken once, those of the longest tokens first.
    """
    by_speaker: dict[str, dict[tuple[str, ...], Word]] = defaultdict(dict)
    for utterance in utterances:
        for word in utterance.words:
            phones = tuple(
                phone.name for phone in utterance.phones if word.start <= (phone.start + phone.end) / 2 < word.end
            )
            known = by_speaker[utterance.speaker].get(phones)
            usable = (
                len(phones) >= 3 and sum(phone in VOWELS for phone in phones) == 1 and not set(phones) & set(SILENCE)
            )
            longer = known is None or word.end - word.start > known.word.end - known.word.start
            if usable and longer and word.end - word.start >= shortest:
                by_speaker[utterance.speaker][phones] = Word(utterance.path, utterance.speaker, word, phones)
    found: dict[tuple[tuple[str, ...], ...], tuple[float, tuple[Word, Word]]] = {}
    for words in by_speaker.values():
        for a, b in combinations(sorted(words.values(), key=lambda one: one.phones), 2):
            if len(a.phones) != len(b.phones):
                continue
            differ = [(x, y) for x, y in zip(a.phones, b.phones, strict=True) if x != y]
            if len(differ) == 1 and not set(differ[0]) & VOWELS:
                length = min(one.word.end - one.word.start for one in (a, b))
                if length > found.get((a.phones, b.phones), (0.0,))[0]:
                    found[a.phones, b.phones] = length, (a, b)
    return [pair for _, pair in sorted(found.values(), key=lambda one: -one[0])][:limit]


def morphed(
    folder: str | os.PathLike[str], pairs: Sequence[tuple[Word, Word]], *, steps: int = STEPS
) -> Iterator[list[Wave]]:
    """Continua of `word_pairs`: for each `steps` waves float32 at `SAMPLE_RATE`; errors as `AudioFile` and `morph`."""
    for pair in pairs:
        waves = []
        for one in pair:
            wave = load(Path(folder) / one.path, SAMPLE_RATE)
            waves.append(wave[round(one.word.start * SAMPLE_RATE) : round(one.word.end * SAMPLE_RATE)])
        yield morph(waves[0], waves[1], SAMPLE_RATE, steps=steps)


def evaluate(
    embed: Callable[[Wave], NDArray[np.floating[Any]]],
    continua: Iterable[Sequence[Wave]],
    *,
    keep_middle: bool = False,
) -> dict[str, Any]:
    """Index of a function on many continua.

    Parameters
    ----------
    embed : callable
        From a wave float32 [N] at `SAMPLE_RATE` to a vector float [D], for instance an
        `speechtok.evaluation.categorical.Embedding`.
    continua : iterable of list of float32 [N]
        Of `synthesize` or `morphed`.
    keep_middle : bool
        See `speechtok.metrics.categorical.discriminability_index`.

    Returns
    -------
    dict
        By similarity the ``mean`` over continua and its ``standard_error``; ``continua``: how many counted; ``same``:
        how many did not, because both endpoints have the same vector; the convention ``middle``.

    Raises
    ------
    InputError
        If no continuum counts.
    """
    indices: dict[Similarity, list[float]] = {name: [] for name in get_args(Similarity)}
    same = count = 0
    for continuum in continua:
        vectors = np.stack([np.asarray(embed(wave), np.float64) for wave in continuum])
        if len(vectors) > 1 and np.array_equal(vectors[0], vectors[-1]):
            same += 1
            continue
        for name, values in indices.items():
            values.append(discriminability_index(vectors, similarity=name, keep_middle=keep_middle))
    count = len(indices["cosine"])
    if count == 0:
        raise InputError(f"none of the {same} continua has endpoints that differ")
    result: dict[str, Any] = {"continua": count, "same": same, "middle": "kept" if keep_middle else "left out"}
    for name, values in indices.items():
        error = float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else None
        result[name] = {"mean": float(np.mean(values)), "standard_error": error}
    return result
