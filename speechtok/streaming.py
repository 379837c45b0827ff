"""Streams: samples in as they come, `Units` out as soon as no later sample can change them.

One stream or many that are at different places: `_encode` computes what is ready in all of them together. Encoders in
chunks go on from their state, chunk by chunk; the others encode windows that hold all that the new frames depend on.
Segment tokenizers and recurrent encoders compute one stream after the other, on the canonical path.
The way back, units in and samples out, is `speechtok.decoding.DecoderStream`.
"""

import copy
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.decode import as_mono
from speechtok.audio.resample import Resampler
from speechtok.encoders.base import ChunkState
from speechtok.errors import AudioError, InputError
from speechtok.frame_units import encoded_in_order
from speechtok.frames import Window, WindowRule
from speechtok.segments import SegmentPass, cut_sound
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units
from speechtok.windows import EncodedWindow, WindowBuffer

__all__ = ["Stream", "StreamState", "Streams"]

_BATCH_SECONDS = 60.0  # windows of this much padded audio are encoded together

Queue = Iterator[tuple[Window, NDArray[np.float32]]]


@dataclass
class StreamState:
    """Everything a stream remembers; a value that can be copied, pickled and restored.

    Parameters
    ----------
    resampler : Resampler
        From the stream's rate to the tokenizer's.
    buffer : WindowBuffer
        The samples that are still needed.
    encoder : ChunkState or None
        Of encoders in chunks, one row (segment tokenizers keep it in `segments`).
    segments : SegmentPass or None
        Of segment tokenizers: the frames of segments that are still to come, and what decides them.
    fingerprint : str
        Of the tokenizer.
    ties : int
        Near-ties that were decided.
    closed : bool
        Whether the sound has ended.
    """

    resampler: Resampler
    buffer: WindowBuffer
    encoder: ChunkState | None
    segments: SegmentPass | None
    fingerprint: str
    ties: int = 0
    closed: bool = False

    @staticmethod
    def new(tokenizer: Tokenizer, sample_rate: int, window: WindowRule | None = None) -> "StreamState":
        """State before the first sample; `window` instead of the tokenizer's rule (bidirectional encoders only)."""
        encoder, by_frames = tokenizer.encoder, tokenizer.segmenter is None
        buffer = WindowBuffer(
            encoder.grid,
            tokenizer.window if window is None or encoder.exact_stream else window,
            tokenizer.context,
            eager=encoder.exact_stream,
            chunks=None if by_frames and not encoder.chunked else 1,
        )
        return StreamState(
            Resampler(sample_rate, tokenizer.sample_rate),
            buffer,
            encoder.stream_state(1) if by_frames and encoder.chunked else None,
            None if by_frames else SegmentPass.new(tokenizer),
            tokenizer.fingerprint,
        )

    @property
    def latency_seconds(self) -> float:
        """See `Stream.latency_seconds`."""
        grid, rule, context = self.buffer.grid, self.buffer.rule, self.buffer.context
        if context is not None:
            samples = grid.num_samples(context.most_ahead + 1)
        else:
            # The first window waits until the sound is known to be longer than `max_seconds`, later ones for context.
            samples = max(grid.num_samples(rule.core(grid) + rule.context(grid) + 1), rule.max_samples(grid) + 1)
        return samples / grid.sample_rate + self.resampler.latency_seconds

    def copy(self, device: torch.device) -> "StreamState":
        """A copy that shares nothing with this one, its tensors on `device`."""
        encoder = None if self.encoder is None else self.encoder.to(device)
        segments = None if self.segments is None else self.segments.to(device)
        return copy.deepcopy(replace(self, encoder=encoder, segments=segments))

    def check(self, other: "StreamState") -> None:
        """Refuse the state of a stream of another kind.

        Raises
        ------
        AudioError
        """
        ours, theirs = ((state.resampler.source_rate, state.buffer.rule, state.fingerprint) for state in (self, other))
        if ours != theirs:
            raise AudioError("the state belongs to a stream of another sample rate, window or tokenizer")


def _encode(
    tokenizer: Tokenizer, states: Sequence[StreamState], waves: Sequence[NDArray[np.float32]] | None
) -> list[Units]:
    """Units of all frames that are ready in every stream after its next samples, float32 [n]; None: the sounds end.

    Whatever ends it early (memory, Ctrl-C) leaves the streams between two states: they are closed then.
    """
    try:
        return _encode_ready(tokenizer, states, waves)
    except BaseException:
        for state in states:
            state.closed = True
        raise


def _encode_ready(
    tokenizer: Tokenizer, states: Sequence[StreamState], waves: Sequence[NDArray[np.float32]] | None
) -> list[Units]:
    firsts = [state.buffer.frames for state in states]
    queues: list[Queue] = []
    for i, state in enumerate(states):
        samples = state.resampler.flush() if waves is None else state.resampler.push(waves[i])
        windows = state.buffer.push(samples)
        queues.append(windows if waves is not None else state.buffer.flush())
    if tokenizer.segmenter is not None:
        parts = [
            list(_encode_segments(tokenizer, state, queue, final=waves is None))
            for state, queue in zip(states, queues, strict=True)
        ]
    elif tokenizer.encoder.recurrent:
        parts = [list(_encode_in_order(tokenizer, *pair)) for pair in zip(states, queues, strict=True)]
    elif tokenizer.encoder.chunked:
        parts = _encode_chunks(tokenizer, states, queues)
    else:
        parts = [[] for _ in states]
        jobs = ((i, window, wave) for i, queue in enumerate(queues) for window, wave in queue)
        for i, encoded in tokenizer.encode_windows(jobs, _BATCH_SECONDS):
            states[i].ties += encoded.ties
            parts[i].append(encoded)
    return [tokenizer.assemble(part, first) for part, first in zip(parts, firsts, strict=True)]


def _encode_segments(tokenizer: Tokenizer, state: StreamState, queue: Queue, *, final: bool) -> Iterator[EncodedWindow]:
    sound = state.segments
    assert sound is not None  # noqa: S101 - for the type checker
    for window, wave in queue:
        yield cut_sound(window.first, window.count, partial(sound.push, tokenizer, window, wave))
    if final:
        yield cut_sound(state.buffer.frames, 0, partial(sound.flush, tokenizer))


def _encode_in_order(tokenizer: Tokenizer, state: StreamState, queue: Queue) -> Iterator[EncodedWindow]:
    for window, wave in queue:
        assert state.encoder is not None  # noqa: S101 - for the type checker
        encoded, state.encoder = encoded_in_order(tokenizer, window, wave, state.encoder)
        yield encoded


def _encode_chunks(
    tokenizer: Tokenizer, states: Sequence[StreamState], queues: Sequence[Queue]
) -> list[list[EncodedWindow]]:
    """Rounds: each takes one chunk of every stream that has one."""
    parts: list[list[EncodedWindow]] = [[] for _ in states]
    while ready := [(i, piece) for i, queue in enumerate(queues) if (piece := next(queue, None)) is not None]:
        turn = [states[i] for i, _ in ready]
        before = [state.encoder for state in turn if state.encoder is not None]
        frames = [state.buffer.grid.num_frames(state.buffer.total) for state in turn]
        encoded, after = tokenizer.encode_chunks([piece for _, piece in ready], frames, before[0].join(before))
        for (i, _), state, result, row in zip(ready, turn, encoded, after.rows(), strict=True):
            state.encoder, state.ties = row, state.ties + result.ties
            parts[i].append(result)
    return parts


class Stream:
    """An open stream of units.

    Encoders of bounded context (``encoder.exact_stream``) give each unit as soon as its context has
    arrived, and the units of the offline pass, whatever the chunks. Bidirectional encoders follow the rule for long
    files: a sound of at most ``window.max_seconds`` is encoded when it ends, a longer one window by window.
    With the tokenizer's own rule the result is that of `Tokenizer.encode`; a shorter rule answers sooner and
    agrees only in part (``speechtok verify`` measures how much). A segment comes as soon as its segmenter knows that
    no later frame can change it: with `Greedy` a while after its end, with the others when the sound ends.

    Parameters
    ----------
    tokenizer : Tokenizer
    sample_rate : int
        Of the samples that will be pushed (Hz).
    window : WindowRule, optional
        Instead of the tokenizer's, for bidirectional encoders.

    Raises
    ------
    AudioError
        If the sample rate is unusable.

    Examples
    --------
    ::

        with tokenizer.stream(sample_rate=48_000) as stream:
            for chunk in microphone:
                print(stream.push(chunk))
            print(stream.flush())
    """

    def __init__(self, tokenizer: Tokenizer, sample_rate: int, *, window: WindowRule | None = None):
        self.tokenizer = tokenizer
        self.sample_rate = sample_rate
        self._state = StreamState.new(tokenizer, sample_rate, window)

    @property
    def latency_seconds(self) -> float:
        """Longest time from the start of a sound to its units, without computing (a sound's end always releases them).

        For encoders of bounded context: the samples that the slowest frame reads, and the reach of the resampler.
        Of segment tokenizers it is the latency of the frames; how long a segment waits depends on the sound.
        """
        return self._state.latency_seconds

    @property
    def ties(self) -> int:
        """Near-ties that were decided so far; of segments none, because all is computed on the canonical path."""
        return self._state.ties

    def push(self, samples: Any) -> Units:
        """Take samples, float [n] or [n, C] in [-1, 1] or int16, and give the units that are ready (maybe none).

        Raises
        ------
        AudioError
            If samples are unusable or the stream has ended; the stream is unchanged then. Any other failure ends it.
        """
        if self._state.closed:
            raise AudioError("the stream has ended (it was flushed, or a push failed); open a new one")
        return _encode(self.tokenizer, [self._state], [as_mono(samples, "the pushed chunk")])[0]

    def flush(self) -> Units:
        """End the sound and give the remaining units.

        Raises
        ------
        AudioError
            If the stream has ended before.
        """
        if self._state.closed:
            raise AudioError("the stream has ended before (it was flushed, or a push failed); open a new one")
        self._state.closed = True
        return _encode(self.tokenizer, [self._state], None)[0]

    def state(self) -> StreamState:
        """A copy of the state, to go on later with `restore`, also in another process."""
        return self._state.copy(torch.device("cpu"))

    def restore(self, state: StreamState) -> None:
        """Go on from a state of a stream with the same tokenizer and sample rate.

        Raises
        ------
        AudioError
            If the state belongs to another kind of stream.
        """
        self._state.check(state)
        self._state = state.copy(self.tokenizer.device)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state.closed = True


class Streams:
    """Many open streams that are encoded together; each gives the units that it would give alone.

    Streams are opened and closed at any time, may have different sample rates and be at different places. Any hashable
    value is a name.

    Parameters
    ----------
    tokenizer : Tokenizer
    window : WindowRule, optional
        Instead of the tokenizer's, for bidirectional encoders.

    Attributes
    ----------
    ties : int
        Near-ties that were decided so far, in all streams.

    Examples
    --------
    ::

        streams = tokenizer.streams()
        streams.open("anna", sample_rate=48_000)
        streams.open("ben", sample_rate=8_000)
        units = streams.push({"anna": chunk, "ben": other})
        rest = streams.flush(["ben"])
    """

    def __init__(self, tokenizer: Tokenizer, *, window: WindowRule | None = None):
        self.tokenizer, self.window, self.ties = tokenizer, window, 0
        self._states: dict[Any, StreamState] = {}

    @property
    def names(self) -> list[Any]:
        """Names of the open streams, in the order of their opening."""
        return list(self._states)

    def open(self, name: Hashable, sample_rate: int | None = None) -> None:
        """Open a stream for samples at `sample_rate` (Hz; the tokenizer's where it is None).

        Raises
        ------
        InputError
            If a stream of that name is open.
        AudioError
            If the sample rate is unusable.
        """
        if name in self._states:
            raise InputError(f"stream {name!r} is open already; close it or choose another name")
        rate = self.tokenizer.sample_rate if sample_rate is None else sample_rate
        self._states[name] = StreamState.new(self.tokenizer, rate, self.window)

    def close(self, name: Hashable) -> None:
        """Forget a stream without its remaining units; InputError if it is not open."""
        self._open([name])
        del self._states[name]

    def latency_seconds(self, name: Hashable) -> float:
        """See `Stream.latency_seconds`; InputError if the stream is not open."""
        return self._open([name])[0].latency_seconds

    def push(self, samples: Mapping[Any, Any]) -> dict[Any, Units]:
        """Take samples of some streams and give the units of each that are ready.

        Parameters
        ----------
        samples : mapping of name to float [n] or [n, C] in [-1, 1] or int16
            Streams that are not named wait.

        Returns
        -------
        dict of name to Units
            Of the named streams.

        Raises
        ------
        InputError
            If a stream is not open; all streams are unchanged then.
        AudioError
            If samples are unusable; all streams are unchanged then. Any other failure closes the named streams.
        """
        states = self._open(samples)
        waves = [as_mono(wave, f"the chunk pushed to stream {name!r}") for name, wave in samples.items()]
        return dict(zip(samples, self._encode(states, waves), strict=True))

    def flush(self, names: Iterable[Any] | None = None) -> dict[Any, Units]:
        """End some sounds (all where it is None), give their remaining units and close their streams.

        Raises
        ------
        InputError
            If a stream is not open; all streams are unchanged then.
        """
        chosen = list(dict.fromkeys(self._states if names is None else names))
        states = self._open(chosen)
        for name in chosen:
            del self._states[name]
        return dict(zip(chosen, self._encode(states, None), strict=True))

    def state(self, name: Hashable) -> StreamState:
        """A copy of a stream's state, for `restore` here or for `Stream.restore`; InputError if it is not open."""
        return self._open([name])[0].copy(torch.device("cpu"))

    def restore(self, name: Hashable, state: StreamState) -> None:
        """Open a stream, or set an open one back, from a state of a stream with the same tokenizer.

        Raises
        ------
        AudioError
            If the state belongs to another kind of stream.
        """
        StreamState.new(self.tokenizer, state.resampler.source_rate, self.window).check(state)
        if state.closed:
            raise AudioError("the state belongs to a stream that was flushed; there is nothing to go on with")
        self._states[name] = state.copy(self.tokenizer.device)

    def _open(self, names: Iterable[Any]) -> list[StreamState]:
        names = list(names)
        missing = [name for name in names if name not in self._states]
        if missing:
            raise InputError(f"stream {missing[0]!r} is not open; open it before")
        return [self._states[name] for name in names]

    def _encode(self, states: list[StreamState], waves: list[NDArray[np.float32]] | None) -> list[Units]:
        before = sum(state.ties for state in states)
        try:
            units = _encode(self.tokenizer, states, waves)
        finally:  # what failed is not open any more
            self._states = {name: state for name, state in self._states.items() if not state.closed}
        self.ties += sum(state.ties for state in states) - before
        return units
