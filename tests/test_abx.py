"""ABX against slow loops that share no code with it, and on features whose error is known."""

import itertools
import math

import numpy as np
import pytest
import torch

from speechtok.errors import InputError
from speechtok.frames import FrameGrid
from speechtok.metrics import abx
from speechtok.metrics.abx import Items, aggregate, evaluate, score_cells, slice_frames
from speechtok.metrics.frame_distances import frame_distances

DISTANCES = ["angular", "euclidean", "symmetric_kl", "identical"]


def sample(seed, *, items=400, phones=4, contexts=3, speakers=4, longest=6, dim=5):
    """Random items without any structure, and their frames for each distance."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, items)
    names = [rng.integers(0, n, items).astype(str).tolist() for n in (phones, contexts, 1, speakers)]
    found = Items([f"file:{i}" for i in rng.permutation(items)], *names, np.cumsum(lengths) - lengths, lengths)
    frames = rng.standard_normal((int(lengths.sum()), dim)).astype(np.float32)
    probabilities = np.exp(frames) / np.exp(frames).sum(1, keepdims=True)
    units = rng.integers(0, 3, len(frames))
    return found, {"angular": frames, "euclidean": frames, "symmetric_kl": probabilities, "identical": units}


# -- the oracle: loops over plain numbers ---------------------------------------------------------------------------


def slow_frame(x, y, distance):
    if distance == "identical":
        return float(x != y)
    x, y = [float(v) for v in x], [float(v) for v in y]
    if distance == "euclidean":
        return math.dist(x, y)
    if distance == "symmetric_kl":
        return 0.5 * sum((p - q) * (math.log(p + 1e-6) - math.log(q + 1e-6)) for p, q in zip(x, y, strict=True))
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    return math.acos(max(-1, min(1, dot / math.hypot(*x) / math.hypot(*y)))) / math.pi


def slow_sequence(rows, columns, distance):
    n, m = len(rows), len(columns)
    cost = {(-1, -1): 0.0}
    for i, j in itertools.product(range(n), range(m)):
        before = [cost[k] for k in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if k in cost]
        cost[i, j] = slow_frame(rows[i], columns[j], distance) + min(before)
    cell, count = (n - 1, m - 1), 1
    while cell != (0, 0):
        i, j = cell
        diagonal, left, up = (cost.get(k, math.inf) for k in ((i - 1, j - 1), (i, j - 1), (i - 1, j)))
        if i and j and diagonal <= left and diagonal <= up:
            cell = i - 1, j - 1
        elif i == 0 or (j and left <= up):
            cell = i, j - 1
        else:
            cell = i - 1, j
        count += 1
    return cost[n - 1, m - 1] / count


def slow_cell(items, frames, cell, distance):
    """Error of a cell: every triple by itself."""
    stretch = [frames[s : s + n] for s, n in zip(items.starts, items.lengths, strict=True)]
    everything = range(len(items.ids))

    def members(phone, speaker):
        wanted = (phone, cell.context[0], cell.context[1], speaker)
        fields = (items.phones, items.previous, items.following, items.speakers)
        return [i for i in everything if tuple(field[i] for field in fields) == wanted]

    score = triples = 0
    known = {}
    for a, b, x in itertools.product(
        members(cell.phone, cell.speaker), members(cell.other, cell.speaker), members(cell.phone, cell.x_speaker)
    ):
        if a == x:
            continue
        # Within, the two items of one phone stand in the order of their names.
        near = sorted((x, a), key=lambda i: items.ids[i]) if cell.speaker == cell.x_speaker else (x, a)
        to_a, to_b = (
            known.setdefault(pair, slow_sequence(stretch[pair[0]], stretch[pair[1]], distance))
            for pair in (tuple(near), (x, b))
        )
        score += 1 if to_a < to_b else 0.5 if to_a == to_b else 0
        triples += 1
    return 1 - score / triples, triples


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("condition", ["within", "across"])
def test_200_random_cells_equal_the_oracle(condition, distance, monkeypatch):
    monkeypatch.setattr(abx, "_TILE", 2000)  # several tiles for each context
    sizes = {"within": {"items": 480, "phones": 6, "contexts": 4}, "across": {"items": 200, "phones": 5}}
    items, frames = sample(7, longest=5, dim=4, **sizes[condition])
    cells = score_cells(frames[distance], items, condition, distance=distance, items_per_cell=None, x_speakers=None)
    assert len(cells) > 200
    for cell in [cells[i] for i in np.random.default_rng(0).permutation(len(cells))[:200]]:
        error, triples = slow_cell(items, frames[distance], cell, distance)
        assert cell.triples == triples
        assert cell.error == pytest.approx(error, abs=1e-6), cell


def test_all_cells_are_there_and_averaged_in_the_stated_order():
    items, frames = sample(3, items=300, speakers=3)
    members = {}
    for i in range(300):
        members.setdefault((items.previous[i], items.speakers[i], items.phones[i]), []).append(i)
    for condition in ("within", "across"):
        cells = {
            (c.context[0], c.speaker, c.x_speaker, c.phone, c.other): c
            for c in score_cells(frames["angular"], items, condition, items_per_cell=None, x_speakers=None)
        }
        expected = {
            (context, speaker, x_speaker, phone, other)
            for context, speaker, x_speaker, phone, other in itertools.product("012", "012", "012", "0123", "0123")
            if phone != other
            and (speaker == x_speaker) == (condition == "within")
            and len(members.get((context, speaker, phone), [])) > (condition == "within")
            and members.get((context, speaker, other))
            and members.get((context, x_speaker, phone))
        }
        assert set(cells) == expected
        pairs = []
        for phone, other in itertools.permutations("0123", 2):
            by_speaker = [
                np.mean([c.error for k, c in cells.items() if (k[1], *k[3:]) == (speaker, phone, other)])
                for speaker in "012"
                if any((k[1], *k[3:]) == (speaker, phone, other) for k in cells)
            ]
            if by_speaker:
                pairs.append(np.mean(by_speaker))
        assert aggregate(list(cells.values())) == pytest.approx(100 * np.mean(pairs))


# -- answers known by construction ----------------------------------------------------------------------------------


def test_random_features_are_at_chance():
    items, frames = sample(0, items=3000)
    for distance in DISTANCES:
        found = evaluate(frames[distance], items, distance=distance)
        assert found["within"]["error"] == pytest.approx(50, abs=1.5)
        assert found["across"]["error"] == pytest.approx(50, abs=1.5)


@pytest.mark.parametrize("distance", ["angular", "symmetric_kl"])
def test_phone_posteriors_are_nearly_perfect(distance):
    items, frames = sample(1, items=2000)
    labels = np.repeat(np.array(items.phones, int), items.lengths)
    posteriors = np.eye(5)[labels] * 0.9 + frames["symmetric_kl"] * 0.1
    found = evaluate(posteriors.astype(np.float32), items, distance=distance)
    assert found["within"]["error"] < 1
    assert found["across"]["error"] < 1
    assert evaluate(np.eye(5, dtype=np.float32)[labels], items, distance=distance)["across"]["error"] == 0


def test_constant_features_tie():
    items, frames = sample(2)
    for value in (np.ones_like(frames["angular"]), np.zeros_like(frames["angular"])):
        found = evaluate(value, items)
        assert (found["within"]["error"], found["across"]["error"]) == (50, 50)


def test_scaling_vectors_changes_nothing():
    items, frames = sample(4, items=1000)
    scale = np.exp(np.random.default_rng(0).uniform(-3, 3, (len(frames["angular"]), 1))).astype(np.float32)
    assert evaluate(frames["angular"] * scale, items) == evaluate(frames["angular"], items)
    # The same scales do matter to a distance that hears loudness.
    euclidean = evaluate(frames["euclidean"], items, distance="euclidean")
    assert evaluate(frames["euclidean"] * scale, items, distance="euclidean") != euclidean


def test_one_hot_units_rank_as_unequal_units():
    items, frames = sample(5, items=1000)
    one_hot = np.eye(3, dtype=np.float32)[frames["identical"]]
    for condition in ("within", "across"):
        by_angle, by_id = (
            score_cells(x, items, condition, distance=d)
            for x, d in ((one_hot, "angular"), (frames["identical"], "identical"))
        )
        assert by_angle == by_id


def test_codebooks_count_equally():
    x, y = np.array([[1, 2], [3, 4]]), np.array([[1, 2], [1, 4], [0, 0]])
    found = frame_distances(torch.from_numpy(x), torch.from_numpy(y), "identical")
    assert found.tolist() == [[0, 0.5, 1], [1, 0.5, 1]]


def test_frame_distances_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    y = torch.tensor([[5.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 0.0]])
    assert frame_distances(x, y, "angular").tolist() == [[0, 0.5, 1, 1], [1, 1, 1, 0]]
    torch.testing.assert_close(frame_distances(x, y, "euclidean"), torch.cdist(x, y))
    with pytest.raises(InputError, match="none of"):
        frame_distances(x, y, "cosine")


# -- subsampling ----------------------------------------------------------------------------------------------------


def test_subsampling_knows_names_not_order():
    items, frames = sample(6, items=1500)
    order = np.random.default_rng(1).permutation(1500)
    shuffled = Items(
        *([field[i] for i in order] for field in list(vars(items).values())[:5]),
        items.starts[order],
        items.lengths[order],
    )
    options = {"items_per_cell": 3, "x_speakers": 2}
    for distance in ("angular", "identical"):
        found = evaluate(frames[distance], items, distance=distance, **options)
        assert evaluate(frames[distance], shuffled, distance=distance, **options) == found
    other = evaluate(frames["angular"], items, seed=1, **options)
    assert other["within"]["error"] != evaluate(frames["angular"], items, **options)["within"]["error"]
    cells = score_cells(frames["angular"], items, "across", **options)
    assert max(cell.triples for cell in cells) == 27
    chosen = {}
    for cell in cells:
        chosen.setdefault((*cell[:3], cell.context), []).append(cell.x_speaker)
    assert {len(speakers) for speakers in chosen.values()} == {2}
    # Not the same two speakers everywhere.
    assert len({tuple(speakers) for speakers in chosen.values()}) > 3


# -- slicing --------------------------------------------------------------------------------------------------------

CENTRED = FrameGrid(16000, 160, 160)  # frame i is centred at 0.005 + 0.01 i


@pytest.mark.parametrize(
    ("onset", "offset", "inclusive", "librilight"),
    [
        (0.01, 0.03, (1, 3), (1, 2)),
        (0.015, 0.025, (1, 3), (1, 2)),  # both edges on centres
        (0.016, 0.024, (2, 2), (2, 1)),  # between two centres
        (0.0, 0.005, (0, 1), (0, 0)),
        (0.145, 0.245, (14, 25), (14, 24)),  # decimals that binary floats miss
        (0.99, 9.0, (99, 100), (99, 100)),  # the file ends first
    ],
)
def test_slices(onset, offset, inclusive, librilight):
    assert slice_frames(onset, offset, CENTRED, 100) == inclusive
    assert slice_frames(onset, offset, CENTRED, 100, slicing="librilight") == librilight


def test_slices_follow_the_encoders_centres():
    grid = FrameGrid(16000, 320, 400)  # centres at 0.0125 + 0.02 i
    for onset, offset in [(0.1, 0.2), (0.0, 0.3), (0.113, 0.152)]:
        start, stop = slice_frames(onset, offset, grid, 50)
        inside = [i for i in range(50) if onset <= grid.centre_seconds(i) <= offset]
        assert list(range(start, stop)) == inside
        start, stop = slice_frames(onset, offset, grid, 50, shift=2)
        inside = [i for i in range(50) if onset <= grid.centre_seconds(i + 2) <= offset]
        assert list(range(start, stop)) == inside
    with pytest.raises(InputError, match="slicing"):
        slice_frames(0, 1, grid, 50, slicing="other")


# -- what is refused ------------------------------------------------------------------------------------------------


def test_bad_input():
    items, frames = sample(0, items=20)
    good = frames["angular"]
    for wrong, distance, message in [
        (good, "cosine", "none of"),
        (good, "identical", "compares units"),
        (frames["identical"], "angular", "float frames"),
        (good * np.nan, "angular", "NaN"),
        (good, "symmetric_kl", "probabilities"),
        (good[:-1], "angular", "leaves"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate(wrong, items, distance=distance)
    fields = [items.ids, items.phones, items.previous, items.following, items.speakers, items.starts, items.lengths]
    with pytest.raises(InputError, match="not unique"):
        evaluate(good, Items(["a"] * 20, *fields[1:]))
    with pytest.raises(InputError, match="must be equal"):
        evaluate(good, Items(*fields[:4], items.speakers[:3], *fields[5:]))
    with pytest.raises(InputError, match="is empty"):
        evaluate(good, Items(*fields[:6], items.lengths * 0))
    for options, message in [
        ({"conditions": ["any"]}, "condition"),
        ({"items_per_cell": 1}, "items_per_cell"),
        ({"x_speakers": 0}, "x_speakers"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate(good, items, **options)


def test_no_cell():
    items, frames = sample(0, speakers=1)
    found = evaluate(frames["angular"], items)
    assert found["across"]["error"] is None
    assert found["within"]["error"] > 0
    with pytest.raises(InputError, match="no cell"):
        aggregate([])
