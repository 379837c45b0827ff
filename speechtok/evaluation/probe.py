"""Probes: how well a linear or one-hidden-layer classifier tells labels from frozen features, layer by layer.

The protocol, the same for every encoder of a table:

- A sound is one vector for each layer: the mean of its frames over time (`speechtok.evaluation.probe_features`).
- Folds keep groups whole (`speechtok.evaluation.probe_folds`): no group is in training and test. A class that occurs
  in fewer than two groups cannot be learned from one and found in another; its sounds are left out and counted.
  Where all groups of a class fall into one fold all the same, its sounds there count as errors (``unseen``).
- All choices (penalty, learning rate, stopping) are made on groups inside of the training folds
  (`speechtok.evaluation.probe_heads`). So is the layer of the row ``chosen``: in each fold the one that was best on
  inner groups. The best row of the table of layers is chosen on the test folds and is no fair figure.
- Accuracy is that of all test predictions together; intervals are 95 % and come from drawing groups again. Balanced
  accuracy is the mean recall of the classes.
- Chance is one of the number of classes; the majority baseline always says the most frequent class of its training
  folds.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from speechtok.corpus.engine import Event
from speechtok.errors import InputError
from speechtok.evaluation import probe_labels
from speechtok.evaluation.probe_features import FrozenFeatures, Pooling, open_encoder
from speechtok.evaluation.probe_folds import LEVEL, Redrawn, grouped_folds
from speechtok.evaluation.probe_heads import DROPOUT, INNER_FOLDS, PENALTIES, RATES, fit
from speechtok.evaluation.probe_labels import TASKS, Labelled, Manifest, Task

__all__ = ["FOLDS", "Problem", "compare", "score", "tasks_of", "with_interval"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FOLDS = 5


@dataclass(frozen=True)
class Problem:
    """Items of one task, ready to be told apart.

    Parameters
    ----------
    paths : list of str
    labels, groups : int64 [N]
        Index into `classes`; group counted from 0.
    classes : list of str
    fold_of : int64 [N]
    left_out : dict
        By class that occurs in fewer than two groups: its ``items`` and ``groups``.
    """

    paths: list[str]
    labels: Ints
    groups: Ints
    classes: list[str]
    fold_of: Ints
    left_out: dict[str, dict[str, int]]

    @classmethod
    def of(cls, labels: Mapping[str, str], groups: Mapping[str, str], folds: int = FOLDS, seed: int = 0) -> "Problem":
        """Leave out what cannot be learned, and fold the rest.

        Parameters
        ----------
        labels, groups : mapping of str to str
            By path.
        folds, seed : int
            See `speechtok.evaluation.probe_folds.grouped_folds`.

        Raises
        ------
        InputError
            If fewer than two classes are left, or there are fewer groups than folds.
        """
        places: dict[str, set[str]] = {}
        for path, label in labels.items():
            places.setdefault(label, set()).add(groups[path])
        classes = sorted(label for label, some in places.items() if len(some) > 1)
        if len(classes) < 2:
            raise InputError(
                f"{len(classes)} of {len(places)} classes occur in two groups or more; a probe needs two such classes"
            )
        left_out = {
            label: {"items": sum(one == label for one in labels.values()), "groups": len(places[label])}
            for label in sorted(set(places) - set(classes))
        }
        paths = [path for path, label in labels.items() if label not in left_out]
        indices = np.array([classes.index(labels[path]) for path in paths], np.int64)
        members = np.unique([groups[path] for path in paths], return_inverse=True)[1].astype(np.int64)
        return cls(paths, indices, members, classes, grouped_folds(indices, members, folds, seed), left_out)

    @property
    def folds(self) -> int:
        """Number of folds."""
        return int(self.fold_of.max()) + 1

    def majority(self) -> Ints:
        """The most frequent class of each item's training folds, int64 [N]."""
        found = np.zeros_like(self.labels)
        for fold in range(self.folds):
            found[self.fold_of == fold] = np.bincount(self.labels[self.fold_of != fold]).argmax()
        return found


def score(
    layers: Mapping[str, Floats],
    problem: Problem,
    redrawn: Redrawn,
    *,
    hidden: int = 0,
    seed: int = 0,
    on_fit: Callable[[], None] = lambda: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], Ints]:
    """Train and test a probe on each layer.

    Parameters
    ----------
    layers : mapping of str to float64 [N, D]
        Vectors of the problem's items.
    problem : Problem
    redrawn : Redrawn
        For intervals, of the problem's groups.
    hidden, seed : int
        See `speechtok.evaluation.probe_heads.fit`.
    on_fit : callable
        Called after each fold of each layer.

    Returns
    -------
    layers : dict
        Figures of each layer.
    chosen : dict
        Figures of the layer that is best inside of each fold's training part, the lower one of equals; ``layer`` of
        each fold.
    predictions : int64 [N]
        Of `chosen`.
    """
    found = {layer: np.full_like(problem.labels, -1) for layer in layers}
    settings: dict[str, list[float]] = {layer: [] for layer in layers}
    chosen, names = np.full_like(problem.labels, -1), []
    for fold in range(problem.folds):
        train, test = problem.fold_of != fold, problem.fold_of == fold
        best, best_accuracy = "", -1.0
        for layer, x in layers.items():
            fitted = fit(x[train], problem.labels[train], problem.groups[train], hidden=hidden, seed=seed)
            found[layer][test] = fitted.predict(x[test])
            settings[layer].append(fitted.setting)
            if fitted.inner_accuracy > best_accuracy:
                best, best_accuracy = layer, fitted.inner_accuracy
            on_fit()
        chosen[test] = found[best][test]
        names.append(best)
    setting = "learning_rate" if hidden else "penalty"
    return (
        {layer: figures(found[layer], problem, redrawn) | {setting: settings[layer]} for layer in layers},
        figures(chosen, problem, redrawn) | {"layer": names},
        chosen,
    )


def figures(predictions: Ints, problem: Problem, redrawn: Redrawn) -> dict[str, Any]:
    """Accuracy, balanced accuracy (0 to 1) with their intervals, recalls of classes, and accuracy of each fold."""
    correct, labels = predictions == problem.labels, problem.labels
    recalls = np.array([correct[labels == index].mean() for index in range(len(problem.classes))])
    return {
        "accuracy": float(correct.mean()),
        "interval": redrawn.mean(correct.astype(float)),
        "balanced_accuracy": float(recalls.mean()),
        "balanced_interval": redrawn.balanced(correct, labels),
        "recalls": dict(zip(problem.classes, recalls.tolist(), strict=True)),
        "folds": [float(correct[problem.fold_of == fold].mean()) for fold in range(problem.folds)],
    }


def with_interval(found: Mapping[str, Any], value: str = "accuracy", interval: str = "interval") -> str:
    """One of `figures` in percent with its interval, for tables: ``61.2 [57.0, 65.1]``."""
    low, high = found[interval]
    return f"{100 * found[value]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def tasks_of(names: Sequence[str], label: str | None = None, group: str | None = None) -> list[Task]:
    """What options name.

    Parameters
    ----------
    names : sequence of str
        Of `speechtok.evaluation.probe_labels.TASKS`.
    label : str, optional
        A column: the one that the named task is made of, or without a name to be told as it is.
    group : str, optional
        A column; default the task's own groups, and of a plain column every sound is its own group.

    Raises
    ------
    InputError
        If there is no such task, or `label` does not say which task it is for.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise InputError(f"no task is called {', '.join(unknown)}; known: {', '.join(TASKS)}; or name a --label")
    if label is None and not names:
        raise InputError(f"nothing is asked: name a --task ({', '.join(TASKS)}) or a --label, a column of the manifest")
    if label is not None and len(names) > 1:
        raise InputError(f"the label {label} can belong to one task only, not to {', '.join(names)}")
    tasks = [TASKS[name] for name in dict.fromkeys(names)]
    if label is not None:
        tasks = [probe_labels.with_field(task, label) for task in tasks] or [probe_labels.column(label)]
    return tasks if group is None else [probe_labels.by_column(task, group) for task in tasks]


def compare(
    data: str | os.PathLike[str],
    encoders: Sequence[str],
    tasks: Sequence[Task],
    *,
    hidden: int = 0,
    layers: Sequence[str] | None = None,
    pooling: Pooling = "mean",
    folds: int = FOLDS,
    seed: int = 0,
    device: str = "cpu",
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[dict[str, Any]]:
    """Probe encoders on the same sounds and folds.

    Parameters
    ----------
    data : path
        See `speechtok.evaluation.probe_labels.read`.
    encoders : sequence of str
        See `speechtok.evaluation.probe_features.open_encoder`.
    tasks : sequence of Task
        See `tasks_of`.
    hidden : int
        Units of the hidden layer; 0 for a linear probe.
    layers, pooling
        See `speechtok.evaluation.probe_features.FrozenFeatures`.
    folds, seed : int
        Test folds; the seed of folds, networks and intervals.
    device : str
        A torch device for encoders; probes are trained on the CPU.
    on_event : callable
        Told how many sounds are encoded, then how many fits are done.

    Returns
    -------
    list of dict
        Task by task a dict for each encoder:

        - ``tokenizer`` (its name), ``task``, ``data``;
        - ``items``, ``groups``, ``classes``: of those that count; of each class its ``items`` and ``groups``;
        - ``left_out`` (see `Problem`), ``unlabelled`` sounds, ``failed`` (path and reason),
          ``unseen``: items whose class is in no training fold;
        - ``chance``, ``majority`` (see `figures`);
        - ``layers``: by layer the figures, and the ``penalty`` or ``learning_rate`` of each fold; ``chosen``: figures,
          and the ``layer`` of each fold (see the head of this module), ``difference``: of its accuracy to that of the
          first encoder, with the ``interval`` over the same draws;
        - ``conventions``.

    Raises
    ------
    InputError
        If an option, the manifest or a task is unusable.
    UnknownNameError
        If an encoder's name stands for nothing.
    CheckpointError
        If weights are unusable.
    """
    if hidden < 0 or pooling not in get_args(Pooling):
        raise InputError(f"hidden={hidden}, pooling={pooling!r}: give 0 or more units, and one of {get_args(Pooling)}")
    if not encoders or not tasks:
        raise InputError("nothing is to be measured; name encoders and tasks")
    manifest = probe_labels.read(data)
    labelled = [probe_labels.apply(manifest, task) for task in tasks]
    for one in labelled:  # whatever is wrong with a task shows before sound is read
        Problem.of(one.labels, one.groups, folds, seed)
    opened = [open_encoder(name, device) for name in encoders]
    frozen = [FrozenFeatures(encoder, layers, pooling, window) for _, encoder, window in opened]
    vectors, failed = _read(manifest, labelled, frozen, on_event)

    problems = []
    for one in labelled:
        kept = {path: label for path, label in one.labels.items() if path not in failed}
        problems.append(Problem.of(kept, one.groups, folds, seed))
    total = len(problems) * folds * sum(len(features.layers) for features in frozen)
    done, results = 0, []

    def on_fit() -> None:
        nonlocal done
        done += 1
        on_event(Event("train", done, total, f"probe {done}"))

    for one, problem in zip(labelled, problems, strict=True):
        redrawn = Redrawn(problem.groups, seed)
        about = _about(manifest, one, problem, failed) | {
            "majority": figures(problem.majority(), problem, redrawn),
            "conventions": _conventions(hidden, pooling, folds, seed, one.task),
        }
        first: Ints | None = None
        for (name, _, _), features, found in zip(opened, frozen, vectors, strict=True):
            stacked = {
                layer: np.stack([found[path][index] for path in problem.paths])
                for index, layer in enumerate(features.layers)
            }
            by_layer, chosen, predictions = score(stacked, problem, redrawn, hidden=hidden, seed=seed, on_fit=on_fit)
            first = predictions if first is None else first
            better = (predictions == problem.labels).astype(float) - (first == problem.labels)
            chosen["difference"] = {
                "to": opened[0][0], "accuracy": float(better.mean()), "interval": redrawn.mean(better),
            }  # fmt: skip
            results.append({"tokenizer": name} | about | {"layers": by_layer, "chosen": chosen})
    return results


def _read(
    manifest: Manifest,
    labelled: Sequence[Labelled],
    frozen: Sequence[FrozenFeatures],
    on_event: Callable[[Event], None],
) -> tuple[list[dict[str, list[Floats]]], dict[str, str]]:
    """Vectors of all sounds that any task asks of, for each encoder; and why sounds have none in one of them."""
    sounds = [sound for sound, _ in manifest.items if any(sound.path in one.labels for one in labelled)]
    vectors: list[dict[str, list[Floats]]] = []
    failed: dict[str, str] = {}
    done, total = 0, len(sounds) * len(frozen)

    def on_sound() -> None:
        nonlocal done
        done += 1
        on_event(Event("read", done, total))

    for features in frozen:
        found, broken = features.read(sounds, on_sound)
        vectors.append(found)
        failed |= broken
    return vectors, failed


def _about(manifest: Manifest, labelled: Labelled, problem: Problem, failed: Mapping[str, str]) -> dict[str, Any]:
    """What a problem is made of."""
    trained = [set(problem.labels[problem.fold_of != fold].tolist()) for fold in range(problem.folds)]
    pairs = zip(problem.labels.tolist(), problem.fold_of.tolist(), strict=True)
    return {
        "task": labelled.task.name,
        "data": manifest.name,
        "items": len(problem.paths),
        "groups": len(np.unique(problem.groups)),
        "classes": {
            name: {
                "items": int(np.count_nonzero(problem.labels == index)),
                "groups": len(np.unique(problem.groups[problem.labels == index])),
            }
            for index, name in enumerate(problem.classes)
        },
        "left_out": problem.left_out,
        "unlabelled": labelled.unlabelled,
        "failed": manifest.failed | {path: why for path, why in failed.items() if path in labelled.labels},
        "unseen": sum(label not in trained[fold] for label, fold in pairs),
        "chance": 1 / len(problem.classes),
    }


def _conventions(hidden: int, pooling: Pooling, folds: int, seed: int, task: Task) -> dict[str, Any]:
    head: dict[str, Any] = {"probe": "softmax regression", "penalties": PENALTIES, "inner_folds": INNER_FOLDS}
    if hidden:
        head = {
            "probe": f"one hidden layer of {hidden}", "learning_rates": RATES, "dropout": DROPOUT,
            "held_out_to_stop": f"1 of {INNER_FOLDS} inner folds",
        }  # fmt: skip
    return head | {
        "pooling": f"{pooling} over time, standardised by the training folds",
        "folds": folds,
        "grouped_by": task.grouped_by,
        "interval": f"{LEVEL:.0%}, groups drawn again",
        "seed": seed,
    }
