"""Segment tokenizers: batched equals single, streamed equals offline, whatever the batch, the pieces or the threads."""

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechtok.audio.resample import resample
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.evaluation.verify import in_batches, random_pieces, streamed_together
from speechtok.frames import WindowRule
from speechtok.quantizers.kmeans import KMeans
from speechtok.segmenters import Greedy
from speechtok.segmenters.pool import pool
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units

from ..conftest import chunked_tokenizer, segmented
from .test_stream import RATES, Shaky, pieces_of, streamed


def test_batches_of_1_4_16(by_segments, long_wave):
    waves = [(long_wave[9000 * i : 9000 * i + 7000 * (i % 7 + 1)], RATES[i % 5]) for i in range(32)]
    single = [by_segments.encode(wave, rate) for wave, rate in waves]
    assert sum(map(len, single)) > 150
    for size in (1, 4, 16):
        assert in_batches(by_segments, waves, size)[0] == single


def test_threads_and_pools_do_not_matter(by_segments, clips, long_wave):
    files = [*sorted(clips.iterdir()), long_wave, long_wave[:1000]]
    expected = [by_segments.encode(file, 16000) for file in files]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert [by_segments.encode(file, 16000) for file in files] == expected
    finally:
        torch.set_num_threads(threads)
    for seconds in (0.1, 3.0, 500.0):
        assert by_segments.encode_batch(files, 16000, batch_seconds=seconds) == expected


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=8),
    begin=st.integers(0, 200_000),
    length=st.integers(0, 120_000),
    rate=st.sampled_from([16000, 44100, 8000]),
)
def test_any_chunking_gives_the_offline_units(by_segments, long_wave, sizes, begin, length, rate):
    wave = long_wave[begin : begin + length]
    sizes = [max(size, len(wave) // 100) for size in sizes]
    assert streamed(by_segments, pieces_of(wave, sizes), rate) == by_segments.encode(wave, rate)


@pytest.mark.parametrize("rate", RATES)
def test_pieces_from_one_sample_to_two_seconds(by_segments, clip_wave, rate):
    wave = resample(clip_wave, 16000, rate)
    offline = by_segments.encode(wave, rate)
    for seed in range(2):
        assert streamed(by_segments, random_pieces(wave, rate, random.Random(seed)), rate) == offline


def test_many_streams_at_different_places(by_segments, long_wave):
    waves = [(long_wave[8000 * i : 8000 * i + 8000 * (i % 12) + 300], RATES[i % 5]) for i in range(24)]
    together, ties = streamed_together(by_segments, waves, 16, random.Random(0))
    assert together == [by_segments.encode(wave, rate) for wave, rate in waves]
    assert ties == 0
    assert sum(map(len, together)) > 150


def test_state_can_be_saved_and_restored(by_segments, long_wave):
    wave = long_wave[:150_000]
    whole = by_segments.encode(wave, 16000)
    for cut in (0, 33_333, 70_001, 149_000):
        first = by_segments.stream(16000)
        head = first.push(wave[:cut])
        state = pickle.loads(pickle.dumps(first.state()))
        first.push(wave[:50_000])  # going on does not touch the saved state
        second, streams = by_segments.stream(16000), by_segments.streams()
        second.restore(state)
        streams.restore("again", state)
        for more in (
            (second.push(wave[cut:]), second.flush()),
            (streams.push({"again": wave[cut:]})["again"], streams.flush()["again"]),
        ):
            assert Units.concatenate([head, *more]) == whole


def test_segments_come_before_the_end(bases, clip_wave, long_wave):
    """Greedy segmentation answers while the sound goes on (encoders with exact streams)."""
    for name in ("mfcc", "chunked"):
        each = segmented(bases[name], clip_wave)
        with each.stream(16000) as stream:
            early = [stream.push(piece) for piece in pieces_of(long_wave, [8000])]
        offline = each.encode(long_wave, 16000)
        assert sum(map(len, early)) > len(offline) - 20
        assert all(len(units) == 0 or units.ends[-1] <= 8000 * (i + 1) for i, units in enumerate(early))


def test_shorter_windows_answer_sooner(bases, clip_wave, long_wave):
    each = segmented(bases["bidirectional"], clip_wave)
    with each.stream(16000, window=WindowRule(1.0, 0.2)) as stream:
        parts = [stream.push(piece) for piece in pieces_of(long_wave, [16000])]
        early = sum(map(len, parts[:3]))
        units = Units.concatenate([*parts, stream.flush()])
    assert early > 0
    assert (units.starts[1:] >= units.ends[:-1]).all()
    assert 0.5 < len(units) / len(each.encode(long_wave, 16000)) < 2


@pytest.fixture(scope="module")
def tied(long_wave):
    """A shaky encoder; its thresholds and its quantizer's borders lie on frames: most sounds have a near-tie."""
    encoder = chunked_tokenizer(long_wave, kind=Shaky).encoder
    with torch.inference_mode():
        frames = W2vBertEncoder.encode(encoder, torch.from_numpy(long_wave)[None], torch.tensor([len(long_wave)]))
    frames = frames.features[0].numpy()
    norms = np.linalg.norm(frames, axis=1)
    # A threshold between two norms that are as close as the noise: about half of all frames stand beside it.
    close = np.sort(norms)
    at = int(np.argsort(np.diff(close) / close[:-1])[0])
    segmenter = Greedy(float((close[at] + close[at + 1]) / 2), 0.6)
    means = pool(frames, segmenter.segment(frames)[0])
    direction = np.random.default_rng(0).standard_normal(means.shape).astype(np.float32)
    direction *= np.linalg.norm(means, axis=1, keepdims=True) / np.linalg.norm(direction, axis=1, keepdims=True) / 100
    pairs = np.concatenate([means + direction, means - direction])
    return Tokenizer(encoder, KMeans(pairs), name="tied", segmenter=segmenter, silence_gap=2, window=WindowRule(5, 0.3))


def test_near_ties_are_decided_alike_on_every_path(tied, long_wave, monkeypatch):
    waves = [(long_wave[: 4000 * length], 16000) for length in (36, 26, *range(20, 0, -2))]

    def paths():
        yield "files", [tied.encode(wave, rate) for wave, rate in waves]
        for size in (2, 4):
            yield f"batches of {size}", in_batches(tied, waves, size)[0]
        yield "streams", [streamed(tied, random_pieces(wave, rate, random.Random(0)), rate) for wave, rate in waves]
        yield "streams together", streamed_together(tied, waves, 3, random.Random(0))[0]

    assert in_batches(tied, waves, 4)[1] > 5
    (_, first), *others = list(paths())
    for name, units in others:
        assert units == first, name
    monkeypatch.setattr(Shaky, "rounding", 0.0)
    (_, first), *others = list(paths())
    different = [name for name, units in others if units != first]
    assert {"batches of 4", "streams", "streams together"} <= set(different), "ties are what is decided"


def test_near_ties_are_rare_on_real_files(bases, clip_wave, speech_files, record_property):
    """Frames of another batch differ, units do not."""
    from speechtok.audio.decode import load

    waves = [(load(path, 16000), 16000) for path in speech_files[:60]]
    for name in ("mfcc", "chunked"):
        each = segmented(bases[name], clip_wave, window=WindowRule(30, 0.3))
        single, _ = in_batches(each, waves, 1)
        batched, ties = in_batches(each, waves, 16)
        record_property(f"near-ties {name}", ties)
        assert batched == single
        assert ties < 0.3 * len(waves), "the canonical path must stay the exception"
