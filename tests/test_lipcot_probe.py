"""The benchmark of LiPCoT's claim: what is hidden stays hidden, splits share no recording, a tiny run learns."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from speechtok.benchmarks import lipcot_probe
from speechtok.benchmarks.lipcot_probe import Problem, appliances, measure, noises, read_series, speakers
from speechtok.benchmarks.unit_lm import LONGEST, UnitEncoder, classes_of, fine_tune, hide, padded, pretrain

import speechtok
from speechtok.errors import InputError

UNITS = 12


def sequences(count, seed=0):
    """Each counts upwards or downwards from anywhere, and is of that class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    steps = np.where(labels, 1, -1)[:, None] * np.arange(40) + rng.integers(0, UNITS, (count, 1))
    return [row[: rng.integers(20, 40)] for row in steps % UNITS], labels


def problem(count=60):
    items, labels = sequences(count)
    parts = np.array(["train", "valid", "test"])[np.arange(count) // 2 % 3]
    return Problem("counting", items, labels, np.arange(count), parts)


def test_what_is_hidden_does_not_reach_the_model():
    ids, lengths = padded(sequences(16)[0])
    seen, hidden = hide(ids, lengths, UNITS, np.random.default_rng(0))
    assert bool((seen[hidden] == UNITS).all())
    assert torch.equal(seen[~hidden], ids[~hidden])
    assert bool(hidden.any(1).all())
    behind = torch.arange(ids.shape[1]) >= lengths[:, None]
    assert not bool((hidden & behind).any())
    # Other units in the hidden places, and anything behind the end, give the same outputs.
    other = torch.where(hidden | behind, (ids + 1) % UNITS, ids)
    encoder = UnitEncoder(UNITS).eval()
    with torch.inference_mode():
        one, two = (encoder(x.masked_fill(hidden, UNITS), lengths) for x in (ids, other))
    torch.testing.assert_close(two[~behind], one[~behind], rtol=0, atol=1e-6)


def test_a_batch_is_cut_and_padded():
    ids, lengths = padded([np.arange(5), np.arange(LONGEST + 9) % 7])
    assert ids.shape == (2, LONGEST)
    assert lengths.tolist() == [5, LONGEST]
    assert ids[0].tolist() == [0, 1, 2, 3, 4] + [0] * (LONGEST - 5)


def test_pre_training_learns_and_is_repeated():
    known, held = sequences(200)[0], sequences(20, 1)[0]
    _, told = pretrain(UNITS, known, held, updates=40, rate=5e-3, seed=0)
    figures = told["held_out"]
    assert figures["loss"] < figures["unigram_loss"] - 0.3
    assert figures["right"] > 2 * figures["unigram_right"]
    one, two = (pretrain(UNITS, known, held, updates=2, rate=5e-3, seed=0)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_fine_tuning_leaves_what_it_begins_with():
    items, labels = sequences(80)
    items = [one // 2 + 6 * label for one, label in zip(items, labels, strict=True)]  # each class has its own units
    torch.manual_seed(0)
    encoder = UnitEncoder(UNITS)
    before = [weight.clone() for weight in encoder.parameters()]
    model = fine_tune(encoder, items[:40], labels[:40], 2, updates=30, rate=3e-3, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), before, strict=True))
    assert np.mean(classes_of(model, items[40:]) == labels[40:]) > 0.9


def test_a_recording_on_both_sides_is_refused():
    whole = problem()
    groups = whole.groups.copy()
    groups[np.flatnonzero(whole.part == "test")[0]] = groups[np.flatnonzero(whole.part == "train")[0]]
    with pytest.raises(InputError, match="counting: group 0 is on both sides"):
        replace(whole, groups=groups)


def test_labels_are_drawn_from_the_training_part():
    whole = problem()
    drawn = [whole.drawn(3, seed) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert set(drawn[0]) != set(drawn[2])
    assert set(whole.part[drawn[0]]) == {"train"}
    assert np.bincount(whole.labels[drawn[0]]).tolist() == [3, 3]
    assert sorted(whole.drawn(None, 0)) == np.flatnonzero(whole.part == "train").tolist()


def test_a_problem_is_measured():
    torch.manual_seed(0)
    told = json.loads(json.dumps(measure(problem(), UnitEncoder(UNITS), 5, seeds=2, updates=5)))
    assert (told["classes"], told["labels"], told["tested"]) == (2, 10, 20)
    assert told["accuracy"]["most frequent class"]["mean"] == 0.5
    for row in told["accuracy"].values():
        assert len(row["seeds"]) == 2
        assert row["mean"] == pytest.approx(np.mean(row["seeds"]))
        assert row["interval"][0] <= row["mean"] <= row["interval"][1]
    # How often units occur says nothing of the direction, their order all of it.
    assert told["accuracy"]["counts of units, logistic regression"]["mean"] < 0.8
    gain = told["accuracy"]["pre-trained"]["mean"] - told["accuracy"]["from scratch"]["mean"]
    assert told["gain_of_pre_training"]["mean"] == pytest.approx(gain)


TS = """\ufeff# a comment
@problemName waves
@data
{rows}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Stands in for sktime: slow and quick waves with some noise."""
    folder = tmp_path / "sktime" / "datasets" / "data" / "PLAID"
    folder.mkdir(parents=True)
    (tmp_path / "sktime" / "__init__.py").write_text("raise ImportError('is not to be imported')")
    rng = np.random.default_rng(0)
    for name, count in (("TRAIN", 30), ("TEST", 10)):
        rows = []
        for index in range(count):
            wave = np.sin((0.3 + index % 2) * np.arange(rng.integers(100, 200))) + 0.1 * rng.standard_normal()
            wave += 0.05 * rng.standard_normal(len(wave))
            rows.append(",".join(f"{value:.4f}" for value in wave) + f":{index % 2}")
        (folder / f"PLAID_{name}.ts").write_text(TS.format(rows="\n".join(rows)), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_series_become_units(package, monkeypatch):
    series, labels = read_series(package / "PLAID_TRAIN.ts")
    assert (len(series), labels[:3]) == (30, ["0", "1", "0"])
    assert series[0].dtype == np.float32
    monkeypatch.setattr(lipcot_probe, "APPLIANCES", 10)
    tokenizer, whole = appliances()
    assert tokenizer.vocab_size == 10
    assert [len(one) for one in whole.sequences[:3]] == [(len(one) - 30) // 10 + 1 for one in series[:3]]
    assert {part: int(np.sum(whole.part == part)) for part in ("train", "valid", "test")} == {
        "train": 24, "valid": 6, "test": 10,
    }  # fmt: skip
    # Nothing of the test part is in the tokenizer.
    lines = (package / "PLAID_TEST.ts").read_text(encoding="utf-8").splitlines()
    (package / "PLAID_TEST.ts").write_text("\n".join(lines[:-1]), encoding="utf-8")
    assert appliances()[0].fingerprint == tokenizer.fingerprint


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setattr(lipcot_probe, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps sktime"):
        appliances()


def test_utterances_and_recordings_are_on_one_side(shared, monkeypatch):
    """The splits of the real data; units do not matter here."""
    monkeypatch.setattr(lipcot_probe, "runs", lambda tokenizer, paths: [np.zeros(1, np.int64)] * len(paths))
    tokenizer = speechtok.load("lipcot-k256")
    said, heard = speakers(shared, tokenizer), noises(shared, tokenizer)
    assert len(np.unique(said.groups)) == len(said.groups) == 18 * 20
    for part, each in (("train", 7), ("valid", 3), ("test", 10)):
        assert np.bincount(said.labels[said.part == part]).tolist() == [each] * 18
    assert len(np.unique(heard.labels)) == 8
    assert len(np.unique(heard.groups)) < len(heard.groups)  # clips of one recording
