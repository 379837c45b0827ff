"""Short gaps between segments, closed: neighbours meet in the middle."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechtok.segmenters.base import SegmentStream

__all__ = ["ClosingStream", "close_gaps"]


def close_gaps(spans: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Let segments that are at most `longest` frames apart meet in the middle of the gap; of odd ones, before it.

    Parameters
    ----------
    spans : int64 [S, 2]
        First frame and end (exclusive) of each segment, in order.
    longest : int

    Returns
    -------
    int64 [S, 2]
    """
    closed = spans.copy()
    gaps = spans[1:, 0] - spans[:-1, 1]
    near = gaps <= longest
    middle = spans[:-1, 1] + gaps // 2
    closed[:-1, 1] = np.where(near, middle, spans[:-1, 1])
    closed[1:, 0] = np.where(near, middle, spans[1:, 0])
    return closed


class ClosingStream:
    """`close_gaps` over the segments of a stream: each waits until the next one begins or can no longer be near.

    Parameters
    ----------
    stream : SegmentStream
        Whose segments they are.
    longest : int
        Gap (frames) up to which neighbours meet.
    """

    def __init__(self, stream: SegmentStream, longest: int) -> None:
        self._stream, self._longest = stream, longest
        self._waiting: NDArray[np.int64] | None = None  # its start is final, its end is not
        self._closed = False

    @property
    def frames(self) -> int:
        """Number of frames that were pushed so far."""
        return self._stream.frames

    @property
    def settled(self) -> int:
        """Frame at which, or behind which, every segment that is still to come begins."""
        return self._stream.settled if self._waiting is None else int(self._waiting[0])

    def push(self, frames: Any) -> NDArray[np.int64]:
        """Take float32 [n, D] frames; give the segments that are final with them, int64 [S, 2]. Raises as it."""
        return self._given(self._stream.push(frames))

    def flush(self) -> NDArray[np.int64]:
        """End the stream; give the remaining segments, int64 [S, 2]. Raises as the stream."""
        spans = self._stream.flush()
        self._closed = True
        return self._given(spans)

    def _given(self, spans: NDArray[np.int64]) -> NDArray[np.int64]:
        known = spans if self._waiting is None else np.concatenate([self._waiting[None], spans])
        known = close_gaps(known, self._longest)
        if len(known) and not self._closed and self._stream.settled - known[-1, 1] <= self._longest:
            self._waiting, known = known[-1].copy(), known[:-1]
        else:
            self._waiting = None
        return known
