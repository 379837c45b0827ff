"""What a probe puts on frozen vectors: softmax regression, or a network with one hidden layer.

Both standardise each dimension by the vectors they are trained on, and choose their one setting on groups of the
training part alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.canonical import one_thread
from speechtok.errors import InputError
from speechtok.evaluation.probe_folds import grouped_folds

__all__ = ["INNER_FOLDS", "PENALTIES", "RATES", "Fitted", "fit", "softmax_regression"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

INNER_FOLDS = 4
PENALTIES = (10_000.0, 1_000.0, 100.0, 10.0, 1.0)  # sklearn's 1 / C; the strongest first
RATES = (1e-2, 5e-3, 1e-3, 5e-4, 1e-4)  # learning rates of MERT's probes (Li et al. 2023)
DROPOUT, BATCH, PATIENCE, EPOCHS = 0.2, 64, 20, 200
_STEPS, _HISTORY, _TOLERANCE = 2_000, 10, 1e-5


@dataclass(frozen=True)
class Fitted:
    """A trained probe.

    Parameters
    ----------
    setting : float
        The penalty, or of a network the learning rate.
    inner_accuracy : float
        Of this setting on training groups that were held out to choose it.
    predict : callable
        From vectors float64 [N, D] to classes int64 [N].
    """

    setting: float
    inner_accuracy: float
    predict: Callable[[Floats], Ints]


@dataclass(frozen=True)
class _Scale:
    """Standardisation by the vectors that a probe is trained on; dimensions that never change become 0."""

    mean: Floats
    factor: Floats

    @classmethod
    def of(cls, x: Floats) -> "_Scale":
        mean, deviation = x.mean(0), x.std(0)
        # A deviation of rounding errors is no variation that could be scaled up.
        moves = deviation > 1e-9 * np.abs(mean).clip(1e-30)
        return cls(mean, np.divide(1.0, deviation, out=np.zeros_like(mean), where=moves))

    def __call__(self, x: Floats) -> Floats:
        scaled: Floats = (x - self.mean) * self.factor
        return scaled


def fit(x: Floats, labels: Ints, groups: Ints, *, hidden: int = 0, seed: int = 0) -> Fitted:
    """Train a probe, its setting chosen on groups of these items.

    Without hidden layer: the penalty that is right most often over `INNER_FOLDS` grouped folds, the stronger one of
    equals, then a fit to all items. With one: a quarter of the groups is held out; of `RATES` and epochs the network
    counts that is best there (by accuracy, then by cross-entropy), and it is not trained again.

    Parameters
    ----------
    x : float64 [N, D]
    labels, groups : int64 [N]
    hidden : int
        Units of the hidden layer; 0: none.
    seed : int
        Of folds, and of the network's weights, batches and dropout.

    Raises
    ------
    InputError
        If there are fewer than two groups.
    """
    count = min(INNER_FOLDS, len(np.unique(groups)))
    if count < 2:
        raise InputError("a training part has one group, so that nothing can be chosen inside of it; use more folds")
    inner = grouped_folds(labels, groups, count, seed)
    with one_thread():  # the matrices are small, and sums do not depend on the machine's number of cores
        return _fit_linear(x, labels, inner) if hidden == 0 else _fit_network(x, labels, inner == 0, hidden, seed)


def _fit_linear(x: Floats, labels: Ints, inner: Ints) -> Fitted:
    right = np.zeros(len(PENALTIES))
    for fold in range(int(inner.max()) + 1):
        train, held = inner != fold, inner == fold
        for index, predict in enumerate(_path(x[train], labels[train], PENALTIES)):
            right[index] += np.count_nonzero(predict(x[held]) == labels[held])
    best = int(right.argmax())
    *_, predict = _path(x, labels, PENALTIES[: best + 1])
    return Fitted(PENALTIES[best], float(right[best] / len(labels)), predict)


def _path(x: Floats, labels: Ints, penalties: Sequence[float]) -> list[Callable[[Floats], Ints]]:
    """A fit for each penalty; only classes that are there can be predicted."""
    scale = _Scale.of(x)
    classes, targets = np.unique(labels, return_inverse=True)

    def predictor(weight: Floats, bias: Floats) -> Callable[[Floats], Ints]:
        return lambda new: classes[(scale(new) @ weight + bias).argmax(1)]

    return [predictor(*one) for one in softmax_regression(scale(x), targets, len(classes), penalties)]


def softmax_regression(
    x: Floats, targets: Ints, classes: int, penalties: Sequence[float]
) -> Iterator[tuple[Floats, Floats]]:
    """Minimise ``sum of cross-entropies + penalty / 2 * |weight|^2`` for each penalty; the bias is free.

    Convex, by L-BFGS in float64. Each penalty begins where the one before it ended, so begin with the strongest.

    Parameters
    ----------
    x : float64 [N, D]
        Columns of mean 0 make it quick.
    targets : int64 [N]
        Every class 0 ... `classes` - 1 occurs.
    classes : int
    penalties : sequence of float
        Positive.

    Yields
    ------
    weight : float64 [D, C]
    bias : float64 [C]
    """
    count = len(x)
    one_hot = F.one_hot(torch.from_numpy(targets), classes).double()
    # The weights lie in the span of the vectors. On its singular axes the second derivatives are known up to the mean
    # variance of the predictions, and dividing by their roots makes hundreds of steps tens.
    left, lengths, axes = torch.linalg.svd(torch.from_numpy(x), full_matrices=False)
    weight, bias = torch.zeros(len(lengths), classes, dtype=torch.float64), one_hot.mean(0).log()
    for penalty in penalties:
        chances = ((left * lengths) @ weight + bias).softmax(1)
        variance = (chances * (1 - chances)).mean()
        root = ((variance * lengths.square() + penalty) / count).sqrt()[:, None]
        rows = torch.cat([left * lengths / root.T, torch.ones(count, 1, dtype=torch.float64)], 1)
        ridge = torch.cat([penalty / count / root.square(), root.new_zeros(1, 1)])
        solution = _minimise(rows, one_hot, ridge, torch.cat([weight * root, bias[None]]))
        weight, bias = solution[:-1] / root, solution[-1]
        yield (axes.T @ weight).numpy(), bias.numpy()


def _minimise(rows: Tensor, one_hot: Tensor, ridge: Tensor, start: Tensor) -> Tensor:
    """Minimise ``mean cross-entropy + sum of ridge / 2 * weight^2`` over weight [D, C], for rows [N, D]."""
    weight = start.clone()
    solver = torch.optim.LBFGS(
        [weight], max_iter=_STEPS, max_eval=2 * _STEPS, history_size=_HISTORY, tolerance_grad=_TOLERANCE,
        tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        logs = (rows @ weight).log_softmax(1)
        weight.grad = rows.T @ (logs.exp() - one_hot) / len(rows) + ridge * weight
        return -(logs * one_hot).sum() / len(rows) + (ridge * weight.square()).sum() / 2

    with torch.no_grad():
        solver.step(loss)
    return weight


def _fit_network(x: Floats, labels: Ints, held: NDArray[np.bool_], hidden: int, seed: int) -> Fitted:
    scale = _Scale.of(x[~held])
    classes, targets = np.unique(labels[~held], return_inverse=True)
    scaled = torch.from_numpy(scale(x)).float()
    # Classes that are held out as a whole cannot be learned; they count as errors, and not in the cross-entropy.
    known = np.isin(labels[held], classes)
    wanted = torch.from_numpy(np.searchsorted(classes, labels[held]))
    fits = [
        _train(scaled[~held], torch.from_numpy(targets), scaled[held], wanted, known, hidden, rate, seed)
        for rate in RATES
    ]
    best = max(range(len(RATES)), key=lambda index: fits[index][0])
    (accuracy, _), network = fits[best]

    def predict(new: Floats) -> Ints:
        with torch.inference_mode():
            found: Ints = classes[network(torch.from_numpy(scale(new)).float()).argmax(1).numpy()]
        return found

    return Fitted(RATES[best], accuracy, predict)


def _train(
    x: Tensor, targets: Tensor, held: Tensor, wanted: Tensor, known: NDArray[np.bool_], hidden: int, rate: float,
    seed: int,
) -> tuple[tuple[float, float], nn.Module]:  # fmt: skip
    """A network as it was after its best epoch, with its accuracy and negative cross-entropy on held-out items."""
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(hidden, int(targets.max()) + 1)
        )
        solver = torch.optim.Adam(network.parameters(), lr=rate)
        best, state, waited = (-1.0, 0.0), network.state_dict(), 0
        for _ in range(EPOCHS):
            network.train()
            for batch in torch.randperm(len(x)).split(BATCH):
                solver.zero_grad()
                F.cross_entropy(network(x[batch]), targets[batch]).backward()
                solver.step()
            network.eval()
            with torch.inference_mode():
                logits = network(held)
                right = int((logits.argmax(1)[known] == wanted[known]).sum())
                loss = F.cross_entropy(logits[known], wanted[known], reduction="sum").item()
            figure = (right / len(held), -loss)
            waited += 1
            if figure > best:
                best, waited = figure, 0
                state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
            if waited == PATIENCE:
                break
    network.load_state_dict(state)
    return best, network.eval()
