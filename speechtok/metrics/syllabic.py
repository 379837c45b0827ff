"""What the units of segments say about syllables (SP, CP, SNMI), and what they cost.

Each segment has one unit; a matching gives it a syllable. Two are published:

- ``iou`` (SD-HuBERT, Cho et al. 2024, arXiv 2310.10803): syllables and segments of an utterance are paired one to one
  so that the sum of their temporal IoU is largest (Hungarian algorithm). ``IoU = inter / (union + 1e-4)`` with
  ``inter = min(ends) - max(starts)``, which is negative where they are apart, and ``union = max(ends) - min(starts)``.
  As many pairs are made as the shorter side has members, also of those that do not overlap; the rest does not count.
- ``overlap`` (ZeroSyl, Visser et al. 2026, arXiv 2602.15537): every segment takes the label of the reference interval
  that it overlaps longest, the earlier of equals. Silences are intervals too; whether segments that fall to them count
  is explicit (`keep_silence`; the published program counts them, as one more type of syllable).

The names SP and CP are swapped with respect to usual purity, here as published: *syllable purity* SP is the share of
pairs whose syllable is the most frequent one of their unit (the ordinary purity of clusters), *cluster purity* CP the
share of pairs whose unit is the most frequent one of their syllable (inverse purity). ``SNMI = I(syllable; unit) /
H(syllable)``. All are counted over all utterances. With thousands of syllable types and units, few pairs per cell make
SP and SNMI look good (see `speechtok.metrics.phonetic` on the bias), so pairs, types and expected bias go with them:
compare tokenizers on the same files and with vocabularies of about the same size.

Bitrates: tokens per second of all sound, silence included, times the bits of a token. *Timing* of a token is its
duration and the gap before it, both in whole steps; ``H(unit, timing)`` is what a decoder needs that puts every unit
back into its place, and ``H(unit) + H(timing)`` the same where the two are coded apart: an estimate that few tokens per
unit do not bend downwards.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError
from speechtok.metrics import bitrate, phonetic
from speechtok.metrics.boundaries import validate as validate_spans

__all__ = ["Matching", "assignment", "cost", "evaluate", "match_iou", "match_overlap", "temporal_iou", "validate"]

Matching = Literal["iou", "overlap"]
Integers = NDArray[np.integer[Any]]
Spans = NDArray[np.float64]


def validate(predictions: Sequence[Spans], ids: Sequence[Integers]) -> None:
    """Check units: InputError unless each utterance has float [S, 2] segments and int [S] ids, none negative."""
    if len(predictions) != len(ids) or not len(ids):
        raise InputError(f"{len(predictions)} segmentations and {len(ids)} arrays of ids; give pairs, at least one")
    for spans, units in zip(predictions, ids, strict=True):
        validate_spans(spans)
        if units.dtype.kind not in "iu" or units.shape != (len(spans),):
            raise InputError(
                f"ids are {units.dtype} {list(units.shape)}; {len(spans)} segments need integers, one each"
            )
        if len(units) and int(units.min()) < 0:
            raise InputError("ids must not be negative; leave out the segments that have none")


def temporal_iou(reference: Spans, predicted: Spans) -> NDArray[np.float64]:
    """IoU of float64 [R, 2] and [S, 2] spans (s), negative where they are apart: float64 [R, S]."""
    inter = np.minimum.outer(reference[:, 1], predicted[:, 1]) - np.maximum.outer(reference[:, 0], predicted[:, 0])
    union = np.maximum.outer(reference[:, 1], predicted[:, 1]) - np.minimum.outer(reference[:, 0], predicted[:, 0])
    return np.asarray(inter / (union + 1e-4))


def assignment(scores: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of rows and columns with the largest sum of scores, each used at most once.

    Shortest augmenting paths with potentials (Kuhn 1955, Munkres 1957; in the form of Jonker and Volgenant 1987).

    Parameters
    ----------
    scores : float64 [R, C]
        Finite.

    Returns
    -------
    rows, columns : int64 [min(R, C)]
        In order of the rows.
    """
    if scores.shape[0] > scores.shape[1]:
        columns, rows = assignment(scores.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    count, width = scores.shape
    # Column `width` is where the row that looks for a partner stands before it has one.
    owner = np.full(width + 1, -1, np.int64)
    row_price, column_price = np.zeros(count), np.zeros(width + 1)
    for row in range(count):
        owner[width], column = row, width
        slack = np.full(width, np.inf)  # of the cheapest known path to each column
        before = np.full(width, width, np.int64)
        done = np.zeros(width + 1, bool)
        while owner[column] >= 0:
            done[column] = True
            current = owner[column]
            free = ~done[:width]
            reduced = -scores[current] - row_price[current] - column_price[:width]
            better = free & (reduced < slack)
            slack[better], before[better] = reduced[better], column
            column = int(np.argmin(np.where(free, slack, np.inf)))
            step = slack[column]
            row_price[owner[done]] += step
            column_price[done] -= step
            slack[free] -= step
        while column != width:
            owner[column] = owner[before[column]]
            column = int(before[column])
    columns = np.flatnonzero(owner[:width] >= 0)
    order = np.argsort(owner[columns])
    return owner[columns][order], columns[order]


def match_iou(reference: Spans, predicted: Spans) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Syllables and segments that belong together: int64 [min(R, S)] indices of either; see the head of the module."""
    if not (len(reference) and len(predicted)):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return assignment(temporal_iou(reference, predicted))


def match_overlap(reference: Spans, predicted: Spans) -> NDArray[np.int64]:
    """Syllable that each segment overlaps longest: int64 [S] of float64 [R, 2] and [S, 2] spans; -1 for silence."""
    if not (len(reference) and len(predicted)):
        return np.full(len(predicted), -1, np.int64)
    edges = [predicted[0, 0], *reference.ravel().tolist(), predicted[:, 1].max()]
    # Silence, syllable, silence, syllable, ..., silence tile the time; between touching syllables it is empty.
    intervals = np.lib.stride_tricks.sliding_window_view(np.asarray(edges), 2)
    overlaps = np.minimum.outer(predicted[:, 1], intervals[:, 1]) - np.maximum.outer(predicted[:, 0], intervals[:, 0])
    overlaps[:, intervals[:, 1] <= intervals[:, 0]] = -np.inf
    # Rounding: of two overlaps that differ by float noise the earlier interval wins, as of equals.
    best = np.argmax(np.round(overlaps, 9), axis=1)
    return np.where(best % 2 == 1, best // 2, -1)


def cost(
    predictions: Sequence[Spans], ids: Sequence[Integers], *, seconds: float, vocab_size: int, step: float = 0.02
) -> dict[str, Any]:
    """Tokens and bits per second.

    Parameters
    ----------
    predictions : list of float64 [S, 2]
        Start and end of each segment (s).
    ids : list of int [S]
        Their units.
    seconds : float
        Total duration of the files, silence included.
    vocab_size : int
        For the nominal bitrate.
    step : float
        Unit of time in which durations and gaps are coded (s).

    Returns
    -------
    dict
        ``tokens_per_second``; ``nominal_bitrate`` (log2 of the vocabulary), ``entropy_bitrate`` (of units alone),
        ``entropy_bitrate_with_timing`` and ``entropy_bitrate_and_timing`` (coded together, and apart).

    Raises
    ------
    InputError
        If there are no units, or an option is out of bounds.
    """
    validate(predictions, ids)
    if not (np.isfinite(step) and step > 0):
        raise InputError(f"the time step is {step} s; it must be positive")
    units = _joined(ids, vocab_size)
    timings = []
    for spans in predictions:
        edges = np.rint(spans / step).astype(np.int64)
        gaps = edges[:, 0] - np.append(0, edges[:-1, 1])[: len(edges)]
        timings.append(np.stack([edges[:, 1] - edges[:, 0], gaps], 1))
    rows = np.concatenate(timings)
    timing = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    both = np.unique(np.column_stack([units, rows]), axis=0, return_inverse=True)[1].reshape(-1)
    rate = bitrate.units_per_second(ids, seconds, deduplicated=False)
    plain, times, joint = (
        bitrate.entropy_bitrate([values], seconds, deduplicated=False) for values in (units, timing, both)
    )
    return {
        "tokens_per_second": rate,
        "nominal_bitrate": bitrate.nominal(rate, vocab_size),
        "entropy_bitrate": plain,
        "entropy_bitrate_with_timing": joint,
        "entropy_bitrate_and_timing": plain + times,
    }


def _joined(ids: Sequence[Integers], vocab_size: int) -> Integers:
    """All ids in one int [N] array; InputError if there are none or one is not below `vocab_size`."""
    joined = np.concatenate(list(ids))
    if len(joined) == 0:
        raise InputError("there are no units")
    if int(joined.max()) >= vocab_size:
        raise InputError(f"unit {int(joined.max())} is outside the vocabulary of {vocab_size}")
    return joined


def evaluate(
    references: Sequence[Spans],
    labels: Sequence[Sequence[str]],
    predictions: Sequence[Spans],
    ids: Sequence[Integers],
    *,
    vocab_size: int,
    matching: Matching = "iou",
    keep_silence: bool = False,
) -> dict[str, Any]:
    """Purities and mutual information.

    Parameters
    ----------
    references : list of float64 [R, 2]
        Start and end of each syllable (s), in order of time.
    labels : list of sequence of str [R]
        Names of the syllables.
    predictions : list of float64 [S, 2]
        Start and end of each segment (s), in order of time.
    ids : list of int [S]
        Units of the segments, not negative and below `vocab_size`.
    matching : {"iou", "overlap"}
        See the head of this module.
    keep_silence : bool
        With ``overlap``: whether segments that fall to silence count, as one more type of syllable. With ``iou`` there
        are none.

    Returns
    -------
    dict
        ``syllable_purity`` (SP), ``cluster_purity`` (CP), ``snmi``, and each with ``_chance``: of the same units in
        random order, which is far from 0 where pairs are few beside types and units (the Miller-Madow correction,
        ``snmi_miller_madow`` and ``snmi_bias``, means nothing there: it exceeds the information itself); ``pairs``,
        ``types`` of syllables and ``units_used`` among them; the conventions ``matching`` and ``silence``.

    Raises
    ------
    InputError
        If arrays do not fit, an option is unknown, or no pair is left.
    """
    if matching not in get_args(Matching):
        raise InputError(f"matching {matching!r} is none of {', '.join(get_args(Matching))}")
    validate(predictions, ids)
    if not len(references) == len(labels) == len(predictions):
        raise InputError(
            f"{len(references)} references, {len(labels)} lists of labels and {len(predictions)} segmentations"
        )
    _joined(ids, vocab_size)
    names: list[str] = []
    units: list[int] = []
    for spans, called, segments, codes in zip(references, labels, predictions, ids, strict=True):
        validate_spans(spans, "reference syllables")
        if len(called) != len(spans):
            raise InputError(f"{len(spans)} syllables have {len(called)} labels")
        if matching == "iou":
            rows, columns = match_iou(spans, segments)
        else:
            rows, columns = match_overlap(spans, segments), np.arange(len(segments))
            if not keep_silence:
                rows, columns = rows[rows >= 0], columns[rows >= 0]
        names += ["" if row < 0 else called[row] for row in rows.tolist()]
        units += codes[columns].tolist()
    if not names:
        raise InputError("no segment is paired with a syllable")
    # Counting needs ranks only; ids of a large vocabulary would leave most of the table empty.
    types, codes = np.unique(names, return_inverse=True)[1], np.unique(units, return_inverse=True)[1]
    figures = phonetic.evaluate(types, codes, vocab_size=len(set(units)))
    shuffled = np.random.default_rng(0).permutation(codes)
    chance = phonetic.evaluate(types, shuffled, vocab_size=len(set(units)))
    return {
        "matching": matching,
        "silence": "kept" if matching == "overlap" and keep_silence else "dropped",
        "pairs": figures["frames"],
        "types": figures["phones"],
        "units_used": figures["units_used"],
        "syllable_purity": figures["phone_purity"],
        "cluster_purity": figures["cluster_purity"],
        "snmi": figures["pnmi"],
        "snmi_miller_madow": figures["pnmi_miller_madow"],
        "snmi_bias": figures["pnmi_bias"],
        "syllable_purity_chance": chance["phone_purity"],
        "cluster_purity_chance": chance["cluster_purity"],
        "snmi_chance": chance["pnmi"],
    }
