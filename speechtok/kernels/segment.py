"""Greedy syllable segmentation of many utterances: ``torch.ops.speechtok.segment``.

The algorithm is `get_segment` of the PyPI package ``sylber`` 0.1.4 (Cho et al., ICLR 2025): a running centre that takes
in voiced frames while their cosine with it is high, then one pass from left to right over the joints between segments
that touch, which merges neighbours whose means are alike and moves the boundary of the others.

The package decides with float32 sums in numpy's order, and decisions on a threshold or between equal scores are common
where frames repeat (silence of exact zeros, one dimension). The CPU form (`speechtok.kernels.segment_cpu`) therefore
adds in that order too: its boundaries are the package's, not nearly so. The Triton form sums in float64: there a norm,
a cosine or a score within float32 rounding of a decision may fall on the other side.
"""

import threading
from collections.abc import Sequence
from typing import Literal

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechtok.errors import InputError
from speechtok.kernels import segment_cpu

__all__ = ["CountMode", "segment", "segment_one", "segment_reference", "segment_triton"]

CountMode = Literal["package", "reset"]

# numba's simplest threading layer must not be entered from two threads at once.
_one_at_a_time = threading.Lock()


def _cosine(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    cosine: NDArray[np.float32] = (x * y).sum(-1) / ((x**2).sum(-1) + 1e-8) ** 0.5 / ((y**2).sum(-1) + 1e-8) ** 0.5
    return cosine


def segment_reference(
    frames: NDArray[np.float32], norm_threshold: float, merge_threshold: float, count_mode: CountMode = "package"
) -> NDArray[np.int64]:
    """Plain form of `segment` for one utterance float32 [T, d], in numpy and with the package's roundings."""
    voiced = ((frames**2).sum(-1) + 1e-8) ** 0.5 >= norm_threshold
    spans: list[list[int]] = []
    joints: list[int] = []  # indices of segments that end where the next one begins
    start, count, centre = -1, 0, np.zeros(0, np.float32)
    for t, frame in enumerate(frames):
        if not voiced[t]:
            if start >= 0:
                spans.append([start, t])
            start = -1
        elif start < 0:
            start, count, centre = t, 1, frame
        elif _cosine(centre, frame) >= merge_threshold:
            centre = (centre * count + frame) / (count + 1)
            count += 1
        else:
            joints.append(len(spans))
            spans.append([start, t])
            # The package forgets to begin the count anew, so the first frame of this segment weighs `count`.
            start, count, centre = t, count + 1 if count_mode == "package" else 1, frame
    if start >= 0:
        spans.append([start, len(frames)])

    dead = set()
    for k in joints:
        (left, joint), (_, right) = spans[k], spans[k + 1]
        before, after = frames[left:joint].mean(0), frames[joint:right].mean(0)
        if _cosine(before, after) >= merge_threshold:
            spans[k + 1] = [left, right]
            dead.add(k)
            continue
        low = max(left, joint - max(1, (joint - left) // 2))
        high = min(right, joint + max(1, (right - joint) // 2))
        p, q = _cosine(frames[low:high], before[None]), _cosine(frames[low:high], after[None])
        scores = [p[:i].sum() + q[i:].sum() for i in range(high - low)]
        boundary = low + int(np.argmax(scores))
        spans[k], spans[k + 1] = [left, boundary], [boundary, right]
    kept = [span for k, span in enumerate(spans) if k not in dead and (count_mode == "package" or span[0] < span[1])]
    return np.array(kept, np.int64).reshape(-1, 2)


def segment(
    frames: Tensor, offsets: Tensor, norm_threshold: float, merge_threshold: float, count_mode: CountMode = "package"
) -> list[Tensor]:
    """Segments of utterances that lie one behind the other.

    Parameters
    ----------
    frames : float32 [N, d]
        Frames of all utterances.
    offsets : int64 [B + 1]
        First frame of each utterance, and N.
    norm_threshold : float
        Frames whose norm is at least this are voiced.
    merge_threshold : float
        Cosine from which frames, and segments, belong together.
    count_mode : "package" or "reset"
        See `speechtok.segmenters.greedy_segment`.

    Returns
    -------
    list of int64 [S, 2]
        First frame and end of each segment, counted from the utterance's first frame.

    Raises
    ------
    InputError
        If shapes do not fit, or a frame (it is named) is not finite or its squared norm overflows float32.
    """
    if frames.ndim != 2 or offsets.ndim != 1 or not len(offsets):
        raise InputError(f"segment takes frames [N, d] and offsets [B + 1], not {frames.shape} and {offsets.shape}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(frames) or bool((offsets.diff() < 0).any()):
        raise InputError(f"offsets must rise from 0 to the number of frames, {len(frames)}")
    spans, counts = torch.ops.speechtok.segment(
        frames.detach(), offsets, float(norm_threshold), float(merge_threshold), count_mode == "reset"
    )
    return list(spans.split(counts.tolist()))


def segment_one(
    frames: NDArray[np.float32], norm_threshold: float, merge_threshold: float, count_mode: CountMode = "package"
) -> NDArray[np.int64]:
    """`segment` of one contiguous utterance float32 [T, d] on CPU; spares the operator, which costs 10 s of frames."""
    spans, counts = np.empty((len(frames), 2), np.int64), np.empty(1, np.int64)
    segment_cpu.scan_all(
        frames, np.array([0, len(frames)]), *segment_cpu.tree(frames.shape[1]),
        np.float32(norm_threshold), np.float32(merge_threshold), count_mode == "reset", spans, counts,
    )  # fmt: skip
    if counts[0] < 0:
        raise _bad_frame(-1 - int(counts[0]), 0, 0, 1)
    return spans[: counts[0]].copy()


def _bad_frame(frame: int, first: int, utterance: int, utterances: int) -> InputError:
    where = f" of utterance {utterance}" if utterances > 1 else ""
    return InputError(f"frame {frame - first}{where} {segment_cpu.NOT_FINITE}")


def _packed(spans: Tensor, counts: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows that were written at the beginning of each utterance's slot."""
    pieces = [spans[first : first + count] for first, count in zip(offsets[:-1], counts.tolist(), strict=True)]
    return torch.cat([spans[:0], *pieces]), counts


def _segment_cpu(
    frames: Tensor, offsets: Tensor, norm_threshold: float, merge_threshold: float, reset: bool
) -> tuple[Tensor, Tensor]:
    frames, offsets = frames.contiguous(), offsets.contiguous()
    # A segment holds a frame when it is closed, so that there are never more segments than frames.
    spans = torch.empty(len(frames), 2, dtype=torch.int64)
    counts = torch.empty(len(offsets) - 1, dtype=torch.int64)
    utterances, arguments = len(counts), (
        frames.numpy(), offsets.numpy(), *segment_cpu.tree(frames.shape[1]),
        np.float32(norm_threshold), np.float32(merge_threshold), reset, spans.numpy(), counts.numpy(),
    )  # fmt: skip
    if utterances > 1 and numba.get_num_threads() > 1:
        with _one_at_a_time:
            segment_cpu.scan_parallel(*arguments)
    else:
        segment_cpu.scan_all(*arguments)
    firsts = offsets.tolist()
    for utterance, count in enumerate(counts.tolist()):
        if count < 0:
            raise _bad_frame(-1 - count, 0, utterance, utterances)
    return _packed(spans, counts, firsts)


def segment_triton(
    frames: Tensor, offsets: Tensor, norm_threshold: float, merge_threshold: float, reset: bool
) -> tuple[Tensor, Tensor]:
    """One utterance per program, sums in float64. Also runs under Triton's interpreter."""
    from speechtok.kernels.segment_triton import scan

    bad = (~torch.isfinite(frames.square().sum(1))).nonzero()
    if len(bad):
        frame = int(bad[0])
        utterance = int((offsets <= frame).sum()) - 1
        raise _bad_frame(frame, int(offsets[utterance]), utterance, len(offsets) - 1)
    spans, keep = scan(frames.contiguous(), offsets.contiguous(), norm_threshold, merge_threshold, reset)
    owners = torch.bucketize(keep.nonzero()[:, 0], offsets, right=True) - 1
    return spans[keep], torch.bincount(owners, minlength=len(offsets) - 1)


def _segment_fake(
    frames: Tensor, offsets: Tensor, norm_threshold: float, merge_threshold: float, reset: bool
) -> tuple[Tensor, Tensor]:
    found = torch.library.get_ctx().new_dynamic_size()
    return frames.new_empty(found, 2, dtype=torch.int64), offsets.new_empty(offsets.shape[0] - 1)


_library = torch.library.Library("speechtok", "FRAGMENT")
_library.define(
    "segment(Tensor frames, Tensor offsets, float norm_threshold, float merge_threshold, bool reset)"
    " -> (Tensor spans, Tensor counts)"
)
_library.impl("segment", _segment_cpu, "CPU")
_library.impl("segment", segment_triton, "CUDA")
torch.library.register_fake("speechtok::segment", _segment_fake, lib=_library)
