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

from speechtok.errors import InputError
from speechtok.kernels import segment_cpu
from speechtok.kernels.segment import segment, segment_reference

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
