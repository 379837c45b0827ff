"""Frame arithmetic at its edges, and the window grid."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechtok.encoders.mfcc import MfccEncoder
from speechtok.errors import InputError
from speechtok.frames import Context, FrameGrid, WindowRule
from speechtok.windows import WindowBuffer, cut

from .conftest import tiny_encoder

GRID = FrameGrid(16000, 320, 400)


def test_hubert_stack_by_hand():
    """Kernels 10,3,3,3,3,2,2 and strides 5,2,2,2,2,2,2 (fairseq): counted layer by layer."""

    def by_hand(n):
        for kernel, stride in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), strict=True):
            n = (n - kernel) // stride + 1 if n >= kernel else 0
        return n

    for n in [*range(1500), 16000, 24000, 48000, 80000, 80320]:
        assert GRID.num_frames(n) == by_hand(n), n


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(0, 0), (1, 0), (319, 0), (320, 0), (321, 0), (399, 0), (400, 1), (719, 1), (720, 2), (16000, 49)],
)
def test_counts(samples, frames):
    assert GRID.num_frames(samples) == frames


@pytest.mark.parametrize("encoder", [MfccEncoder(), tiny_encoder("hubert")], ids=["mfcc", "hubert"])
def test_encoders_agree_with_their_grid(encoder):
    hop, field = encoder.hop, encoder.receptive_field
    for n in (0, 1, hop - 1, hop, hop + 1, field - 1, field, field + 1, field + hop - 1, field + hop, field + hop + 1):
        with torch.inference_mode():
            frames = encoder(torch.randn(2, n) * 0.1)
        expected = encoder.grid.num_frames(n)
        assert frames.features.shape == (2, expected, encoder.dim)
        assert frames.lengths.tolist() == [expected, expected]


def test_spans_are_centred_on_what_was_read():
    for grid in (GRID, FrameGrid(16000, 160, 400), FrameGrid(16000, 320, 560)):
        start, end = grid.span(3)
        assert end - start == grid.hop
        assert (start + end) / 2 == 3 * grid.hop + grid.receptive_field / 2
        assert grid.frame_at(start) == 3
        assert grid.frame_at(end - 1) == 3
        assert grid.centre_seconds(0) == pytest.approx(grid.offset_seconds + grid.hop_seconds / 2)
    assert GRID.num_samples(GRID.num_frames(12345)) <= 12345
    assert GRID.num_samples(0) == 0


def test_delay_moves_the_spans():
    late = FrameGrid(16000, 320, 400, delay=160)
    assert late.offset == GRID.offset - 160


@settings(deadline=None)
@given(
    total=st.integers(0, 60_000),
    cuts=st.lists(st.integers(50, 9000), min_size=1, max_size=30),
    seconds=st.sampled_from([(1.0, 0.2), (0.5, 0.0), (2.0, 0.9), (0.06, 0.0)]),
)
def test_windows_tile_the_frames_whatever_the_chunks(total, cuts, seconds):
    rule = WindowRule(*seconds)
    wave = np.arange(total, dtype=np.float32)
    buffer, streamed, position = WindowBuffer(GRID, rule), [], 0
    for size in cuts * (1 + total // max(1, sum(cuts))):
        streamed += list(buffer.push(wave[position : position + size]))
        position += size
    streamed += list(buffer.push(wave[position:]))
    streamed += list(buffer.flush())
    whole = list(cut([wave], GRID, rule))
    assert [w for w, _ in streamed] == [w for w, _ in whole]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(streamed, whole, strict=True))
    frames = GRID.num_frames(total)
    kept = [first for window, _ in whole for first in range(window.first, window.first + window.count)]
    assert kept == list(range(frames))
    for window, piece in whole:
        assert len(piece) <= max(rule.max_samples(GRID), 400)
        # The kept frames are the right ones of the piece: same samples.
        if window.count:
            assert piece[window.skip * GRID.hop] == window.first * GRID.hop


CONTEXTS = [Context(0, 0), Context(4, 4), Context(16, 0, 8, 3), Context(24, 0, 4, 9), Context(8, 0, 8, 8)]


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@pytest.mark.parametrize("eager", [False, True], ids=["files", "streams"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    total=st.integers(0, 60_000),
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=20),
    one_chunk=st.booleans(),
)
def test_context_windows_hold_all_that_their_frames_need(context, eager, total, sizes, one_chunk):
    wave = np.arange(total, dtype=np.float32)
    rule = WindowRule(1, 0)
    buffer = WindowBuffer(GRID, rule, context, eager=eager, chunks=1 if eager and one_chunk else None)
    got, position, turn, frames = [], 0, 0, GRID.num_frames(total)
    while position < total:
        size = sizes[turn % len(sizes)]
        got += list(buffer.push(wave[position : position + size]))
        position, turn = position + size, turn + 1
        if eager:  # nothing waits that no later sample can change
            known = GRID.num_frames(min(position, total))
            due = (known - context.right) // context.chunk * context.chunk - context.look_ahead
            assert sum(window.count for window, _ in got) == max(0, due)
            assert len(buffer.samples) <= GRID.num_samples(context.left + context.chunk + context.right) + GRID.hop
    got += list(buffer.flush())
    kept = [first for window, _ in got for first in range(window.first, window.first + window.count)]
    assert kept == list(range(frames))
    for window, piece in got:
        assert len(piece) <= max(rule.max_samples(GRID), GRID.receptive_field)
        begin = window.start // GRID.hop
        assert begin % context.chunk == 0
        if window.count:
            needs = context.needs(window.first, window.first + window.count)
            assert begin <= needs[0]
            assert window.start + len(piece) >= GRID.num_samples(min(frames, needs[1]))
            assert piece[window.skip * GRID.hop] == window.first * GRID.hop
    if not eager and total <= rule.max_samples(GRID):
        assert len(got) == 1, "a short file is one window"


def test_what_a_frame_needs_by_hand():
    context = Context(16, 0, 8, 3)
    # Frame 12 is answered at position 15, the last of the chunk of 8 ... 15; frame 13 one chunk later.
    assert context.needs(12, 13) == (0, 16)
    assert context.needs(13, 14) == (0, 24)
    assert context.needs(29, 30) == (16, 40)
    assert context.most_ahead == 3 + 7
    assert Context(4, 4).needs(10, 12) == (6, 16)
    assert Context(4, 4).most_ahead == 4


def test_impossible_rules_are_refused():
    with pytest.raises(InputError, match="more than twice"):
        WindowRule(1.0, 0.5)
    with pytest.raises(InputError, match="no frame between"):
        WindowRule(0.02, 0.0).core(GRID)
    with pytest.raises(InputError, match="context of 96 and 0 frames"):
        WindowRule(2.0, 0.0).core(GRID, Context(96, 0, 8, 3))
