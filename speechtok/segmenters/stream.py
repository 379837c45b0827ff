"""Greedy segmentation of frames that come in pieces."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError
from speechtok.kernels import segment_cpu, segment_ties
from speechtok.kernels.segment import CountMode
from speechtok.segmenters.inputs import check_greedy, frames_array

__all__ = ["GreedyStream"]


class GreedyStream:
    """An open stream of frames; gives the segments of `greedy_segment` over all of them, whatever the pieces.

    **When a segment comes.** Segments that touch form a run; a run ends with a silent frame or with the stream. A
    segment is given with the frame that ends its right neighbour (the first frame outside it), or, if it is the last of
    its run, with the silent frame behind it. In the second pass of the algorithm a joint reads the two segments beside
    it, the left one as earlier joints of the run left it and the right one as the first pass made it, and nothing else;
    the first pass never looks ahead or back. When the right one has ended, both are known, and the joint is settled
    for good: the left segment is either final, or it is merged and becomes part of the right one, which then waits for
    its own right neighbour. A silent frame ends a run, and no joint lies across it, so nothing beyond it has a say.

    **No number of frames bounds the wait.** A right neighbour may last as long as its sound, and merging repeats. Nor
    can a segment be given earlier: while its right neighbour is open, and for ``-1 < merge_threshold < 1`` and d >= 2,
    a few loud frames, each within the allowed angle of the running centre, can still turn the neighbour's mean towards
    that of the waiting segment, which merges the two, while silence would leave them apart. A bound of a fixed number
    of frames would need another algorithm, whose boundaries are not those of the offline pass.

    **What is kept.** Frames from the start of the earliest segment that is not final, and five vectors. Streams can be
    copied (``copy.deepcopy``) and pickled.

    Parameters
    ----------
    norm_threshold, merge_threshold, count_mode
        As in `greedy_segment`.
    empty : bool
        Whether to give segments of length zero, which "package" may have.

    Raises
    ------
    InputError
        If a threshold is NaN or the mode is unknown.

    Examples
    --------
    ::

        stream = GreedyStream()
        for piece in pieces:  # float32 [n, d]
            print(stream.push(piece))
        print(stream.flush())
    """

    def __init__(
        self,
        norm_threshold: float = 2.6,
        merge_threshold: float = 0.8,
        count_mode: CountMode = "package",
        *,
        empty: bool = True,
    ) -> None:
        check_greedy(norm_threshold, merge_threshold, count_mode)
        self.empty = empty
        self.norm_threshold, self.merge_threshold, self.count_mode = norm_threshold, merge_threshold, count_mode
        self._marks = segment_cpu.new_marks()
        self._vectors: NDArray[np.float32] | None = None
        # Frames and squared norms from frame `_base` on; the arrays have room for more.
        self._frames, self._squares = np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
        self._base = self._held = 0
        self._closed = False

    @property
    def frames(self) -> int:
        """Number of frames that were pushed so far."""
        return self._base + self._held

    @property
    def settled(self) -> int:
        """Frame at which, or behind which, every segment that is still to come begins."""
        return segment_cpu.settled(self._marks)

    def push(self, frames: Any) -> NDArray[np.int64]:
        """Take frames and give the segments that are final with them.

        Parameters
        ----------
        frames : float32 [n, d], array or tensor
            The next frames; d as before.

        Returns
        -------
        int64 [S, 2]
            First frame and end of each segment, counted from the first frame of the stream. Maybe none.

        Raises
        ------
        InputError
            If frames are not float32 [n, d], one of them is not finite, or the stream has ended. The stream is
            unchanged then.
        """
        if self._closed:
            raise InputError("the stream has ended (it was flushed); open a new one")
        array = frames_array(frames)
        if self._vectors is None:
            self._vectors = np.zeros((segment_cpu.VECTORS, array.shape[1]), np.float32)
            self._frames = np.zeros((0, array.shape[1]), np.float32)
        if array.shape[1] != self._vectors.shape[1]:
            raise InputError(f"frames have {array.shape[1]} values, those before had {self._vectors.shape[1]}")
        self._hold(array)
        return self._scan(len(array), final=False)

    def flush(self) -> NDArray[np.int64]:
        """End the stream and give the remaining segments, int64 [S, 2]; InputError if it has ended before."""
        if self._closed:
            raise InputError("the stream has ended before (it was flushed); open a new one")
        self._closed = True
        return self._scan(0, final=True) if self._vectors is not None else np.zeros((0, 2), np.int64)

    def _hold(self, frames: NDArray[np.float32]) -> None:
        """Put frames behind those that are held; drop what is settled when room is needed."""
        needed = self._held + len(frames)
        if needed > len(self._frames):
            keep = self.settled - self._base
            live = self._held - keep
            # Doubling makes the copies cheap in sum, however small the pieces are.
            room = max(2 * (live + len(frames)), 64)
            held, squares = np.empty((room, frames.shape[1]), np.float32), np.empty(room, np.float32)
            held[:live], squares[:live] = self._frames[keep : self._held], self._squares[keep : self._held]
            self._frames, self._squares = held, squares
            self._base, self._held = self._base + keep, live
        self._frames[self._held : self._held + len(frames)] = frames
        self._held += len(frames)

    def _scan(self, added: int, *, final: bool) -> NDArray[np.int64]:
        assert self._vectors is not None  # noqa: S101 - for the type checker
        before = self._marks.copy(), self._vectors.copy()
        spans = np.empty((added + 2, 2), np.int64)
        bounds, pairs, half = segment_cpu.tree(self._vectors.shape[1])
        found = segment_cpu.scan(
            self._frames[: self._held], self._base, final, self._squares, self._marks, self._vectors,
            bounds, pairs, half, np.float32(self.norm_threshold), np.float32(self.merge_threshold),
            self.count_mode == "reset", segment_ties.margins_for(0.0, bounds, pairs), spans,
        )  # fmt: skip
        if found < 0:
            self._marks, self._vectors = before
            self._held -= added
            raise InputError(f"frame {-1 - found} of the stream {segment_cpu.NOT_FINITE}")
        spans = spans[:found].copy()
        return spans if self.empty else spans[spans[:, 0] < spans[:, 1]]
