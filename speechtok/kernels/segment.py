"""Greedy syllable segmentation of many utterances: ``torch.ops.speechtok.segment``.

The algorithm is `get_segment` of the PyPI package ``sylber`` 0.1.4 (Cho et al., ICLR 2025): a running centre that takes
in voiced frames while their cosine with it is high, then one pass from left to right over the joints between segments
that touch, which merges neighbours whose means are alike and moves the boundary of the others.

The package decides with float32 sums in numpy's order, and decisions on a threshold or between equal scores are common
where frames repeat (silence of exact zeros, one dimension). The CPU form (`speechtok.kernels.segment_cpu`) therefore
adds in that order too: its boundaries are the package's, not nearly so. The Triton form sums in float64: there a norm,
a cosine or a score within float32 rounding of a decision may fall on the other side.
"""

import math
import threading
from collections.abc import Sequence
from typing import Literal

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechtok.errors import InputError
from speechtok.kernels import segment_cpu, segment_ties

__all__ = ["CountMode", "decisions_reference", "segment", "segment_one", "segment_reference", "segment_triton"]

CountMode = Literal["package", "reset"]

# numba's simplest threading layer must not be entered from two threads at once.
_one_at_a_time = threading.Lock()


def _cosine(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    cosine: NDArray[np.float32] = (x * y).sum(-1) / ((x**2).sum(-1) + 1e-8) ** 0.5 / ((y**2).sum(-1) + 1e-8) ** 0.5
    return cosine


def _length(vector: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))


class _Bounds:
    """How far a slack brings what `decisions_reference` compares; plain form of `segment_ties`."""

    def __init__(self, frames: NDArray[np.float32], slack: float) -> None:
        self.frames, self.slack = frames.astype(np.float64), slack
        bounds, pairs, _ = segment_cpu.tree(frames.shape[1])
        self.rounding = segment_ties.dot_rounding(bounds, pairs)
        self.unit = segment_ties.UNIT

    def norm(self, norm: float) -> float:
        return segment_ties.SAFE * (self.slack + self.rounding + 4 * self.unit) * norm

    def turn(self, move: float, vector: NDArray[np.float32]) -> float:
        relative = move / math.hypot(_length(vector), 1e-4)
        return relative + relative**2

    def centre(self, moved: float, count: int, centre: NDArray[np.float32], frame: NDArray[np.float32]) -> float:
        rounding = 6 * self.unit * (count * _length(centre) + _length(frame))
        return (count * moved + self.slack * _length(frame) + rounding) / (count + 1)

    def mean(self, begin: int, end: int, mean: NDArray[np.float32]) -> float:
        size = float(np.linalg.norm(self.frames[begin:end], axis=1).mean()) if begin < end else 0.0
        return self.turn((self.slack + 2 * (end - begin + 2) * self.unit) * size, mean)

    def cosine(self, turns: float) -> float:
        return segment_ties.SAFE * (turns + 2 * (2 * self.rounding + 8 * self.unit))

    def frame(self) -> float:
        return self.slack + self.slack**2

    def splits(self, p: NDArray[np.float32], q: NDArray[np.float32], turns: float) -> list[tuple[float, float]]:
        scores = np.concatenate([[0.0], np.cumsum(p.astype(np.float64) - q)])[:-1]
        best, size = int(np.argmax(scores)), len(p)
        each = 2 * self.frame() + turns + 4 * (2 * self.rounding + 8 * self.unit)
        rounding = 2 * (min(size, 128) / 8 + 11 + math.log2(size)) * size * self.unit
        return [
            (float(scores[best] - scores[i]), segment_ties.SAFE * (each * abs(i - best) + rounding))
            for i in range(size)
            if i != best
        ]


def segment_reference(
    frames: NDArray[np.float32], norm_threshold: float, merge_threshold: float, count_mode: CountMode = "package"
) -> NDArray[np.int64]:
    """Plain form of `segment` for one utterance float32 [T, d], in numpy and with the package's roundings."""
    return decisions_reference(frames, norm_threshold, merge_threshold, count_mode)[0]


def decisions_reference(
    frames: NDArray[np.float32],
    norm_threshold: float,
    merge_threshold: float,
    count_mode: CountMode = "package",
    slack: float = 0.0,
) -> tuple[NDArray[np.int64], list[tuple[str, float, float]]]:
    """`segment_reference`, and every decision on the way with how close it was, in plain form.

    Returns
    -------
    spans : int64 [S, 2]
    decisions : list of (kind, distance, bound)
        "norm", "centre", "merge" or "split"; how far the value is from the threshold, or the score from the best; how
        far frames that differ by `slack` may bring it, see `segment_ties`. Empty for a slack of 0.
    """
    decisions: list[tuple[str, float, float]] = []
    ties = _Bounds(frames, slack)
    norms = ((frames**2).sum(-1) + 1e-8) ** 0.5
    voiced = norms >= norm_threshold
    if slack:
        decisions += [("norm", float(norm - np.float32(norm_threshold)), ties.norm(float(norm))) for norm in norms]
    spans: list[list[int]] = []
    joints: list[int] = []  # indices of segments that end where the next one begins
    start, count, centre, moved = -1, 0, np.zeros(0, np.float32), 0.0
    for t, frame in enumerate(frames):
        if not voiced[t]:
            if start >= 0:
                spans.append([start, t])
            start = -1
            continue
        if start < 0:
            start, count, centre, moved = t, 1, frame, slack * _length(frame)
            continue
        cosine = _cosine(centre, frame)
        if slack:
            turns = ties.frame() + ties.turn(moved, centre)
            decisions.append(("centre", float(cosine - np.float32(merge_threshold)), ties.cosine(turns)))
        if cosine >= merge_threshold:
            moved = ties.centre(moved, count, centre, frame)
            centre = (centre * count + frame) / (count + 1)
            count += 1
        else:
            joints.append(len(spans))
            spans.append([start, t])
            # The package forgets to begin the count anew, so the first frame of this segment weighs `count`.
            count = count + 1 if count_mode == "package" else 1
            start, centre, moved = t, frame, slack * _length(frame)
    if start >= 0:
        spans.append([start, len(frames)])

    dead = set()
    for k in joints:
        (left, joint), (_, right) = spans[k], spans[k + 1]
        before, after = frames[left:joint].mean(0), frames[joint:right].mean(0)
        cosine = _cosine(before, after)
        turns = ties.mean(left, joint, before) + ties.mean(joint, right, after) if slack else 0.0
        if slack:
            decisions.append(("merge", float(cosine - np.float32(merge_threshold)), ties.cosine(turns)))
        if cosine >= merge_threshold:
            spans[k + 1] = [left, right]
            dead.add(k)
            continue
        low = max(left, joint - max(1, (joint - left) // 2))
        high = min(right, joint + max(1, (right - joint) // 2))
        p, q = _cosine(frames[low:high], before[None]), _cosine(frames[low:high], after[None])
        scores = [p[:i].sum() + q[i:].sum() for i in range(high - low)]
        boundary = low + int(np.argmax(scores))
        if slack:
            decisions += [("split", *each) for each in ties.splits(p, q, turns)]
        spans[k], spans[k + 1] = [left, boundary], [boundary, right]
    kept = [span for k, span in enumerate(spans) if k not in dead and (count_mode == "package" or span[0] < span[1])]
    return np.array(kept, np.int64).reshape(-1, 2), decisions


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
    frames: NDArray[np.float32],
    norm_threshold: float,
    merge_threshold: float,
    count_mode: CountMode = "package",
    slack: float = 0.0,
) -> tuple[NDArray[np.int64], bool]:
    """`segment` of one contiguous utterance float32 [T, d] on CPU; spares the operator, which costs 10 s of frames.

    Also tells whether frames that differ by `slack` (relative, Euclidean norm of each) might be segmented otherwise, by
    the bounds of `segment_ties`.
    """
    spans = np.empty((len(frames), 2), np.int64)
    bounds, pairs, half = segment_cpu.tree(frames.shape[1])
    margins = segment_ties.margins_for(slack, bounds, pairs)
    found = segment_cpu.scan_one(
        frames, bounds, pairs, half, np.float32(norm_threshold), np.float32(merge_threshold),
        count_mode == "reset", margins, spans,
    )  # fmt: skip
    if found < 0:
        raise _bad_frame(-1 - found, 0, 0, 1)
    return spans[:found].copy(), bool(margins[segment_ties.TIED])


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
    bounds, pairs, half = segment_cpu.tree(frames.shape[1])
    utterances, arguments = len(counts), (
        frames.numpy(), offsets.numpy(), bounds, pairs, half, np.float32(norm_threshold), np.float32(merge_threshold),
        reset, segment_ties.margins_for(0.0, bounds, pairs), spans.numpy(), counts.numpy(),
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
