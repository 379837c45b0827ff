"""Augmentation complexity: how much of an utterance's identity survives augmentation (Zhai et al. 2024, 2306.00788).

For utterances x and views a ~ p(a | x) the *complexity* kappa^2 is the largest value of
``K(x, x) = 1 + chi^2(p(. | x) || p)``. With p replaced by the mixture over N utterances, ``p(a | x) / p(a)`` is
``N q(x | a)``, where q says which utterance made the view, hence ``K(x, x) = N E[q(x | a)]``: 1 where views tell
nothing, N where they tell all. Views are seen through an encoder or a tokenizer, whose posterior q is modelled; by the
data processing inequality a calibrated q gives a lower bound. Values near N are *saturated*: they say no more than "at
least N".

Unit edit distance says how stable units are, complexity how distinct they remain: a constant tokenizer has an edit
distance of 0 and a complexity of 1.

Models of q, both with a temperature that is chosen on views of their own (an overconfident q would deviate upwards):

- `gaussian_scores`: vectors [N, V, D], one normal distribution for each utterance with a common diagonal covariance.
- `unigram_scores`: units, smoothed relative frequencies of each utterance.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError

__all__ = [
    "PERCENTILE", "augmentation_complexity", "calibrate", "gaussian_scores", "kernel_diagonal", "posteriors",
    "spectrum", "unigram_scores",
]  # fmt: skip

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

PERCENTILE = 99.0  # of K(x, x), in place of its supremum: one utterance must not decide
_SATURATED = 0.9  # share of log2 N from which a value only says "at least N"
_TEMPERATURES = np.geomspace(1 / 4, 4096, 57)  # four steps to the octave
_FLOOR = 1e-8  # of a variance, relative to the largest


def posteriors(scores: Floats, temperature: float = 1.0) -> NDArray[np.float64]:
    """Which utterance made a view: softmax of log-likelihoods [..., N] divided by `temperature`, float64 [..., N]."""
    scaled = np.asarray(scores, np.float64) / temperature
    scaled -= scaled.max(-1, keepdims=True)
    likelihoods = np.exp(scaled)
    return likelihoods / likelihoods.sum(-1, keepdims=True)


def kernel_diagonal(posterior: Floats) -> NDArray[np.float64]:
    """K(x, x) of every utterance.

    Parameters
    ----------
    posterior : float [N, V, N]
        For V views of each of N utterances, the probability of each utterance.

    Returns
    -------
    float64 [N]
        1 ... N.

    Raises
    ------
    InputError
        If shapes do not fit.
    """
    count = _count(posterior)
    own = np.asarray(posterior)[np.arange(count), :, np.arange(count)]
    return count * own.mean(1, dtype=np.float64)


def spectrum(posterior: Floats) -> NDArray[np.float64]:
    """Eigenvalues, in size descending, of the view operator ``P[i, j] = mean over views of i of q(j | view)``.

    Rows are distributions, so the first is 1; their sum is the mean of `kernel_diagonal`. Their number that is not
    small is the number of directions of utterance space that views keep apart.

    Parameters
    ----------
    posterior : float [N, V, N]
        As `kernel_diagonal`.

    Returns
    -------
    float64 [N]
        Real parts: P is similar to a symmetric matrix but for sampling.
    """
    _count(posterior)
    values = np.linalg.eigvals(np.asarray(posterior, np.float64).mean(1)).real
    return values[np.argsort(-np.abs(values))]


def gaussian_scores(train: Floats, views: Floats) -> NDArray[np.float64]:
    """Log-likelihoods of views under a normal distribution for each utterance (linear discriminant analysis).

    Parameters
    ----------
    train : float [N, V, D]
        Views that means and the common diagonal covariance are estimated from.
    views : float [M, W, D]
        Other views, for instance of the same utterances.

    Returns
    -------
    float64 [M, W, N]
        Up to a constant of each view.

    Raises
    ------
    InputError
        If shapes do not fit, or there are fewer than two training views.
    """
    train, views = np.asarray(train, np.float64), np.asarray(views, np.float64)
    if train.ndim != 3 or views.ndim != 3 or train.shape[2] != views.shape[2] or train.shape[1] < 2:
        raise InputError(f"views {train.shape} and {views.shape}: [N, V >= 2, D] and [M, W, D] are needed")
    count, number, dim = train.shape
    means = train.mean(1)
    variance = ((train - means[:, None]) ** 2).sum((0, 1)) / (count * (number - 1))
    deviation = np.sqrt(np.maximum(variance, max(_FLOOR * float(variance.max()), np.finfo(np.float64).tiny)))
    centres, points = means / deviation, (views / deviation).reshape(-1, dim)
    centre = centres.mean(0)  # close to the origin, products cancel less
    centres, points = centres - centre, points - centre
    scores = points @ centres.T - (centres**2).sum(1) / 2
    return scores.reshape(*views.shape[:2], count)


def unigram_scores(
    train: Sequence[Sequence[Integers]],
    views: Sequence[Sequence[Integers]],
    vocab_size: int,
    *,
    smoothing: float = 10.0,
) -> NDArray[np.float64]:
    """Log-likelihoods of views as bags of units.

    Parameters
    ----------
    train, views : [N][V] and [M][W] of int [T]
        Units of the views.
    vocab_size : int
        K.
    smoothing : float
        Units of the common distribution that every utterance is given in addition to its own.

    Returns
    -------
    float64 [M, W, N]

    Raises
    ------
    InputError
        If units lie outside of the vocabulary, numbers of views differ, or `smoothing` is not positive.
    """
    if not smoothing > 0:
        raise InputError(f"smoothing={smoothing}: a positive number of units is needed")
    own, tested = _counts(train, vocab_size), _counts(views, vocab_size)
    counts = own.sum(1)  # [N, K]
    common = (counts.sum(0) + 1.0 / vocab_size) / (counts.sum() + 1.0)
    shares = (counts + smoothing * common) / (counts.sum(1, keepdims=True) + smoothing)
    return np.asarray(tested @ np.log(shares).T)


def calibrate(scores: Floats) -> float:
    """Temperature at which `scores` [N, V, N] of views that no model was fitted on are most likely.

    Chosen on a grid of four steps to the octave.
    """
    count = _count(scores)
    owners = np.broadcast_to(np.arange(count)[:, None, None], (count, scores.shape[1], 1))
    own = np.take_along_axis(np.asarray(scores, np.float64), owners, -1)[..., 0]

    def likelihood(temperature: float) -> float:
        scaled = np.asarray(scores, np.float64) / temperature
        top = scaled.max(-1)
        return float((own / temperature - top - np.log(np.exp(scaled - top[..., None]).sum(-1))).mean())

    return float(max(_TEMPERATURES, key=likelihood))


def augmentation_complexity(
    calibration: Floats, scores: Floats, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Complexity from scores of two sets of views.

    Parameters
    ----------
    calibration, scores : float [N, V, N], [N, W, N]
        Log-likelihoods (`gaussian_scores`, `unigram_scores`) of views that choose the temperature, and of views that
        are measured. Neither may be among those that the model of the posterior was fitted on.
    resamples : int
        Of utterances, for the interval.
    seed : int
        Of the resampling.

    Returns
    -------
    dict
        ``bits``: log2 of the 99th percentile of K(x, x); ``ci``: its 95 % interval by bootstrap over utterances;
        ``kappa_squared``, ``mean``, ``largest``; ``temperature``; ``utterances``; ``most_bits``: log2 N; ``saturated``:
        whether `bits` is above 0.9 `most_bits`, so that it only says "at least".

    Raises
    ------
    InputError
        If shapes do not fit.
    """
    count = _count(scores)
    if _count(calibration) != count:
        raise InputError(f"{_count(calibration)} and {count} utterances; both sets of views must be of the same ones")
    temperature = calibrate(calibration)
    values = kernel_diagonal(posteriors(scores, temperature))
    generator = np.random.default_rng(seed)
    drawn = values[generator.integers(0, count, (resamples, count))]
    bits = float(np.log2(np.percentile(values, PERCENTILE)))
    return {
        "bits": bits,
        "ci": np.log2(np.percentile(np.percentile(drawn, PERCENTILE, axis=1), (2.5, 97.5))).tolist(),
        "kappa_squared": float(np.percentile(values, PERCENTILE)),
        "mean": float(values.mean()),
        "largest": float(values.max()),
        "temperature": temperature,
        "utterances": count,
        "most_bits": math.log2(count),
        "saturated": bits > _SATURATED * math.log2(count),
    }


def _count(values: Floats) -> int:
    """N of values [N, V, N]; InputError where they are something else."""
    shape = np.shape(values)
    if len(shape) != 3 or shape[0] != shape[2] or 0 in shape:
        raise InputError(f"values have shape {shape}; [utterances, views, utterances] is needed")
    return int(shape[0])


def _counts(units: Sequence[Sequence[Integers]], vocab_size: int) -> NDArray[np.float64]:
    """How often each unit stands in each view: [N, V, K]."""
    if not units or len({len(views) for views in units}) != 1 or not units[0]:
        raise InputError("every utterance needs the same number of views, at least one")
    rows = [np.asarray(view) for views in units for view in views]
    if any(row.size and (int(row.min()) < 0 or int(row.max()) >= vocab_size) for row in rows):
        raise InputError(f"units lie outside of the vocabulary of {vocab_size}")
    counted = [np.bincount(row.astype(np.int64), minlength=vocab_size) for row in rows]
    return np.stack(counted).reshape(len(units), -1, vocab_size).astype(np.float64)
