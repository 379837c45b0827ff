"""LiPCoT's claim, tested: units, a small masked language model of them, classes from few labels.

The publication (arXiv 2408.07292) reports 77.2 % for a pre-trained BERT and 67.4 % for the same one from scratch, on
92 test items of EEG. Here, in the same manner: a masked language model is trained on unlabelled units of training
sound, and copies of it are fine-tuned to tell classes, beside the same network from scratch, with the same updates,
seeds and drawn labels; the learning rate of each is chosen on validation items, by its first seed. Below them: logistic
regression on how often each unit occurs, the same on means of the frozen model's outputs, and always saying the most
frequent class.

- speakers: 18 of development speech, which neither the tokenizer nor the model has heard. Whole utterances are dealt
  out.
- noises: the classes of ESC-10 that there are in the data, by the field ``split``. Clips of one recording share it.
- appliances: a series that is no sound, the current that 11 kinds of household appliances draw (PLAID, Gao et al. 2014;
  as in the UCR archive), with its own tokenizer, model and split. It is part of the package sktime, which is read and
  not imported: ``pip install --no-deps sktime``.

There is no task of digits: those that the data name are of the evaluation speech, on which nothing may be trained.

Sounds are runs of units: what repeats could be copied, and there would be 1.6 times as many units to read. Series are
short and keep their repetitions. Intervals come from drawing test items again (recordings, for noises), means over
seeds.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from speechtok.benchmarks.runner import machine, parser, write
from speechtok.benchmarks.unit_lm import LONGEST, UnitEncoder, classes_of, fine_tune, means_of, pretrain

import speechtok
from speechtok.encoders.lipcot import LipcotConfig, LipcotEncoder
from speechtok.errors import InputError
from speechtok.evaluation.probe_folds import Redrawn
from speechtok.evaluation.probe_heads import fit as regression
from speechtok.frames import WindowRule
from speechtok.tokenizer import Tokenizer
from speechtok.training.cards import metadata
from speechtok.training.kmeans import fit
from speechtok.training.splits import NOISE, SPEECH, listed, spoken

Ints = NDArray[np.int64]

RATES = (1e-3, 3e-4)  # learning rates of fine-tuning
UTTERANCES, TESTED, WATCHED = 20, 10, 3  # of a speaker: all that are taken, those for test and for validation
CLASSES = "esc10/"
# About 5 periods of the mains in a window; currents are in amperes.
SERIES = LipcotConfig(sample_rate=1, window=30, hop=10, order=6, warp=0.0, floor=1e-8)
APPLIANCES = 64  # units of currents
HELD = 5  # every n-th series of training is for validation


@dataclass(frozen=True)
class Problem:
    """Labelled sequences.

    Parameters
    ----------
    name : str
    sequences : list of int64 [T]
    labels, groups : int64 [N]
        Class, and which sequences are of one recording.
    part : str array [N]
        "train", "valid" or "test".
    """

    name: str
    sequences: list[Ints]
    labels: Ints
    groups: Ints
    part: NDArray[np.str_]

    def __post_init__(self) -> None:
        for group in np.unique(self.groups):
            if len(np.unique(self.part[self.groups == group])) > 1:
                raise InputError(f"{self.name}: group {group} is on both sides of a split")

    def drawn(self, shots: int | None, seed: int) -> Ints:
        """Indices of `shots` training items of each class (as many as there are, at most); None: all."""
        pool = np.random.default_rng(seed).permutation(np.flatnonzero(self.part == "train"))
        taken = [pool[self.labels[pool] == label][:shots] for label in np.unique(self.labels)]
        return np.concatenate(taken)


# -- data -------------------------------------------------------------------------------------------------------------


def runs(tokenizer: Tokenizer, paths: Sequence[Path]) -> list[Ints]:
    """Units of files without repetitions; each int64 [T]."""
    return [units.run_lengths()[0].astype(np.int64) for units in tokenizer.encode_batch(paths)]


def numbered(values: Sequence[Any]) -> Ints:
    """Count values from 0 in sorted order: int64 [N]."""
    found: Ints = np.unique(np.asarray(values), return_inverse=True)[1].astype(np.int64)
    return found


def speakers(data: Path, tokenizer: Tokenizer) -> Problem:
    """Speakers of development speech with enough utterances."""
    folder, rng = data / SPEECH["valid"], np.random.default_rng(0)
    said: dict[str, list[str]] = {}
    for line in metadata(folder / "metadata.jsonl"):
        said.setdefault(line["speaker"], []).append(line["path"])
    rows = []
    for speaker, paths in sorted(said.items()):
        if len(paths) >= UTTERANCES:
            chosen = rng.permutation(sorted(paths))[:UTTERANCES]
            parts = ["test"] * TESTED + ["valid"] * WATCHED + ["train"] * (UTTERANCES - TESTED - WATCHED)
            rows += [(speaker, str(path), part) for path, part in zip(chosen, parts, strict=True)]
    sequences = runs(tokenizer, [folder / path for _, path, _ in rows])
    labels, groups = (numbered([row[column] for row in rows]) for column in (0, 1))
    return Problem("speakers", sequences, labels, groups, np.array([part for *_, part in rows]))


def noises(data: Path, tokenizer: Tokenizer) -> Problem:
    """Labelled noises."""
    lines = [one for one in metadata(data / NOISE / "metadata.jsonl") if one["path"].startswith(CLASSES)]
    sequences = runs(tokenizer, [data / NOISE / line["path"] for line in lines])
    labels, groups = (numbered([line[field] for line in lines]) for field in ("label", "original"))
    return Problem("noises", sequences, labels, groups, np.array([line["split"] for line in lines]))


def read_series(path: Path) -> tuple[list[NDArray[np.float32]], list[str]]:
    """Series and labels of a file of the UCR archive (``.ts``, one dimension)."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    rows = [line.rsplit(":", 1) for line in lines if line and line[0] not in "#@"]
    return [np.array(values.split(","), np.float32) for values, _ in rows], [label for _, label in rows]


def currents() -> tuple[list[NDArray[np.float32]], list[str], NDArray[np.str_]]:
    """All series of PLAID, their labels and parts; InputError without the package that has them."""
    spec = find_spec("sktime")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / "datasets" / "data" / "PLAID").is_dir():
        raise InputError("the series are read from the package sktime; pip install --no-deps sktime==1.2.0")
    train, test = (read_series(folder / f"datasets/data/PLAID/PLAID_{name}.ts") for name in ("TRAIN", "TEST"))
    parts = ["valid" if index % HELD == 0 else "train" for index in range(len(train[0]))] + ["test"] * len(test[0])
    return train[0] + test[0], train[1] + test[1], np.array(parts)


def appliances() -> tuple[Tokenizer, Problem]:
    """Units of currents; the tokenizer is fitted on the training part."""
    series, labels, parts = currents()
    rule = WindowRule(max_seconds=10_000, context_seconds=0)
    known = [one for one, part in zip(series, parts, strict=True) if part != "test"]
    tokenizer, _ = fit(known, LipcotEncoder(SERIES), APPLIANCES, name="appliances", window=rule)
    sequences = [units.ids.astype(np.int64) for units in tokenizer.encode_batch(series, SERIES.sample_rate)]
    return tokenizer, Problem("appliances", sequences, numbered(labels), np.arange(len(series)), parts)


# -- measurement ------------------------------------------------------------------------------------------------------


def counts(sequences: Sequence[Ints], units: int) -> NDArray[np.float64]:
    """Roots of how often each unit occurs in what is read of a sequence: float64 [N, units]."""
    found = np.stack([np.bincount(one[:LONGEST], minlength=units) for one in sequences])
    shares: NDArray[np.float64] = np.sqrt(found / found.sum(1, keepdims=True))
    return shares


def measure(problem: Problem, encoder: UnitEncoder, shots: int | None, seeds: int, updates: int) -> dict[str, Any]:
    """All rows of one problem, see the module."""
    labels, test, valid = problem.labels, *(np.flatnonzero(problem.part == part) for part in ("test", "valid"))
    classes = int(labels.max()) + 1
    draws = [problem.drawn(shots, seed) for seed in range(seeds)]

    def items(index: Ints) -> list[Ints]:
        return [problem.sequences[i] for i in index]

    def tuned(start: UnitEncoder | None, rate: float, seed: int) -> Callable[[Ints], Ints]:
        torch.manual_seed(seed)
        begin = start or UnitEncoder(encoder.units)
        one = draws[seed]
        model = fine_tune(begin, items(one), labels[one], classes, updates=updates, rate=rate, seed=seed)
        return lambda index: classes_of(model, items(index))

    right: dict[str, NDArray[np.bool_]] = {}  # [seeds, tested]
    rates: dict[str, float] = {}
    for name, start in (("pre-trained", encoder), ("from scratch", None)):
        first = {rate: tuned(start, rate, 0) for rate in RATES}
        rates[name] = max(RATES, key=lambda rate: np.mean(first[rate](valid) == labels[valid]))
        others = [tuned(start, rates[name], seed) for seed in range(1, seeds)]
        right[name] = np.stack([one(test) == labels[test] for one in (first[rates[name]], *others)])
    for name, x in (
        ("frozen, logistic regression", means_of(encoder, problem.sequences)),
        ("counts of units, logistic regression", counts(problem.sequences, encoder.units)),
    ):
        fits = [regression(x[chosen], labels[chosen], chosen) for chosen in draws]
        right[name] = np.stack([one.predict(x[test]) == labels[test] for one in fits])
    common = np.bincount(labels[problem.part == "train"]).argmax()
    right["most frequent class"] = np.broadcast_to(labels[test] == common, (seeds, len(test)))
    redrawn = Redrawn(problem.groups[test])
    means = {name: values.mean(0) for name, values in right.items()}
    gain = means["pre-trained"] - means["from scratch"]
    return {
        "problem": problem.name,
        "classes": classes,
        "labels": len(draws[0]),
        "tested": len(test),
        "rates": rates,
        "accuracy": {
            name: {
                "mean": float(one.mean()),
                "interval": redrawn.mean(one),
                "seeds": right[name].mean(1).tolist(),
            }
            for name, one in means.items()
        },
        "gain_of_pre_training": {"mean": float(gain.mean()), "interval": redrawn.mean(gain)},
    }


def main() -> None:
    """Run and report."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--tokenizer", default="lipcot-k256")
    options.add_argument("--every", type=int, default=2, help="pre-train on every n-th file of the training speech")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--pretrain", type=int, default=1200, help="updates on sound, and half as many on series")
    options.add_argument("--updates", type=int, default=250, help="of fine-tuning")
    options.add_argument("--shots", type=int, default=5, help="labels of a class where labels are few")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    begin, data = time.process_time(), chosen.data
    tokenizer = speechtok.load(chosen.tokenizer)
    seconds: dict[str, float] = {}

    def note(what: str) -> None:
        seconds[what] = time.process_time() - begin - sum(seconds.values())
        print(f"{what}: {seconds[what]:.0f} s", flush=True)

    heard = [data / path for path in spoken(data, "train", chosen.every) + listed(data, NOISE, "train")]
    sound = [one for one in runs(tokenizer, heard) if len(one)]
    problems = [speakers(data, tokenizer), noises(data, tokenizer)]
    note("units of sound")
    speech = [one for one, part in zip(problems[0].sequences, problems[0].part, strict=True) if part == "test"]
    model, learned = pretrain(tokenizer.vocab_size, sound, speech, updates=chosen.pretrain, rate=1e-3, seed=0)
    note("pre-training on sound")
    rows = [
        measure(problems[0], model, chosen.shots, chosen.seeds, chosen.updates),
        measure(problems[1], model, None, chosen.seeds, chosen.updates),
    ]
    note("classes of sound")
    other, problem = appliances()
    parts = [[one for one, part in zip(problem.sequences, problem.part, strict=True) if (part == "test") == test]
             for test in (False, True)]  # fmt: skip
    series, figures = pretrain(other.vocab_size, *parts, updates=chosen.pretrain // 2, rate=1e-3, seed=0)
    note("units of series and pre-training")
    rows += [measure(problem, series, shots, chosen.seeds, chosen.updates) for shots in (chosen.shots, None)]
    note("classes of series")
    result = {
        "machine": machine(),
        "settings": {key: str(value) for key, value in vars(chosen).items() if key not in ("json", "data")},
        "series": json.loads(json.dumps(other.encoder.config_dict())),
        "pre_training": {
            "sound": learned | {"sequences": len(sound)},
            "series": figures | {"sequences": len(parts[0])},
        },
        "rows": rows,
        "cpu_seconds": seconds,
    }
    write(chosen.json, result)


if __name__ == "__main__":
    main()
