"""Boundary figures against published values and slow oracles; segmenters on a folder whose answers are known."""

import itertools
import json

import numpy as np
import pytest
import soundfile

from speechtok.errors import InputError
from speechtok.evaluation.boundaries import Segmenter, energy_seed, uniform_grid
from speechtok.evaluation.boundaries import evaluate as evaluate_folder
from speechtok.metrics.boundaries import (
    SHIFTS,
    best_shift,
    count,
    evaluate,
    f1,
    hits,
    over_segmentation,
    r_value,
    validate,
)

RNG = np.random.default_rng(0)
RATE = 16000


@pytest.mark.parametrize(
    ("precision", "recall", "expected"),
    [(0.766, 0.683, 75.87), (0.643, 0.710, 70.66), (0.479, 0.759, 39.20), (0.641, 0.887, 62.43), (1, 1, 100)],
)
def test_published_r_values(precision, recall, expected):
    assert 100 * r_value(precision, recall) == pytest.approx(expected, abs=0.005)


def test_nothing_found():
    assert np.isnan(r_value(0, 0))
    assert np.isnan(over_segmentation(0, 0.5))
    assert f1(0, 0) == 0
    assert f1(0.766, 0.683) == pytest.approx(0.7221, abs=5e-5)
    one, far = np.array([[0.0, 1.0], [1.0, 2.0]]), np.array([[5.0, 6.0]])
    for protocol in ("sdhubert", "zerosyl"):
        found = evaluate([one], [far], protocol=protocol)
        assert (found["hits"], found["f1"], found["r_value"], found["over_segmentation"]) == (0, 0, None, None)
        assert evaluate([one], [np.zeros((0, 2))], protocol=protocol)["precision"] == 0
    with pytest.raises(InputError, match="no boundary is matched"):
        best_shift([one], [far], protocol="sdhubert")


def most_pairs(left, right, tolerance):
    """Largest number of pairs, by trying every partner of the first and leaving it alone."""
    if not left or not right:
        return 0
    best = most_pairs(left[1:], right, tolerance)
    for k, other in enumerate(right):
        if abs(left[0] - other) <= tolerance:
            best = max(best, 1 + most_pairs(left[1:], right[:k] + right[k + 1 :], tolerance))
    return best


def first_free(left, right, tolerance):
    """ZeroSyl's search: each reference takes the first prediction near it that is free."""
    free, found = list(right), 0
    for one in left:
        for k, other in enumerate(free):
            if abs(one - other) <= tolerance:
                free.pop(k)
                found += 1
                break
    return found


def test_the_sweep_finds_as_many_as_there_are():
    for _ in range(400):
        left, right = (np.sort(RNG.integers(0, 60, RNG.integers(0, 8))) for _ in range(2))
        tolerance = int(RNG.integers(0, 12))
        found = hits(left, right, tolerance)
        assert found == most_pairs(left.tolist(), right.tolist(), tolerance)
        assert found == first_free(left.tolist(), right.tolist(), tolerance)


def segments(count):
    """Segments on a grid of 10 ms, some of them apart, in whole hundredths of seconds."""
    edges = np.sort(RNG.choice(120, 2 * count, replace=False)).reshape(-1, 2)
    joined = RNG.random(count - 1) < 0.7
    edges[:-1, 1][joined] = edges[1:, 0][joined]
    return edges


def oracle(reference, predicted, protocol, tolerance, shift):
    """Both protocols in whole hundredths, as sets and by recursion."""
    if protocol == "sdhubert":
        wanted = sorted({time + shift for time in reference.ravel().tolist()})
        guessed = sorted(set(predicted[:, 0].tolist()))
        return most_pairs(wanted, guessed, tolerance), len(guessed), len(wanted)
    guessed = [time + shift for time in [*predicted[:, 0].tolist(), predicted[-1, 1]]]
    total = np.zeros(3, int)
    stretches, last = [], None
    for start, end in reference.tolist():
        if start != last:
            stretches.append([])
        stretches[-1].append((start, end))
        last = end
    for stretch in stretches:
        wanted = [end for _, end in stretch[:-1]]
        inside = [time for time in guessed if stretch[0][0] + tolerance < time < stretch[-1][1] - tolerance]
        total += most_pairs(wanted, inside, tolerance), len(inside), len(wanted)
    return tuple(total.tolist())


@pytest.mark.parametrize("protocol", ["sdhubert", "zerosyl"])
def test_protocols_against_the_oracle(protocol):
    """Times are hundredths, so that many boundaries are exactly the tolerance apart."""
    for _ in range(150):
        reference, predicted = segments(RNG.integers(1, 7)), segments(RNG.integers(1, 7))
        shift, tolerance = int(RNG.integers(-5, 6)), int(RNG.integers(0, 8))
        found = count(reference / 100, predicted / 100, protocol=protocol, tolerance=tolerance / 100, shift=shift / 100)
        assert tuple(found) == oracle(reference, predicted, protocol, tolerance, shift)


def test_protocols_by_hand():
    reference = np.array([[0.0, 0.2], [0.2, 0.5], [0.8, 1.0]])
    predicted = np.array([[0.03, 0.25], [0.25, 0.5], [0.84, 1.0]])
    # Starts .03 .25 .84 against .0 .2 .5 .8 1.; the one inner border .2, and .25 as the only guess inside a stretch.
    assert tuple(count(reference, predicted, protocol="sdhubert")) == (3, 3, 5)
    assert tuple(count(reference, predicted, protocol="zerosyl")) == (1, 1, 1)
    assert tuple(count(reference, predicted, protocol="zerosyl", shift=-0.01)) == (1, 1, 1)
    assert tuple(count(reference, predicted, protocol="zerosyl", shift=0.01)) == (0, 1, 1)
    assert tuple(count(reference, predicted, protocol="sdhubert", shift=0.1)) == (1, 3, 5)


@pytest.mark.parametrize(("protocol", "sign"), [("sdhubert", 1), ("zerosyl", -1)])
def test_the_shift_is_found(protocol, sign):
    """Late by 30 ms: the reference has to come later, the predictions earlier."""
    reference = [np.cumsum(RNG.uniform(0.12, 0.4, 40)) for _ in range(10)]
    reference = [np.stack([x[:-1], x[1:]], 1) for x in reference]
    late = [x + 0.03 for x in reference]
    found = best_shift(reference, late, protocol=protocol, tolerance=0.002)
    assert found == pytest.approx(sign * 0.03)
    assert evaluate(reference, late, protocol=protocol, tolerance=0.002, shift=found)["recall"] > 0.95
    assert best_shift(reference, reference, protocol=protocol, tolerance=0.06) == SHIFTS[0]  # the first of equals


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (np.zeros((3, 3)), "give float seconds"),
        (np.zeros((3, 2), int), "give float seconds"),
        (np.array([[0.0, np.nan]]), "NaN"),
        (np.array([[0.0, 1.0], [2.0, 1.5]]), "segment 1 is"),
        (np.array([[1.0, 2.0], [0.0, 3.0]]), "segment 1 is"),
    ],
)
def test_bad_segments(spans, message):
    with pytest.raises(InputError, match=message):
        validate(spans)


def test_bad_options():
    one = np.array([[0.0, 1.0]])
    for options, message in (
        ({"protocol": "other"}, "none of sdhubert, zerosyl"),
        ({"protocol": "zerosyl", "tolerance": -1}, "tolerance"),
        ({"protocol": "zerosyl", "shift": np.nan}, "shift"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate([one], [one], **options)
    with pytest.raises(InputError, match="give pairs"):
        evaluate([one], [], protocol="sdhubert")
    with pytest.raises(InputError, match="no boundary that counts"):
        evaluate([one], [one], protocol="zerosyl")


# -- folders --------------------------------------------------------------------------------------------------------

BEAT = 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two corpora of bumps of sound: BEAT seconds each, loud in the middle; each is a syllable of its own word."""
    root = tmp_path_factory.mktemp("aligned")
    facts, aligned = [], []
    for corpus, number in itertools.product(("librispeech", "speechocean762"), range(2)):
        (root / corpus).mkdir(exist_ok=True)
        path, bumps = f"{corpus}/{number}.flac", 12 + number
        time = np.arange(int(bumps * BEAT * RATE)) / RATE
        wave = np.sin(2 * np.pi * 700 * time) * np.sin(np.pi * time / BEAT) ** 2 * 0.5
        soundfile.write(root / path, np.concatenate([np.zeros(RATE // 2), wave, np.zeros(RATE // 2)]), RATE)
        edges = [round(0.5 + BEAT * i, 3) for i in range(bumps + 1)]
        words = [[f"w{i}", a, b] for i, (a, b) in enumerate(itertools.pairwise(edges))]
        phones = [["SIL", 0, 0.5], *(["AA" if i % 2 else "IY", a, b] for i, (_, a, b) in enumerate(words))]
        facts.append({"path": path, "speaker": corpus})
        aligned.append({"path": path, "words": words, "phones": [*phones, ["SIL", edges[-1], edges[-1] + 0.5]]})
    for name, lines in (("metadata", facts), ("alignments", aligned)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_folder(folder):
    def beats(wave):
        spans = energy_seed().cut(wave)
        return spans, np.arange(len(spans)) % 2

    told = []
    segmenters = [energy_seed(), uniform_grid(4), Segmenter("beats", beats, vocab_size=2)]
    results = evaluate_folder(folder, segmenters, on_event=told.append)
    assert [result["segmenter"] for result in results] == ["energy-25ms", "uniform-4", "beats"]
    seed, grid, units = (result["groups"] for result in results)
    assert list(seed) == ["native", "accented", "pooled"]
    assert seed["pooled"]["syllables"] == seed["pooled"]["segments"] == 50
    assert seed["pooled"]["zerosyl"]["r_value"] == 1
    assert seed["pooled"]["sdhubert"]["precision"] == 1
    assert seed["pooled"]["seconds"] == pytest.approx(50 * BEAT + 4)
    assert seed["pooled"]["units"] is None
    assert grid["native"]["zerosyl"]["recall"] == 1  # the grid and the beats have one rate and phase
    assert {name: units["pooled"]["units"][name]["snmi"] for name in ("iou", "overlap")} == pytest.approx(
        {"iou": 1, "overlap": 1}
    )
    assert units["pooled"]["units"]["cost"]["tokens_per_second"] == pytest.approx(50 / (50 * BEAT + 4))
    assert results[0]["left_out"] == {}
    assert told[-1].done == told[-1].total > 0
    json.dumps(results, allow_nan=False)


def test_shift_is_chosen_on_another_folder(folder):
    late = Segmenter("late", lambda wave: energy_seed().cut(wave) + 0.04)
    (chosen,) = evaluate_folder(folder, [late], dev=folder, tolerance=0.02)
    assert chosen["conventions"]["shift_from"].startswith("best R on ")
    assert 0.02 <= chosen["conventions"]["shift"]["sdhubert"] <= 0.045
    assert -0.05 <= chosen["conventions"]["shift"]["zerosyl"] <= -0.02
    (given,) = evaluate_folder(folder, [late], shift={"sdhubert": 0.04, "zerosyl": -0.04}, tolerance=0.02)
    assert given["groups"]["pooled"]["zerosyl"]["r_value"] == 1
    (plain,) = evaluate_folder(folder, [late], tolerance=0.02, limit_files=2)
    assert plain["conventions"]["shift"] == {"sdhubert": 0.0, "zerosyl": 0.0}
    assert plain["groups"]["pooled"]["zerosyl"]["hits"] == 0
    with pytest.raises(InputError, match="either a shift or a folder"):
        evaluate_folder(folder, [late], dev=folder, shift=0.0)
    with pytest.raises(InputError, match="name sdhubert and zerosyl"):
        evaluate_folder(folder, [late], shift={"sdhubert": 0.0})


def test_bad_segmenters(folder):
    with pytest.raises(InputError, match="a name of its own"):
        evaluate_folder(folder, [uniform_grid(4), uniform_grid(4)])
    with pytest.raises(InputError, match=r"backward on .*0\.flac: segments: segment 0"):
        evaluate_folder(folder, [Segmenter("backward", lambda wave: np.array([[1.0, 0.0]]))])
    with pytest.raises(InputError, match="give both or neither"):
        evaluate_folder(folder, [Segmenter("unnamed", lambda wave: (np.zeros((1, 2)), np.zeros(1, int)))])
    with pytest.raises(InputError, match="must be positive"):
        uniform_grid(0)
    with pytest.raises(InputError, match="8000"):
        energy_seed(sample_rate=4000)


def test_silence_and_short_sounds():
    for seconds in (0, 0.001, 0.02, 1):
        assert energy_seed().cut(np.zeros(int(seconds * RATE), np.float32)).shape == (0, 2)
    spans = uniform_grid(4).cut(np.zeros(RATE + 1000, np.float32))
    assert spans[:, 0].tolist() == [0, 0.25, 0.5, 0.75, 1.0]
    assert spans[-1, 1] == pytest.approx(1.0625)
    tone = np.sin(np.arange(300) / 5).astype(np.float32)
    assert (energy_seed().cut(tone) <= len(tone) / RATE).all()


def test_baselines_on_real_speech(shared):
    """The order that every segmenter is read against: dips of loudness far above a grid of the same rate."""
    seed, grid = evaluate_folder(
        shared / "speech" / "eval", [energy_seed(), uniform_grid(4)], shift={"sdhubert": 0.02, "zerosyl": -0.02},
        limit_files=100,
    )  # fmt: skip
    for protocol in ("sdhubert", "zerosyl"):
        assert seed["groups"]["lossy"][protocol]["f1"] > 0.65
        assert seed["groups"]["lossy"][protocol]["f1"] > grid["groups"]["lossy"][protocol]["f1"] + 0.2
