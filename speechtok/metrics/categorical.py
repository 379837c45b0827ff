"""Categorical perception: how sharply vectors flip along a continuum between two categories.

With ``p = s_a / (s_a + s_b)``, the share of the first endpoint in the similarities to both endpoints, the
discriminability index is the mean of ``|p - 1[alpha < 0.5]|`` over the steps alpha in [0, 1]. The published index
(Sylber, Cho et al. 2025, arXiv 2410.07168) is of this kind, but its exact form is not known: compare values of this
function with each other alone. Conventions:

- ``cosine``: s is the cosine, 0 where it is negative. Vectors that all lie close together have an index near 0.5,
  however orderly they are.
- ``distance``: ``s_a`` is the Euclidean distance to the *other* endpoint, so endpoints are always told apart, and
  equal steps on a line have 0.2 (11 steps, without the middle).
- The step in the middle belongs to neither category and is left out unless it is asked for.
"""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError

__all__ = ["Similarity", "discriminability_index", "validate"]

Similarity = Literal["cosine", "distance"]


def validate(vectors: NDArray[np.floating[Any]], similarity: str) -> None:
    """InputError unless vectors are finite [steps, D], 2 steps or more, endpoints differ, and the name is known."""
    if similarity not in get_args(Similarity):
        raise InputError(f"similarity {similarity!r} is none of {', '.join(get_args(Similarity))}")
    if vectors.ndim != 2 or len(vectors) < 2 or not np.isfinite(vectors).all():
        raise InputError(f"vectors are {list(vectors.shape)}; give finite [steps, D] with 2 steps or more")
    if np.array_equal(vectors[0], vectors[-1]):
        raise InputError("both endpoints have the same vector; nothing lies between them")


def discriminability_index(
    vectors: NDArray[np.floating[Any]], *, similarity: Similarity = "cosine", keep_middle: bool = False
) -> float:
    """How far a continuum is from a single step: 0 where it is two categories.

    Parameters
    ----------
    vectors : float [steps, D]
        Of the steps in order; the first and the last are the endpoints.
    similarity : {"cosine", "distance"}
        See the head of this module.
    keep_middle : bool
        Whether the step alpha = 0.5 counts, as one of the second category.

    Returns
    -------
    float
        In [0, 1]; lower is more categorical.

    Raises
    ------
    InputError
        As `validate`.
    """
    validate(vectors, similarity)
    x = np.asarray(vectors, np.float64)
    if similarity == "cosine":
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        a, b = (np.maximum(0, unit @ unit[i]) for i in (0, -1))
    else:
        a, b = (np.linalg.norm(x - x[i], axis=1) for i in (-1, 0))
    total = a + b
    share = np.divide(a, total, out=np.full(len(x), 0.5), where=total > 0)
    alpha = np.arange(len(x)) / (len(x) - 1)
    counted = np.ones(len(x), bool) if keep_middle else alpha != 0.5
    return float(np.abs(share - (alpha < 0.5))[counted].mean())
