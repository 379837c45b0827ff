"""Cut a wave that arrives in pieces into the windows that are encoded one by one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from speechtok.frames import FrameGrid, Window, WindowRule

__all__ = ["WindowBuffer", "cut"]


def cut(
    blocks: Iterable[NDArray[np.float32]], grid: FrameGrid, rule: WindowRule
) -> Iterator[tuple[Window, NDArray[np.float32]]]:
    """Cut a whole wave, given as float32 [n] blocks at the grid's rate, into windows with their samples."""
    buffer = WindowBuffer(grid, rule)
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
        The fixed grid of windows (see `WindowRule`).
    context : int, optional
        If given, `rule` is not used: every frame is handed out as soon as `context` frames follow it.
        Right for encoders whose frames depend on no more than that.

    Notes
    -----
    The fields ``samples``, ``start``, ``emitted`` and ``frames`` are the whole state.
    """

    grid: FrameGrid
    rule: WindowRule
    context: int | None = None
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
        if self.context is None:
            windows = list(self.rule.windows(self.grid, self.total, emitted=self.emitted, final=final))
            context = self.rule.context(self.grid)
        else:
            windows = list(self._ready(self.context, final))
            context = self.context
        for window in windows:
            stop = self.total if window.stop is None else window.stop
            yield window, self.samples[window.start - self.start : stop - self.start].copy()
            self.emitted += 1
            self.frames = window.first + window.count
        if self.frames:
            keep = max(0, self.frames - context) * self.grid.hop
            if keep > self.start:
                self.samples = self.samples[keep - self.start :].copy()
                self.start = keep

    def _ready(self, context: int, final: bool) -> Iterator[Window]:
        total = self.grid.num_frames(self.total)
        last = total if final else total - context
        if last > self.frames:
            begin = max(0, self.frames - context)
            stop = begin * self.grid.hop + self.grid.num_samples(total - begin)
            yield Window(begin * self.grid.hop, stop, self.frames, self.frames - begin, last - self.frames)
