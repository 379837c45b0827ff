"""Polyphase windowed-sinc resampling whose output does not depend on how the input is cut.

Each output sample is one dot product of a fixed length over the input, so any chunking gives the
same bits, and the whole state is a short history and a counter. The filter is the Kaiser-windowed
sinc of "kaiser_best" (64 zero crossings, roll-off 0.9476, beta 14.77; Smith, Digital Audio
Resampling), the one torchaudio and librosa's resampy use under that name.
"""

import math
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from speechtok.errors import AudioError

__all__ = ["MAX_RATE", "MIN_RATE", "Resampler", "resample"]

MIN_RATE, MAX_RATE = 1_000, 768_000
_ZERO_CROSSINGS, _ROLLOFF, _BETA = 64, 0.9475937167399596, 14.769656459379492


# Rates without a small ratio need one row of taps per output phase; 32 million taps are 128 MB.
_MAX_TAPS, _ROWS = 1 << 25, 256
_building = threading.Lock()


@lru_cache(maxsize=4)
def _filters(up: int, down: int) -> NDArray[np.float32]:
    """Filter bank [up, 2 * half]: row r holds the taps for an output that lies r / up after an input sample."""
    scale = min(1.0, up / down) * _ROLLOFF
    half = math.ceil(_ZERO_CROSSINGS / scale)
    bank = np.empty((up, 2 * half), np.float32)
    for begin in range(0, up, _ROWS):  # in blocks: the float64 temporaries stay small
        phase = np.arange(begin, min(up, begin + _ROWS))[:, None] / up
        t = np.clip((np.arange(1 - half, half + 1) - phase) * scale, -_ZERO_CROSSINGS, _ZERO_CROSSINGS)
        window = np.i0(_BETA * np.sqrt(1 - (t / _ZERO_CROSSINGS) ** 2)) / np.i0(_BETA)
        bank[begin : begin + _ROWS] = np.sinc(t) * window * scale
    return bank


# "reassoc" lets the dot product use vector registers; its order is fixed at compile time, so it is the same for every
# chunking. No "nnan"/"ninf": non-finite samples are refused before, but must not be undefined behaviour here.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _convolve(x, base, filters, first, up, down, out):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    taps = filters.shape[1]
    half = taps // 2
    for index in range(len(out)):
        time = (first + index) * down
        nearest = time // up
        row = filters[time - nearest * up]
        begin = nearest - half + 1 - base
        total = np.float32(0)
        for tap in range(taps):
            total += row[tap] * x[begin + tap]
        out[index] = total


@dataclass
class Resampler:
    """Streaming rate conversion of a mono signal.

    Parameters
    ----------
    source_rate, target_rate : int
        Rates in Hz, between `MIN_RATE` and `MAX_RATE`; any, where both are equal and samples pass as they are.

    Notes
    -----
    The fields ``history``, ``consumed`` and ``produced`` are the whole state; copy them to save a stream.
    N samples in give ``ceil(N * target_rate / source_rate)`` out.
    """

    source_rate: int
    target_rate: int
    history: NDArray[np.float32] = field(init=False)
    consumed: int = field(default=0, init=False)
    produced: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for rate in (self.source_rate, self.target_rate):
            if not isinstance(rate, int | np.integer):
                raise AudioError(f"sample rate {rate!r} is not a whole number of Hz")
            if rate < 1 or (self.source_rate != self.target_rate and not MIN_RATE <= rate <= MAX_RATE):
                raise AudioError(
                    f"sample rate {rate} Hz is outside {MIN_RATE} ... {MAX_RATE} Hz; the header may be damaged"
                )
        common = math.gcd(self.source_rate, self.target_rate)
        self._up, self._down = self.target_rate // common, self.source_rate // common
        self._filters = None
        if self._up != self._down:
            if 2 * _ZERO_CROSSINGS * max(self._up, self._down) > _MAX_TAPS:
                raise AudioError(
                    f"{self.source_rate} Hz cannot be converted to {self.target_rate} Hz: the rates have no small "
                    "common ratio; resample the sound first"
                )
            with _building:  # several threads may meet a new rate at once
                self._filters = _filters(self._up, self._down)
        self._half = 0 if self._filters is None else self._filters.shape[1] // 2
        # Silence before the start; the history always begins at input index `consumed - len(history)`.
        self.history = np.zeros(max(0, self._half - 1), np.float32)

    @property
    def latency_seconds(self) -> float:
        """Time by which the samples given so far may lag behind those taken."""
        return self._half / self.source_rate

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_filters"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The filters follow from the rates: a saved state need not carry them, and copies share them.
        self.__init__(state["source_rate"], state["target_rate"])  # type: ignore[misc]
        self.__dict__.update(state)

    def push(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take float32 [n] samples, give those output samples that no later input can change."""
        if self._filters is None:
            self.consumed += len(samples)
            return samples
        self.history = np.concatenate((self.history, samples))
        self.consumed += len(samples)
        # Output n reads input up to floor(n * down / up) + half.
        ready = -(-max(0, self.consumed - self._half) * self._up // self._down)
        return self._emit(ready)

    def flush(self) -> NDArray[np.float32]:
        """Give the rest, as if silence followed."""
        if self._filters is None:
            return np.zeros(0, np.float32)
        total = -(-self.consumed * self._up // self._down)
        self.history = np.concatenate((self.history, np.zeros(self._half + 1, np.float32)))
        self.consumed += self._half + 1
        return self._emit(total)

    def _emit(self, end: int) -> NDArray[np.float32]:
        assert self._filters is not None  # noqa: S101 - callers checked
        out = np.empty(max(0, end - self.produced), np.float32)
        base = self.consumed - len(self.history)
        if len(out):
            _convolve(self.history, base, self._filters, self.produced, self._up, self._down, out)
            self.produced = end
        keep = self.produced * self._down // self._up - self._half + 1 - base
        if keep > 0:
            self.history = self.history[keep:].copy()
        return out


def resample(samples: NDArray[np.float32], source_rate: int, target_rate: int) -> NDArray[np.float32]:
    """Convert a whole float32 [N] signal to float32 [ceil(N * target_rate / source_rate)]."""
    resampler = Resampler(source_rate, target_rate)
    return np.concatenate((resampler.push(np.asarray(samples, np.float32)), resampler.flush()))
