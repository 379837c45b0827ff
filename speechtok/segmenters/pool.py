"""One vector per segment: the mean of its frames."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError
from speechtok.segmenters.inputs import frames_array

__all__ = ["pool"]


def pool(frames: Any, spans: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean of the frames of each segment.

    Sums run over the rows of the segment in float64 and over nothing else, so a segment's mean is the same to the bit
    wherever the segment lies and whatever surrounds it.

    Parameters
    ----------
    frames : float32 [T, D], array or tensor
    spans : int64 [S, 2]
        First frame and end (exclusive) of each segment.

    Returns
    -------
    float32 [S, D]

    Raises
    ------
    InputError
        If frames are not float32 [T, D], or a segment is empty or reaches beyond them.
    """
    array = frames_array(frames)
    means = np.empty((len(spans), array.shape[1]), np.float32)
    for mean, (begin, end) in zip(means, spans.tolist(), strict=True):
        if not 0 <= begin < end <= len(array):
            raise InputError(f"segment [{begin}, {end}) is empty or not within the {len(array)} frames")
        mean[:] = array[begin:end].astype(np.float64).mean(0)
    return means
