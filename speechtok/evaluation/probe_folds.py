"""Folds that keep groups whole, and confidence intervals of accuracies by drawing groups again."""

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError

__all__ = ["LEVEL", "Redrawn", "grouped_folds"]

Ints = NDArray[np.int64]

LEVEL, DRAWS = 0.95, 10_000


def grouped_folds(labels: Ints, groups: Ints, folds: int, seed: int = 0) -> Ints:
    """Put whole groups into folds of about equal size in which every class is spread as evenly as it can be.

    Groups are placed one by one, those that hold much of a class first, each where it adds least to the sum of squares
    of what the folds hold (shares of each class, and of all items).

    Parameters
    ----------
    labels, groups : int64 [N]
        Class and group of each item, counted from 0.
    folds : int
        At least 2.
    seed : int
        Decides the order of groups that are alike.

    Returns
    -------
    int64 [N]
        Fold of each item; no fold is empty.

    Raises
    ------
    InputError
        If there are fewer groups than folds.
    """
    names, members = np.unique(groups, return_inverse=True)
    if folds < 2 or len(names) < folds:
        raise InputError(f"{len(names)} groups cannot make {folds} folds; give at least 2 folds and as many groups")
    counts = np.zeros((len(names), int(labels.max()) + 2))
    np.add.at(counts, (members, labels), 1)
    counts[:, -1] = counts.sum(1)  # the share of all items counts like that of a class
    shares = counts / counts.sum(0).clip(1)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-np.square(shares[order]).sum(1), kind="stable")]
    held = np.zeros((folds, shares.shape[1]))
    fold_of = np.zeros(len(names), np.int64)
    for group in order:
        # What a fold holds already decides: (held + new)^2 - held^2 = 2 held new + new^2.
        fold = int(np.argmin(held @ shares[group]))
        fold_of[group] = fold
        held[fold] += shares[group]
    return fold_of[members]


class Redrawn:
    """Groups drawn again, with replacement, as many as there are: the same draws for all figures of a task.

    Whole groups are drawn, not items: sounds of one instrument are right or wrong together, and what an interval is
    asked for is how the figure would be with other instruments. With as few groups as ten such intervals come out
    somewhat too narrow. Probes are not trained again: classes, folds and predictions stay as they are.

    Parameters
    ----------
    groups : int64 [N]
    seed, draws : int
    """

    def __init__(self, groups: Ints, seed: int = 0, draws: int = DRAWS) -> None:
        names, self._members = np.unique(groups, return_inverse=True)
        count = len(names)
        self._weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws).astype(float)

    def _sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums of values [N, C] over the items of each draw: [draws, C]."""
        by_group = np.zeros((self._weights.shape[1], values.shape[1]))
        np.add.at(by_group, self._members, values)
        return self._weights @ by_group

    def mean(self, values: NDArray[np.float64]) -> tuple[float, float]:
        """Interval of the mean of a value of each item, float64 [N]."""
        sums = self._sums(np.stack([values, np.ones(len(values))], 1))
        return _interval(sums[:, 0] / sums[:, 1])

    def balanced(self, correct: NDArray[np.bool_], labels: Ints) -> tuple[float, float]:
        """Interval of the mean recall of the classes; a draw without a class takes the mean of the others."""
        member = np.eye(int(labels.max()) + 1)[labels]
        hits, counts = self._sums(member * correct[:, None]), self._sums(member)
        recalls = np.divide(hits, counts, out=np.full_like(hits, np.nan), where=counts > 0)
        return _interval(np.nanmean(recalls, axis=1))


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
