"""Segmenters as parts of tokenizers: configuration, offline and streamed results, pooled means."""

import copy
import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtok.errors import FormatError, InputError
from speechtok.segmenters import Greedy, MinCut, NormPeaks, build, greedy_segment, min_cut_segment, norm_peak_segment
from speechtok.segmenters.min_cut import speech_mask
from speechtok.segmenters.pool import pool
from tests.test_segment_kernel import utterances

EACH = [
    Greedy(1.0, 0.7),
    Greedy(0.5, 0.9, "package"),
    Greedy(1.0, 0.7, close_gap=3),
    Greedy(1.5, 0.9, close_gap=1),
    MinCut(0.5, merge_threshold=0.7, seconds=0.1),
    MinCut(1.0, None, min_frames=1),
    NormPeaks(),
    NormPeaks(5, 0.2),
]


def plain(segmenter, frames):
    """The same by the functions."""
    match segmenter:
        case Greedy(norm, merge, mode, longest):
            spans = [span for span in greedy_segment(frames, norm, merge, mode).tolist() if span[0] < span[1]]
            for left, right in pairwise(spans):
                if right[0] - left[1] <= longest:
                    left[1] = right[0] = (left[1] + right[0]) // 2
            return spans
        case MinCut(norm, merge, rate, seconds, least):
            voiced = speech_mask(frames, norm, relative=False)
            return min_cut_segment(
                frames, voiced, merge_threshold=merge, frame_rate=rate, seconds=seconds, min_frames=least
            ).tolist()
        case NormPeaks(window, prominence):
            return norm_peak_segment(frames, window, prominence).tolist()


@pytest.mark.parametrize("segmenter", EACH, ids=str)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.sampled_from([1, 4, 16]), longest=st.integers(1, 60))
def test_a_segmenter_is_its_function_offline_and_in_pieces(segmenter, seed, width, longest):
    (frames,) = utterances(seed, 1, width, 200)
    spans, near_tie = segmenter.segment(frames)
    assert spans.tolist() == plain(segmenter, frames)
    assert spans.dtype == np.int64
    assert near_tie is False
    rng, stream, given, place = np.random.default_rng(seed), segmenter.stream(), [], 0
    while place < len(frames):
        size = int(rng.integers(0, longest + 1))
        given += stream.push(frames[place : place + size]).tolist()
        place = min(len(frames), place + size)
        assert stream.frames == place
        assert 0 <= stream.settled <= place
        assert not given or given[-1][1] <= stream.settled
        stream = pickle.loads(pickle.dumps(stream)) if rng.random() < 0.5 else copy.deepcopy(stream)
    assert given + stream.flush().tolist() == spans.tolist()


def test_no_segment_is_empty():
    """Where scores of two splits are equal the package gives segments of length zero."""
    found = [each for each in utterances(4, 300, 1, 60) if (np.diff(greedy_segment(each, 0.0, 0.5)) == 0).any()]
    for each in found:
        spans = Greedy(0.0, 0.5, "package").segment(each)[0]
        assert (spans[:, 0] < spans[:, 1]).all()
        pool(each, spans)
    assert len(found) > 10


def test_near_ties():
    frames = np.repeat(np.float32([[3, 0], [0, 3], [0, 0]]), 8, 0)
    for segmenter in EACH:
        assert segmenter.segment(frames)[1] is False
    assert Greedy().segment(frames, 1e-6)[1] is False
    assert Greedy(3.0).segment(frames, 1e-6)[1] is True
    assert MinCut().segment(frames, 1e-6)[1] is True
    assert NormPeaks().segment(frames, 1e-6)[1] is True


def test_streams_that_wait_for_the_end():
    frames = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
    stream = NormPeaks().stream()
    assert stream.push(frames).shape == (0, 2)
    assert (stream.frames, stream.settled) == (len(frames), 0)
    frames[:] = 0  # the stream holds its own copy
    with pytest.raises(InputError, match="4 values, those before had 3"):
        stream.push(np.zeros((2, 4), np.float32))
    assert len(stream.flush()) > 1
    assert stream.settled == len(frames)
    with pytest.raises(InputError, match="ended"):
        stream.push(frames)
    with pytest.raises(InputError, match="ended"):
        stream.flush()
    assert MinCut().stream().flush().shape == (0, 2)


@pytest.mark.parametrize("segmenter", EACH, ids=str)
def test_configurations_come_back(segmenter):
    stored = json.loads(json.dumps(segmenter.config_dict()))
    assert build(segmenter.type, stored) == segmenter
    assert build(segmenter.type, stored).config_dict() == segmenter.config_dict()


def test_whole_numbers_are_the_same_configuration():
    assert json.dumps(Greedy(2, 1).config_dict()) == json.dumps(Greedy(2.0, 1.0).config_dict())
    assert Greedy().config_dict() == {
        "norm_threshold": 2.6, "merge_threshold": 0.8, "count_mode": "reset", "close_gap": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("syllables", {}, "unknown segmenter 'syllables'; this version knows greedy, min_cut, norm_peaks"),
        ("greedy", {"threshold": 1.0}, "segmenter 'greedy' .*'threshold'"),
        ("greedy", {"norm_threshold": "2.6"}, "norm_threshold is '2.6'"),
        ("greedy", {"merge_threshold": True}, "merge_threshold is True"),
        ("greedy", {"merge_threshold": float("nan")}, "finite"),
        ("greedy", {"count_mode": "other"}, "choose from package, reset"),
        ("min_cut", {"seconds": 0}, "positive"),
        ("min_cut", {"min_frames": 1.5}, "whole number"),
        ("min_cut", {"merge_threshold": "0.4"}, "merge_threshold is '0.4'"),
        ("norm_peaks", {"window": 2}, "odd"),
        ("norm_peaks", {"prominence": None}, "prominence is None"),
    ],
)
def test_unusable_configurations_are_refused(kind, config, message):
    with pytest.raises(FormatError, match=message):
        build(kind, config)


@given(seed=st.integers(0, 10**6), width=st.sampled_from([1, 3, 40]), count=st.integers(1, 80))
@settings(max_examples=50, deadline=None)
def test_pooled_means_are_of_the_segment_alone(seed, width, count):
    rng = np.random.default_rng(seed)
    frames = (rng.standard_normal((count, width)) * 10.0 ** rng.uniform(-3, 3, (count, 1))).astype(np.float32)
    spans = np.sort(rng.integers(0, count + 1, (10, 2)), axis=1)
    spans = spans[spans[:, 0] < spans[:, 1]]
    means = pool(frames, spans)
    assert means.dtype == np.float32
    assert means.shape == (len(spans), width)
    for mean, (begin, end) in zip(means, spans, strict=True):
        exact = np.array([sum(map(float, column)) / (end - begin) for column in frames[begin:end].T])
        np.testing.assert_allclose(mean, exact, rtol=1e-6, atol=1e-7 * np.abs(frames[begin:end]).max())
        # To the bit, with other frames around it and another layout in memory.
        around = rng.standard_normal((7, width)).astype(np.float32) * 1e6
        other = np.concatenate([around, frames[begin:end], around])
        np.testing.assert_array_equal(pool(other, np.array([[7, 7 + end - begin]]))[0], mean)
        np.testing.assert_array_equal(pool(np.asfortranarray(other), np.array([[7, 7 + end - begin]]))[0], mean)


def test_sums_of_means_do_not_lose_small_frames():
    """In float32 the ones would vanish beside the first frame."""
    frames = np.ones((1001, 1), np.float32)
    frames[0] = 2**25
    assert pool(frames, np.array([[0, 1001]]))[0, 0] == np.float32((2**25 + 1000) / 1001)


def test_pool_edges():
    frames = torch.ones(4, 2)
    assert pool(frames, np.zeros((0, 2), np.int64)).shape == (0, 2)
    for begin, end in ((2, 2), (3, 5), (-1, 2), (3, 1)):
        with pytest.raises(InputError, match=rf"segment \[{begin}, {end}\)"):
            pool(frames, np.array([[begin, end]]))


def test_a_stream_that_closes_gaps_waits_no_longer_than_they_are():
    """A segment is given as soon as the next one cannot be near any more."""
    frames = np.zeros((40, 2), np.float32)
    frames[5:10], frames[13:20] = 3.0, 3.0
    stream = Greedy(1.0, 0.5, close_gap=4).stream()
    given = [(at, stream.push(frames[at : at + 1]).tolist()) for at in range(40)]
    # The first one ends with the start of the second, the second when 5 silent frames are behind it.
    assert [(at, spans) for at, spans in given if spans] == [(20, [[5, 11]]), (24, [[11, 20]])]
    assert stream.flush().tolist() == []


def test_gaps_refuse_nonsense():
    for wrong in (-1, 1.5, True):
        with pytest.raises(InputError, match="close_gap"):
            Greedy(close_gap=wrong)
    with pytest.raises(FormatError):
        build("greedy", {"close_gap": "4"})
