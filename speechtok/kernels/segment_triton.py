"""Triton form of greedy segmentation. Imported only where Triton is needed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["scan"]

# Means and the running centre follow the package's float32 additions one by one; norms and cosines are summed in
# float64 and then rounded, because the order in which a GPU adds a row is not numpy's.


@triton.jit
def _dot(x, y):  # type: ignore[no-untyped-def]
    return tl.sum(x.to(tl.float64) * y.to(tl.float64), 0).to(tl.float32)


@triton.jit
def _length(square):  # type: ignore[no-untyped-def]
    return tl.sqrt_rn(square + 1e-8)


@triton.jit
def _greedy(  # type: ignore[no-untyped-def]
    frames, offsets, starts, ends, joined, found, width, norm_threshold, merge_threshold,
    RESET: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """First pass: segments of one utterance at the beginning of its slot, and which ones end where the next begins."""
    utterance = tl.program_id(0)
    first = tl.load(offsets + utterance)
    length = tl.load(offsets + utterance + 1) - first
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    centre = tl.zeros((WIDTH,), tl.float32)
    count = first * 0
    number = first * 0
    start = first * 0 - 1
    for t in range(length):
        frame = tl.load(frames + (first + t) * width + columns, mask=inside, other=0.0)
        norm = _length(_dot(frame, frame))
        voiced = norm >= norm_threshold
        is_open = start >= 0
        cosine = tl.div_rn(tl.div_rn(_dot(centre, frame), _length(_dot(centre, centre))), norm)
        joins = voiced & is_open & (cosine >= merge_threshold)
        splits = voiced & is_open & (cosine < merge_threshold)
        closes = is_open & (joins == 0)
        tl.store(starts + first + number, start, mask=closes)
        tl.store(ends + first + number, t, mask=closes)
        tl.store(joined + first + number, splits, mask=closes)
        number += closes.to(tl.int64)
        weight = count.to(tl.float32)
        moved = tl.div_rn(centre * weight + frame, tl.zeros((WIDTH,), tl.float32) + (weight + 1.0))
        centre = tl.where(joins, moved, frame)
        anew = splits if RESET else splits & False
        count = tl.where(voiced, tl.where(is_open & (anew == 0), count + 1, 1), 0)
        start = tl.where(voiced, tl.where(joins, start, t), -1)
    is_open = start >= 0
    tl.store(starts + first + number, start, mask=is_open)
    tl.store(ends + first + number, length, mask=is_open)
    tl.store(joined + first + number, False, mask=is_open)
    tl.store(found + utterance, number + is_open.to(tl.int64))


@triton.jit
def _mean(frames, begin, end, columns, width, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros((WIDTH,), tl.float32)
    for t in range(begin, end):
        total += tl.load(frames + t * width + columns, mask=columns < width, other=0.0)
    length = tl.maximum(end - begin, 1).to(tl.float32)  # of nothing the mean is zero
    return tl.div_rn(total, tl.zeros((WIDTH,), tl.float32) + length)


@triton.jit
def _refine(  # type: ignore[no-untyped-def]
    frames, offsets, starts, ends, joined, found, spans, keep, width, merge_threshold,
    RESET: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Second pass, from left to right over the segments of one utterance; loops are empty where no joint follows."""
    utterance = tl.program_id(0)
    first = tl.load(offsets + utterance)
    number = tl.load(found + utterance)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    left = tl.load(starts + first, mask=number > 0, other=0)
    for k in range(number):
        joint = tl.load(ends + first + k)
        touches = tl.load(joined + first + k)
        following = tl.load(starts + first + k + 1, mask=k + 1 < number, other=0)
        right = tl.where(touches, tl.load(ends + first + k + 1, mask=k + 1 < number, other=0), joint + 1)
        before = _mean(frames, first + left, first + tl.where(touches, joint, left + 1), columns, width, WIDTH)
        after = _mean(frames, first + joint, first + tl.where(touches, right, joint), columns, width, WIDTH)
        before_norm = _length(_dot(before, before))
        after_norm = _length(_dot(after, after))
        cosine = tl.div_rn(tl.div_rn(_dot(before, after), before_norm), after_norm)
        merges = touches & (cosine >= merge_threshold)
        low = tl.maximum(left, joint - tl.maximum(1, (joint - left) // 2))
        high = tl.minimum(right, joint + tl.maximum(1, (right - joint) // 2))
        boundary = low
        total = tl.sum(tl.zeros((WIDTH,), tl.float64), 0)
        top = total
        # The split before `low` scores 0; the one before frame t + 1 the sum of differences up to t.
        for t in range(low, tl.where(touches & (merges == 0), high - 1, low)):
            frame = tl.load(frames + (first + t) * width + columns, mask=inside, other=0.0)
            norm = _length(_dot(frame, frame))
            p = tl.div_rn(tl.div_rn(_dot(frame, before), norm), before_norm)
            q = tl.div_rn(tl.div_rn(_dot(frame, after), norm), after_norm)
            total += p.to(tl.float64) - q.to(tl.float64)
            boundary = tl.where(total > top, t + 1, boundary)
            top = tl.maximum(total, top)
        end = tl.where(touches, boundary, joint)
        tl.store(spans + (first + k) * 2, left)
        tl.store(spans + (first + k) * 2 + 1, end)
        kept = (merges == 0) & (end > left) if RESET else merges == 0
        tl.store(keep + first + k, kept)
        left = tl.where(merges, left, tl.where(touches, end, following))


def scan(
    frames: Tensor, offsets: Tensor, norm_threshold: float, merge_threshold: float, reset: bool
) -> tuple[Tensor, Tensor]:
    """Spans int64 [N, 2] and which of them count, bool [N], of utterances of contiguous float32 [N, d]."""
    total, width = frames.shape
    utterances = len(offsets) - 1
    spans = torch.zeros(total, 2, dtype=torch.int64, device=frames.device)
    keep = torch.zeros(total, dtype=torch.bool, device=frames.device)
    if total and utterances:
        starts, ends = torch.empty(2, total, dtype=torch.int64, device=frames.device)
        joined = torch.empty(total, dtype=torch.bool, device=frames.device)
        found = torch.empty(utterances, dtype=torch.int64, device=frames.device)
        # Fused multiplications would round the running centre otherwise than the package does.
        options = {"RESET": reset, "WIDTH": triton.next_power_of_2(width), "num_warps": 4, "enable_fp_fusion": False}
        _greedy[(utterances,)](
            frames, offsets, starts, ends, joined, found, width, norm_threshold, merge_threshold, **options
        )
        _refine[(utterances,)](
            frames, offsets, starts, ends, joined, found, spans, keep, width, merge_threshold, **options
        )
    return spans, keep
