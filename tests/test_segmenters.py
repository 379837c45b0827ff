"""Segmenters on synthetic frames, and on the frames of a real encoder for real files."""

import copy
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

import speechtok
from speechtok.errors import InputError
from speechtok.kernels.segment import segment_reference
from speechtok.segmenters import (
    GreedyStream,
    greedy_segment,
    greedy_segment_batch,
    min_cut_segment,
    norm_peak_segment,
)
from speechtok.segmenters.min_cut import speech_mask
from speechtok.segmenters.norm_peaks import prominent_peaks
from tests.test_segment_kernel import MERGE_THRESHOLDS, NORM_THRESHOLDS, package, piecewise, utterances

__all__ = ["package"]  # a fixture

RNG = np.random.default_rng


def encode(files):
    tokenizer = speechtok.load("w2vbert-mini")
    frames = []
    with torch.inference_mode():
        for file in files:
            pieces = [
                tokenizer.encoder(torch.from_numpy(wave)[None]).features[0] for _, wave in tokenizer.windows(file)
            ]
            frames.append(torch.cat(pieces).numpy())
    return frames


@pytest.fixture(scope="module")
def features(speech_files):
    """Of 200 real files."""
    return encode(speech_files)


def settings(features):
    """Thresholds for an encoder whose silence is not zero: a tenth or a half of all frames is silent."""
    norms = np.linalg.norm(np.concatenate(features), axis=1)
    return [(float(np.percentile(norms, share)), merge) for share in (10, 50) for merge in (0.8, 0.95)]


def test_real_features_equal_the_package(package, features):
    segments = 0
    for norm, merge in settings(features):
        batch = greedy_segment_batch(features, norm, merge)
        for frames, found in zip(features, batch, strict=True):
            expected = package(frames, norm, merge)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(greedy_segment(frames, norm, merge), expected)
            np.testing.assert_array_equal(segment_reference(frames, norm, merge), expected)
            np.testing.assert_array_equal(streamed(frames, RNG(len(frames)), norm, merge), expected)
            segments += len(expected)
    assert segments > 10_000


def streamed(frames, rng, *arguments, saved=False):
    """Segments of a stream that is fed random pieces; what comes must be behind what came, and final."""
    stream, given, place = GreedyStream(*arguments), [np.zeros((0, 2), np.int64)], 0
    largest = rng.choice([1, 5, 50, 400])
    while place < len(frames):
        size = rng.integers(0, largest + 1)
        spans = stream.push(frames[place : place + size])
        place = min(place + size, len(frames))
        assert stream.frames == place
        assert not len(spans) or spans.max() <= stream.settled
        given.append(spans)
        if saved:
            stream = pickle.loads(pickle.dumps(stream)) if rng.random() < 0.5 else copy.deepcopy(stream)
    return np.concatenate([*given, stream.flush()])


def stream_equals_offline(features, chunkings):
    for i, frames in enumerate(features):
        norm = float(np.percentile(np.linalg.norm(frames, axis=1), 20))
        for mode in ("package", "reset"):
            expected = greedy_segment(frames, norm, 0.9, mode)
            for seed in range(chunkings):
                found = streamed(frames, RNG([i, seed]), norm, 0.9, mode, saved=seed == 0)
                np.testing.assert_array_equal(found, expected)


def test_streams_of_real_files_equal_offline(features):
    stream_equals_offline(features[::4], 4)


@pytest.mark.slow
def test_streams_of_500_real_files_equal_offline(shared):
    kinds = {".flac", ".opus", ".mp3"}
    files = sorted(path for path in (shared / "speech").rglob("*") if path.suffix in kinds)
    assert len(files) >= 500
    stream_equals_offline(encode([files[i] for i in RNG(1).permutation(len(files))[:500]]), 8)


@pytest.mark.parametrize("mode", ["package", "reset"])
@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_streams_equal_offline_over_the_grid(width, mode):
    rng = RNG(width)
    for norm in NORM_THRESHOLDS:
        for merge in MERGE_THRESHOLDS:
            for frames in utterances([5, width, int(10 * norm)], 4, width, 150):
                expected = greedy_segment(frames, norm, merge, mode)
                np.testing.assert_array_equal(streamed(frames, rng, norm, merge, mode), expected)


def blocks(*heights, length=4, width=3):
    """Pieces along different axes, the norm of each as given; zero is silence."""
    axes = np.eye(width, dtype=np.float32)
    return np.concatenate([np.repeat(axes[i % width][None] * height, length, 0) for i, height in enumerate(heights)])


def test_a_stream_answers_when_the_right_neighbour_has_ended():
    frames = blocks(5, 5, 5, 0, 5)
    stream = GreedyStream()
    came = [(t, span) for t, frame in enumerate(frames) for span in stream.push(frame[None]).tolist()]
    # The first segment with the end of the second; the last two of the run with the silent frame 12.
    assert came == [(8, [0, 4]), (12, [4, 8]), (12, [8, 12])]
    assert stream.settled == 16
    assert stream.flush().tolist() == [[16, 20]]


def test_no_number_of_frames_bounds_the_wait():
    """Two streams that differ in their last frames only, a thousand frames after the joint, place it differently."""
    left = np.repeat(np.float32([[3, 0]]), 10, 0)
    right = np.repeat(np.float32([[0, 3]]), 1000, 0)
    angles = np.linspace(np.pi / 2, 0, 8)
    turn = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32) * (
        3.0 * 1e4 ** np.arange(1, 9)[:, None] ** 0.6
    )
    turn = turn.astype(np.float32)
    stays = greedy_segment(np.concatenate([left, right]), 2.6, 0.8, "reset")
    turns = greedy_segment(np.concatenate([left, right, turn]), 2.6, 0.8, "reset")
    assert stays.tolist() == [[0, 10], [10, 1010]]
    assert turns.tolist() == [[0, 1018]]


def test_memory_of_a_stream_is_bounded_by_its_open_segments():
    stream = GreedyStream()
    for i in range(300):
        stream.push(blocks(5, 5, 5, 0, length=7, width=8))
        assert len(stream._frames) <= 200, i
    assert stream.frames == 300 * 28


def test_a_stream_that_refused_frames_goes_on():
    frames = piecewise(RNG(0), 100, 8)
    stream = GreedyStream(1.0, 0.8)
    got = [stream.push(frames[:60])]
    bad = frames[60:].copy()
    bad[7, 2] = np.nan
    with pytest.raises(InputError, match="frame 67 of the stream"):
        stream.push(bad)
    with pytest.raises(InputError, match="8"):
        stream.push(np.zeros((3, 9), np.float32))
    got += [stream.push(frames[60:]), stream.flush()]
    np.testing.assert_array_equal(np.concatenate(got), greedy_segment(frames, 1.0, 0.8))
    with pytest.raises(InputError, match="ended"):
        stream.push(frames)
    with pytest.raises(InputError, match="ended"):
        stream.flush()


def test_a_stream_without_frames():
    assert GreedyStream().flush().shape == (0, 2)
    stream = GreedyStream()
    assert stream.push(np.zeros((0, 4), np.float32)).shape == (0, 2)
    assert stream.flush().shape == (0, 2)


@pytest.mark.parametrize("mode", ["package", "reset"])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_edges(kind, mode):
    def found(frames):
        spans = greedy_segment(kind(np.asarray(frames, np.float32)), 2.6, 0.8, mode)
        assert spans.dtype == np.int64 and spans.ndim == 2 and spans.shape[1] == 2
        return spans.tolist()

    assert found(np.zeros((0, 5))) == []
    assert found(np.zeros((9, 5))) == []
    assert found([[0, 0], [3, 0], [0, 0]]) == [[1, 2]]
    assert found([[3.0]]) == [[0, 1]]
    assert found([[3], [3], [-3], [-3]]) == [[0, 2], [2, 4]]
    assert found(blocks(5, 5, 0, 5)) == [[0, 4], [4, 8], [12, 16]]


def test_silence_in_front_shifts_everything():
    for frames in utterances(9, 20, 16):
        moved = np.concatenate([np.zeros((7, 16), np.float32), frames])
        np.testing.assert_array_equal(greedy_segment(moved, 1.0, 0.8), greedy_segment(frames, 1.0, 0.8) + 7)


def test_every_voiced_frame_is_in_one_segment():
    for frames in utterances(10, 50, 16):
        cover = np.zeros(len(frames), int)
        for begin, end in greedy_segment(frames, 1.0, 0.8):
            cover[begin:end] += 1
        np.testing.assert_array_equal(cover, np.linalg.norm(frames, axis=1) >= 1)


def test_layouts_are_read_alike():
    frames = piecewise(RNG(1), 80, 16)
    expected = greedy_segment(frames, 1.0, 0.8)
    locked = frames.copy()
    locked.flags.writeable = False
    for other in (
        np.asfortranarray(frames),
        locked,
        np.repeat(frames, 2, 0)[::2],
        torch.from_numpy(frames).T.clone().T,
    ):
        np.testing.assert_array_equal(greedy_segment(other, 1.0, 0.8), expected)


@pytest.mark.parametrize("segmenter", [greedy_segment, norm_peak_segment, min_cut_segment])
@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((3, 4)), "float64"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), "bfloat16"),
        ([[1.0]], "list"),
        (np.zeros(4, np.float32), "shape"),
        (np.zeros((1, 3, 4), np.float32), "one utterance at a time"),
        (np.zeros((3, 0), np.float32), "shape"),
        (np.float32([[1, 2], [3, np.nan]]), "frame 1 holds NaN"),
        (np.float32([[1, 2], [3, 4], [np.inf, 3]]), "frame 2 holds NaN"),
    ],
)
def test_unusable_frames_are_refused(segmenter, frames, message):
    with pytest.raises(InputError, match=message):
        segmenter(frames)


def test_unusable_options_are_refused():
    frames = np.zeros((3, 4), np.float32)
    with pytest.raises(InputError, match="norm_threshold is NaN"):
        greedy_segment(frames, float("nan"))
    with pytest.raises(InputError, match="merge_threshold is NaN"):
        GreedyStream(1.0, float("nan"))
    with pytest.raises(InputError, match="count_mode is 'other'"):
        greedy_segment(frames, 1.0, 0.8, "other")
    with pytest.raises(InputError, match="utterance 1 has another width"):
        greedy_segment_batch([frames, np.zeros((3, 5), np.float32)])
    assert greedy_segment_batch([]) == []


def test_the_room_is_light():
    check = "import sys, speechtok.segmenters as s; assert 'torch' not in sys.modules; print(*dir(s)); s.greedy_segment"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "GreedyStream" in done.stdout
    with pytest.raises(AttributeError, match="no attribute"):
        speechtok.segmenters.nonsense  # noqa: B018


# Norm peaks


def test_peaks_are_scipys():
    find_peaks = pytest.importorskip("scipy.signal").find_peaks
    rng = RNG(0)
    for _ in range(500):
        values = rng.standard_normal(rng.integers(0, 60))
        if rng.random() < 0.5:
            values = np.round(values)  # plateaus
        for prominence in (0.0, 0.45, 1.5):
            found = prominent_peaks(values, prominence)
            np.testing.assert_array_equal(found, find_peaks(values, prominence=prominence)[0])


def test_norm_peaks_of_real_features_are_zerosyls(features):
    """ZeroSyl's own lines."""
    find_peaks = pytest.importorskip("scipy.signal").find_peaks
    for frames in features[::4]:
        norms = np.linalg.norm(frames, axis=-1)
        norms = (norms - norms.mean()) / norms.std()
        smooth = np.convolve(np.pad(norms, (1, 1), mode="edge"), np.ones(3) / 3, mode="valid")
        bounds = [0, *find_peaks(smooth, prominence=0.45)[0].tolist(), len(frames)]
        np.testing.assert_array_equal(norm_peak_segment(frames), list(pairwise(bounds)))


def test_norm_peaks_edges():
    assert norm_peak_segment(np.zeros((0, 3), np.float32)).shape == (0, 2)
    assert norm_peak_segment(np.ones((1, 3), np.float32)).tolist() == [[0, 1]]
    assert norm_peak_segment(np.ones((9, 3), np.float32)).tolist() == [[0, 9]]
    hills = np.float32([1, 1, 1, 5, 1, 1, 1, 1, 5, 1, 1])[:, None]
    assert norm_peak_segment(hills, window=1).tolist() == [[0, 3], [3, 8], [8, 11]]
    with pytest.raises(InputError, match="odd"):
        norm_peak_segment(hills, window=2)


# Min-cut


def published_cut(similarity, columns):
    """SD-HuBERT's search (mincut.pyx), sums and minima as they are there."""
    size = len(similarity)
    cost = np.full((size, columns), np.finfo(np.float64).max)
    back = np.ones((size, columns), int)
    cost[0, 0] = 0
    for i in range(1, size):
        inside = [similarity[j:i, j:i].sum() / 2 for j in range(i)]
        cuts = [similarity[j:i, :j].sum() + similarity[j:i, i:].sum() for j in range(i)]
        for k in range(1, columns):
            total = [cost[j, k - 1] + cuts[j] / (inside[j] + cuts[j]) for j in range(i)]
            back[i, k] = np.argmin(total)
            cost[i, k] = total[back[i, k]]
    bounds = [size - 1]
    for k in range(columns - 1, 0, -1):
        bounds.append(int(back[bounds[-1], k]))
    return bounds[::-1]


def published_merge(frames, spans, threshold):
    """Merging of SD-HuBERT, every cosine anew each time."""
    while len(spans) > 1:
        means = [frames[begin:end].mean(0) for begin, end in spans]
        alike = [np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairwise(means)]
        k = int(np.argmax(alike))
        if alike[k] < threshold:
            break
        spans = [*spans[:k], [spans[k][0], spans[k + 1][1]], *spans[k + 2 :]]
    return spans


@pytest.mark.parametrize("threshold", [None, 0.4, 0.8])
def test_min_cut_is_the_published_one(threshold):
    for seed in range(25):
        frames = piecewise(RNG([1, seed]), int(RNG(seed).integers(3, 90)), 16)
        frames += RNG(seed).standard_normal(frames.shape).astype(np.float32) * 0.2
        similarity = frames @ frames.T
        bounds = published_cut(similarity - similarity.min() + 1e-7, int(np.ceil(len(frames) / 50 / 0.2)) + 1)
        bounds = np.unique([*bounds[:-1], bounds[-1] + 1])
        spans = [list(span) for span in pairwise(bounds)]
        expected = spans if threshold is None else published_merge(frames, spans, threshold)
        np.testing.assert_array_equal(min_cut_segment(frames, merge_threshold=threshold), expected)


def test_min_cut_finds_the_blocks():
    frames = blocks(3, 3, 3, 3, length=10) + RNG(0).normal(0, 0.05, (40, 3)).astype(np.float32)
    assert min_cut_segment(frames, seconds=0.1).tolist() == [[0, 10], [10, 20], [20, 30], [30, 40]]
    voiced = np.ones(40, bool)
    voiced[18:21] = voiced[22:24] = False  # leaves a run of one frame
    assert min_cut_segment(frames, voiced, seconds=0.1).tolist() == [[0, 10], [10, 18], [24, 30], [30, 40]]


def test_min_cut_edges():
    assert min_cut_segment(np.zeros((0, 3), np.float32)).shape == (0, 2)
    assert min_cut_segment(np.ones((4, 3), np.float32), np.zeros(4, bool)).shape == (0, 2)
    assert min_cut_segment(np.ones((1, 3), np.float32)).shape == (0, 2)
    assert min_cut_segment(np.ones((1, 3), np.float32), min_frames=1).tolist() == [[0, 1]]
    assert min_cut_segment(np.ones((50, 3), np.float32)).tolist() == [[0, 50]]
    # More pieces than frames are asked for; zeros have no direction and are not merged.
    assert len(min_cut_segment(np.zeros((5, 3), np.float32), seconds=0.001)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voiced": np.ones(3, bool)}, "give bool"),
        ({"voiced": np.ones(7001)}, "give bool"),
        ({"seconds": 0.0}, "positive"),
        ({"frame_rate": -1.0}, "positive"),
        ({}, "one run"),
    ],
)
def test_min_cut_refuses(options, message):
    with pytest.raises(InputError, match=message):
        min_cut_segment(np.zeros((7001, 2), np.float32), **options)


def test_speech_mask():
    frames = np.float32([[0.1], [3], [4], [0], [2]])
    assert speech_mask(frames, 2, relative=False).tolist() == [False, True, True, False, False]
    assert speech_mask(frames).tolist() == [False, True, True, False, True]
    assert speech_mask(np.ones((4, 2), np.float32)).tolist() == [False] * 4
    assert speech_mask(np.zeros((0, 2), np.float32)).shape == (0,)
