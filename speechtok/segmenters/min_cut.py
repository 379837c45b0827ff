"""Min-cut segmentation: SD-HuBERT's (Cho et al., ICASSP 2024), after Peng et al. (Interspeech 2023).

Every run of voiced frames is cut into K pieces so that the similarity across cuts is small against the similarity
inside: the sum over pieces of ``cut / (inside + cut)`` is least, where `inside` is half the sum of dot products within
the piece, `cut` their sum with all other frames of the run, and dot products are shifted to be positive. Then the two
most alike neighbours are merged again and again while the cosine of their means is high. Time is O(T^2 K) and memory
O(T^2) in the length of a run.
"""

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numba
import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError
from speechtok.segmenters.base import Segmenter, WholeStream
from speechtok.segmenters.inputs import finite, frames_array

__all__ = ["MinCut", "min_cut_segment", "speech_mask"]

_LONGEST = 6000  # frames of a run: 430 MB of similarities


def speech_mask(frames: Any, threshold: float = 0.1, *, relative: bool = True) -> NDArray[np.bool_]:
    """Voiced frames by norm, as SD-HuBERT has it for the layer above the one that is cut.

    Parameters
    ----------
    frames : float32 [T, d], array or tensor
    threshold : float
        Norms above it are voiced.
    relative : bool
        Norms are first mapped so that their 1st percentile is 0 and their 99th is 1; SD-HuBERT's absolute threshold
        is 2.

    Returns
    -------
    bool [T]

    Raises
    ------
    InputError
        If frames are not float32 [T, d].
    """
    norms = np.linalg.norm(frames_array(frames), axis=-1)
    if relative and len(norms):
        low, high = np.percentile(norms, (1, 99))
        # Where all norms are equal nothing can be told apart: nothing is voiced.
        norms = (norms - low) / (high - low) if high > low else np.zeros_like(norms)
    mask: NDArray[np.bool_] = norms > threshold
    return mask


@numba.njit(nogil=True, cache=True)
def _cut(blocks, rows, pieces):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Ends of the pieces of the best cut of frames 0..N-2 (sic), given 2-D prefix sums [N + 1, N + 1] and row sums.

    The published program never closes the last piece in its search but at frame N - 1, and adds that frame afterwards.
    """
    frames = len(rows) - 1
    best = np.full((pieces + 1, frames), np.inf)
    came = np.zeros((pieces + 1, frames), np.int64)
    cost = np.empty(frames)
    best[0, 0] = 0.0
    for i in range(1, frames):
        for j in range(i):
            inside = blocks[i, i] - blocks[i, j] - blocks[j, i] + blocks[j, j]
            cut = rows[i] - rows[j] - inside
            cost[j] = cut / (inside / 2 + cut)
        for k in range(1, pieces + 1):
            least, where = np.inf, 0
            # k - 1 pieces need as many frames.
            for j in range(k - 1, i):
                total = best[k - 1, j] + cost[j]
                if total < least:
                    least, where = total, j
            best[k, i], came[k, i] = least, where
    ends = np.empty(pieces + 1, np.int64)
    ends[pieces] = frames - 1
    for k in range(pieces, 0, -1):
        ends[k - 1] = came[k, ends[k]]
    ends[pieces] = frames
    return ends


def _pieces(frames: NDArray[np.float32], count: int) -> list[tuple[int, int]]:
    """The best cut of a run float32 [N, d] into `count` pieces, fewer where frames are few."""
    count = min(count, len(frames) - 1)
    if count < 2:
        return [(0, len(frames))]
    similarity = frames @ frames.T
    similarity -= similarity.min()
    similarity += np.float32(1e-7)
    blocks = np.zeros((len(frames) + 1, len(frames) + 1))
    np.cumsum(similarity, axis=0, out=blocks[1:, 1:])
    np.cumsum(blocks[1:, 1:], axis=1, out=blocks[1:, 1:])
    return list(pairwise(_cut(blocks, np.ascontiguousarray(blocks[:, -1]), count).tolist()))


def _merge(frames: NDArray[np.float32], spans: list[tuple[int, int]], threshold: float) -> list[tuple[int, int]]:
    """Merge the two most alike neighbours while the cosine of their means is at least the threshold."""

    def mean(span: tuple[int, int]) -> NDArray[np.float32]:
        centre: NDArray[np.float32] = frames[span[0] : span[1]].mean(0)
        return centre

    def cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
        norms = float(np.linalg.norm(left) * np.linalg.norm(right))
        return float(left @ right) / norms if norms > 0 else -math.inf

    means = [mean(span) for span in spans]
    alike = [cosine(left, right) for left, right in pairwise(means)]
    while alike and max(alike) >= threshold:
        k = alike.index(max(alike))
        spans[k : k + 2] = [(spans[k][0], spans[k + 1][1])]
        means[k : k + 2] = [mean(spans[k])]
        del alike[k]
        for side in (k - 1, k):
            if 0 <= side < len(alike):
                alike[side] = cosine(means[side], means[side + 1])
    return spans


def min_cut_segment(
    frames: Any,
    voiced: NDArray[np.bool_] | None = None,
    *,
    frame_rate: float = 50.0,
    seconds: float = 0.2,
    merge_threshold: float | None = 0.4,
    min_frames: int = 2,
) -> NDArray[np.int64]:
    """Segments of one utterance by min-cut and merging.

    Parameters
    ----------
    frames : float32 [T, d], array or tensor
        SD-HuBERT: layer 9.
    voiced : bool [T], optional
        Frames to be segmented, for instance of `speech_mask`; all where it is None.
    frame_rate : float
        Frames per second.
    seconds : float
        A run of N frames is cut into ``ceil(N / frame_rate / seconds)`` pieces before merging (0.2: SD-HuBERT's
        scripts; 0.1: the default of its class).
    merge_threshold : float or None
        Cosine of neighbouring means from which they are merged; None merges nothing.
    min_frames : int
        Shorter runs are dropped.

    Returns
    -------
    int64 [S, 2]
        First frame and end (exclusive) of each segment; [0, 2] where nothing is voiced.

    Raises
    ------
    InputError
        If frames are not float32 [T, d] or not finite, the mask does not fit, an option is not positive, or a run is
        longer than 6000 frames.
    """
    array = frames_array(frames)
    mask = np.ones(len(array), bool) if voiced is None else np.asarray(voiced)
    if mask.dtype != bool or mask.shape != array.shape[:1]:
        raise InputError(f"voiced is {mask.dtype} {mask.shape}; give bool [{len(array)}]")
    if not (frame_rate > 0 and seconds > 0):
        raise InputError(f"frame_rate {frame_rate} and seconds {seconds} must be positive")
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if len(bad):
        raise InputError(f"frame {bad[0]} holds NaN or infinity")
    turns = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    spans: list[tuple[int, int]] = []
    for begin, end in turns.reshape(-1, 2).tolist():
        if end - begin < min_frames:
            continue
        if end - begin > _LONGEST:
            raise InputError(f"frames {begin} to {end} are one run; at most {_LONGEST} can be cut, so give a mask")
        run = array[begin:end]
        pieces = _pieces(run, math.ceil((end - begin) / frame_rate / seconds))
        if merge_threshold is not None:
            pieces = _merge(run, pieces, merge_threshold)
        spans += [(begin + left, begin + right) for left, right in pieces]
    return np.array(spans, np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class MinCut(Segmenter):
    """`min_cut_segment` as the segmenter of a tokenizer: frames are voiced by their own norm, of no second layer.

    Parameters
    ----------
    norm_threshold : float
        Frames whose norm is above it are voiced.
    merge_threshold, frame_rate, seconds, min_frames
        As in `min_cut_segment`.

    Raises
    ------
    InputError
        If an option is not a finite number, or not positive where it must be.
    """

    type: ClassVar[str] = "min_cut"
    norm_threshold: float = 2.6
    merge_threshold: float | None = 0.4
    frame_rate: float = 50.0
    seconds: float = 0.2
    min_frames: int = 2

    def __post_init__(self) -> None:
        values = finite(norm_threshold=self.norm_threshold, frame_rate=self.frame_rate, seconds=self.seconds)
        if self.merge_threshold is not None:
            values |= finite(merge_threshold=self.merge_threshold)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if not (self.frame_rate > 0 and self.seconds > 0):
            raise InputError(f"frame_rate {self.frame_rate} and seconds {self.seconds} must be positive")
        if not isinstance(self.min_frames, int) or self.min_frames < 1:
            raise InputError(f"min_frames is {self.min_frames!r}; give a whole number from 1 on")

    def config_dict(self) -> dict[str, Any]:
        return asdict(self)

    def segment(self, frames: NDArray[np.float32], slack: float = 0.0) -> tuple[NDArray[np.int64], bool]:
        """See `Segmenter.segment`; with a slack everything is a near-tie: the best of many cuts has no simple bound.

        Raises
        ------
        InputError
            Also if a voiced run is longer than 6000 frames.
        """
        return self._spans(frames), slack > 0

    def _spans(self, frames: NDArray[np.float32]) -> NDArray[np.int64]:
        return min_cut_segment(
            frames, speech_mask(frames, self.norm_threshold, relative=False), frame_rate=self.frame_rate,
            seconds=self.seconds, merge_threshold=self.merge_threshold, min_frames=self.min_frames,
        )  # fmt: skip

    def stream(self) -> WholeStream:
        return WholeStream(self._spans)
