import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from speechtok.errors import InputError
from speechtok.metrics.phonetic import evaluate, joint_counts, pnmi

RNG = np.random.default_rng(0)


def test_equal_constant_and_random_units():
    labels = RNG.integers(0, 40, 50_000)
    assert pnmi(joint_counts(labels, labels)) == pytest.approx(1)
    assert pnmi(joint_counts(labels, np.zeros_like(labels))) == pytest.approx(0, abs=1e-12)
    chance = evaluate(labels, RNG.integers(0, 100, len(labels)))
    assert chance["pnmi"] == pytest.approx(chance["pnmi_bias"], rel=0.1)
    assert evaluate(np.zeros(5, int), np.arange(5))["pnmi"] == 0


def test_against_sklearn_and_relabelling():
    labels, units = RNG.integers(0, 12, 3000), RNG.integers(0, 30, 3000)
    units = np.where(RNG.random(3000) < 0.5, labels, units)
    share = np.bincount(labels) / len(labels)
    expected = mutual_info_score(labels, units) / -(share * np.log(share)).sum()
    assert pnmi(joint_counts(labels, units)) == pytest.approx(expected, rel=1e-9)
    shuffled = RNG.permutation(30)[units]
    assert evaluate(labels, shuffled) == pytest.approx(evaluate(labels, units))
    refined = units * 12 + labels
    assert pnmi(joint_counts(labels, refined)) >= pnmi(joint_counts(labels, units))


def test_purities_by_hand():
    found = evaluate(np.array([0, 0, 0, 1, 1, 2]), np.array([5, 5, 6, 6, 6, 5]))
    assert found["phone_purity"] == pytest.approx(4 / 6)
    assert found["cluster_purity"] == pytest.approx((2 + 2 + 1) / 6)
    assert found["units_used"] == 2


def test_bad_input():
    with pytest.raises(InputError, match="equally long"):
        joint_counts(np.zeros(2, int), np.zeros(3, int))
