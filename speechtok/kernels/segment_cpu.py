"""CPU form of greedy segmentation: one pass over the frames, with numpy's order of float32 additions.

Joints are resolved as soon as their right segment has ended, while its frames are still in the cache; this is the order
of the package's second pass, whose joints depend on earlier ones only. The same `scan` thus serves whole utterances and
streams: all that it remembers lies in `marks` and `vectors`.

Numpy adds a row in eight lanes (leaves of at most 128 numbers), then leaves in a binary tree. The lanes are one vector
of eight numbers, which numba does not find by itself: `_lanes` says it.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from speechtok.kernels import segment_ties as ties

__all__ = ["NOT_FINITE", "VECTORS", "new_marks", "scan", "scan_all", "scan_one", "scan_parallel", "settled", "tree"]

NOT_FINITE = "holds NaN, infinity or values whose squares overflow float32"

# marks, int64: the running centre's count; start and end of the closed segment that waits for its right neighbour, and
# start of the open one (-1: there is none); the next frame. All count from the stream's first frame.
_COUNT, _LEFT, _JOINT, _RIGHT, _NEXT, _MARKS = range(6)
# vectors, float32 [VECTORS, d]: the running centre, sums over the waiting and the open segment, and their means.
_CENTRE, _LEFT_SUM, _RIGHT_SUM, _LEFT_MEAN, _RIGHT_MEAN, VECTORS = range(6)

_EPSILON = np.float32(1e-8)
_ONE = np.float32(1)
_LEAF, _WIDTH = 128, 8


@cache
def tree(width: int) -> tuple[NDArray[np.int64], NDArray[np.int64], np.float32]:
    """How numpy adds `width` numbers: bounds of the leaves, pairs (i, j) of "leaf i += leaf j" in order, and a half.

    The half is the exponent of square roots of scalars, which numpy takes with ``powf``. It is an argument, not a
    constant, because the compiler would make ``sqrt`` of it, and the two differ in the last bit once in 2000 times.
    """
    bounds, pairs = [0], []

    def grow(begin: int, count: int) -> int:
        if count <= _LEAF:
            bounds.append(begin + count)
            return len(bounds) - 2
        half = count // 2
        half -= half % _WIDTH
        left = grow(begin, half)
        pairs.append((left, grow(begin + half, count - half)))
        return left

    grow(0, width)
    return np.array(bounds), np.array(pairs, np.int64).reshape(-1, 2), np.float32(0.5)


@numba.njit(nogil=True, cache=True)
def new_marks():  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Marks before the first frame."""
    marks = np.full(_MARKS, -1, np.int64)
    marks[_COUNT] = marks[_NEXT] = 0
    return marks


def settled(marks: NDArray[np.int64]) -> int:
    """First frame that a later `scan` may read again."""
    waiting, is_open, following = (int(marks[i]) for i in (_LEFT, _RIGHT, _NEXT))
    return waiting if waiting >= 0 else is_open if is_open >= 0 else following


@intrinsic
def _lanes(typing: Any, x: Any, y: Any, begin: Any, end: Any) -> Any:
    """Sum of x[i] * y[i] in eight lanes; contiguous float32 arrays, from begin to end, a multiple of eight apart."""
    del typing
    signature = types.float32(x, y, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), _WIDTH)
        data = [
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:2], values[:2], strict=True)
        ]
        lanes = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * _WIDTH))
        step = context.get_constant(types.intp, _WIDTH)
        with cgutils.for_range_slice(builder, values[2], values[3], step, intp=step.type) as (i, _):
            pieces = []
            for array in data:
                pointer = builder.bitcast(builder.gep(array, [i]), vector.as_pointer())
                pieces.append(builder.load(pointer, align=4))
            builder.store(builder.fadd(builder.load(lanes), builder.fmul(*pieces)), lanes)
        parts = [builder.extract_element(builder.load(lanes), ir.IntType(32)(lane)) for lane in range(_WIDTH)]
        while len(parts) > 1:
            parts = [builder.fadd(parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]
        return parts[0]

    return signature, generate


@numba.njit(nogil=True, cache=True)
def _leaf(x, y, begin, end):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    total, i = np.float32(0), begin
    if end - begin >= 8:
        i = end - (end - begin) % 8
        total = _lanes(x, y, begin, i)  # type: ignore[call-arg]
    for k in range(i, end):
        total += x[k] * y[k]
    return total


@numba.njit(nogil=True, cache=True)
def _dot(x, y, bounds, pairs, parts):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """``(x * y).sum()`` as numpy has it."""
    for leaf in range(len(bounds) - 1):
        parts[leaf] = _leaf(x, y, bounds[leaf], bounds[leaf + 1])
    for k in range(len(pairs)):
        parts[pairs[k, 0]] += parts[pairs[k, 1]]
    return parts[0]


@numba.njit(nogil=True, cache=True)
def _sum(values, ones):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """``values.sum()`` as numpy has it; `ones` is at least as long. Depth first, with the open subtrees on a stack."""
    begins, counts, totals = np.empty(128, np.int64), np.empty(128, np.int64), np.empty(128, np.float32)
    # A negative count stands for "add the two topmost totals".
    begins[0], counts[0], depth, ready = 0, len(values), 1, 0
    while depth > 0:
        depth -= 1
        begin, count = begins[depth], counts[depth]
        if count < 0:
            ready -= 1
            totals[ready - 1] += totals[ready]
        elif count <= 128:
            totals[ready] = _leaf(values, ones, begin, begin + count)
            ready += 1
        else:
            half = count // 2
            half -= half % 8
            counts[depth] = -1
            begins[depth + 1], counts[depth + 1] = begin + half, count - half
            begins[depth + 2], counts[depth + 2] = begin, half
            depth += 3
    return totals[0]


@numba.njit(nogil=True, cache=True)
def _add(frames, begin, end, total):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    for t in range(begin, end):
        frame = frames[t]
        for k in range(len(total)):
            total[k] += frame[k]


@numba.njit(nogil=True, cache=True)
def _mean(frames, begin, end, total, mean):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """``frames[begin:end].mean(0)`` as numpy has it: row by row, but a single column like a row."""
    if len(total) == 1:
        column = frames[begin:end].reshape(end - begin)
        total[0] = _sum(column, np.ones(len(column), np.float32))
    length = np.float32(end - begin)
    for k in range(len(total)):
        mean[k] = total[k] / length


@numba.njit(nogil=True, cache=True)
def _best_split(p, q):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """First i that has the largest ``p[:i].sum() + q[i:].sum()``.

    Running sums of p - q find it. The package rounds each of its sums: where others come so close that those roundings
    may decide, its sums are computed.
    """
    total, top, best = 0.0, 0.0, 0
    for i in range(1, len(p)):
        total += np.float64(p[i - 1]) - np.float64(q[i - 1])
        if total > top:
            top, best = total, i
    # A pairwise sum of W numbers below 1 is off by at most 2^-24 W (depth of its tree < 16 + 10 + log2 W < 60).
    close = top - len(p) * 2.0**-17
    total, rivals = 0.0, 0
    for i in range(len(p)):
        rivals += total >= close
        total += np.float64(p[i]) - np.float64(q[i])
    if rivals == 1:
        return best
    ones = np.ones(len(p), np.float32)
    total, highest, best = 0.0, np.float32(-np.inf), 0
    for i in range(len(p)):
        if total >= close:
            score = _sum(p[:i], ones) + _sum(q[i:], ones)
            if score > highest:
                highest, best = score, i
        total += np.float64(p[i]) - np.float64(q[i])
    return best


@numba.njit(nogil=True, cache=True)
def _boundary(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    frames, squares, left, joint, right, before, after, bounds, pairs, parts, margins, turns,
):  # fmt: skip
    """Where two neighbours [left, joint) and [joint, right) part best, by the cosines of frames with both means."""
    low = max(left, joint - max(1, (joint - left) // 2))
    high = min(right, joint + max(1, (right - joint) // 2))
    before_norm = np.sqrt(_dot(before, before, bounds, pairs, parts) + _EPSILON)
    after_norm = np.sqrt(_dot(after, after, bounds, pairs, parts) + _EPSILON)
    p, q = np.empty(high - low, np.float32), np.empty(high - low, np.float32)
    for i in range(high - low):
        frame, norm = frames[low + i], np.sqrt(squares[low + i] + _EPSILON)
        p[i] = _dot(frame, before, bounds, pairs, parts) / norm / before_norm
        q[i] = _dot(frame, after, bounds, pairs, parts) / norm / after_norm
    if margins[ties.SLACK] > 0:
        ties.boundary_tied(margins, p, q, turns)
    return low + _best_split(p, q)


@numba.njit(nogil=True, cache=True)
def _close(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    frames, base, squares, end, last, marks, vectors, bounds, pairs, half, parts, merge_threshold, reset, margins,
    spans, found,
):  # fmt: skip
    """End the open segment, settle its joint with the waiting one, and let it wait unless it is the `last` of its run.

    Returns the number of spans, of which `found` were there before.
    """
    right = marks[_RIGHT]
    right_sum, right_mean = vectors[_RIGHT_SUM], vectors[_RIGHT_MEAN]
    if marks[_LEFT] >= 0:
        left, joint = marks[_LEFT], marks[_JOINT]
        left_sum, left_mean = vectors[_LEFT_SUM], vectors[_LEFT_MEAN]
        _mean(frames, left - base, joint - base, left_sum, left_mean)
        _mean(frames, joint - base, end - base, right_sum, right_mean)
        left_square = _dot(left_mean, left_mean, bounds, pairs, parts)
        right_square = _dot(right_mean, right_mean, bounds, pairs, parts)
        cosine = (
            _dot(left_mean, right_mean, bounds, pairs, parts)
            / (left_square + _EPSILON) ** half
            / (right_square + _EPSILON) ** half
        )
        turns = 0.0
        if margins[ties.SLACK] > 0:
            turns += ties.mean_turn(margins, squares, left - base, joint - base, left_square)
            turns += ties.mean_turn(margins, squares, joint - base, end - base, right_square)
            ties.cosine_tied(margins, cosine, merge_threshold, turns)
        if cosine >= merge_threshold:
            # Numpy adds from the first frame on, so the sum goes on from the left one.
            right = left
            _add(frames, joint - base, end - base, left_sum)
            right_sum[:] = left_sum
        else:
            right = base + _boundary(
                frames, squares, left - base, joint - base, end - base, left_mean, right_mean, bounds, pairs, parts,
                margins, turns,
            )  # fmt: skip
            if right > left or not reset:
                spans[found, 0], spans[found, 1] = left, right
                found += 1
            if right != joint:
                right_sum[:] = 0
                _add(frames, right - base, end - base, right_sum)
    marks[_RIGHT] = -1
    if last:
        spans[found, 0], spans[found, 1] = right, end
        marks[_LEFT] = -1
        return found + 1
    marks[_LEFT], marks[_JOINT] = right, end
    vectors[_LEFT_SUM] = right_sum
    return found


@numba.njit(nogil=True, cache=True)
def scan(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    frames, base, final, squares, marks, vectors, bounds, pairs, half, norm_threshold, merge_threshold, reset, margins,
    spans,
):  # fmt: skip
    """Segments that end for good with the frames from ``marks[_NEXT]`` on; `frames` begin at frame `base`.

    Squared norms of frames go to `squares`, segments to `spans`, near-ties to `margins` (see `segment_ties`). Returns
    the number of segments, or ``-1 - t`` if frame t is not finite.
    """
    found, end = 0, base + len(frames)
    centre, right_sum = vectors[_CENTRE], vectors[_RIGHT_SUM]
    parts = np.empty(len(bounds) - 1, np.float32)
    watched = margins[ties.SLACK] > 0
    centre_square = _dot(centre, centre, bounds, pairs, parts)
    for t in range(marks[_NEXT], end):
        frame = frames[t - base]
        square = _dot(frame, frame, bounds, pairs, parts)
        if not np.isfinite(square):
            return -1 - t
        squares[t - base] = square
        is_open = marks[_RIGHT] >= 0
        norm = np.sqrt(square + _EPSILON)
        if watched:
            ties.norm_tied(margins, norm, norm_threshold)
        if not norm >= norm_threshold:
            if is_open:
                found = _close(
                    frames, base, squares, t, True, marks, vectors, bounds, pairs, half, parts,
                    merge_threshold, reset, margins, spans, found,
                )  # fmt: skip
            continue
        if is_open:
            cosine = (
                _dot(centre, frame, bounds, pairs, parts)
                / (centre_square + _EPSILON) ** half
                / (square + _EPSILON) ** half
            )
            if watched:
                ties.centre_tied(margins, cosine, merge_threshold, centre_square)
            if cosine >= merge_threshold:
                count = np.float32(marks[_COUNT])
                if watched:
                    ties.moved_centre(margins, count, centre_square, square)
                for k in range(len(centre)):
                    centre[k] = (centre[k] * count + frame[k]) / (count + _ONE)
                    right_sum[k] += frame[k]
                centre_square = _dot(centre, centre, bounds, pairs, parts)
                marks[_COUNT] += 1
                continue
            found = _close(
                frames, base, squares, t, False, marks, vectors, bounds, pairs, half, parts,
                merge_threshold, reset, margins, spans, found,
            )  # fmt: skip
        # The package begins the count anew after silence, but not after a split.
        marks[_COUNT] = marks[_COUNT] + 1 if is_open and not reset else 1
        marks[_RIGHT] = t
        centre[:] = frame
        right_sum[:] = frame
        centre_square = square
        if watched:
            ties.moved_centre(margins, 0, square, square)
    marks[_NEXT] = end
    if final and marks[_RIGHT] >= 0:
        found = _close(
            frames, base, squares, end, True, marks, vectors, bounds, pairs, half, parts,
            merge_threshold, reset, margins, spans, found,
        )  # fmt: skip
    return found


@numba.njit(nogil=True, cache=True)
def scan_one(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    frames, bounds, pairs, half, norm_threshold, merge_threshold, reset, margins, spans,
):  # fmt: skip
    """Segments of one whole utterance; returns as `scan`."""
    vectors = np.zeros((VECTORS, frames.shape[1]), np.float32)
    squares = np.empty(len(frames), np.float32)
    return scan(
        frames, 0, True, squares, new_marks(), vectors, bounds, pairs, half,
        norm_threshold, merge_threshold, reset, margins, spans,
    )  # fmt: skip


@numba.njit(nogil=True, cache=True)
def scan_all(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    frames, offsets, bounds, pairs, half, norm_threshold, merge_threshold, reset, margins, spans, counts,
):  # fmt: skip
    """Segments of utterances ``frames[offsets[i] : offsets[i + 1]]``, written from ``spans[offsets[i]]`` on."""
    for i in range(len(counts)):
        begin, end = offsets[i], offsets[i + 1]
        counts[i] = scan_one(
            frames[begin:end], bounds, pairs, half, norm_threshold, merge_threshold, reset, margins, spans[begin:end]
        )


@numba.njit(nogil=True, cache=True, parallel=True)
def scan_parallel(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    frames, offsets, bounds, pairs, half, norm_threshold, merge_threshold, reset, margins, spans, counts,
):  # fmt: skip
    """As `scan_all`, utterances in parallel; `margins` of slack 0 are never written to, so that all may share them."""
    for i in numba.prange(len(counts)):
        begin, end = offsets[i], offsets[i + 1]
        counts[i] = scan_one(
            frames[begin:end], bounds, pairs, half, norm_threshold, merge_threshold, reset, margins, spans[begin:end]
        )
