"""Reference syllables of an aligned folder: words and phones in, syllable spans out.

Aligned folders name words and phones, not syllables, so syllables are made by rule, and figures against them depend on
the rules. They are these:

- Every vowel (`VOWELS`, ER among them) is the nucleus of one syllable. Dictionaries write syllabic consonants as a
  vowel and a consonant (AH L, AH N), so nothing else is a nucleus.
- Maximal onset (Kahn 1976): of the consonants between two nuclei, the longest run that ends at the second one and is a
  legal English onset (`ONSETS`) opens its syllable; the others close the syllable before. Stress has no say. Consonants
  before the first nucleus are its onset and those after the last are its coda, legal or not.
- Syllables never cross words: "at all" is AE T, AO L.
- Silence, noise that the aligner could not name (SIL, SPN) or a gap between phones inside a word cuts the word into
  stretches that are syllabified apart. No syllable holds silence or noise.
- A word, or such a stretch of one, without a vowel ("mm", "shh") is one syllable.
- A phone belongs to the word that holds its centre. Digits for stress (``AH0``) are removed. The label of a syllable is
  its phones with spaces between them: ``S T R EH NG TH``.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from speechtok.errors import InputError
from speechtok.evaluation.alignments import GROUPS, SILENCE, Span, Utterance, read
from speechtok.evaluation.units import each_group, spread

__all__ = ["ONSETS", "RULES", "VOWELS", "evaluate", "split", "syllables"]

# What figures against these syllables state as their reference.
RULES = "maximal onset within words, from forced alignments"

VOWELS = frozenset(
    ("AA", "AE", "AH", "AO", "AW", "AX", "AY", "EH", "ER", "EY", "IH", "IX", "IY", "OW", "OY", "UH", "UW")
)

# Consonants and clusters that begin English syllables; NG never does, and R, L, W, Y alone do.
_SINGLE = ("P", "B", "T", "D", "K", "G", "CH", "JH", "F", "V", "TH", "DH", "S", "Z", "SH", "ZH", "HH", "M", "N")
_SECOND = {  # after a first consonant
    "L": ("P", "B", "K", "G", "F", "S"),
    "R": ("P", "B", "T", "D", "K", "G", "F", "TH", "SH"),
    "W": ("T", "D", "K", "G", "TH", "HH", "S"),
    "Y": ("P", "B", "T", "D", "K", "G", "F", "V", "TH", "HH", "M", "N", "L", "S"),
}
_AFTER_S = ("P", "T", "K", "F", "M", "N", "P L", "P R", "P Y", "T R", "T Y", "K L", "K R", "K W", "K Y")
ONSETS = frozenset(
    tuple(onset.split())
    for onset in (
        *_SINGLE,
        *_SECOND,
        *(f"{first} {second}" for second, firsts in _SECOND.items() for first in firsts),
        *(f"S {rest}" for rest in _AFTER_S),
    )
)

_TICK = 1e-6  # times of alignments are compared in microseconds


def split(phones: Sequence[str]) -> list[tuple[int, int]]:
    """Syllables of a word or a stretch of one.

    Parameters
    ----------
    phones : sequence of str
        ARPAbet without stress and without silence.

    Returns
    -------
    list of (int, int)
        First phone of each syllable and the one behind its last; together they cover all phones.
    """
    nuclei = [index for index, phone in enumerate(phones) if phone in VOWELS]
    borders = [0]
    for previous, nucleus in pairwise(nuclei):
        # The earliest start from which the rest is legal gives the longest onset; the nucleus alone always is.
        borders.append(
            next(i for i in range(previous + 1, nucleus + 1) if i == nucleus or tuple(phones[i:nucleus]) in ONSETS)
        )
    borders.append(len(phones))
    return [(start, stop) for start, stop in pairwise(borders) if start < stop]


def syllables(utterance: Utterance) -> tuple[Span, ...]:
    """Syllables of an aligned utterance.

    Parameters
    ----------
    utterance : Utterance

    Returns
    -------
    tuple of Span
        In order of time, not overlapping; `Span.name` is the label. Times are those of the phones (s). Neighbours share
        a border unless silence is between them.

    Raises
    ------
    InputError
        If a phone of speech lies in no word.
    """
    stretches: list[list[Span]] = []
    starts = [word.start for word in utterance.words]
    last = -1
    for phone in utterance.phones:
        if phone.name in SILENCE:
            last = -1
            continue
        word = bisect_right(starts, (phone.start + phone.end) / 2) - 1
        if word < 0 or (phone.start + phone.end) / 2 > utterance.words[word].end:
            raise InputError(
                f"{utterance.path}: phone {phone.name} at {phone.start} s lies in no word; syllables need words, mend "
                "its line in alignments.jsonl or leave it out"
            )
        if word != last or phone.start - stretches[-1][-1].end > _TICK:
            stretches.append([])
        last = word
        stretches[-1].append(Span(phone.name.rstrip("012"), phone.start, phone.end))
    return tuple(
        Span(" ".join(phone.name for phone in stretch[i:j]), stretch[i].start, stretch[j - 1].end)
        for stretch in stretches
        for i, j in split([phone.name for phone in stretch])
    )


def evaluate(folder: str | os.PathLike[str], *, limit_files: int | None = None) -> dict[str, Any]:
    """Count the reference syllables of an aligned folder; English is read at about four per second of sound.

    Parameters
    ----------
    folder : path
        An aligned folder (see `speechtok.evaluation.alignments`).
    limit_files : int, optional
        At most this many utterances, evenly spread.

    Returns
    -------
    dict
        ``groups``: per corpus group and pooled the utterances, words, syllables and their types, aligned seconds
        (silence included), seconds of speech, and syllables per second of either; ``left_out`` and ``conventions`` as
        in `speechtok.evaluation.units.evaluate`.

    Raises
    ------
    InputError
        If the folder is unusable.
    """
    utterances = spread(read(folder), limit_files)
    found = [syllables(utterance) for utterance in utterances]

    def score(members: list[int]) -> dict[str, Any]:
        spans = [span for i in members for span in found[i]]
        if not spans:
            raise InputError(f"{utterances[members[0]].path} and others hold no syllable")
        seconds = sum(utterances[i].phones[-1].end for i in members if utterances[i].phones)
        speech = sum(span.end - span.start for span in spans)
        return {
            "utterances": len(members),
            "words": sum(len(utterances[i].words) for i in members),
            "syllables": len(spans),
            "types": len({span.name for span in spans}),
            "seconds": seconds,
            "speech_seconds": speech,
            "syllables_per_second": len(spans) / seconds,
            "syllables_per_speech_second": len(spans) / speech if speech > 0 else None,
        }

    groups, left_out = each_group(utterances, score)
    return {
        "data": Path(folder).resolve().name,
        "conventions": {
            "syllables": RULES,
            "silence": list(SILENCE),
            "corpora": GROUPS,
            "seconds": "aligned time, silence included",
            "files": "all" if limit_files is None else f"at most {limit_files}, evenly spread",
        },
        "groups": groups,
        "left_out": left_out,
    }
