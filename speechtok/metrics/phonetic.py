"""How much units say about phones: purity and PNMI (HuBERT, Hsu et al. 2021, section V-A), and codebook use.

Conventions: labels and units are compared frame by frame; both are integers; entropies are in nats. Mutual information
estimated from counts is biased upwards by about ``(labels - 1)(units - 1) / (2 N)`` nats, so N always goes with it,
and `pnmi` exists in two forms: from plain counts (fairseq's, which published figures are) and with the correction of
Miller and Madow (1955), which adds ``(occupied - 1) / (2 N)`` to each of the three entropies. Silence inflates every
figure; whether its frames count is the caller's choice (`evaluate`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError

__all__ = [
    "cluster_purity",
    "codebook_use",
    "conditional_entropy",
    "entropy",
    "evaluate",
    "joint_counts",
    "leakage",
    "phone_purity",
    "pnmi",
    "validate",
]

Integers = NDArray[np.integer[Any]]


def validate(labels: Integers, units: Integers) -> None:
    """Check frame labels: InputError unless both are integer [N] of one length N > 0 and not negative."""
    for name, array in (("labels", labels), ("units", units)):
        if array.dtype.kind not in "iu":
            raise InputError(f"{name} have dtype {array.dtype}; give integers")
    if labels.shape != units.shape or labels.ndim != 1 or len(labels) == 0:
        raise InputError(f"labels {labels.shape} and units {units.shape} must be equally long and not empty")
    if int(labels.min()) < 0 or int(units.min()) < 0:
        raise InputError("labels and units must not be negative; leave out the frames that have none")


def joint_counts(labels: Integers, units: Integers) -> NDArray[np.int64]:
    """Count pairs.

    Parameters
    ----------
    labels, units : int [N], not negative

    Returns
    -------
    int64 [L, U]

    Raises
    ------
    InputError
        As `validate`.
    """
    validate(labels, units)
    counts = np.zeros((int(labels.max()) + 1, int(units.max()) + 1), np.int64)
    np.add.at(counts, (labels, units), 1)
    return counts


def entropy(counts: NDArray[np.int64], *, corrected: bool = False) -> float:
    """Entropy (nats) of counts of any shape; `corrected` adds Miller and Madow's ``(occupied - 1) / (2 N)``."""
    total = counts.sum()
    if total == 0:
        raise InputError("the entropy of no counts is not defined")
    share = counts[counts > 0] / total
    plain = float(-(share * np.log(share)).sum())
    return plain + (len(share) - 1) / (2 * float(total)) if corrected else plain


def phone_purity(counts: NDArray[np.int64]) -> float:
    """Share of frames whose label is the most frequent one of their unit."""
    return float(counts.max(0).sum() / counts.sum())


def cluster_purity(counts: NDArray[np.int64]) -> float:
    """Share of frames whose unit is the most frequent one of their label."""
    return float(counts.max(1).sum() / counts.sum())


def _information(counts: NDArray[np.int64], corrected: bool) -> float:
    labels, units = entropy(counts.sum(1), corrected=corrected), entropy(counts.sum(0), corrected=corrected)
    return labels + units - entropy(counts, corrected=corrected)


def pnmi(counts: NDArray[np.int64], *, corrected: bool = False) -> float:
    """Mutual information of label and unit over the entropy of the label.

    Parameters
    ----------
    counts : int64 [L, U]
        Of `joint_counts`.
    corrected : bool
        With Miller and Madow's correction of all three entropies; then it may fall slightly below 0.

    Returns
    -------
    float
        0 if there is one label only.
    """
    labels = entropy(counts.sum(1), corrected=corrected)
    return _information(counts, corrected) / labels if labels > 0 else 0.0


def conditional_entropy(counts: NDArray[np.int64]) -> float:
    """H(unit | label) in nats: what units tell beyond the label."""
    return entropy(counts) - entropy(counts.sum(1))


def leakage(speakers: Integers, units: Integers, *, corrected: bool = False) -> float:
    """Speaker leakage ``I(unit; speaker) / H(speaker)`` of int [N] speakers and units; 1: units tell the speaker."""
    return pnmi(joint_counts(speakers, units), corrected=corrected)


def codebook_use(units: Integers, vocab_size: int) -> dict[str, float]:
    """How a codebook of K = `vocab_size` codes is used by int [N] units.

    Returns
    -------
    dict
        ``units_used``; ``dead_codes`` (never seen); ``usage``: codes with a share above ``1 / (10 K)``;
        ``perplexity``: e to the entropy.
    """
    if len(units) == 0 or int(units.min()) < 0 or int(units.max()) >= vocab_size:
        raise InputError(f"units must not be empty and must lie in the vocabulary of {vocab_size}")
    counts = np.bincount(units, minlength=vocab_size)
    used = int((counts > 0).sum())
    return {
        "units_used": used,
        "dead_codes": vocab_size - used,
        "usage": int((counts * 10 * vocab_size > len(units)).sum()),
        "perplexity": float(np.exp(entropy(counts))),
    }


def evaluate(
    labels: Integers,
    units: Integers,
    *,
    vocab_size: int,
    silent: Sequence[int] = (),
    keep_silence: bool = True,
    speakers: Integers | None = None,
) -> dict[str, Any]:
    """All figures of this module.

    Parameters
    ----------
    labels, units : int [N], not negative
        Of each frame.
    vocab_size : int
        K; units are below it.
    silent : sequence of int
        Labels that mean silence.
    keep_silence : bool
        Whether frames with those labels count.
    speakers : int [N], optional
        Of each frame; adds the leakage.

    Returns
    -------
    dict
        Figures; ``frames`` is the number that counted, ``pnmi_bias`` the expected bias of ``pnmi``. ``silence`` tells
        the policy.

    Raises
    ------
    InputError
        If arrays do not fit or no frame is left.
    """
    validate(labels, units)
    if speakers is not None:
        validate(speakers, units)
    counted = np.ones(len(labels), bool) if keep_silence else ~np.isin(labels, list(silent))
    if not counted.any():
        raise InputError("no frame is left without silence")
    labels, units = labels[counted], units[counted]
    counts = joint_counts(labels, units)
    use = codebook_use(units, vocab_size)
    phones, information = int((counts.sum(1) > 0).sum()), entropy(counts.sum(1))
    bias = (phones - 1) * (use["units_used"] - 1) / (2 * len(labels) * information) if information > 0 else 0.0
    result: dict[str, Any] = {
        "silence": "kept" if keep_silence else "dropped",
        "frames": len(labels),
        "phones": phones,
        **use,
        "phone_purity": phone_purity(counts),
        "cluster_purity": cluster_purity(counts),
        "pnmi": pnmi(counts),
        "pnmi_miller_madow": pnmi(counts, corrected=True),
        "pnmi_bias": float(bias),
        "conditional_entropy_nats": conditional_entropy(counts),
    }
    if speakers is not None:
        talkers = joint_counts(speakers[counted], units)
        result["speakers"] = int((talkers.sum(1) > 0).sum())
        result["speaker_leakage"] = pnmi(talkers)
        result["speaker_leakage_miller_madow"] = pnmi(talkers, corrected=True)
    return result
