"""Syllables by rule, by hand and on real alignments; purities, matching and cost of their units."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import mutual_info_score

from speechtok.errors import InputError
from speechtok.evaluation.alignments import Span, Utterance, read
from speechtok.evaluation.syllables import ONSETS, VOWELS, evaluate, split, syllables
from speechtok.metrics import syllabic
from speechtok.metrics.syllabic import assignment, cost, match_iou, match_overlap, temporal_iou

RNG = np.random.default_rng(0)


def named(text):
    phones = text.split()
    return [" ".join(phones[i:j]) for i, j in split(phones)]


@pytest.mark.parametrize(
    ("phones", "expected"),
    [
        ("S T R EH NG TH", ["S T R EH NG TH"]),
        ("EH K S T R AH", ["EH K", "S T R AH"]),
        ("S IH NG ER", ["S IH NG", "ER"]),
        ("L IH T AH L", ["L IH", "T AH L"]),
        ("AE T L AH S", ["AE T", "L AH S"]),
        ("B Y UW T IY", ["B Y UW", "T IY"]),
        ("HH AE M L AH T", ["HH AE M", "L AH T"]),
        ("K EY AA S", ["K EY", "AA S"]),
        ("M M", ["M M"]),
        ("AY", ["AY"]),
    ],
)
def test_maximal_onset(phones, expected):
    assert named(phones) == expected


def test_onsets_against_the_definition():
    """Of all cuts between two nuclei the earliest legal one, by brute force over random consonants."""
    consonants = sorted({phone for onset in ONSETS for phone in onset} | {"NG"})
    assert not {phone for onset in ONSETS for phone in onset} & VOWELS
    for _ in range(500):
        between = RNG.choice(consonants, RNG.integers(0, 5)).tolist()
        phones = ["AA", *between, "IY"]
        legal = [cut for cut in range(len(between) + 1) if not between[cut:] or tuple(between[cut:]) in ONSETS]
        assert split(phones)[1][0] == 1 + min(legal)


def utterance(words, phones):
    return Utterance("a/b.flac", "x", *(tuple(Span(*one) for one in spans) for spans in (words, phones)))


def test_words_silence_and_noise():
    one = utterance(
        [("at", 0.1, 0.3), ("all", 0.3, 0.5), ("away", 0.6, 1.0), ("mm", 1.0, 1.1)],
        [
            ("SIL", 0.0, 0.1), ("AE1", 0.1, 0.2), ("T", 0.2, 0.3), ("AO1", 0.3, 0.4), ("L", 0.4, 0.5),
            ("SPN", 0.5, 0.6), ("AH0", 0.6, 0.7), ("SIL", 0.7, 0.8), ("W", 0.8, 0.9), ("EY", 0.9, 1.0),
            ("M", 1.0, 1.1),
        ],
    )  # fmt: skip
    assert [(s.name, s.start, s.end) for s in syllables(one)] == [
        ("AE T", 0.1, 0.3), ("AO L", 0.3, 0.5), ("AH", 0.6, 0.7), ("W EY", 0.8, 1.0), ("M", 1.0, 1.1)
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"b.flac: phone T at 0.5 s lies in no word"):
        syllables(utterance([("a", 0, 0.5)], [("AH", 0, 0.5), ("T", 0.5, 0.6)]))
    assert syllables(utterance([], [("SIL", 0, 1)])) == ()


def test_real_syllables(shared):
    """Known from read English: about 4.2 per second of speech; slow learners are slower."""
    found = evaluate(shared / "speech" / "eval")
    rates = {name: figures["syllables_per_speech_second"] for name, figures in found["groups"].items()}
    assert 4 < rates["native"] < 5
    assert 4 < rates["lossy"] < 5
    assert 2.5 < rates["accented"] < 4
    for one in read(shared / "speech" / "eval"):
        spans = syllables(one)
        phones = [phone.name for phone in one.phones if phone.name not in ("SIL", "SPN")]
        assert " ".join(span.name for span in spans).split() == phones
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(spans))
        assert all(sum(phone in VOWELS for phone in span.name.split()) <= 1 for span in spans)


# -- units of segments ----------------------------------------------------------------------------------------------


def spans(count, gaps=True):
    edges = np.sort(RNG.choice(1000, 2 * count, replace=False)) / 100
    return edges.reshape(-1, 2) if gaps else np.stack([edges[:count], edges[1 : count + 1]], 1)


def test_assignment_equals_scipy():
    for _ in range(300):
        scores = RNG.normal(size=RNG.integers(1, 14, 2))
        expected = linear_sum_assignment(scores, maximize=True)
        assert [x.tolist() for x in assignment(scores)] == [x.tolist() for x in expected]
    ties = np.round(RNG.normal(size=(9, 6)), 0)
    assert ties[assignment(ties)].sum() == ties[linear_sum_assignment(ties, maximize=True)].sum()


def test_temporal_iou_by_hand():
    found = temporal_iou(np.array([[0.0, 1.0]]), np.array([[0.5, 1.5], [0.0, 1.0], [2.0, 3.0]]))
    assert found[0] == pytest.approx([0.5 / 1.5001, 1 / 1.0001, -1 / 3.0001])
    assert [len(x) for x in match_iou(np.zeros((0, 2)), spans(3))] == [0, 0]


def test_overlap_against_a_loop():
    for _ in range(100):
        reference, predicted = spans(RNG.integers(1, 8), gaps=bool(RNG.integers(2))), spans(RNG.integers(1, 8))
        edges = [-100, *reference.ravel(), 100]
        expected = []
        for start, end in predicted:
            overlaps = {}
            for k in range(len(edges) - 1):
                shared = min(end, edges[k + 1]) - max(start, edges[k])
                if edges[k + 1] > edges[k]:
                    overlaps[k] = round(shared, 9)
            best = max(overlaps, key=lambda k: (overlaps[k], -k))
            expected.append(best // 2 if best % 2 else -1)
        assert match_overlap(reference, predicted).tolist() == expected
    assert match_overlap(np.zeros((0, 2)), spans(2)).tolist() == [-1, -1]


def test_perfect_and_constant_units():
    reference = [spans(12, gaps=False) for _ in range(20)]
    ids = [RNG.integers(0, 5, 12) for _ in reference]
    labels = [[f"S{i}" for i in one] for one in ids]
    for matching in ("iou", "overlap"):
        found = syllabic.evaluate(reference, labels, reference, ids, vocab_size=5, matching=matching)
        assert (found["syllable_purity"], found["cluster_purity"]) == (1, 1)
        assert found["snmi"] == pytest.approx(1)
        assert (found["pairs"], found["types"], found["units_used"]) == (240, 5, 5)
        one = syllabic.evaluate(reference, labels, reference, [0 * x for x in ids], vocab_size=5, matching=matching)
        assert one["cluster_purity"] == 1
        assert one["syllable_purity"] == max(np.bincount(np.concatenate(ids))) / 240
        assert one["snmi"] == pytest.approx(0, abs=1e-12)


def test_figures_by_definition():
    """SP and CP with their swapped names, and SNMI, from pairs made by scipy and counted by hand."""
    reference, predicted = [spans(10) for _ in range(30)], [spans(9) for _ in range(30)]
    labels = [[f"S{i}" for i in RNG.integers(0, 4, 10)] for _ in reference]
    ids = [RNG.integers(0, 6, 9) for _ in reference]
    pairs = []
    for a, names, b, units in zip(reference, labels, predicted, ids, strict=True):
        rows, columns = linear_sum_assignment(temporal_iou(a, b), maximize=True)
        pairs += [(names[i], int(units[j])) for i, j in zip(rows, columns, strict=True)]
    found = syllabic.evaluate(reference, labels, predicted, ids, vocab_size=6)
    count = {pair: pairs.count(pair) for pair in set(pairs)}
    units, names = {u for _, u in pairs}, {s for s, _ in pairs}
    assert found["syllable_purity"] == pytest.approx(
        sum(max(n for (_, v), n in count.items() if v == u) for u in units) / len(pairs)
    )
    assert found["cluster_purity"] == pytest.approx(
        sum(max(n for (t, _), n in count.items() if t == s) for s in names) / len(pairs)
    )
    share = np.array([sum(s == t for t, _ in pairs) for s in names]) / len(pairs)
    information = mutual_info_score([s for s, _ in pairs], [u for _, u in pairs])
    assert found["snmi"] == pytest.approx(information / -(share * np.log(share)).sum())


def test_silence_is_the_callers_choice():
    reference, labels = [np.array([[0.0, 1.0], [2.0, 3.0]])], [["A", "B"]]
    predicted, ids = [np.array([[0.0, 1.0], [1.1, 1.9], [2.0, 3.0]])], [np.array([1, 2, 3])]
    dropped, kept = (
        syllabic.evaluate(reference, labels, predicted, ids, vocab_size=4, matching="overlap", keep_silence=keep)
        for keep in (False, True)
    )
    assert (dropped["pairs"], dropped["types"], dropped["silence"]) == (2, 2, "dropped")
    assert (kept["pairs"], kept["types"], kept["silence"]) == (3, 3, "kept")


def test_cost_by_hand():
    """Four tokens in 2 s; two equally frequent units; durations 0.1 or 0.2 s that follow the unit; no gaps."""
    spans_ = np.array([[0, 0.1], [0.1, 0.3], [0.3, 0.4], [0.4, 0.6]])
    found = cost([spans_], [np.array([0, 1, 0, 1])], seconds=2.0, vocab_size=8)
    assert found == pytest.approx(
        {
            "tokens_per_second": 2, "nominal_bitrate": 6, "entropy_bitrate": 2,
            "entropy_bitrate_with_timing": 2, "entropy_bitrate_and_timing": 4,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [np.array([0.0])]}, "need integers"),
        ({"ids": [np.array([-1])]}, "not be negative"),
        ({"ids": [np.array([9])]}, "vocabulary of 4"),
        ({"ids": []}, "give pairs"),
        ({"labels": [["A", "B"]]}, "2 labels"),
        ({"labels": []}, "0 lists of labels"),
        ({"matching": "best"}, "none of iou, overlap"),
        ({"references": [np.zeros((0, 2))], "labels": [[]]}, "no segment is paired"),
    ],
)
def test_bad_input(change, message):
    one = np.array([[0.0, 1.0]])
    good = {"references": [one], "labels": [["A"]], "predictions": [one], "ids": [np.array([0])]}
    with pytest.raises(InputError, match=message):
        syllabic.evaluate(**(good | change), vocab_size=4)
    with pytest.raises(InputError, match="time step"):
        cost([one], [np.array([0])], seconds=1, vocab_size=4, step=0)


def test_chance_is_what_units_in_random_order_give() -> None:
    generator = np.random.default_rng(0)
    count, types, units = 400, 60, 80
    spans = [np.stack([np.arange(count), np.arange(count) + 1.0], 1)]
    said = generator.integers(0, types, count)
    labels = [[f"S{one}" for one in said]]
    ids = [(said + types * generator.integers(0, 2, count)) % units]  # units that tell much about syllables
    found = syllabic.evaluate(spans, labels, spans, ids, vocab_size=units)
    draws = [
        syllabic.evaluate(spans, labels, spans, [generator.permutation(ids[0])], vocab_size=units) for _ in range(30)
    ]
    for name in ("syllable_purity", "cluster_purity", "snmi"):
        values = [draw[name] for draw in draws]
        assert abs(found[f"{name}_chance"] - np.mean(values)) < 4 * np.std(values) + 1e-3
        assert found[name] > found[f"{name}_chance"]
    assert found["snmi_chance"] > 0.5  # few pairs: most of the information of random units is chance
