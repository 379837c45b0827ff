"""Boundaries of segments against reference boundaries: precision, recall, F1, over-segmentation and R-value.

The R-value (Räsänen, Laine and Altosaar 2009) punishes recall that is bought with extra boundaries:
``OS = Re / Pr - 1``, ``r1 = sqrt((1 - Re)^2 + OS^2)``, ``r2 = (Re - 1 - OS) / sqrt(2)``, ``R = 1 - (|r1| + |r2|) / 2``.

A boundary may be used once: a hit takes one predicted and one reference boundary that are at most `tolerance` apart.
Hits, predicted and reference boundaries are counted over all utterances, and ratios are taken of the sums. Protocols
say which boundaries count, and figures of one say nothing about another:

- ``sdhubert`` (Cho et al. 2024, arXiv 2310.10803; the tables of Sylber): predicted are the unique *starts* of segments,
  reference the unique starts *and* ends of syllables. `shift` is added to the reference. Published figures use the
  shift of `SHIFTS` that gives the best R on other data (`best_shift`).
- ``zerosyl`` (Visser et al. 2026, arXiv 2602.15537): predicted are the starts and the last end. The utterance is
  split where the reference is silent (neighbours that do not touch), and only what lies inside a stretch counts: the
  ends of all its syllables but the last, and the predictions more than `tolerance` away from both its edges. `shift` is
  added to the *predicted* boundaries. The published program rounds these to 10 ms before; here nothing is rounded.
- ``inner``: the unique starts and ends of both sides, without the edges of the utterance, as word and phone
  segmentation is scored (mostly at 20 ms; Kamper 2022, arXiv 2202.11929). The edges are the first start and the last
  end of the reference; predictions count that are more than `tolerance` inside of both. `shift` is added to the
  predicted boundaries.

All match greedily in order of time, which finds as many hits as there can be. Times are compared in whole
microseconds: no float decides whether 50 ms are 50 ms.

*Intervals* are counted apart (`evaluate_intervals`): a segment is a hit if its start and its end are both within the
tolerance of those of one syllable.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError

__all__ = [
    "SHIFTED",
    "SHIFTS",
    "TOLERANCE",
    "Counts",
    "Protocol",
    "best_shift",
    "count",
    "evaluate",
    "evaluate_intervals",
    "f1",
    "hits",
    "interval_hits",
    "over_segmentation",
    "r_value",
    "validate",
]

Protocol = Literal["sdhubert", "zerosyl", "inner"]
Spans = NDArray[np.float64]
Ticks = NDArray[np.int64]

TOLERANCE = 0.05  # seconds
# Seconds. SD-HuBERT tries every 5 ms of this range. With half of that, borders of any encoder can meet the 10 ms grid
# of alignments, where the tolerance, which is inclusive, takes in one place more.
SHIFTS = tuple(step / 400 for step in range(-20, 20))
# What a shift is added to.
SHIFTED: dict[Protocol, str] = {"sdhubert": "reference", "zerosyl": "predicted", "inner": "predicted"}

_TICK = 1e-6


class Counts(NamedTuple):
    """Boundaries, or intervals: matched, predicted, of the reference."""

    hits: int
    predicted: int
    reference: int


def validate(spans: Spans, name: str = "segments") -> None:
    """Check segments: InputError unless float [S, 2] of finite (start, end) in order, with no end before its start."""
    if spans.ndim != 2 or spans.shape[1] != 2 or spans.dtype.kind != "f":
        raise InputError(f"{name} are {spans.dtype} {list(spans.shape)}; give float seconds [S, 2]")
    if not np.isfinite(spans).all():
        raise InputError(f"{name} hold NaN or infinite times")
    if (spans[:, 1] < spans[:, 0]).any() or (spans[1:] < spans[:-1]).any():
        bad = int(np.flatnonzero((spans[:, 1] < spans[:, 0]) | np.r_[False, (spans[1:] < spans[:-1]).any(1)])[0])
        raise InputError(f"{name}: segment {bad} is {spans[bad].tolist()}; sort them, and no end may precede its start")


def _validate_options(protocol: str, tolerance: float, shift: float) -> None:
    if protocol not in get_args(Protocol):
        raise InputError(f"protocol {protocol!r} is none of {', '.join(get_args(Protocol))}")
    if not (np.isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"the tolerance is {tolerance} s; it must not be negative")
    if not np.isfinite(shift):
        raise InputError(f"the shift is {shift} s; it must be a number")


def _ticks(seconds: NDArray[np.float64] | float) -> Ticks:
    return np.rint(np.asarray(seconds) / _TICK).astype(np.int64)


def hits(reference: Ticks, predicted: Ticks, tolerance: int) -> int:
    """Matched pairs of two sorted int64 lists of times: a sweep that takes the earliest pair within `tolerance`.

    It is SD-HuBERT's loop over two pointers, and takes the same pairs as ZeroSyl's search for the first free prediction
    of each reference.
    """
    found = i = j = 0
    left, right = reference.tolist(), predicted.tolist()
    while i < len(left) and j < len(right):
        if abs(left[i] - right[j]) <= tolerance:
            found, i, j = found + 1, i + 1, j + 1
        elif left[i] > right[j]:
            j += 1
        else:
            i += 1
    return found


def count(
    reference: Spans, predicted: Spans, *, protocol: Protocol, tolerance: float = TOLERANCE, shift: float = 0.0
) -> Counts:
    """Boundaries of one utterance.

    Parameters
    ----------
    reference, predicted : float64 [S, 2]
        Start and end of each syllable and of each segment (s), in order of time.
    protocol : {"sdhubert", "zerosyl", "inner"}
        See the head of this module.
    tolerance : float
        Largest distance of a hit (s), inclusive.
    shift : float
        Added to the boundaries that `SHIFTED` names (s).

    Raises
    ------
    InputError
        As `validate`, or if an option is out of bounds.
    """
    _validate_options(protocol, tolerance, shift)
    validate(reference, "reference syllables")
    validate(predicted)
    return _count(_ticks(reference), _ticks(predicted), protocol, int(_ticks(tolerance)), int(_ticks(shift)))


def _count(reference: Ticks, predicted: Ticks, protocol: Protocol, tolerance: int, shift: int) -> Counts:
    """`count` in microseconds."""
    if protocol == "sdhubert":
        guessed, wanted = np.unique(predicted[:, 0]), np.unique(reference) + shift
        return Counts(hits(wanted, guessed, tolerance), len(guessed), len(wanted))
    if protocol == "inner":
        if not len(reference):
            return Counts(0, 0, 0)
        wanted, guessed = np.unique(reference)[1:-1], np.unique(predicted) + shift
        guessed = guessed[(guessed > reference[0, 0] + tolerance) & (guessed < reference[-1, 1] - tolerance)]
        return Counts(hits(wanted, guessed, tolerance), len(guessed), len(wanted))
    # Starts and last end are a list, not a set, but two segments never begin at once except where one is empty.
    guessed = np.sort(np.append(predicted[:, 0], predicted[-1:, 1])) + shift
    cuts = np.flatnonzero(reference[1:, 0] > reference[:-1, 1]) + 1
    total = np.zeros(3, np.int64)
    for begin, end in pairwise([0, *cuts.tolist(), len(reference)]):
        if begin == end:
            continue
        first, last = reference[begin, 0] + tolerance, reference[end - 1, 1] - tolerance
        inside = guessed[(guessed > first) & (guessed < last)]
        wanted = reference[begin : end - 1, 1]
        total += hits(wanted, inside, tolerance), len(inside), len(wanted)
    return Counts(*total.tolist())


def interval_hits(reference: Ticks, predicted: Ticks, tolerance: int) -> int:
    """Pairs of int64 [R, 2] and [S, 2] intervals whose starts and ends are both within `tolerance`, each used once.

    Both sides are in order of their starts and of their ends, so a prediction that begins or ends too early for one
    interval is too early for all later ones, and taking the earliest that fits finds as many pairs as there can be.
    """
    found = j = 0
    guesses = predicted.tolist()
    for start, end in reference.tolist():
        while j < len(guesses) and (guesses[j][0] < start - tolerance or guesses[j][1] < end - tolerance):
            j += 1
        if j < len(guesses) and guesses[j][0] <= start + tolerance and guesses[j][1] <= end + tolerance:
            found, j = found + 1, j + 1
    return found


def f1(precision: float, recall: float) -> float:
    """Harmonic mean; 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def over_segmentation(precision: float, recall: float) -> float:
    """``Re / Pr - 1``: predicted over reference boundaries, less one; NaN without a hit."""
    return recall / precision - 1 if precision > 0 else float("nan")


def r_value(precision: float, recall: float) -> float:
    """R-value of precision and recall in [0, 1]; NaN without a hit, where over-segmentation is not defined."""
    surplus = over_segmentation(precision, recall)
    r1 = np.hypot(1 - recall, surplus)
    r2 = (recall - 1 - surplus) / np.sqrt(2)
    return float(1 - (abs(r1) + abs(r2)) / 2)


def _pairs(references: Sequence[Spans], predictions: Sequence[Spans]) -> list[tuple[Ticks, Ticks]]:
    """Both sides of each utterance in microseconds; InputError where they are unusable."""
    if len(references) != len(predictions) or not len(references):
        raise InputError(f"{len(references)} references and {len(predictions)} predictions; give pairs, at least one")
    for reference, predicted in zip(references, predictions, strict=True):
        validate(reference, "reference syllables")
        validate(predicted)
    return [(_ticks(a), _ticks(b)) for a, b in zip(references, predictions, strict=True)]


def _pooled(
    references: Sequence[Spans],
    predictions: Sequence[Spans],
    protocol: Protocol,
    tolerance: float,
    shifts: Sequence[float],
) -> list[Counts]:
    """Sums over utterances, one for each shift."""
    pairs = _pairs(references, predictions)
    sums = []
    for shift in shifts:
        _validate_options(protocol, tolerance, shift)
        steps = int(_ticks(tolerance)), int(_ticks(shift))
        sums.append(Counts(*np.sum([_count(a, b, protocol, *steps) for a, b in pairs], axis=0).tolist()))
    return sums


def _ratios(counts: Counts) -> tuple[float, float]:
    """Precision and recall; 0 where there is nothing to divide by."""
    return counts.hits / max(1, counts.predicted), counts.hits / max(1, counts.reference)


def best_shift(
    references: Sequence[Spans],
    predictions: Sequence[Spans],
    *,
    protocol: Protocol,
    tolerance: float = TOLERANCE,
    shifts: Sequence[float] = SHIFTS,
) -> float:
    """The shift (s) of `shifts` with the largest R-value, the first of equals; choose it on other data than you report.

    Parameters
    ----------
    references, predictions, protocol, tolerance
        As `evaluate`.
    shifts : sequence of float
        Candidates (s).

    Raises
    ------
    InputError
        As `count`, or if no shift gives a hit.
    """
    sums = _pooled(references, predictions, protocol, tolerance, shifts)
    values = [r_value(*_ratios(counts)) for counts in sums]
    if np.isnan(values).all():
        raise InputError("no boundary is matched at any shift; are the segments seconds, and those of these files?")
    return float(shifts[int(np.nanargmax(values))])


def evaluate(
    references: Sequence[Spans],
    predictions: Sequence[Spans],
    *,
    protocol: Protocol,
    tolerance: float = TOLERANCE,
    shift: float = 0.0,
) -> dict[str, Any]:
    """All figures of this module.

    Parameters
    ----------
    references, predictions : list of float64 [S, 2]
        Syllables and segments of each utterance: start and end (s), in order of time; S may be 0.
    protocol, tolerance, shift
        As `count`.

    Returns
    -------
    dict
        ``precision``, ``recall``, ``f1``, ``over_segmentation``, ``r_value`` (as fractions; the last two None without a
        hit), the counts, and the conventions ``protocol``, ``tolerance``, ``shift`` and ``shifted``.

    Raises
    ------
    InputError
        As `count`, or if there is no reference boundary.
    """
    (counts,) = _pooled(references, predictions, protocol, tolerance, [shift])
    if counts.reference == 0:
        raise InputError("the references hold no boundary that counts")
    precision, recall = _ratios(counts)
    return {
        "protocol": protocol,
        "tolerance": float(tolerance),
        "shift": float(shift),
        "shifted": SHIFTED[protocol],
        **counts._asdict(),
        "precision": precision,
        "recall": recall,
        "f1": f1(precision, recall),
        "over_segmentation": over_segmentation(precision, recall) if counts.hits else None,
        "r_value": r_value(precision, recall) if counts.hits else None,
    }


def evaluate_intervals(
    references: Sequence[Spans], predictions: Sequence[Spans], *, tolerance: float = TOLERANCE, shift: float = 0.0
) -> dict[str, Any]:
    """Precision, recall and F1 of whole intervals: both edges within the tolerance.

    Parameters
    ----------
    references, predictions : list of float64 [S, 2]
        As `evaluate`.
    tolerance : float
        Largest distance of each edge (s), inclusive.
    shift : float
        Added to the reference (s).

    Returns
    -------
    dict
        ``precision``, ``recall`` and ``f1`` as fractions, the counts, and the conventions ``tolerance``, ``shift`` and
        ``shifted``.

    Raises
    ------
    InputError
        As `evaluate`.
    """
    _validate_options("sdhubert", tolerance, shift)
    pairs = _pairs(references, predictions)
    near, move = int(_ticks(tolerance)), int(_ticks(shift))
    counts = Counts(
        sum(interval_hits(reference + move, predicted, near) for reference, predicted in pairs),
        sum(len(predicted) for _, predicted in pairs),
        sum(len(reference) for reference, _ in pairs),
    )
    if counts.reference == 0:
        raise InputError("the references hold no syllable")
    precision, recall = _ratios(counts)
    return {
        "tolerance": float(tolerance),
        "shift": float(shift),
        "shifted": "reference",
        **counts._asdict(),
        "precision": precision,
        "recall": recall,
        "f1": f1(precision, recall),
    }
