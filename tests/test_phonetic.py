"""Purity and PNMI against formulas of others, against sklearn and by hand; codebook use."""

import math

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from speechtok.errors import InputError
from speechtok.metrics.phonetic import (
    cluster_purity,
    codebook_use,
    conditional_entropy,
    entropy,
    evaluate,
    joint_counts,
    leakage,
    phone_purity,
    pnmi,
)

RNG = np.random.default_rng(0)


def test_equal_constant_and_random_units():
    labels = RNG.integers(0, 40, 50_000)
    assert pnmi(joint_counts(labels, labels)) == pytest.approx(1)
    assert pnmi(joint_counts(labels, labels), corrected=True) == pytest.approx(1, abs=1e-3)
    assert pnmi(joint_counts(labels, np.zeros_like(labels))) == pytest.approx(0, abs=1e-12)
    chance = evaluate(labels, RNG.integers(0, 100, len(labels)), vocab_size=100)
    assert chance["pnmi"] == pytest.approx(chance["pnmi_bias"], rel=0.1)
    assert evaluate(np.zeros(5, int), np.arange(5), vocab_size=5)["pnmi"] == 0


def test_against_sklearn_and_relabelling():
    labels, units = RNG.integers(0, 12, 3000), RNG.integers(0, 30, 3000)
    units = np.where(RNG.random(3000) < 0.5, labels, units)
    share = np.bincount(labels) / len(labels)
    expected = mutual_info_score(labels, units) / -(share * np.log(share)).sum()
    assert pnmi(joint_counts(labels, units)) == pytest.approx(expected, rel=1e-9)
    shuffled = RNG.permutation(30)[units]
    assert evaluate(labels, shuffled, vocab_size=30) == pytest.approx(evaluate(labels, units, vocab_size=30))
    refined = units * 12 + labels
    assert pnmi(joint_counts(labels, refined)) >= pnmi(joint_counts(labels, units))


def test_against_the_formulas_of_fairseq():
    """measure_teacher_quality adds 1e-8 inside its logarithms; a difference of 1e-6 is what that may cost."""
    counts = RNG.integers(1, 200, (39, 100))
    counts[RNG.random(counts.shape) < 0.3] = 0
    p = counts / counts.sum()
    y, z = p.sum(1, keepdims=True), p.sum(0, keepdims=True)
    information = (p * np.log(p / (y @ z) + 1e-8)).sum()
    assert pnmi(counts) == pytest.approx(information / -(y * np.log(y + 1e-8)).sum(), abs=1e-6)
    assert phone_purity(counts) == pytest.approx(p.max(axis=0).sum())
    assert cluster_purity(counts) == pytest.approx(p.max(axis=1).sum())


def test_miller_madow_by_hand():
    counts = np.array([[3, 1, 0], [0, 0, 4]])
    h_label = math.log(2) + (2 - 1) / 16
    h_unit = -(3 / 8 * math.log(3 / 8) + 1 / 8 * math.log(1 / 8) + 1 / 2 * math.log(1 / 2)) + (3 - 1) / 16
    h_both = h_unit  # the same three occupied cells
    assert pnmi(counts, corrected=True) == pytest.approx((h_label + h_unit - h_both) / h_label)
    assert entropy(counts, corrected=True) == pytest.approx(h_both)


def test_miller_madow_takes_the_bias_away():
    """Independent labels and units on few frames: the plain figure is far above 0, the corrected one is not."""
    plain, corrected = [], []
    for _ in range(20):
        counts = joint_counts(RNG.integers(0, 20, 6000), RNG.integers(0, 50, 6000))
        plain.append(pnmi(counts))
        corrected.append(pnmi(counts, corrected=True))
    assert np.mean(plain) > 0.02
    assert abs(np.mean(corrected)) < 0.1 * np.mean(plain)


def test_purities_by_hand():
    found = evaluate(np.array([0, 0, 0, 1, 1, 2]), np.array([5, 5, 6, 6, 6, 5]), vocab_size=10)
    assert found["phone_purity"] == pytest.approx(4 / 6)
    assert found["cluster_purity"] == pytest.approx((2 + 2 + 1) / 6)
    assert (found["units_used"], found["dead_codes"]) == (2, 8)
    # H(unit | label): labels 0 and 1 hold 3 and 2 frames, label 2 one; only label 0 is split, 2 to 1.
    expected = 3 / 6 * -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert found["conditional_entropy_nats"] == pytest.approx(expected)
    assert conditional_entropy(np.eye(3, dtype=int)) == pytest.approx(0)


def test_silence_is_the_callers_choice():
    labels, units = np.array([0, 0, 0, 1, 2, 1, 2, 1]), np.array([0, 0, 0, 1, 1, 2, 2, 1])
    kept = evaluate(labels, units, vocab_size=3, silent=[0])
    dropped = evaluate(labels, units, vocab_size=3, silent=[0], keep_silence=False)
    assert (kept["silence"], kept["frames"], dropped["silence"], dropped["frames"]) == ("kept", 8, "dropped", 5)
    assert dropped["pnmi"] == pytest.approx(pnmi(joint_counts(labels[3:], units[3:])))
    assert dropped["pnmi"] < kept["pnmi"]
    with pytest.raises(InputError, match="no frame"):
        evaluate(labels[:3], units[:3], vocab_size=3, silent=[0], keep_silence=False)


def test_codebook_use():
    units = np.concatenate([np.zeros(9990, int), np.full(10, 1), np.full(11, 2)])
    use = codebook_use(units, 100)
    assert use["units_used"] == 3
    assert use["dead_codes"] == 97
    assert use["usage"] == 2  # 1 / (10 K) of 10011 frames are 10.011
    assert codebook_use(np.arange(50).repeat(3), 50)["perplexity"] == pytest.approx(50)
    with pytest.raises(InputError, match="vocabulary"):
        codebook_use(np.array([7]), 7)


def test_speaker_leakage():
    speakers = RNG.integers(0, 4, 20_000)
    assert leakage(speakers, speakers * 2) == pytest.approx(1)
    noise = RNG.integers(0, 10, 20_000)
    assert leakage(speakers, noise, corrected=True) == pytest.approx(0, abs=1e-3)
    found = evaluate(noise % 5, speakers, vocab_size=4, speakers=speakers)
    assert (found["speakers"], found["speaker_leakage"]) == (4, pytest.approx(1))


@pytest.mark.parametrize(
    ("labels", "units", "message"),
    [
        (np.zeros(2, int), np.zeros(3, int), "equally long"),
        (np.zeros(0, int), np.zeros(0, int), "not empty"),
        (np.zeros(2), np.zeros(2, int), "integers"),
        (np.array([-1, 0]), np.zeros(2, int), "negative"),
    ],
)
def test_bad_input(labels, units, message):
    with pytest.raises(InputError, match=message):
        joint_counts(labels, units)
    with pytest.raises(InputError, match=message):
        evaluate(labels, units, vocab_size=3)
