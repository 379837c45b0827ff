"""Training-free segmentation at the peaks of the frames' norm, in the manner of ZeroSyl (arXiv 2602.15537).

ZeroSyl takes layer 13 of WavLM-Large: the norms of its frames are large where syllables meet. Norms are standardised
over the utterance, smoothed, and every peak of enough prominence is a boundary. Segments tile the utterance; silence is
a segment like others.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numba
import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError
from speechtok.segmenters.base import Segmenter, WholeStream
from speechtok.segmenters.inputs import finite, frames_array

__all__ = ["NormPeaks", "norm_peak_segment", "prominent_peaks"]


@numba.njit(nogil=True, cache=True)
def _peaks(values, prominence):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    last = len(values) - 1
    peaks = np.empty(len(values), np.int64)
    found, i = 0, 1
    while i < last:
        if values[i - 1] >= values[i]:
            i += 1
            continue
        end = i
        while end < last and values[end + 1] == values[i]:
            end += 1
        if end < last and values[end + 1] < values[i]:
            height = values[i]
            # The lowest point on each side before something higher; the higher of the two is the peak's base.
            bases = np.full(2, height)
            for side, step in ((0, -1), (1, 1)):
                k = i
                while 0 <= k <= last and values[k] <= height:
                    bases[side] = min(bases[side], values[k])
                    k += step
            if height - bases.max() >= prominence:
                peaks[found] = (i + end) // 2
                found += 1
        i = end + 1
    return peaks[:found]


def prominent_peaks(values: NDArray[np.float64], prominence: float) -> NDArray[np.int64]:
    """Indices of the peaks of float [T] values that have at least this prominence, as ``scipy.signal.find_peaks`` does.

    A peak is higher than what is before and behind it; of a plateau the middle counts (the left one of two). The ends
    are not peaks. Its prominence is its height above the higher one of the lowest points on its two sides, each side as
    far as the next higher value or the end.
    """
    peaks: NDArray[np.int64] = _peaks(np.ascontiguousarray(values, np.float64), float(prominence))
    return peaks


def norm_peak_segment(frames: Any, window: int = 3, prominence: float = 0.45) -> NDArray[np.int64]:
    """Segments between the peaks of the standardised, smoothed norm.

    Parameters
    ----------
    frames : float32 [T, d], array or tensor
        Of any layer; its own norms decide. Features to be pooled may come from another one.
    window : int
        Length of the moving average (frames, odd); ends are extended by their own value.
    prominence : float
        Least prominence of a boundary, in standard deviations of the norm.

    Returns
    -------
    int64 [S, 2]
        First frame and end (exclusive) of each segment; together they are 0..T. [0, 2] for T = 0.

    Raises
    ------
    InputError
        If frames are not float32 [T, d] or not finite, or the window is even.
    """
    if window < 1 or window % 2 == 0:
        raise InputError(f"the window is {window} frames; it must be odd and positive")
    array = frames_array(frames)
    if len(array) == 0:
        return np.zeros((0, 2), np.int64)
    norms = np.linalg.norm(array, axis=-1)
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        raise InputError(f"frame {bad[0]} holds NaN, infinity or values whose squares overflow float32")
    spread = norms.std()
    if spread == 0:
        return np.array([[0, len(array)]])
    padded = np.pad((norms - norms.mean()) / spread, window // 2, mode="edge")
    smooth = np.convolve(padded, np.ones(window) / window, mode="valid")
    bounds = np.concatenate([[0], prominent_peaks(smooth, prominence), [len(array)]])
    return np.stack([bounds[:-1], bounds[1:]], 1)


@dataclass(frozen=True)
class NormPeaks(Segmenter):
    """`norm_peak_segment` as the segmenter of a tokenizer.

    Parameters
    ----------
    window, prominence
        As in `norm_peak_segment`.

    Raises
    ------
    InputError
        If the window is not an odd positive whole number, or the prominence not a finite number.
    """

    type: ClassVar[str] = "norm_peaks"
    window: int = 3
    prominence: float = 0.45

    def __post_init__(self) -> None:
        object.__setattr__(self, "prominence", finite(prominence=self.prominence)["prominence"])
        if not isinstance(self.window, int) or self.window < 1 or self.window % 2 == 0:
            raise InputError(f"the window is {self.window!r} frames; it must be a whole number, odd and positive")

    def config_dict(self) -> dict[str, Any]:
        return asdict(self)

    def segment(self, frames: NDArray[np.float32], slack: float = 0.0) -> tuple[NDArray[np.int64], bool]:
        """See `Segmenter.segment`; with a slack everything is a near-tie: every norm moves the scale of all."""
        return self._spans(frames), slack > 0

    def _spans(self, frames: NDArray[np.float32]) -> NDArray[np.int64]:
        return norm_peak_segment(frames, self.window, self.prominence)

    def stream(self) -> WholeStream:
        return WholeStream(self._spans)
