"""Units of segments, copied over the frames that the segments span."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from speechtok.errors import InputError

__all__ = ["GAP", "PLACES", "Condition", "lay_out"]

GAP = -1  # unit of frames that belong to no segment
PLACES = 2  # numbers that say where in its segment a frame is


@dataclass(frozen=True)
class Condition:
    """What is known of each frame.

    Parameters
    ----------
    units : int64 [B, T]
        Unit of the segment that the frame belongs to; -1: none.
    places : float32 [B, T, 2]
        Share of the segment, or of the gap, that has passed in the middle of the frame, and the logarithm of its length
        in frames.
    lengths : int64 [B]
        Frames of each row.
    speaker : float [B, S] or None
        None: the null speaker.
    """

    units: Tensor
    places: Tensor
    lengths: Tensor
    speaker: Tensor | None = None


def lay_out(
    units: NDArray[np.int32], spans: NDArray[np.int64], frames: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Copy units over the frames of their segments.

    Parameters
    ----------
    units : int32 [S]
    spans : int64 [S, 2]
        Segments in frames, in order and without overlap: start and end. What lies between them are gaps.
    frames : int
        Of the whole sound.

    Returns
    -------
    units : int64 [T]
    places : float32 [T, 2]
        See `Condition`.

    Raises
    ------
    InputError
        If segments are empty, overlap, are out of order or leave the sound.
    """
    spans = np.asarray(spans, np.int64).reshape(-1, 2)
    borders = spans.ravel()
    ordered = bool((np.diff(borders) >= 0).all() and (spans[:, 0] < spans[:, 1]).all())
    if len(units) != len(spans) or not ordered or (len(borders) and (borders[0] < 0 or borders[-1] > frames)):
        raise InputError(
            f"{len(units)} units and {len(spans)} segments of {frames} frames: segments must be as many, not empty, in "
            "order, without overlap and inside the sound"
        )
    ids, places = np.full(frames, GAP, np.int64), np.zeros((frames, PLACES), np.float32)
    for unit, (start, end) in zip(units, spans, strict=True):
        ids[start:end] = unit
    edges = [0, *borders.tolist(), frames]
    for start, end in pairwise(edges):
        places[start:end, 0] = (np.arange(end - start) + 0.5) / max(1, end - start)
        places[start:end, 1] = math.log(max(1, end - start))
    return ids, places
