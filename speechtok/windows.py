"""Cut a wave that arrives in pieces into the windows that are encoded one by one, and what comes of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError
from speechtok.frames import Context, FrameGrid, Window, WindowRule

__all__ = ["EncodedWindow", "WindowBuffer", "cut"]


@dataclass(frozen=True)
class EncodedWindow:
    """Result of one window; of segment tokenizers, the segments that are final with it.

    Parameters
    ----------
    first : int
        First of the kept frames, counted in its sound.
    count : int
        Kept frames.
    ids : int32 [K, count]
        Ids of the kept frames; of segment tokenizers ``[1, S]``.
    ties : int
        Kept frames that were near-ties and were decided on the canonical path; of segment tokenizers 1 where a decision
        of the window was a near-tie, so that all of it was computed on the canonical path.
    spans : int64 [S, 2] or None
        Of segment tokenizers: first frame and end of each segment, counted in its sound.
    error : InputError or None
        Why the sound has no units: it cannot be cut into segments.
    stop : int or None
        Samples of the sound up to the end of this window, where a last frame may be partial.
    """

    first: int
    count: int
    ids: NDArray[np.int32]
    ties: int
    spans: NDArray[np.int64] | None = None
    error: InputError | None = None
    stop: int | None = None


def cut(
    blocks: Iterable[NDArray[np.float32]], grid: FrameGrid, rule: WindowRule, context: Context | None = None
) -> Iterator[tuple[Window, NDArray[np.float32]]]:
    """Cut a whole wave, given as float32 [n] blocks at the grid's rate, into windows with their samples."""
    buffer = WindowBuffer(grid, rule, context)
    for block in blocks:
        yield from buffer.push(block)
    yield from buffer.flush()


@dataclass
class WindowBuffer:
    """Holds just the samples that coming windows still need.

    Parameters
    ----------
    grid : FrameGrid
    rule : WindowRule
        The longest window, and how longer sounds are cut.
    context : Context, optional
        Of encoders whose context is bounded: windows hold all that their frames depend on.
        None: windows lie on the fixed grid of `rule`.
    eager : bool
        With `context` only: give frames as soon as their context is there, without waiting for full windows.
    chunks : int, optional
        With `context` only: chunks of a window, instead of as many as `rule` allows.

    Notes
    -----
    The fields ``samples``, ``start``, ``emitted`` (windows, or with `context` chunks) and ``frames`` are the whole
    state.
    """

    grid: FrameGrid
    rule: WindowRule
    context: Context | None = None
    eager: bool = False
    chunks: int | None = None
    samples: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    start: int = 0
    emitted: int = 0
    frames: int = 0

    @property
    def total(self) -> int:
        """Samples taken so far."""
        return self.start + len(self.samples)

    def push(self, samples: NDArray[np.float32]) -> Iterator[tuple[Window, NDArray[np.float32]]]:
        """Take float32 [n] samples; give the windows that are complete, with their samples."""
        self.samples = np.concatenate((self.samples, samples))
        return self._take(final=False)

    def flush(self) -> Iterator[tuple[Window, NDArray[np.float32]]]:
        """Give the remaining windows; the wave ends here."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> Iterator[tuple[Window, NDArray[np.float32]]]:
        context = self.context
        if context is None:
            for window in self.rule.windows(self.grid, self.total, emitted=self.emitted, final=final):
                yield self._piece(window)
                self.emitted += 1
            keep = self.frames - self.rule.context(self.grid) if self.frames else 0
        elif not self.eager and self.total <= self.rule.max_samples(self.grid):
            if final and self.emitted == 0:
                yield self._piece(Window(0, None, 0, 0, self.grid.num_frames(self.total)))
            return
        else:
            most = self.chunks or self.rule.core(self.grid, context) // context.chunk
            frames = self.grid.num_frames(self.total) if final else self.grid.whole_frames(self.total)
            ready = context.ready(frames, final=final)
            while self.emitted < ready:
                end = min(ready, self.emitted + most)
                if end < self.emitted + most and not (final or self.eager):
                    break
                yield self._piece(context.window(self.grid, frames, self.emitted, end))
                self.emitted = end
            keep = self.emitted * context.chunk - context.left
        keep = max(0, keep) * self.grid.hop
        if keep > self.start:
            self.samples = self.samples[keep - self.start :].copy()
            self.start = keep

    def _piece(self, window: Window) -> tuple[Window, NDArray[np.float32]]:
        self.frames = window.first + window.count
        stop = self.total if window.stop is None else window.stop
        return window, self.samples[window.start - self.start : stop - self.start].copy()
