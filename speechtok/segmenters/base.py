"""The interface of all segmenters: frames in, segments out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import FormatError, InputError
from speechtok.segmenters.inputs import frames_array

__all__ = ["SegmentStream", "Segmenter", "WholeStream", "build"]


class SegmentStream(Protocol):
    """An open stream of frames; gives the segments of `Segmenter.segment` over all of them, whatever the pieces."""

    @property
    def frames(self) -> int:
        """Number of frames that were pushed so far."""

    @property
    def settled(self) -> int:
        """Frame at which, or behind which, every segment that is still to come begins."""

    def push(self, frames: Any) -> NDArray[np.int64]:
        """Take float32 [n, D] frames; give the segments that are final with them, int64 [S, 2], maybe none."""

    def flush(self) -> NDArray[np.int64]:
        """End the stream; give the remaining segments, int64 [S, 2]."""


class Segmenter(ABC):
    """Cuts an utterance into segments."""

    type: ClassVar[str]

    @abstractmethod
    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values; it decides the result."""

    @abstractmethod
    def segment(self, frames: NDArray[np.float32], slack: float = 0.0) -> tuple[NDArray[np.int64], bool]:
        """Segments of one whole utterance.

        Parameters
        ----------
        frames : float32 [T, D]
        slack : float
            Relative change of each frame (Euclidean norm) against which decisions are to hold.

        Returns
        -------
        spans : int64 [S, 2]
            First frame and end (exclusive) of each segment, in order, never empty and never overlapping.
        near_tie : bool
            Whether frames that differ from these by at most `slack` might have been segmented otherwise. True may be
            said too often; False is never wrong. False for a slack of 0.

        Raises
        ------
        InputError
            If frames are not float32 [T, D], or one of them is not finite.
        """

    @abstractmethod
    def stream(self) -> SegmentStream:
        """Open a stream of frames."""


class WholeStream:
    """A stream whose segments need all frames: it holds them and gives everything at the end.

    Parameters
    ----------
    segment : callable
        Gives the segments int64 [S, 2] of frames float32 [T, D].
    """

    def __init__(self, segment: Callable[[NDArray[np.float32]], NDArray[np.int64]]) -> None:
        self._segment, self._pieces, self._closed = segment, list[NDArray[np.float32]](), False

    @property
    def frames(self) -> int:
        """Number of frames that were pushed so far."""
        return sum(len(piece) for piece in self._pieces)

    @property
    def settled(self) -> int:
        """0, until the stream ends."""
        return self.frames if self._closed else 0

    def push(self, frames: Any) -> NDArray[np.int64]:
        """Take float32 [n, D] frames and give no segments yet.

        Raises
        ------
        InputError
            If frames are not float32 [n, D] or of another width than before, or the stream has ended. The stream is
            unchanged then.
        """
        if self._closed:
            raise InputError("the stream has ended (it was flushed); open a new one")
        array = frames_array(frames)
        if self._pieces and array.shape[1] != self._pieces[0].shape[1]:
            raise InputError(f"frames have {array.shape[1]} values, those before had {self._pieces[0].shape[1]}")
        self._pieces.append(array.copy())
        return np.zeros((0, 2), np.int64)

    def flush(self) -> NDArray[np.int64]:
        """End the stream and give all segments, int64 [S, 2].

        Raises
        ------
        InputError
            If the stream has ended before, or a frame is not finite.
        """
        if self._closed:
            raise InputError("the stream has ended before (it was flushed); open a new one")
        self._closed = True
        return self._segment(np.concatenate(self._pieces)) if self._pieces else np.zeros((0, 2), np.int64)


def build(kind: str, config: Mapping[str, Any]) -> Segmenter:
    """Segmenter of a bundle, from its type and what `Segmenter.config_dict` gave.

    Raises
    ------
    FormatError
        If this version does not know the type or a field, or a value is unusable.
    """
    from speechtok.segmenters.greedy import Greedy
    from speechtok.segmenters.min_cut import MinCut
    from speechtok.segmenters.norm_peaks import NormPeaks

    kinds: dict[str, Callable[..., Segmenter]] = {each.type: each for each in (Greedy, MinCut, NormPeaks)}
    if kind not in kinds:
        raise FormatError(f"unknown segmenter {kind!r}; this version knows {', '.join(kinds)}")
    try:
        return kinds[kind](**config)
    except (TypeError, InputError) as error:
        raise FormatError(f"malformed configuration of segmenter {kind!r} ({error})") from error
