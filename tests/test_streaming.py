"""Streams one by one and together: latency, state, memory, misuse; equivalence/test_stream.py has their units."""

import pickle
import subprocess
import sys
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from speechtok.encoders.base import Encoder
from speechtok.errors import AudioError, FormatError, InputError
from speechtok.frames import WindowRule
from speechtok.units import Units


@pytest.fixture(params=["mfcc", "chunked", "bidirectional"])
def each(request):
    return request.getfixturevalue("tokenizer" if request.param == "mfcc" else request.param)


def tensors_of(value):
    """All arrays and tensors inside a state."""
    if isinstance(value, torch.Tensor | np.ndarray):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


def held(state) -> int:
    """Bytes of memory that a state keeps alive."""
    arrays = list(tensors_of(state))
    owners = [array if isinstance(array, torch.Tensor) or array.base is None else array.base for array in arrays]
    return sum(o.untyped_storage().nbytes() if isinstance(o, torch.Tensor) else o.nbytes for o in owners)


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


@pytest.mark.parametrize("rate", [16000, 44100])
def test_latency_of_chunks_is_what_is_stated(chunked, clip_wave, rate):
    """The slowest frame waits exactly so long: look-ahead, the rest of its chunk, and the reach of the resampler."""
    step, grid = rate // 1000, chunked.encoder.grid
    wave = np.interp(np.arange(2 * rate) / rate, np.arange(len(clip_wave)) / 16000, clip_wave).astype(np.float32)
    worst = 0.0
    with chunked.stream(rate) as stream:
        stated = stream.latency_seconds
        frame = 0
        for position in range(0, len(wave), step):
            for _ in range(len(stream.push(wave[position : position + step]))):
                worst = max(worst, (position + step) / rate - frame * grid.hop_seconds)
                frame += 1
    assert frame > 50
    assert stated <= worst <= stated + 2 * step / rate
    assert stated == pytest.approx((3 + 7) * 0.02 + 0.035 + (0 if rate == 16000 else 187 / 44100))


def test_every_chunk_is_computed_once(chunked, clip_wave, monkeypatch):
    """The left context comes from the state: the cost of a chunk does not depend on what was before."""
    widths = []
    kind = type(chunked.encoder)
    monkeypatch.setattr(kind, "rounding", 0.0)  # no near-ties: they are the only thing that is encoded again
    advance = kind.advance

    def counted(self, wave, lengths, positions, state):
        widths.append(wave.shape)
        return advance(self, wave, lengths, positions, state)

    monkeypatch.setattr(kind, "advance", counted)
    monkeypatch.setattr(kind, "encode", None)
    with chunked.stream(16000) as stream:
        count = sum(len(stream.push(clip_wave[at : at + 3000])) for at in range(0, len(clip_wave), 3000))
        count += len(stream.flush())
    chunks = -(-(count + 3) // 8)
    assert widths == [(1, 560 + 7 * 320)] * chunks


def test_a_chunk_of_many_streams_is_one_batch(chunked, clip_wave, monkeypatch):
    kind, sizes = type(chunked.encoder), []
    advance = kind.advance

    def counted(self, wave, lengths, positions, state):
        sizes.append(len(wave))
        return advance(self, wave, lengths, positions, state)

    monkeypatch.setattr(kind, "advance", counted)
    streams = chunked.streams()
    for name in range(5):
        streams.open(name)
    streams.push({name: clip_wave[: 560 + 320 * (8 * name + 7)] for name in range(5)})
    assert sizes == [5, 4, 3, 2, 1], "round by round, who has a chunk takes part"


def test_state_can_be_saved_and_restored(each, clip_wave):
    wave = np.interp(np.arange(0, len(clip_wave), 0.5), np.arange(len(clip_wave)), clip_wave).astype(np.float32)
    whole = each.encode(wave, 32000)
    first = each.stream(32000)
    head = first.push(wave[:70_001])
    state = pickle.loads(pickle.dumps(first.state()))
    first.push(wave[:5000])  # going on does not touch the saved state
    second = each.stream(32000)
    second.restore(state)
    assert Units.concatenate([head, second.push(wave[70_001:]), second.flush()]) == whole
    assert Units.concatenate([head, first.push(wave[:100])]) != whole
    third = each.stream(32000)
    third.restore(state)  # nor did the second stream
    assert Units.concatenate([head, third.push(wave[70_001:]), third.flush()]) == whole
    with pytest.raises(AudioError, match="another sample rate, window or tokenizer"):
        each.stream(16000).restore(state)
    streams = each.streams()
    streams.restore("again", state)
    assert Units.concatenate([head, streams.push({"again": wave[70_001:]})["again"], streams.flush()["again"]]) == whole


def test_state_goes_to_another_process(tmp_path, chunked, clip_wave):
    whole = chunked.encode(clip_wave, 16000)
    folder = chunked.save(tmp_path / "bundle")
    with chunked.stream(16000) as stream:
        head = stream.push(clip_wave[:41_000])
        torch.save(stream.state(), tmp_path / "state.pt")
    np.save(tmp_path / "rest.npy", clip_wave[41_000:])
    code = """
import sys, numpy, torch
from pathlib import Path
from speechtok.tokenizer import Tokenizer
folder = Path(sys.argv[1])
stream = Tokenizer.load(folder / "bundle").stream(16000)
stream.restore(torch.load(folder / "state.pt", weights_only=False))
parts = [stream.push(numpy.load(folder / "rest.npy")), stream.flush()]
numpy.save(folder / "ids.npy", numpy.concatenate([part.ids for part in parts]))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert folder.is_dir()
    assert np.array_equal(np.concatenate([head.ids, np.load(tmp_path / "ids.npy")]), whole.ids)


def test_states_of_other_streams_are_refused(tokenizer, chunked, bidirectional):
    state = chunked.stream(16000).state()
    for other in (tokenizer, bidirectional):
        with pytest.raises(AudioError, match="another sample rate, window or tokenizer"):
            other.stream(16000).restore(state)
        with pytest.raises(AudioError, match="another sample rate, window or tokenizer"):
            other.streams().restore("x", state)
    with pytest.raises(AudioError, match="another sample rate, window or tokenizer"):
        bidirectional.streams(window=WindowRule(1, 0.1)).restore("x", bidirectional.stream(16000).state())
    ended = chunked.stream(16000)
    ended.flush()
    with pytest.raises(AudioError, match="was flushed"):
        chunked.streams().restore("x", ended.state())


@pytest.mark.parametrize("which", ["tokenizer", "chunked"])
def test_a_push_that_fails_inside_ends_its_stream(request, monkeypatch, which, clip_wave):
    tokenizer = request.getfixturevalue(which)
    stream, streams = tokenizer.stream(16000), tokenizer.streams()
    streams.open("a")
    streams.open("b")

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for name in ("encode_windows", "encode_chunks"):
            patch.setattr(tokenizer, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.push(clip_wave)
        with pytest.raises(KeyboardInterrupt):
            streams.push({"a": clip_wave})
    with pytest.raises(AudioError, match="a push failed"):
        stream.push(clip_wave)
    assert streams.names == ["b"]
    assert len(streams.push({"b": clip_wave})["b"].ids)


@pytest.mark.parametrize(("which", "rate"), [("tokenizer", 48000), ("chunked", 16000)])
def test_state_does_not_grow(request, which, rate):
    """After one minute and after ten; the state is also what keeps memory alive."""
    each = request.getfixturevalue(which)
    noise = np.random.default_rng(0).standard_normal(rate * 5).astype(np.float32) * 0.1
    sizes = {}
    with each.stream(rate) as stream:
        for turn in range(1, 121):
            assert len(stream.push(noise)) > 200
            if turn in (12, 120):
                sizes[turn] = held(stream._state), len(pickle.dumps(stream.state()))
    context, grid = each.encoder.context, each.encoder.grid
    chunk = 4 * (context.chunk + 1) * grid.hop  # how much of the next chunk is there changes from push to push
    for early, late in zip(sizes[12], sizes[120], strict=True):
        assert abs(late - early) <= chunk + 64
    assert sizes[120][0] < 4 * grid.num_samples(context.left + 2 * context.chunk + context.right) + 150_000


@pytest.mark.slow
def test_two_hours(chunked):
    import psutil

    noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    with chunked.stream(16000) as stream:
        for second in range(7200):
            stream.push(noise)
            if second == 600:
                early = held(stream._state), psutil.Process().memory_info().rss
    assert held(stream._state) <= early[0] + 4 * 9 * 320
    assert psutil.Process().memory_info().rss < early[1] + 50_000_000


def test_streams_share_no_memory(chunked, clip_wave):
    """A stream that waits must not keep the batches alive that it was once part of."""
    streams = chunked.streams()
    for name in range(16):
        streams.open(name)
    streams.push(dict.fromkeys(range(16), clip_wave[:30_000]))
    alone = chunked.stream(16000)
    alone.push(clip_wave[:30_000])
    assert all(held(streams._states[name]) == held(alone._state) for name in range(16))


def test_streams_open_and_close_at_any_time(each, clip_wave):
    offline = each.encode(clip_wave, 16000)
    streams = each.streams()
    streams.open("a", 16000)
    parts = {"a": [streams.push({"a": clip_wave[:30_000]})["a"]], "b": []}
    streams.open("b")
    streams.open(("c", 1), 8000)
    assert streams.names == ["a", "b", ("c", 1)]
    given = streams.push({"b": clip_wave, ("c", 1): clip_wave[:5000]})
    assert list(given) == ["b", ("c", 1)]
    parts["b"].append(given["b"])
    streams.close(("c", 1))
    parts["a"].append(streams.push({"a": clip_wave[30_000:]})["a"])
    for name, units in streams.flush().items():
        parts[name].append(units)
    assert Units.concatenate(parts["a"]) == Units.concatenate(parts["b"]) == offline
    assert streams.names == []
    streams.open("a", 8000)  # a name is free again after the flush
    assert streams.latency_seconds("a") == each.stream(8000).latency_seconds
    assert len(streams.flush(["a"])["a"]) == 0
    assert streams.push({}) == streams.flush([]) == streams.flush() == {}


def test_misuse_is_refused(each):
    with each.stream(16000) as stream:
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


def test_misuse_of_many_streams_changes_none(each, clip_wave):
    streams = each.streams()
    streams.open("good", 16000)
    streams.open("bad", 16000)
    with pytest.raises(InputError, match="'good' is open already"):
        streams.open("good")
    with pytest.raises(AudioError, match="'bad' holds a NaN"):
        streams.push({"good": clip_wave[:9000], "bad": np.array([np.nan], np.float32)})
    for misuse in (
        lambda: streams.push({"good": clip_wave[:9000], "nobody": clip_wave}),
        lambda: streams.flush(["good", "nobody"]),
        lambda: streams.close("nobody"),
        lambda: streams.state("nobody"),
        lambda: streams.latency_seconds("nobody"),
    ):
        with pytest.raises(InputError, match="'nobody' is not open"):
            misuse()
    with pytest.raises(AudioError, match="sample rate"):
        streams.open("odd", 3)
    assert streams.names == ["good", "bad"]
    good = [streams.push({"good": clip_wave})["good"], streams.flush(["good"])["good"]]
    assert Units.concatenate(good) == each.encode(clip_wave, 16000)


def test_encoders_without_chunks_say_so(tokenizer, bidirectional):
    for each in (tokenizer, bidirectional):
        assert not each.encoder.chunked
        with pytest.raises(NotImplementedError, match="chunks"):
            each.encoder.stream_state(1)
        with pytest.raises(NotImplementedError, match="chunks"):
            Encoder.advance(each.encoder, None, None, None, None)
    with pytest.raises(InputError, match="no chunks"):
        bidirectional.encode_chunks([], [], None)
