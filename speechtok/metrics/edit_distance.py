"""Unit edit distance, UED: how much units change when the sound is changed (Gat et al. 2023, arXiv 2209.15483).

Runs of equal units count once on both sides, so a pure change of tempo costs nothing. The Levenshtein distance has unit
costs. Conventions differ between publications, so both are chosen by name and reported:

- `norm`: ``dedup_ref`` divides by the runs of the clean sequence (NAST and the known re-implementations of the paper),
  ``frames`` by its frames (the paper's formula), ``max_len`` by the runs of the longer side.
- `agg`: ``mean`` of the utterances' ratios (the paper), ``pooled`` edits over pooled lengths (NAST, word error rate).

Figures are percentages and may exceed 100. An empty clean sequence has length 1 for this purpose: 0 if both are empty.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from speechtok.errors import InputError
from speechtok.units import run_lengths

__all__ = ["Agg", "Norm", "aggregate", "distances", "evaluate", "interval", "unit_edit_distance", "validate"]

Integers = NDArray[np.integer[Any]]
Norm = Literal["dedup_ref", "frames", "max_len"]
Agg = Literal["mean", "pooled"]


def validate(references: Sequence[Integers], hypotheses: Sequence[Integers], norm: str, agg: str) -> None:
    """InputError unless there are as many int [T] references as hypotheses, at least one, and the names are known."""
    if norm not in get_args(Norm):
        raise InputError(f"norm {norm!r} is none of {', '.join(get_args(Norm))}")
    if agg not in get_args(Agg):
        raise InputError(f"agg {agg!r} is none of {', '.join(get_args(Agg))}")
    if len(references) != len(hypotheses) or not len(references):
        raise InputError(f"{len(references)} references and {len(hypotheses)} hypotheses; give pairs, at least one")
    for units in (*references, *hypotheses):
        if units.ndim != 1 or units.dtype.kind not in "iu":
            raise InputError(f"units must be integer [T], not {units.dtype} {units.shape}; take one codebook")


def distances(
    references: Sequence[Integers], hypotheses: Sequence[Integers], norm: Norm = "dedup_ref"
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Edits and the length they are divided by, int64 [N] each, of N pairs of int [T] units (for bootstrap)."""
    validate(references, hypotheses, norm, "mean")
    edits, lengths = np.zeros((2, len(references)), np.int64)
    for index, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        # Python integers: rapidfuzz is much quicker with them than with numpy's.
        clean, changed = (run_lengths(np.asarray(x, np.int32))[0].tolist() for x in (reference, hypothesis))
        edits[index] = Levenshtein.distance(clean, changed)
        length = {"dedup_ref": len(clean), "frames": len(reference), "max_len": max(len(clean), len(changed))}[norm]
        lengths[index] = max(1, length)
    return edits, lengths


def aggregate(edits: Integers, lengths: Integers, agg: Agg = "mean") -> float:
    """UED in percent from edits and lengths, int64 [N] each, of `distances`."""
    return float(100 * (edits.sum() / lengths.sum() if agg == "pooled" else (edits / lengths).mean()))


def interval(
    edits: Integers, lengths: Integers, agg: Agg = "mean", *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of `aggregate` by bootstrap: utterances are drawn again with replacement.

    Parameters
    ----------
    edits, lengths : int64 [N]
        See `distances`.
    agg : str
    resamples, seed : int
        How often, and how they are drawn.
    """
    drawn = np.random.default_rng(seed).integers(0, len(edits), (resamples, len(edits)))
    values = edits[drawn].sum(1) / lengths[drawn].sum(1) if agg == "pooled" else (edits / lengths)[drawn].mean(1)
    low, high = np.percentile(100 * values, (2.5, 97.5))
    return float(low), float(high)


def unit_edit_distance(
    references: Sequence[Integers],
    hypotheses: Sequence[Integers],
    *,
    norm: Norm = "dedup_ref",
    agg: Agg = "mean",
) -> float:
    """UED in percent.

    Parameters
    ----------
    references, hypotheses : list of int [T]
        Units of the clean and of the changed sound, one per frame.
    norm, agg : str
        See the head of this module.

    Raises
    ------
    InputError
        As `validate`.
    """
    validate(references, hypotheses, norm, agg)
    return aggregate(*distances(references, hypotheses, norm), agg)


def evaluate(
    references: Sequence[Integers],
    hypotheses: Sequence[Integers],
    *,
    norm: Norm = "dedup_ref",
    agg: Agg = "mean",
    seconds: float | None = None,
) -> dict[str, Any]:
    """UED with its conventions and what belongs beside it.

    Parameters
    ----------
    references, hypotheses, norm, agg
        As `unit_edit_distance`.
    seconds : float, optional
        Total duration of the clean sound; adds edits per second, which compares tokenizers of unlike rates.

    Returns
    -------
    dict
        ``ued`` (percent), ``norm``, ``agg``, ``pairs``, ``run_ratio``: runs of the changed over runs of the clean sound
        (0 if there are none), and ``edits_per_second``.
    """
    ued = unit_edit_distance(references, hypotheses, norm=norm, agg=agg)
    clean, changed = (
        sum(len(run_lengths(np.asarray(units, np.int32))[0]) for units in side) for side in (references, hypotheses)
    )
    result: dict[str, Any] = {
        "ued": ued,
        "norm": norm,
        "agg": agg,
        "pairs": len(references),
        "run_ratio": changed / clean if clean else 0.0,
    }
    if seconds is not None:
        if not seconds > 0:
            raise InputError(f"the total duration is {seconds} s; it must be positive")
        result["edits_per_second"] = float(distances(references, hypotheses, norm)[0].sum() / seconds)
    return result
