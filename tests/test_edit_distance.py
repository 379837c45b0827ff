"""Unit edit distance against editdistance and jiwer, and on pairs whose distance is known."""

import editdistance
import jiwer
import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from speechtok.errors import InputError
from speechtok.metrics.edit_distance import distances, evaluate, unit_edit_distance
from speechtok.units import run_lengths

RNG = np.random.default_rng(0)


def pairs(count, vocabulary=20, longest=60):
    """Units with runs, and edited copies of them."""
    references, hypotheses = [], []
    for _ in range(count):
        units = RNG.integers(0, vocabulary, RNG.integers(1, longest)).repeat(2)
        kept = units[RNG.random(len(units)) > 0.1]
        references.append(units)
        hypotheses.append(np.where(RNG.random(len(kept)) < 0.2, RNG.integers(0, vocabulary, len(kept)), kept))
    return references, hypotheses


def dd(units):
    return run_lengths(units.astype(np.int32))[0].tolist()


def test_equals_editdistance_and_rapidfuzz_on_2000_pairs():
    references, hypotheses = pairs(2000)
    expected = [editdistance.eval(dd(a), dd(b)) for a, b in zip(references, hypotheses, strict=True)]
    edits, lengths = distances(references, hypotheses)
    assert edits.tolist() == expected
    assert expected == [Levenshtein.distance(dd(a), dd(b)) for a, b in zip(references, hypotheses, strict=True)]
    assert lengths.tolist() == [max(1, len(dd(a))) for a in references]
    mean = np.mean([e / len(dd(a)) for e, a in zip(expected, references, strict=True)])
    assert unit_edit_distance(references, hypotheses) == pytest.approx(100 * mean)


def test_pooled_is_the_word_error_rate():
    references, hypotheses = pairs(200)
    lines = [[" ".join(map(str, dd(x))) for x in side] for side in (references, hypotheses)]
    expected = 100 * jiwer.wer(*lines)
    assert unit_edit_distance(references, hypotheses, agg="pooled") == pytest.approx(expected)


def test_norms_by_hand():
    """1 1 2 3 3 3 against 1 4: two edits of three runs, six frames."""
    pair = [np.array([1, 1, 2, 3, 3, 3])], [np.array([1, 4])]
    found = [unit_edit_distance(*pair, norm=norm) for norm in ("dedup_ref", "frames", "max_len")]
    assert found == pytest.approx([200 / 3, 200 / 6, 200 / 3])
    assert unit_edit_distance(*reversed(pair), norm="dedup_ref") == pytest.approx(100)
    assert unit_edit_distance(*reversed(pair), norm="max_len") == pytest.approx(200 / 3)


def test_mean_and_pooled_differ():
    references = [np.array([1]), np.array([1, 2, 3])]
    hypotheses = [np.array([2]), np.array([1, 2, 3])]
    assert unit_edit_distance(references, hypotheses, agg="mean") == pytest.approx(50)
    assert unit_edit_distance(references, hypotheses, agg="pooled") == pytest.approx(25)


def test_identity_tempo_relabelling_and_constants():
    references, hypotheses = pairs(50)
    assert unit_edit_distance(references, references) == 0
    assert unit_edit_distance(references, [units.repeat(3) for units in references]) == 0
    names = RNG.permutation(20)
    renamed = [[names[units] for units in side] for side in (references, hypotheses)]
    assert unit_edit_distance(*renamed) == pytest.approx(unit_edit_distance(references, hypotheses))
    constant = [[np.zeros(len(units), int) for units in side if len(units)] for side in (references, references)]
    assert unit_edit_distance(*constant) == 0
    unrelated = [[RNG.integers(0, 50, 300) for _ in range(20)] for _ in range(2)]
    # 94 with equally likely units; with some more frequent than others, as those of speech, it is less.
    assert 90 < unit_edit_distance(*unrelated) < 97
    likely = 1 / np.arange(1, 51)
    unrelated = [[RNG.choice(50, 300, p=likely / likely.sum()) for _ in range(20)] for _ in range(2)]
    assert 75 < unit_edit_distance(*unrelated) < 90


def test_empty_sequences():
    nothing, some = np.zeros(0, int), np.array([1, 2, 3])
    assert unit_edit_distance([nothing], [nothing]) == 0
    assert unit_edit_distance([nothing], [some]) == 300
    assert unit_edit_distance([some], [nothing]) == 100


def test_evaluate_names_its_conventions():
    references, hypotheses = pairs(10)
    found = evaluate(references, hypotheses, norm="frames", agg="pooled", seconds=4.0)
    assert (found["norm"], found["agg"], found["pairs"]) == ("frames", "pooled", 10)
    assert found["ued"] == unit_edit_distance(references, hypotheses, norm="frames", agg="pooled")
    assert found["edits_per_second"] == distances(references, hypotheses)[0].sum() / 4
    runs = [sum(len(dd(units)) for units in side) for side in (references, hypotheses)]
    assert found["run_ratio"] == runs[1] / runs[0]


def test_bad_input():
    one = [np.array([1])]
    for arguments, options, message in [
        ((one, one), {"norm": "words"}, "norm"),
        ((one, one), {"agg": "median"}, "agg"),
        ((one, []), {}, "pairs"),
        (([], []), {}, "pairs"),
        ((one, [np.array([0.5])]), {}, "integer"),
        ((one, [np.zeros((2, 3), int)]), {}, "codebook"),
        ((one, one), {"seconds": 0.0}, "positive"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate(*arguments, **options)
