"""Greedy segmentation by norm and cosine: Sylber's (Cho et al., ICLR 2025, arXiv 2410.07168).

Written for encoders whose frames collapse onto one vector within a syllable and onto zero without speech. Frames whose
norm is below a threshold are silent. A segment takes in voiced frames while their cosine with its running centre is
high enough. Then, from left to right, neighbours whose means are alike are merged, and the boundary between the others
moves to where frames are divided best between the two means. The cost is linear in T.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.errors import InputError
from speechtok.kernels.segment import CountMode, segment, segment_one
from speechtok.segmenters.base import Segmenter, SegmentStream
from speechtok.segmenters.gaps import ClosingStream, close_gaps
from speechtok.segmenters.inputs import check_greedy, finite, frames_array, frames_tensor
from speechtok.segmenters.stream import GreedyStream

__all__ = ["Greedy", "greedy_segment", "greedy_segment_batch"]


def greedy_segment(
    frames: Any, norm_threshold: float = 2.6, merge_threshold: float = 0.8, count_mode: CountMode = "package"
) -> NDArray[np.int64]:
    """Segments of one utterance, on CPU those of `get_segment` of the package ``sylber`` 0.1.4, boundary for boundary.

    Parameters
    ----------
    frames : float32 [T, d], array or tensor
        Features of an encoder. On CUDA the Triton kernel runs, whose sums are float64: a value within float32 rounding
        of a decision may fall on the other side there.
    norm_threshold : float
        Frames of at least this norm are voiced. 2.6 is Sylber's; other encoders have other norms.
    merge_threshold : float
        Cosine from which frames, and neighbouring segments, belong together.
    count_mode : "package" or "reset"
        Weight of the running centre. The package counts all frames since the last silence, so that after a split the
        first frame of the new segment weighs as much as that many frames; in "reset" every segment counts its own
        frames. Where two splits score the same, "package" can also give segments of length zero, as the package does;
        "reset" leaves them out.

    Returns
    -------
    int64 [S, 2]
        First frame and end (exclusive) of each segment, in order, never overlapping; gaps are silence. [0, 2] where
        nothing is voiced (the package returns an array of shape (0,)).

    Raises
    ------
    InputError
        If frames are not float32 [T, d] or one of them is not finite, a threshold is NaN or the mode is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> frames = np.repeat(np.eye(3, dtype=np.float32) * [[3], [0], [3]], 4, axis=0)
    >>> greedy_segment(frames).tolist()
    [[0, 4], [8, 12]]
    """
    check_greedy(norm_threshold, merge_threshold, count_mode)
    tensor = frames_tensor(frames)
    if tensor.device.type == "cpu":
        return segment_one(tensor.contiguous().numpy(), norm_threshold, merge_threshold, count_mode)[0]
    offsets = torch.tensor([0, len(tensor)], device=tensor.device)
    spans: NDArray[np.int64] = segment(tensor, offsets, norm_threshold, merge_threshold, count_mode)[0].cpu().numpy()
    return spans


def greedy_segment_batch(
    utterances: Sequence[Any],
    norm_threshold: float = 2.6,
    merge_threshold: float = 0.8,
    count_mode: CountMode = "package",
) -> list[NDArray[np.int64]]:
    """Segments of many utterances, each as `greedy_segment` gives them, whatever the number of threads.

    Utterances are computed in parallel on numba's threads (``numba.set_num_threads``), or one per program on CUDA; they
    are laid one behind the other in memory first.

    Parameters
    ----------
    utterances : sequence of float32 [T, d], arrays or tensors
        With one d, on one device.
    norm_threshold, merge_threshold, count_mode
        As in `greedy_segment`.

    Returns
    -------
    list of int64 [S, 2]

    Raises
    ------
    InputError
        As `greedy_segment`, or if the widths or devices of utterances differ.
    """
    check_greedy(norm_threshold, merge_threshold, count_mode)
    tensors = [frames_tensor(frames) for frames in utterances]
    if not tensors:
        return []
    for i, tensor in enumerate(tensors):
        if tensor.shape[1] != tensors[0].shape[1] or tensor.device != tensors[0].device:
            raise InputError(f"utterance {i} has another width or device than utterance 0; give one kind at a time")
    lengths = torch.tensor([0, *(len(tensor) for tensor in tensors)])
    offsets = lengths.cumsum(0).to(tensors[0].device)
    spans = segment(torch.cat(tensors), offsets, norm_threshold, merge_threshold, count_mode)
    return [piece.cpu().numpy() for piece in spans]


@dataclass(frozen=True)
class Greedy(Segmenter):
    """`greedy_segment` as the segmenter of a tokenizer; segments of length zero are left out.

    Parameters
    ----------
    norm_threshold, merge_threshold : float
        As in `greedy_segment`.
    count_mode : "reset" or "package"
        As in `greedy_segment`; "reset", the default here, lets every segment count its own frames.
    close_gap : int
        Segments that are at most so many frames apart meet in the middle of the gap. For encoders whose frames are
        short at the borders of syllables, too (see `speechtok.training.sylber`). A segment is final when the next one
        begins, or that many frames later.

    Raises
    ------
    InputError
        If a threshold is not a finite number, the mode is unknown or the gap is negative.
    """

    type: ClassVar[str] = "greedy"
    norm_threshold: float = 2.6
    merge_threshold: float = 0.8
    count_mode: CountMode = "reset"
    close_gap: int = 0

    def __post_init__(self) -> None:
        values = finite(norm_threshold=self.norm_threshold, merge_threshold=self.merge_threshold)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        check_greedy(self.norm_threshold, self.merge_threshold, self.count_mode)
        if type(self.close_gap) is not int or self.close_gap < 0:
            raise InputError(f"close_gap is {self.close_gap!r}; give a number of frames, 0 or more")

    def config_dict(self) -> dict[str, Any]:
        return asdict(self)

    def segment(self, frames: NDArray[np.float32], slack: float = 0.0) -> tuple[NDArray[np.int64], bool]:
        """See `Segmenter.segment`; near-ties are found by the bounds of `speechtok.kernels.segment_ties`."""
        spans, near_tie = segment_one(
            frames_array(frames), self.norm_threshold, self.merge_threshold, self.count_mode, slack
        )
        return close_gaps(spans[spans[:, 0] < spans[:, 1]], self.close_gap), near_tie

    def stream(self) -> SegmentStream:
        stream = GreedyStream(self.norm_threshold, self.merge_threshold, self.count_mode, empty=False)
        return ClosingStream(stream, self.close_gap) if self.close_gap else stream
