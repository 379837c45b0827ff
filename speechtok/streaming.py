"""Streams: samples in as they come, `Units` out as soon as no later sample can change them."""

import copy
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from speechtok.audio.decode import as_mono
from speechtok.audio.resample import Resampler
from speechtok.errors import AudioError
from speechtok.frames import WindowRule
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units
from speechtok.windows import WindowBuffer

__all__ = ["Stream", "StreamState"]


@dataclass
class StreamState:
    """Everything a stream remembers; a value that can be copied, pickled and restored."""

    resampler: Resampler
    buffer: WindowBuffer
    fingerprint: str
    closed: bool = False


class Stream:
    """An open stream of units.

    Encoders of bounded context (``encoder.exact_stream``) give each unit as soon as its context has
    arrived, and the units of the offline pass. Bidirectional encoders follow the rule for long files: a sound
    of at most ``window.max_seconds`` is encoded when it ends, a longer one window by window.
    With the tokenizer's own rule the result is that of `Tokenizer.encode`; a shorter rule answers sooner and
    agrees only in part (``speechtok verify`` measures how much).

    Parameters
    ----------
    tokenizer : Tokenizer
    sample_rate : int
        Of the samples that will be pushed (Hz).
    window : WindowRule, optional
        Instead of the tokenizer's, for bidirectional encoders.

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
        encoder = tokenizer.encoder
        self._state = StreamState(
            Resampler(sample_rate, tokenizer.sample_rate),
            WindowBuffer(encoder.grid, window or tokenizer.window, encoder.context),
            tokenizer.fingerprint,
        )

    @property
    def latency_seconds(self) -> float:
        """Longest time from a sound to its units, without computing (a sound's end always releases them)."""
        grid, buffer = self.tokenizer.encoder.grid, self._state.buffer
        if buffer.context is not None:
            return grid.num_samples(buffer.context + 1) / grid.sample_rate
        # The first window waits until the sound is known to be longer than `max_seconds`, later ones for their context.
        later = grid.num_samples(buffer.rule.core(grid) + buffer.rule.context(grid) + 1)
        return max(later, buffer.rule.max_samples(grid) + 1) / grid.sample_rate

    def push(self, samples: Any) -> Units:
        """Take samples, float [n] or [n, C] in [-1, 1] or int16, and give the units that are ready (maybe none).

        Raises
        ------
        AudioError
            If samples are unusable or the stream was flushed; the stream is unchanged then.
        """
        if self._state.closed:
            raise AudioError("the stream was flushed; open a new one")
        return self._encode(self._state.resampler.push(as_mono(samples, "the pushed chunk")), final=False)

    def flush(self) -> Units:
        """End the sound and give the remaining units."""
        if self._state.closed:
            raise AudioError("the stream was flushed before; open a new one")
        self._state.closed = True
        return self._encode(self._state.resampler.flush(), final=True)

    def _encode(self, samples: Any, *, final: bool) -> Units:
        buffer = self._state.buffer
        first = buffer.frames
        windows = list(buffer.push(samples))
        if final:
            windows += list(buffer.flush())
        parts = []
        for window, wave in windows:
            encoded = self.tokenizer.encode_batch_of_windows([(window, wave)])[0]
            parts.append((window.first, encoded.ids))
        return self.tokenizer.assemble(parts, first)

    def state(self) -> StreamState:
        """A copy of the state, to go on later with `restore`."""
        return copy.deepcopy(self._state)

    def restore(self, state: StreamState) -> None:
        """Go on from a state of a stream with the same tokenizer and sample rate."""
        theirs = (state.resampler.source_rate, state.buffer.rule, state.fingerprint)
        if theirs != (self.sample_rate, self._state.buffer.rule, self.tokenizer.fingerprint):
            raise AudioError("the state belongs to a stream of another sample rate, window or tokenizer")
        self._state = copy.deepcopy(state)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state.closed = True
