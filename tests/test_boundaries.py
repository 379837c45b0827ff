"""Boundary figures against published values and slow oracles; cutters on a folder whose answers are known."""

import itertools
import json

import numpy as np
import pytest
import soundfile

from speechtok.errors import InputError
from speechtok.evaluation.baselines import SMOOTHINGS, energy, energy_onsets, energy_seed, uniform_grid
from speechtok.evaluation.boundaries import Cutter, Family, choose
from speechtok.evaluation.boundaries import evaluate as evaluate_folder
from speechtok.metrics.boundaries import (
    SHIFTS,
    best_shift,
    count,
    evaluate,
    evaluate_intervals,
    f1,
    hits,
    interval_hits,
    over_segmentation,
    r_value,
    validate,
)
from speechtok.segmenters.energy import EnergySeeds
from tests.test_energy_seeds import babble, mel

RNG = np.random.default_rng(0)
RATE = 16000
PROTOCOLS = ("sdhubert", "zerosyl", "inner")


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
    for protocol in PROTOCOLS:
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
    """All protocols in whole hundredths, as sets and by recursion."""
    if protocol == "sdhubert":
        wanted = sorted({time + shift for time in reference.ravel().tolist()})
        guessed = sorted(set(predicted[:, 0].tolist()))
        return most_pairs(wanted, guessed, tolerance), len(guessed), len(wanted)
    if protocol == "inner":
        first, last = reference.min(), reference.max()
        wanted = sorted({time for time in reference.ravel().tolist() if first < time < last})
        guessed = sorted({time + shift for time in predicted.ravel().tolist()})
        guessed = [time for time in guessed if first + tolerance < time < last - tolerance]
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


@pytest.mark.parametrize("protocol", PROTOCOLS)
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
    # .2 .5 .8 against .25 .5 .84; the start at .03 and the end at 1. are at the edges.
    assert tuple(count(reference, predicted, protocol="inner")) == (3, 3, 3)
    assert tuple(count(reference, predicted, protocol="inner", tolerance=0.02)) == (1, 4, 3)  # .03 is inside of 0 + .02
    assert tuple(count(np.zeros((0, 2)), predicted, protocol="inner")) == (0, 0, 0)


def most_intervals(left, right, tolerance):
    """Largest number of pairs of intervals with both edges near, as `most_pairs`."""
    if not left or not right:
        return 0
    best = most_intervals(left[1:], right, tolerance)
    for k, other in enumerate(right):
        if max(abs(left[0][0] - other[0]), abs(left[0][1] - other[1])) <= tolerance:
            best = max(best, 1 + most_intervals(left[1:], right[:k] + right[k + 1 :], tolerance))
    return best


def test_intervals_against_the_oracle():
    """Also of segments that overlap, as long as they are in order."""
    for _ in range(300):
        left, right = (
            np.stack([np.sort(RNG.integers(0, 40, n)), 8 + np.sort(RNG.integers(0, 40, n))], 1)
            for n in RNG.integers(0, 7, 2)
        )
        left, right = (np.stack([one[:, 0], np.maximum(one[:, 0], one[:, 1])], 1) for one in (left, right))
        tolerance = int(RNG.integers(0, 12))
        expected = most_intervals(left.tolist(), right.tolist(), tolerance)
        assert interval_hits(left, right, tolerance) == expected


def test_intervals_by_hand():
    reference = np.array([[0.0, 0.2], [0.2, 0.5], [0.8, 1.0]])
    predicted = np.array([[0.03, 0.25], [0.25, 0.6], [0.84, 1.05], [1.05, 1.2]])
    found = evaluate_intervals([reference, reference], [predicted, np.zeros((0, 2))])
    assert (found["hits"], found["predicted"], found["reference"]) == (2, 4, 6)
    assert (found["precision"], found["recall"], found["f1"]) == (0.5, 2 / 6, pytest.approx(0.4))
    assert evaluate_intervals([reference], [predicted], shift=0.1)["hits"] == 1  # the second
    assert evaluate_intervals([reference], [reference + 0.3], shift=0.3, tolerance=0)["f1"] == 1
    with pytest.raises(InputError, match="no syllable"):
        evaluate_intervals([np.zeros((0, 2))], [predicted])
    with pytest.raises(InputError, match="tolerance"):
        evaluate_intervals([reference], [predicted], tolerance=-1)


@pytest.mark.parametrize(("protocol", "sign"), [("sdhubert", 1), ("zerosyl", -1), ("inner", -1)])
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
        ({"protocol": "other"}, "none of sdhubert, zerosyl, inner"),
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


def bumps(root, beat=BEAT):
    """Two corpora of bumps of sound: `beat` seconds each, loud in the middle; each is a syllable of its own word."""
    facts, aligned = [], []
    for corpus, number in itertools.product(("librispeech", "speechocean762"), range(2)):
        (root / corpus).mkdir(exist_ok=True)
        path, bumps = f"{corpus}/{number}.flac", 12 + number
        time = np.arange(int(bumps * beat * RATE)) / RATE
        tone = np.where(time // beat % 2, 500, 2000)  # the sine is 0 wherever it changes
        wave = np.sin(2 * np.pi * tone * time) * np.sin(np.pi * time / beat) ** 2 * 0.5
        soundfile.write(root / path, np.concatenate([np.zeros(RATE // 2), wave, np.zeros(RATE // 2)]), RATE)
        edges = [round(0.5 + beat * i, 3) for i in range(bumps + 1)]
        words = [[f"w{i}", a, b] for i, (a, b) in enumerate(itertools.pairwise(edges))]
        phones = [["SIL", 0, 0.5], *(["AA" if i % 2 else "IY", a, b] for i, (_, a, b) in enumerate(words))]
        facts.append({"path": path, "speaker": corpus})
        aligned.append({"path": path, "words": words, "phones": [*phones, ["SIL", edges[-1], edges[-1] + 0.5]]})
    for name, lines in (("metadata", facts), ("alignments", aligned)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bumps(tmp_path_factory.mktemp("aligned"))


def beats(wave):
    spans = energy_seed().cut(wave)
    return spans, np.arange(len(spans)) % 2


def test_folder(folder):
    told = []
    cutters = [energy_seed(), uniform_grid(4), Cutter("beats", beats, vocab_size=2, facts={"by": "hand"})]
    results = evaluate_folder(folder, cutters, on_event=told.append)
    assert [result["tokenizer"] for result in results] == ["energy-25ms", "uniform-4", "beats"]
    seed, grid, units = (result["groups"] for result in results)
    assert list(seed) == ["native", "accented", "pooled"]
    assert seed["pooled"]["syllables"] == seed["pooled"]["segments"] == 50
    assert seed["pooled"]["zerosyl"]["r_value"] == seed["pooled"]["inner"]["r_value"] == 1
    assert seed["pooled"]["sdhubert"]["precision"] == 1
    assert seed["pooled"]["intervals"]["f1"] > 0.8  # but first and last ones, which fade in and out
    assert seed["pooled"]["seconds"] == pytest.approx(50 * BEAT + 4)
    assert seed["pooled"]["units"] is None
    assert grid["native"]["zerosyl"]["recall"] == 1  # the grid and the beats have one rate and phase
    assert {name: units["pooled"]["units"][name]["snmi"] for name in ("iou", "overlap")} == pytest.approx(
        {"iou": 1, "overlap": 1}
    )
    assert units["pooled"]["units"]["cost"]["tokens_per_second"] == pytest.approx(50 / (50 * BEAT + 4))
    assert results[0]["left_out"] == {}
    assert results[2]["facts"] == {"by": "hand"}
    assert told[-1].done == told[-1].total > 0
    json.dumps(results, allow_nan=False)


def test_silence_units(folder):
    """A unit 2 for the silence before the first beat: no segment, unless it is asked for, but a cost."""

    def with_silence(wave):
        spans, ids = beats(wave)
        return np.concatenate([[[0.0, spans[0, 0]]], spans]), np.concatenate([[2], ids])

    cutter = Cutter("silent", with_silence, vocab_size=3, silence=2)
    (without,), (with_,), (plain,) = (
        evaluate_folder(folder, [one], silence_starts=starts)
        for one, starts in ((cutter, False), (cutter, True), (Cutter("beats", beats, vocab_size=2), False))
    )
    left, kept, bare = (one["groups"]["pooled"] for one in (without, with_, plain))
    assert (left["segments"], left["silence_units"], bare["silence_units"]) == (50, 4, 0)
    for figures in ("sdhubert", "zerosyl", "inner", "intervals"):
        assert left[figures] == bare[figures]
    assert kept["sdhubert"]["predicted"] == bare["sdhubert"]["predicted"] + 4
    assert kept["intervals"]["predicted"] == 54
    for matching in ("iou", "overlap"):
        assert left["units"][matching] == kept["units"][matching] == bare["units"][matching]
    assert left["units"]["overlap_with_silence"]["types"] == bare["units"]["overlap_with_silence"]["types"] + 1
    assert left["units"]["cost"]["tokens_per_second"] == pytest.approx(54 / (50 * BEAT + 4))
    assert with_["conventions"]["silence_units"] == "segments"


def test_shift_is_chosen_on_another_folder(folder):
    late = Cutter("late", lambda wave: energy_seed().cut(wave) + 0.04)
    (chosen,) = evaluate_folder(folder, [late], dev=folder, tolerance=0.02)
    assert chosen["conventions"]["shift_from"].startswith("best R on ")
    assert 0.02 <= chosen["conventions"]["shift"]["sdhubert"] <= 0.045
    assert -0.05 <= chosen["conventions"]["shift"]["zerosyl"] <= -0.02
    assert -0.05 <= chosen["conventions"]["shift"]["inner"] <= -0.02
    known = {"sdhubert": 0.04, "zerosyl": -0.04, "inner": -0.04}
    (given,) = evaluate_folder(folder, [late], shift=known, tolerance=0.02)
    assert given["groups"]["pooled"]["zerosyl"]["r_value"] == 1
    assert given["conventions"]["shift_from"] == "given"
    (plain,) = evaluate_folder(folder, [late], tolerance=0.02, limit_files=2)
    assert plain["conventions"]["shift"] == dict.fromkeys(PROTOCOLS, 0.0)
    assert plain["conventions"]["shift_from"] == "not chosen"
    assert plain["groups"]["pooled"]["zerosyl"]["hits"] == 0
    # A shift that is given is not chosen, whatever there is to choose on.
    assert evaluate_folder(folder, [late], dev=folder, shift=known, tolerance=0.02)[0] == given
    with pytest.raises(InputError, match="name sdhubert, zerosyl, inner"):
        evaluate_folder(folder, [late], shift={"sdhubert": 0.0})


def halves(name="halves", **changes):
    """Beats cut into `pieces` each: 1 is right, 2 has a higher rate, 9 is out of range."""
    prepared = []

    def prepare(wave):
        prepared.append(len(wave))
        return energy_seed().cut(wave)

    def cut(spans, setting):
        edges = [np.linspace(start, end, setting["pieces"] + 1) for start, end in spans]
        return np.array([pair for row in edges for pair in itertools.pairwise(row)])

    return Family(name, prepare, lambda _: [{"pieces": n} for n in (9, 2, 1)], cut, **changes), prepared


def test_settings_are_chosen_on_another_folder(folder, monkeypatch):
    monkeypatch.setattr("speechtok.evaluation.boundaries.RATES", (2.5, 8.0))
    family, prepared = halves(facts={"grid": [9, 2, 1]})
    (result,) = evaluate_folder(folder, [family], dev=folder)
    facts = result["facts"]
    assert (facts["setting"], facts["settings_tried"], facts["settings_in_range"]) == ({"pieces": 1}, 3, 2)
    assert facts["dev_segments_per_second"] == pytest.approx(50 / (50 * BEAT + 4))
    assert facts["dev_r_value"] == pytest.approx(result["groups"]["pooled"]["sdhubert"]["r_value"])
    assert facts["grid"] == [9, 2, 1]
    assert len(prepared) == 8  # once for each file of either folder
    monkeypatch.setattr("speechtok.evaluation.boundaries.RATES", (4.0, 8.0))
    (result,) = evaluate_folder(folder, [family], dev=folder, shift=0.0)
    assert result["facts"]["setting"] == {"pieces": 2}
    assert result["conventions"]["shift"] == dict.fromkeys(PROTOCOLS, 0.0)
    monkeypatch.setattr("speechtok.evaluation.boundaries.RATES", (10.0, 11.0))
    with pytest.raises(InputError, match=r"halves: its 3 settings give 3\.\d+ to 27\.\d+ segments per second"):
        evaluate_folder(folder, [family], dev=folder)
    with pytest.raises(InputError, match="halves: its thresholds are chosen on other speech"):
        evaluate_folder(folder, [family])
    (result,) = evaluate_folder(folder, [halves(default={"pieces": 1})[0]])
    assert result["groups"]["pooled"]["segments"] == 50
    assert result["facts"] == {"setting": {"pieces": 1}, "chosen_on": None}


def test_energy_is_the_seed_at_its_setting(clip_wave):
    family = energy()
    assert family.settings([]) == [{"smoothing": value} for value in SMOOTHINGS]
    for setting in family.settings([]):
        assert np.array_equal(family.at(setting).cut(clip_wave), energy_seed(**setting).cut(clip_wave))
    assert family.default == {"smoothing": 0.025}


def test_the_choice_and_all_that_was_tried(folder, monkeypatch):
    monkeypatch.setattr("speechtok.evaluation.boundaries.RATES", (2.5, 8.0))
    family, prepared = halves()
    setting, tried = choose(family, folder)
    (result,) = evaluate_folder(folder, [halves()[0]], dev=folder)
    facts, pooled = result["facts"], result["groups"]["pooled"]
    assert setting == facts["setting"] == {"pieces": 1}
    assert len(prepared) == 4
    assert [one["setting"]["pieces"] for one in tried] == [9, 2, 1]
    nine, _, one = tried
    assert nine["segments_per_second"] == pytest.approx(9 * one["segments_per_second"])
    assert {nine[name] for name in ("shift", "precision", "recall", "f1", "r_value")} == {None}
    assert one["shift"] == result["conventions"]["shift"]["sdhubert"]
    for name in ("precision", "recall", "f1", "r_value"):
        assert one[name] == pytest.approx(pooled["sdhubert"][name])
    monkeypatch.setattr("speechtok.evaluation.boundaries.RATES", (10.0, 11.0))
    with pytest.raises(InputError, match="none with a hit"):
        choose(family, folder)


def test_energy_onsets_lie_where_the_filter_bank_heard_them():
    """Two buzzes that nearly touch: borders of the seeds, at the middle between the centres of two frames."""
    places = [(0.30, 0.50), (0.55, 0.75)]
    wave = babble(places, 1.2)
    spans = energy_onsets().cut(wave)
    frames = EnergySeeds()(mel(wave))
    for side in (0, 1):
        # Frame i reads 25 ms from i * 10 ms on.
        centres = [(frame * 160 + 200) / RATE for frame in frames[:, side]]
        before = [((frame - 1) * 160 + 200) / RATE for frame in frames[:, side]]
        assert np.allclose(spans[:, side], (np.array(centres) + before) / 2)
    assert spans[1, 0] == pytest.approx(0.50, abs=0.03)
    few = energy_onsets(EnergySeeds(distance=1.0))
    assert len(few.cut(wave)) == 1
    assert few.facts["setting"]["distance"] == 1.0
    for short in (0, 399):  # shorter than a frame
        assert energy_onsets().cut(np.zeros(short, np.float32)).shape == (0, 2)


def test_bad_cutters(folder):
    with pytest.raises(InputError, match="a name of its own"):
        evaluate_folder(folder, [uniform_grid(4), uniform_grid(4)])
    with pytest.raises(InputError, match=r"backward on .*0\.flac: segments: segment 0"):
        evaluate_folder(folder, [Cutter("backward", lambda wave: np.array([[1.0, 0.0]]))])
    with pytest.raises(InputError, match="give both or neither"):
        evaluate_folder(folder, [Cutter("unnamed", lambda wave: (np.zeros((1, 2)), np.zeros(1, int)))])
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
    """The order that every cutter is read against: dips of loudness far above a grid of the same rate."""
    seed, grid = evaluate_folder(
        shared / "speech" / "eval", [energy_seed(), uniform_grid(4)], limit_files=100,
        shift={"sdhubert": 0.02, "zerosyl": -0.02, "inner": -0.02},
    )  # fmt: skip
    for protocol in PROTOCOLS:
        assert seed["groups"]["lossy"][protocol]["f1"] > 0.65
        assert seed["groups"]["lossy"][protocol]["f1"] > grid["groups"]["lossy"][protocol]["f1"] + 0.2
