"""Streamed equals offline, for any chunking; bidirectional encoders by their window rule."""

import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechtok.audio.decode import load
from speechtok.errors import AudioError, FormatError
from speechtok.frames import WindowRule
from speechtok.units import Units


def streamed(tokenizer, wave, rate, sizes, window=None):
    parts, position, turn = [], 0, 0
    with tokenizer.stream(rate, window=window) as stream:
        while position < len(wave):
            parts.append(stream.push(wave[position : position + sizes[turn % len(sizes)]]))
            position += sizes[turn % len(sizes)]
            turn += 1
        parts.append(stream.flush())
    return Units.concatenate(parts)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=8),
    begin=st.integers(0, 30_000),
    length=st.integers(0, 40_000),
    rate=st.sampled_from([16000, 44100, 8000]),
)
def test_any_chunking_gives_the_offline_units(tokenizer, bidirectional, clip_wave, sizes, begin, length, rate):
    wave = clip_wave[begin : begin + length]
    sizes = [max(size, len(wave) // 200) for size in sizes]
    for each in (tokenizer, bidirectional):
        assert streamed(each, wave, rate, sizes) == each.encode(wave, rate)


def test_real_files(tokenizer, speech_files):
    for path in speech_files[:40]:
        wave = load(path, 16000)
        assert streamed(tokenizer, wave, 16000, [1600]) == tokenizer.encode(wave, 16000)


def test_units_come_early_and_once(tokenizer, clip_wave):
    with tokenizer.stream(16000) as stream:
        assert stream.latency_seconds == pytest.approx((5 - 1) * 0.01 + 0.025)
        seen = 0
        for position in range(0, len(clip_wave), 160):
            units = stream.push(clip_wave[position : position + 160])
            if len(units):
                assert units.starts[0] == 120 + 160 * seen
            seen += len(units)
            due = tokenizer.encoder.grid.num_frames(position + 160) - 4
            assert seen == max(0, due), "every frame whose context is there has been given"
        seen += len(stream.flush())
    assert seen == len(tokenizer.encode(clip_wave, 16000))


def test_memory_is_bounded(tokenizer):
    with tokenizer.stream(48000) as stream:
        for _ in range(200):
            stream.push(np.zeros(4800, np.float32))
            assert len(stream.state().buffer.samples) < 5000
            assert len(stream.state().resampler.history) < 2000


def test_shorter_windows_answer_sooner(bidirectional, clip_wave):
    rule = WindowRule(1.0, 0.2)
    offline = bidirectional.encode(clip_wave, 16000)
    quick = streamed(bidirectional, clip_wave, 16000, [4000], rule)
    assert len(quick) == len(offline)
    assert np.array_equal(quick.starts, offline.starts)
    with bidirectional.stream(16000, window=rule) as stream, bidirectional.stream(16000) as slow:
        assert stream.latency_seconds < slow.latency_seconds
        waited = 0
        while not len(stream.push(clip_wave[waited : waited + 80])):
            waited += 80
        assert 0 <= stream.latency_seconds - waited / 16000 < 0.02


def test_state_can_be_saved_and_restored(tokenizer, bidirectional, clip_wave):
    for each in (tokenizer, bidirectional):
        wave = np.interp(np.arange(0, len(clip_wave), 0.5), np.arange(len(clip_wave)), clip_wave).astype(np.float32)
        whole = each.encode(wave, 32000)
        first = each.stream(32000)
        head = first.push(wave[:70_001])
        state = pickle.loads(pickle.dumps(first.state()))
        first.push(wave[:5000])  # going on does not touch the saved state
        second = each.stream(32000)
        second.restore(state)
        assert Units.concatenate([head, second.push(wave[70_001:]), second.flush()]) == whole
        with pytest.raises(AudioError, match="another sample rate, window or tokenizer"):
            each.stream(16000).restore(state)


def test_misuse_is_refused(tokenizer):
    with tokenizer.stream(16000) as stream:
        stream.push(np.zeros((500, 2), np.float32))
        with pytest.raises(AudioError, match="NaN"):
            stream.push(np.array([np.nan], np.float32))
        stream.flush()
        with pytest.raises(AudioError, match="flushed"):
            stream.push(np.zeros(5, np.float32))
        with pytest.raises(AudioError, match="flushed"):
            stream.flush()
    with pytest.raises(FormatError):
        Units.concatenate([])
