"""How much units say about phones: purity and PNMI (HuBERT, Hsu et al. 2021, section V-A).

Conventions: labels and units are compared frame by frame; both are integers. Mutual information is estimated from
counts, which is biased upwards by about ``(labels - 1)(units - 1) / (2 N)`` nats: always report N.
"""

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError

__all__ = ["cluster_purity", "evaluate", "joint_counts", "phone_purity", "pnmi"]


def joint_counts(labels: NDArray[np.int64], units: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count pairs.

    Parameters
    ----------
    labels, units : int [N], not negative

    Returns
    -------
    int64 [L, U]
    """
    if labels.shape != units.shape or labels.ndim != 1 or len(labels) == 0:
        raise InputError(f"labels {labels.shape} and units {units.shape} must be equally long and not empty")
    counts = np.zeros((int(labels.max()) + 1, int(units.max()) + 1), np.int64)
    np.add.at(counts, (labels, units), 1)
    return counts


def _entropy(counts: NDArray[np.int64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def phone_purity(counts: NDArray[np.int64]) -> float:
    """Share of frames whose label is the most frequent one of their unit."""
    return float(counts.max(0).sum() / counts.sum())


def cluster_purity(counts: NDArray[np.int64]) -> float:
    """Share of frames whose unit is the most frequent one of their label."""
    return float(counts.max(1).sum() / counts.sum())


def pnmi(counts: NDArray[np.int64]) -> float:
    """Mutual information of label and unit over the entropy of the label; 0 if there is one label only."""
    entropy = _entropy(counts.sum(1))
    information = entropy + _entropy(counts.sum(0)) - _entropy(counts)
    return information / entropy if entropy > 0 else 0.0


def evaluate(labels: NDArray[np.int64], units: NDArray[np.int64]) -> dict[str, float]:
    """All figures of this module, with the number of frames, units used, their perplexity, and PNMI's expected bias."""
    counts = joint_counts(labels, units)
    used = counts.sum(0)
    phones = int((counts.sum(1) > 0).sum())
    clusters = int((used > 0).sum())
    entropy = _entropy(counts.sum(1))
    bias = (phones - 1) * (clusters - 1) / (2 * counts.sum() * entropy) if entropy > 0 else 0.0
    return {
        "frames": int(counts.sum()),
        "phones": phones,
        "units_used": clusters,
        "perplexity": float(np.exp(_entropy(used))),
        "phone_purity": phone_purity(counts),
        "cluster_purity": cluster_purity(counts),
        "pnmi": pnmi(counts),
        "pnmi_bias": float(bias),
    }
