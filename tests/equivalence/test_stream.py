"""Streamed equals offline, for any chunking, alone and together; bidirectional encoders by their window rule."""

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechtok.audio.decode import load
from speechtok.audio.resample import resample
from speechtok.encoders.base import Frames
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.evaluation.verify import in_batches, random_pieces, streamed_together
from speechtok.frames import WindowRule
from speechtok.quantizers.kmeans import KMeans
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units

from ..conftest import chunked_tokenizer

RATES = [8000, 16000, 22050, 44100, 48000]


def streamed(tokenizer, pieces, rate, window=None):
    with tokenizer.stream(rate, window=window) as stream:
        parts = [stream.push(piece) for piece in pieces]
        return Units.concatenate([*parts, stream.flush()])


def pieces_of(wave, sizes):
    position, turn = 0, 0
    while position < len(wave):
        yield wave[position : position + sizes[turn % len(sizes)]]
        position, turn = position + sizes[turn % len(sizes)], turn + 1


@pytest.fixture(scope="module")
def long_wave(clips):
    return np.concatenate([load(path, 16000) for path in sorted(clips.iterdir())])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=8),
    begin=st.integers(0, 30_000),
    length=st.integers(0, 40_000),
    rate=st.sampled_from([16000, 44100, 8000]),
)
def test_any_chunking_gives_the_offline_units(tokenizer, chunked, bidirectional, clip_wave, sizes, begin, length, rate):
    wave = clip_wave[begin : begin + length]
    sizes = [max(size, len(wave) // 200) for size in sizes]
    for each in (tokenizer, chunked, bidirectional):
        assert streamed(each, pieces_of(wave, sizes), rate) == each.encode(wave, rate)


@pytest.mark.parametrize("rate", RATES)
def test_pieces_from_one_sample_to_two_seconds(chunked, tokenizer, clip_wave, rate):
    wave = resample(clip_wave, 16000, rate)
    for each in (chunked, tokenizer):
        offline = each.encode(wave, rate)
        assert len(set(offline.ids.tolist())) > 10, "ids vary"
        for seed in range(4):
            assert streamed(each, random_pieces(wave, rate, random.Random(seed)), rate) == offline


def test_single_samples(chunked, clip_wave):
    wave = clip_wave[:12_000]
    assert streamed(chunked, pieces_of(wave, [1]), 16000) == chunked.encode(wave, 16000)


@pytest.mark.parametrize("frames", [0, 1, 4, 5, 7, 8, 12, 13, 16, 21])
@pytest.mark.parametrize(("look_ahead", "smoothing"), [(0, 1), (3, 1), (3, 7), (8, 1), (10, 3)])
def test_ends_around_chunk_borders(clip_wave, frames, look_ahead, smoothing):
    """A sound may end anywhere in a chunk; the last answers come after its end."""
    each = chunked_tokenizer(clip_wave, look_ahead=look_ahead, smoothing=smoothing)
    length = each.encoder.grid.num_samples(frames)
    for samples in (length, length + 319):
        wave = clip_wave[:samples]
        units = streamed(each, pieces_of(wave, [1000]), 16000)
        assert len(units) == frames
        assert units == each.encode(wave, 16000)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"subsampling": "conv", "feature_projection_input_dim": 19 * 8}, id="25 Hz"),
        pytest.param({"attention_past": 0, "conv_depthwise_kernel_size": 1, "look_ahead": 7}, id="no past"),
        pytest.param({"num_hidden_layers": 0}, id="no blocks"),
        pytest.param({"smoothing": 5}, id="smoothed"),
        pytest.param({"attention_chunk": 2, "attention_past": 6, "look_ahead": 5}, id="small chunks"),
    ],
)
def test_other_shapes_of_the_encoder(long_wave, changes):
    each = chunked_tokenizer(long_wave, **changes)
    offline = each.encode(long_wave, 16000)
    assert len(list(each.windows(long_wave, 16000))) > 3
    assert streamed(each, random_pieces(long_wave, 16000, random.Random(0)), 16000) == offline
    whole = Tokenizer(each.encoder, each.quantizer, name="whole", window=WindowRule(100, 0))
    assert np.array_equal(whole.encode(long_wave, 16000).ids, offline.ids)


def test_long_files_are_exact_whatever_the_window(chunked, tokenizer, long_wave):
    for each, lengths in ((chunked, (2.5, 5.0, 11.0)), (tokenizer, (0.5, 3.0))):
        whole = Tokenizer(each.encoder, each.quantizer, name="whole", window=WindowRule(100, 0))
        expected = whole.encode(long_wave, 16000).ids
        for seconds in lengths:
            cut = Tokenizer(each.encoder, each.quantizer, name="cut", window=WindowRule(seconds, 0.1))
            assert len(list(cut.windows(long_wave, 16000))) > 1
            assert np.array_equal(cut.encode(long_wave, 16000).ids, expected)


def test_batches_of_1_4_16(chunked, long_wave):
    waves = [(long_wave[9000 * i : 9000 * i + 7000 * (i % 7 + 1)], RATES[i % 5]) for i in range(32)]
    single = [chunked.encode(wave, rate) for wave, rate in waves]
    for size in (1, 4, 16):
        assert in_batches(chunked, waves, size)[0] == single


@pytest.mark.parametrize("which", ["chunked", "mfcc", "bidirectional"])
def test_32_streams_at_different_places_in_one_batch(which, request, long_wave):
    """Forty streams, 32 open at a time; lengths, rates, starts and pieces differ."""
    each = request.getfixturevalue("tokenizer" if which == "mfcc" else which)
    waves = [(long_wave[8000 * i : 8000 * i + 4000 * (i % 9) + 300], RATES[i % 5]) for i in range(40)]
    expected = [each.encode(wave, rate) for wave, rate in waves]
    together, _ = streamed_together(each, waves, 32, random.Random(0))
    assert together == expected
    assert sum(map(len, expected)) > 1000


class Shaky(W2vBertEncoder):
    """Adds a difference below the stated rounding that depends on the shape of the batch, as other machines might."""

    size, rounding = 3e-6, 1e-5

    def _shaken(self, frames, wave, salt):
        noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(wave.numel() * 2 + salt))
        return frames + self.size * frames.norm(dim=-1, keepdim=True) * noise / noise.norm(dim=-1, keepdim=True)

    def encode(self, wave, lengths):
        frames = super().encode(wave, lengths)
        return Frames(self._shaken(frames.features, wave, 0), frames.lengths)

    def advance(self, wave, lengths, positions, state):
        frames, state = super().advance(wave, lengths, positions, state)
        return self._shaken(frames, wave, 1), state


@pytest.fixture(scope="module")
def tied(long_wave):
    """A shaky encoder with pairs of centroids at equal distance from its frames: most frames are near-ties."""
    encoder = chunked_tokenizer(long_wave, kind=Shaky).encoder
    with torch.inference_mode():
        frames = W2vBertEncoder.encode(encoder, torch.from_numpy(long_wave)[None], torch.tensor([len(long_wave)]))
    frames = frames.features[0].numpy()
    direction = np.random.default_rng(0).standard_normal(frames.shape).astype(np.float32)
    direction *= np.linalg.norm(frames, axis=1, keepdims=True) / np.linalg.norm(direction, axis=1, keepdims=True) / 100
    pairs = np.concatenate([frames + direction, frames - direction])
    return Tokenizer(encoder, KMeans(pairs), name="tied", window=WindowRule(5, 0.3))


def test_near_ties_are_decided_alike_on_every_path(tied, long_wave, monkeypatch):
    seconds = (5.5, 3.0, 1.5, 0.5)
    waves = [(long_wave[: int(16000 * length)], 16000) for length in seconds]
    whole = Tokenizer(tied.encoder, tied.quantizer, name="whole", window=WindowRule(100, 0))

    def paths():
        yield "files", [tied.encode(wave, rate).ids for wave, rate in waves]
        yield "one window", [whole.encode(wave, rate).ids for wave, rate in waves]
        for size in (2, 4):
            yield f"batches of {size}", [units.ids for units in in_batches(tied, waves, size)[0]]
        yield "streams", [streamed(tied, random_pieces(wave, rate, random.Random(0)), rate).ids for wave, rate in waves]
        yield "streams together", [units.ids for units in streamed_together(tied, waves, 3, random.Random(0))[0]]

    _, ties = in_batches(tied, waves, 1)
    assert ties > 300
    assert streamed_together(tied, waves, 3, random.Random(0))[1] > 300
    (_, first), *others = list(paths())
    for name, ids in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, ids, strict=True)), name
    monkeypatch.setattr(Shaky, "rounding", 0.0)
    (_, first), *others = list(paths())
    different = [name for name, ids in others if any((a != b).any() for a, b in zip(first, ids, strict=True))]
    assert {"one window", "batches of 4", "streams", "streams together"} <= set(different), "ties are what is decided"


def test_real_files(tokenizer, chunked, speech_files):
    for path in speech_files[:40]:
        wave = load(path, 16000)
        for each in (tokenizer, chunked):
            assert streamed(each, pieces_of(wave, [1600]), 16000) == each.encode(wave, 16000)


def test_shorter_windows_answer_sooner(bidirectional, clip_wave):
    rule = WindowRule(1.0, 0.2)
    offline = bidirectional.encode(clip_wave, 16000)
    quick = streamed(bidirectional, pieces_of(clip_wave, [4000]), 16000, rule)
    assert len(quick) == len(offline)
    assert np.array_equal(quick.starts, offline.starts)
    with bidirectional.stream(16000, window=rule) as stream, bidirectional.stream(16000) as slow:
        assert stream.latency_seconds < slow.latency_seconds
        waited = 0
        while not len(stream.push(clip_wave[waited : waited + 80])):
            waited += 80
        assert 0 <= stream.latency_seconds - waited / 16000 < 0.02
