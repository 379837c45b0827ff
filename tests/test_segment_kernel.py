"""The segmentation kernel: the package, the plain form, numba and Triton give the same boundaries."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speechtok.benchmarks.segmentation import syllables

from speechtok.errors import InputError
from speechtok.kernels import segment_cpu
from speechtok.kernels.segment import decisions_reference, segment, segment_one, segment_reference

ORACLE = Path(__file__).resolve().parents[1] / ".venv" / "oracles" / "sylber" / "utils" / "segment_utils.py"
NORM_THRESHOLDS = (0, 0.5, 1, 2.6)
MERGE_THRESHOLDS = (-1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.999)


@pytest.fixture(scope="session")
def package():
    """`get_segment` of the package, whose other modules (and pinned dependencies) are not imported."""
    if not ORACLE.exists():
        pytest.skip("the package sylber is not in .venv/oracles; `make lint` puts it there")
    spec = importlib.util.spec_from_file_location("sylber_segment_utils", ORACLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.get_segment(*arguments).reshape(-1, 2)


def piecewise(rng, frames, width):
    """Nearly constant pieces of various norms, some exactly zero, with noise of one of several strengths or none."""
    pieces = []
    while sum(map(len, pieces)) < frames:
        centre = np.zeros(width) if rng.random() < 0.25 else rng.standard_normal(width) * rng.choice([0.3, 1, 3])
        if pieces and rng.random() < 0.3:
            centre = pieces[-1][-1] + centre * 0.3
        pieces.append(np.repeat(centre[None], rng.integers(1, 30), 0))
    wave = np.concatenate(pieces)[:frames]
    return (wave + rng.standard_normal(wave.shape) * rng.choice([0, 0.01, 0.1, 0.5])).astype(np.float32)


def utterances(seed, count, width, longest=400):
    rng = np.random.default_rng(seed)
    return [piecewise(rng, rng.integers(1, longest + 1), width) for _ in range(count)]


def together(frames, *arguments):
    """Utterances through the operator in one call."""
    offsets = np.cumsum([0, *(len(each) for each in frames)])
    spans = segment(torch.from_numpy(np.concatenate(frames)), torch.from_numpy(offsets), *arguments)
    return [each.numpy() for each in spans]


def alone(frames, *arguments):
    return together([frames], *arguments)[0]


@pytest.mark.parametrize("width", [1, 2, 8, 64, 768])
def test_equals_the_package(package, width):
    """3080 utterances over all widths; not one boundary differs."""
    empty = 0
    for i, norm in enumerate(NORM_THRESHOLDS):
        for j, merge in enumerate(MERGE_THRESHOLDS):
            frames = utterances([width, i, j], 22, width)
            batch = together(frames, norm, merge)
            for each, found in zip(frames, batch, strict=True):
                expected = package(each, norm, merge)
                empty += int((expected[:, 0] == expected[:, 1]).sum())
                np.testing.assert_array_equal(found, expected)
                np.testing.assert_array_equal(alone(each, norm, merge), expected)
                np.testing.assert_array_equal(segment_reference(each, norm, merge), expected)
    assert empty > 0 or width != 8  # exact ties are among the cases


@pytest.mark.parametrize("width", [1, 5, 100, 129, 300])
def test_reset_equals_the_reference(width):
    for i, norm in enumerate((0, 1)):
        for j, merge in enumerate(MERGE_THRESHOLDS):
            for each in utterances([7, width, i, j], 10, width, 150):
                found = alone(each, norm, merge, "reset")
                np.testing.assert_array_equal(found, segment_reference(each, norm, merge, "reset"))
                assert (found[:, 0] < found[:, 1]).all()


def test_the_count_matters():
    """After a split the package gives the new segment's first frame the weight of all frames of the run."""
    pairs = [(alone(each, 0.5, 0.8), alone(each, 0.5, 0.8, "reset")) for each in utterances(3, 200, 8)]
    assert 0 < sum(not np.array_equal(*pair) for pair in pairs) < 100


@pytest.mark.parametrize("width", [1, 7, 8, 9, 127, 128, 129, 257, 300, 768, 1000, 1024])
def test_sums_are_numpys(width):
    """Bit by bit: dot products of rows, and sums of any length."""
    rows = np.random.default_rng(width).standard_normal((50, width)).astype(np.float32)
    bounds, pairs, _ = segment_cpu.tree(width)
    parts = np.empty(len(bounds) - 1, np.float32)
    dots = [segment_cpu._dot(row, rows[0], bounds, pairs, parts) for row in rows]
    np.testing.assert_array_equal(np.float32(dots), (rows * rows[0]).sum(-1))
    ones = np.ones(width, np.float32)
    np.testing.assert_array_equal(np.float32([segment_cpu._sum(row, ones) for row in rows]), rows.sum(-1))


def test_ties_are_decided_as_numpy_rounds():
    """Nearly equal scores of long windows, where running sums alone do not find the package's first maximum."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 9, 200, 900):
        for _ in range(30):
            p = rng.random(size, np.float32)
            q = p.copy()
            q[rng.random(size) < 0.1] += np.float32(1e-7)
            scores = [p[:i].sum() + q[i:].sum() for i in range(size)]
            assert segment_cpu._best_split(p, q) == int(np.argmax(scores))


@pytest.fixture
def threads():
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)


def test_threads_have_no_say(threads):
    frames = utterances(11, 40, 64)
    threads(1)
    expected = together(frames, 1.0, 0.8)
    if numba.config.NUMBA_NUM_THREADS < 2:
        done = subprocess.run(
            [sys.executable, "-c", PARALLEL],
            capture_output=True, text=True, env={**os.environ, "NUMBA_NUM_THREADS": "2"}, check=False,
        )  # fmt: skip
        assert done.stdout.strip() == "same", done.stderr
    else:
        threads(2)
        for found, one in zip(together(frames, 1.0, 0.8), expected, strict=True):
            np.testing.assert_array_equal(found, one)


PARALLEL = """
import numba, numpy as np
from tests.test_segment_kernel import alone, together, utterances
numba.set_num_threads(2)
frames = utterances(11, 40, 64)
for each, found in zip(frames, together(frames, 1.0, 0.8), strict=True):
    np.testing.assert_array_equal(found, alone(each, 1.0, 0.8))
print("same")
"""


def test_no_utterances_and_empty_ones():
    assert segment(torch.zeros(0, 4), torch.tensor([0]), 1.0, 0.8) == []
    frames = [np.zeros((0, 4), np.float32), np.ones((3, 4), np.float32), np.zeros((0, 4), np.float32)]
    assert [each.tolist() for each in together(frames, 1.0, 0.8)] == [[], [[0, 3]], []]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_frames_that_are_not_finite_are_named(value):
    frames = [np.ones((5, 3), np.float32) for _ in range(3)]
    frames[1][2, 1] = value
    with pytest.raises(InputError, match="frame 2 of utterance 1 holds NaN, infinity"):
        together(frames, 1.0, 0.8)


@pytest.mark.parametrize(
    ("frames", "offsets", "message"),
    [
        (torch.zeros(3), torch.tensor([0, 3]), "takes frames"),
        (torch.zeros(3, 2), torch.zeros(0).long(), "takes frames"),
        (torch.zeros(3, 2), torch.tensor([0, 4]), "rise from 0"),
        (torch.zeros(3, 2), torch.tensor([1, 3]), "rise from 0"),
        (torch.zeros(3, 2), torch.tensor([0, 2, 1, 3]), "rise from 0"),
    ],
)
def test_bad_offsets_are_refused(frames, offsets, message):
    with pytest.raises(InputError, match=message):
        segment(frames, offsets, 1.0, 0.8)


def test_opcheck():
    frames = np.concatenate(utterances(2, 2, 8, 40))
    offsets = torch.tensor([0, 10, len(frames)])
    torch.library.opcheck(torch.ops.speechtok.segment, (torch.from_numpy(frames), offsets, 1.0, 0.8, False))


TRITON = """
import numpy as np, torch
from speechtok.errors import InputError
from speechtok.kernels.segment import segment_reference, segment_triton
from tests.test_segment_kernel import utterances
compared = 0
for seed, width, norm, merge, mode in [
    (0, 8, 1.0, 0.8, "package"), (1, 8, 0.0, 0.3, "package"), (2, 12, 0.5, 0.8, "reset"), (3, 3, 1.0, 0.9, "reset"),
    (4, 40, 2.6, 0.5, "package"), (5, 64, 0.0, -1.0, "package"), (6, 8, 1e9, 0.8, "package"),
]:
    frames = [np.zeros((0, width), np.float32), *utterances(seed, 3, width, 40), np.zeros((0, width), np.float32)]
    offsets = torch.tensor([0, *(len(each) for each in frames)]).cumsum(0)
    spans, counts = segment_triton(torch.from_numpy(np.concatenate(frames)), offsets, norm, merge, mode == "reset")
    for each, found in zip(frames, spans.split(counts.tolist()), strict=True):
        np.testing.assert_array_equal(found.numpy(), segment_reference(each, norm, merge, mode))
        compared += len(found)
assert compared > 20, compared
try:
    segment_triton(torch.full((4, 3), torch.nan), torch.tensor([0, 2, 4]), 1.0, 0.8, False)
except InputError as error:
    assert "frame 0 of utterance 0" in str(error)
    print("same")
"""


def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_on_a_gpu():
    frames = utterances(4, 200, 64)
    offsets = torch.tensor([0, *(len(each) for each in frames)]).cumsum(0)
    found = segment(torch.from_numpy(np.concatenate(frames)).cuda(), offsets.cuda(), 1.0, 0.8)
    for each, spans in zip(frames, found, strict=True):
        np.testing.assert_array_equal(spans.cpu().numpy(), segment_reference(each, 1.0, 0.8))


# Near-ties


def moved(rng, frames, slack, kind):
    """Frames that differ by hardly less than `slack`: each its own way, stretches of them sideways, or in length."""
    if kind == "noise":
        step = rng.standard_normal(frames.shape)
    elif kind == "stretches":
        step = np.repeat(rng.standard_normal(frames.shape), rng.integers(1, 12), 0)[: len(frames)]
        step -= frames * (step * frames).sum(1, keepdims=True) / np.maximum((frames**2).sum(1, keepdims=True), 1e-30)
    else:
        step = frames * rng.choice([-1, 1], (len(frames), 1))
    norms = np.linalg.norm(frames.astype(float), axis=1, keepdims=True)
    size = (slack * 0.999 - 6e-8) * norms / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-30)
    return (frames + step * size).astype(np.float32)


def close_call(rng, width, slack):
    """Frames and settings of which one threshold is about as far from some decision as the slack may bring it."""
    frames = piecewise(rng, rng.integers(1, 60), width)
    thresholds = {"norm": float(rng.choice(NORM_THRESHOLDS)), "merge": float(rng.choice(MERGE_THRESHOLDS))}
    mode = str(rng.choice(["package", "reset"]))
    decisions = decisions_reference(frames, *thresholds.values(), mode, slack)[1]
    kind = rng.choice(sorted({kind for kind, *_ in decisions} - {"split"}))
    _, distance, bound = [each for each in decisions if each[0] == kind][
        rng.integers(sum(kind == k for k, *_ in decisions))
    ]
    if np.isfinite(distance):
        thresholds["norm" if kind == "norm" else "merge"] += distance + bound * rng.uniform(-2, 2)
    return frames, *map(float, thresholds.values()), mode  # numpy's own scalars would not be compared in float32


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3, 8, 64, 300]), st.floats(-5.7, -1.5))
def test_what_is_no_near_tie_holds(seed, width, exponent):
    rng, slack = np.random.default_rng(seed), 10**exponent
    frames, *setting = close_call(rng, width, slack)
    spans, tied = segment_one(frames, *setting, slack)
    expected, decisions = decisions_reference(frames, *setting, slack)
    np.testing.assert_array_equal(spans, expected)
    # Both sides compute bounds in float64, but lengths of vectors not alike.
    if all(abs(abs(distance) / bound - 1) > 1e-5 for _, distance, bound in decisions):
        assert tied == any(not abs(distance) > bound for _, distance, bound in decisions)
    if not tied:
        for kind in ("noise", "stretches", "stretches", "lengths"):
            for _ in range(5):
                np.testing.assert_array_equal(segment_one(moved(rng, frames, slack, kind), *setting)[0], spans)


def test_near_ties_are_not_said_lightly():
    """Of the near-ties that the search above finds, most turn when frames are moved at random."""
    turned = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        frames, *setting = close_call(rng, 2, 1e-3)
        spans, tied = segment_one(frames, *setting, 1e-3)
        if tied:
            others = [moved(rng, frames, 1e-3, kind) for kind in ("stretches", "lengths") for _ in range(15)]
            turned.append(any(not np.array_equal(segment_one(other, *setting)[0], spans) for other in others))
    assert len(turned) > 50
    assert np.mean(turned) > 0.5


def at(*degrees, length=3.0):
    angles = np.deg2rad(degrees)
    return (length * np.stack([np.cos(angles), np.sin(angles)], 1)).astype(np.float32)


def between(angle):
    """The last frame of the left segment lies at this angle; the first four at 0, the right segment at 65 degrees."""
    return at(0, 0, 0, 0, angle, 65, 65, 65)


def middle():
    """Angle at which that frame is as like to the mean of the one as to that of the other segment, by bisection."""
    low, high = 0.0, 60.0
    for _ in range(60):
        angle = (low + high) / 2
        frames = between(angle).astype(float)
        p, q = (frames[4] @ mean / np.linalg.norm(mean) for mean in (frames[:5].mean(0), frames[5:].mean(0)))
        low, high = (angle, high) if p > q else (low, angle)
    return low


def turning(kind, degrees):
    """Frames of which one decision of this kind is `degrees` from turning, and all others are far from it."""
    edge = np.rad2deg(np.arccos(0.8))
    match kind:
        case "norm":
            return at(0, 0, 0) * np.float32([[1], [2.6 / 3 * (1 + np.deg2rad(degrees))], [1]])
        case "centre":
            return at(0, 0, edge + degrees, 70)
        case "merge":
            # Begins far enough away to split and turns back; the mean of the right side lies at the edge.
            return at(0, 0, edge + degrees + 9, edge + degrees - 9)
        case "split":
            return between(middle() + degrees)


@pytest.mark.parametrize("kind", ["norm", "centre", "merge", "split"])
def test_each_kind_of_decision_is_watched(kind):
    for degrees in (2e-5, -2e-5):
        frames = turning(kind, degrees)
        assert segment_one(frames, 2.6, 0.8, "reset", 1e-6)[1], degrees
        close = [which for which, distance, bound in decisions_reference(frames, 2.6, 0.8, "reset", 1e-6)[1]
                 if not abs(distance) > bound]  # fmt: skip
        assert set(close) == {kind}
    sides = [segment_one(turning(kind, degrees), 2.6, 0.8, "reset", 1e-6) for degrees in (0.02, -0.02)]
    assert not any(tied for _, tied in sides)
    assert not np.array_equal(sides[0][0], sides[1][0])


def test_without_slack_nothing_is_a_near_tie():
    frames = np.repeat(at(0, 0, 36.8699, 90), 4, 0)
    for threshold in (2.6, float(np.linalg.norm(frames[0]))):
        spans, tied = segment_one(frames, threshold, 0.8)
        np.testing.assert_array_equal(spans, segment_reference(frames, threshold, 0.8))
        assert not tied
        assert decisions_reference(frames, threshold, 0.8)[1] == []


def test_near_ties_are_rare_in_frames_like_sylbers():
    tied = [segment_one(syllables(10, seed), 2.6, 0.8, "reset", 1e-6)[1] for seed in range(50)]
    assert sum(tied) <= 1


@pytest.mark.parametrize("width", [1, 7, 8, 100, 128, 129, 768, 1000])
def test_roundings_stay_below_their_bound(width):
    from speechtok.kernels.segment_ties import dot_rounding

    bounds, pairs, _ = segment_cpu.tree(width)
    parts = np.empty(len(bounds) - 1, np.float32)
    rows = np.random.default_rng(width).random((200, width), np.float32)
    found = [float(segment_cpu._dot(row, rows[0], bounds, pairs, parts)) for row in rows]
    exact = (rows.astype(np.float64) * rows[0].astype(np.float64)).sum(1)
    error = np.abs(found - exact) / exact
    assert error.max() <= dot_rounding(bounds, pairs)
    # Every number is added to something: no bound below one operation per halving would do.
    assert dot_rounding(bounds, pairs) >= 2.0**-24 * (1 + np.log2(width))
