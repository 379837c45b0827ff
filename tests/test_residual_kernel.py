"""The residual encode kernel: numba against the reference and transformers, Triton in its interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EncodecConfig
from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer

from speechtok.errors import InputError
from speechtok.kernels.nearest import nearest_centroids_reference
from speechtok.kernels.residual import residual_encode, residual_encode_reference


def books_of(k, v, d):
    """Codebooks whose codes grow shorter from book to book, as those of a trained quantizer do."""
    return torch.randn(k, v, d) * 0.7 ** torch.arange(k)[:, None, None]


@pytest.mark.parametrize(
    ("n", "k", "v", "d"),
    [(0, 3, 5, 4), (1, 1, 1, 1), (7, 2, 2, 5), (255, 3, 100, 39), (257, 8, 64, 16), (513, 8, 1024, 128), (40, 2, 1, 3)],
)
def test_equals_the_reference(n, k, v, d):
    torch.manual_seed(n + v)
    rows, books = torch.randn(n, d), books_of(k, v, d)
    before = rows.clone()
    ids, slack = residual_encode(rows, books)
    expected, expected_slack = residual_encode_reference(rows, books)
    assert ids.dtype == torch.int32
    assert torch.equal(ids, expected)
    torch.testing.assert_close(slack, expected_slack, rtol=1e-5, atol=1e-6)
    assert torch.equal(rows, before)


def test_rows_that_are_no_numbers_have_no_slack():
    codebooks = books_of(3, 8, 4)
    rows = torch.randn(5, 4)
    rows[2, 1] = torch.nan
    for encode in (residual_encode, residual_encode_reference):
        _, slack = encode(rows, codebooks)
        assert slack.isnan().tolist() == [False, False, True, False, False]


def test_the_reference_is_nearest_and_subtract():
    torch.manual_seed(1)
    rows, books = torch.randn(100, 6), books_of(4, 20, 6)
    ids, slack = residual_encode_reference(rows, books)
    halves, left = [], rows.double()
    for q, book in enumerate(books):
        nearest, distances = nearest_centroids_reference(left, book)
        assert torch.equal(nearest, ids[:, q])
        halves.append((distances[:, 1] - distances[:, 0]) / 2)
        left = left - book.double()[nearest.long()]
    torch.testing.assert_close(slack, torch.stack(halves).amin(0), rtol=1e-5, atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 5), st.integers(1, 40), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_any_shape_equals_the_reference(seed, n, k, v, d):
    torch.manual_seed(seed)
    rows, books = 3 * torch.randn(n, d), books_of(k, v, d)
    ids, slack = residual_encode(rows, books)
    expected, expected_slack = residual_encode_reference(rows, books)
    clear = expected_slack > 1e-5  # float32 may decide what float64 finds undecided
    assert torch.equal(ids[clear], expected[clear])
    torch.testing.assert_close(slack[clear], expected_slack[clear], rtol=1e-4, atol=1e-5)
    assert bool((slack[~clear] < 1e-4).all())


def test_equals_transformers():
    """transformers sets codebooks to zero, where all ids are 0 and nothing is compared."""
    torch.manual_seed(0)
    theirs = EncodecResidualVectorQuantizer(EncodecConfig())
    for layer in theirs.layers:
        layer.codebook.embed.copy_(torch.randn(1024, 128))
    frames = 2 * torch.randn(3, 128, 200)
    expected = theirs.encode(frames, bandwidth=6.0)  # [K, B, T]
    books = torch.stack([layer.codebook.embed for layer in theirs.layers[:8]])
    ids, _ = residual_encode(frames.transpose(1, 2).reshape(-1, 128), books)
    assert torch.equal(ids.long().view(3, 200, 8).permute(2, 0, 1), expected)
    assert len(ids[:, 7].unique()) > 300


def test_fewer_books_are_a_prefix():
    torch.manual_seed(2)
    rows, books = torch.randn(300, 16), books_of(6, 50, 16)
    ids, slack = residual_encode(rows, books)
    fewer, wider = residual_encode(rows, books[:3])
    assert torch.equal(ids[:, :3], fewer)
    assert bool((wider >= slack).all())
    assert bool((wider > slack).any())


def test_equal_distances_go_to_the_lower_index():
    books = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]])
    ids, slack = residual_encode(torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]]), books)
    assert ids.tolist() == [[0, 2], [0, 2], [0, 0]]
    assert slack.tolist() == [0, 0, 0]


def test_far_from_the_origin_no_digits_are_lost():
    torch.manual_seed(0)
    rows, books = torch.randn(500, 8) + 1000, torch.randn(1, 20, 8) + 1000
    ids, slack = residual_encode(rows, books)
    expected, expected_slack = residual_encode_reference(rows, books)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(slack, expected_slack, rtol=1e-3, atol=1e-3)


def test_layout_of_rows_and_autocast_have_no_say():
    torch.manual_seed(3)
    rows, books = torch.randn(300, 24), books_of(4, 50, 24)
    plain = residual_encode(rows, books)
    strided = residual_encode(rows.T.contiguous().T, books.transpose(1, 2).contiguous().transpose(1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = residual_encode(rows, books)
    for other in (strided, cast):
        assert torch.equal(other[0], plain[0])
        assert torch.equal(other[1], plain[1])


def test_slack_is_what_a_row_can_move():
    """No move below it changes an id; a little above, towards the border of the narrowest book, many do."""
    torch.manual_seed(4)
    books = books_of(4, 30, 5)
    rows = torch.randn(400, 5)
    ids, slack = residual_encode(rows, books)
    for _ in range(30):
        step = torch.nn.functional.normalize(torch.randn(400, 5), dim=1) * slack[:, None] * 0.999
        assert torch.equal(residual_encode(rows + step, books)[0], ids)
    # The nearest border of any book is at (b^2 - a^2) / (2 |e_b - e_a|) along e_b - e_a.
    left, ways, lengths = rows.double(), [], []
    for q, book in enumerate(books.double()):
        distances, order = torch.cdist(left, book).topk(2, largest=False)
        across = book[order[:, 1]] - book[order[:, 0]]
        lengths.append((distances[:, 1] ** 2 - distances[:, 0] ** 2) / (2 * across.norm(dim=1)))
        ways.append(torch.nn.functional.normalize(across, dim=1))
        left = left - book[ids[:, q].long()]
    length, narrowest = torch.stack(lengths).min(0)
    way = torch.stack(ways)[narrowest, torch.arange(400)]
    moved = (rows + way * length[:, None] * 1.001).float()
    assert (residual_encode(moved, books)[0] != ids).any(1).float().mean() > 0.99
    assert bool((length >= slack * 0.999).all())
    assert float((slack / length).median()) > 0.3  # and the bound is of use


def test_bad_shapes_are_refused():
    for rows, books in (
        (torch.zeros(3, 4), torch.zeros(2, 5, 6)),
        (torch.zeros(4), torch.zeros(2, 5, 4)),
        (torch.zeros(3, 4), torch.zeros(5, 4)),
        (torch.zeros(3, 4), torch.zeros(2, 0, 4)),
    ):
        with pytest.raises(InputError, match=r"\[K, V, D\]"):
            residual_encode(rows, books)


def test_opcheck():
    torch.library.opcheck(torch.ops.speechtok.residual_encode, (torch.randn(40, 6), torch.randn(3, 9, 6)))


TRITON = """
import torch
from speechtok.kernels.residual import residual_encode_reference, residual_encode_triton
for n, k, v, d in [(0, 3, 4, 5), (70, 3, 100, 39), (5, 2, 1, 8), (66, 2, 65, 33), (3, 4, 2, 5)]:
    torch.manual_seed(n)
    rows, books = torch.randn(n, d), torch.randn(k, v, d) * 0.7 ** torch.arange(k)[:, None, None]
    before = rows.clone()
    ids, slack = residual_encode_triton(rows, books)
    expected, expected_slack = residual_encode_reference(rows, books)
    assert torch.equal(ids, expected), (n, k, v, d)
    torch.testing.assert_close(slack, expected_slack, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, before)
books = torch.tensor([[[1.0, 0], [-1, 0], [1, 0]], [[0, 1], [0, 1], [0, 0]]])
ids, slack = residual_encode_triton(torch.tensor([[0.0, 0], [2, 0], [1, 1]]), books)
assert ids.tolist() == [[0, 2], [0, 2], [0, 0]], ids
assert slack.tolist() == [0, 0, 0], slack
print("same")
"""


def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    # The interpreter is chosen when Triton is imported, so it gets a process of its own.
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_on_a_gpu():
    torch.manual_seed(0)
    rows, books = torch.randn(5000, 128), books_of(8, 1024, 128)
    ids, slack = residual_encode(rows.cuda(), books.cuda())
    expected, expected_slack = residual_encode_reference(rows, books)
    same = (ids.cpu() == expected).all(1)
    assert same.float().mean() > 0.999
    torch.testing.assert_close(slack.cpu()[same], expected_slack[same], rtol=1e-4, atol=1e-4)
