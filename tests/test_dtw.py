"""The warping kernel: numba against the reference and by hand, Triton in its interpreter."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from speechtok.errors import InputError
from speechtok.kernels.dtw import dtw, dtw_reference


def blocks(seed, pairs=60, shape=(40, 50), longest=12, coarse=False):
    """A distance matrix and random blocks of it; coarse distances make many ties."""
    rng = np.random.default_rng(seed)
    distances = rng.integers(0, 3, shape) / 2 if coarse else rng.random(shape)
    rows, columns = rng.integers(1, longest, (2, pairs))
    spans = np.stack([rng.integers(0, shape[0] - rows + 1), rows, rng.integers(0, shape[1] - columns + 1), columns], 1)
    return torch.from_numpy(distances.astype(np.float32)), torch.from_numpy(spans)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_reference_bit_by_bit(seed, coarse):
    distances, spans = blocks(seed, coarse=coarse)
    assert torch.equal(dtw(distances, spans), dtw_reference(distances, spans))


def test_one_frame_and_no_pairs():
    distances, spans = blocks(0)
    assert dtw(distances, spans[:0]).shape == (0,)
    assert dtw(distances, torch.tensor([[3, 1, 7, 1]])) == distances[3, 7]
    line = torch.tensor([[3, 1, 7, 5], [2, 6, 1, 1]])
    torch.testing.assert_close(dtw(distances, line), torch.stack([distances[3, 7:12].mean(), distances[2:8, 1].mean()]))


def test_the_diagonal_comes_first():
    """All three ways to the last cell cost 9; over the diagonal the path has 2 cells, over a corner 3."""
    assert dtw(torch.tensor([[9.0, 0.0], [0.0, 1.0]]), torch.tensor([[0, 2, 0, 2]])) == 10 / 2


def test_left_before_up():
    """Left and up of the last cell tie, and their paths differ in length: the mean tells which one was taken."""
    wall = 100.0
    distances = torch.tensor([
        [0.0, wall, wall, wall],
        [0.0, 0.0, 0.0, wall],
        [0.0, wall, 1.0, 0.0],
        [wall, 0.0, 0.0, 6.0],
    ])  # fmt: skip
    whole = torch.tensor([[0, 4, 0, 4]])
    # Left: (0,0) (1,0) (2,0) (3,1) (3,2) (3,3); up: (0,0) (1,1) (1,2) (2,3) (3,3).
    assert dtw(distances, whole) == 6 / 6
    # Transposed, left and up change places.
    assert dtw(distances.T.contiguous(), whole) == pytest.approx(6 / 5)


def test_in_a_thread_pool():
    distances, spans = blocks(1, pairs=4000)
    expected = dtw(distances, spans)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda part: dtw(distances, part), spans.split(500)))
    assert torch.equal(torch.cat(parts), expected)


def test_padded_batch_is_a_matrix():
    batch = torch.rand(3, 4, 5)
    spans = torch.tensor([[4 * p, n, 0, m] for p, (n, m) in enumerate([(4, 5), (2, 3), (1, 4)])])
    alone = [dtw(batch[p, :n, :m], torch.tensor([[0, n, 0, m]])) for p, (n, m) in enumerate([(4, 5), (2, 3), (1, 4)])]
    assert torch.equal(dtw(batch.view(12, 5), spans), torch.cat(alone))


def test_opcheck():
    torch.library.opcheck(torch.ops.speechtok.dtw, blocks(2))


@pytest.mark.parametrize(
    ("distances", "spans", "message"),
    [
        (torch.zeros(3), torch.zeros(1, 4).long(), "takes distances"),
        (torch.zeros(3, 3), torch.zeros(1, 2).long(), "takes distances"),
        (torch.zeros(3, 3), torch.tensor([[0, 4, 0, 1]]), "leaves"),
        (torch.zeros(3, 3), torch.tensor([[0, 1, -1, 1]]), "leaves"),
        (torch.zeros(3, 3), torch.tensor([[0, 0, 0, 1]]), "empty"),
    ],
)
def test_bad_blocks_are_refused(distances, spans, message):
    with pytest.raises(InputError, match=message):
        dtw(distances, spans)


TRITON = """
import torch
from speechtok.kernels.dtw import dtw_reference, dtw_triton
from tests.test_dtw import blocks
for seed, pairs, longest, coarse in [(0, 0, 2, False), (1, 1, 5, False), (2, 130, 7, False), (3, 40, 12, True)]:
    distances, spans = blocks(seed, pairs, longest=longest, coarse=coarse)
    assert torch.equal(dtw_triton(distances, spans), dtw_reference(distances, spans)), (seed, pairs)
print("same")
"""


def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_on_a_gpu():
    distances, spans = blocks(4, pairs=1000)
    assert torch.equal(dtw(distances.cuda(), spans.cuda()).cpu(), dtw_reference(distances, spans))
