"""Near-ties of greedy segmentation: decisions that frames which differ a little might turn.

Frames x and x' with ``|x' - x| <= slack |x|`` are segmented alike if every decision falls alike, in order. A decision
compares computed numbers; each is the exact one plus a rounding error, on both sides. It holds if the exact numbers
cannot move as far as the computed ones are apart, less twice the rounding. With u = 2^-24 (one float32 operation):

- A sum in which a term passes n operations is off by at most n u times the sum of sizes; `dot_rounding` is n u of a
  row.
- Norm ``r(x) = sqrt(|x|^2 + 1e-8)``: moves by at most slack r, and is off by (n / 2 + 2) u r.
- Direction ``x / r(x)``: with the coordinate 1e-4 added, x becomes a vector of length r, so that the direction of what
  moves by e turns by at most ``2 e / (r + r')`` (Dunkl and Williams), which is below ``d + d^2`` for ``d = e / r``.
- Cosine, the product of two directions of length <= 1: moves by at most the sum of both turns; off by (2 n + 8) u.
- Running centre ``c <- (k c + x) / (k + 1)``: what c has moved follows the same recursion; each step adds
  ``3 u (k |c| + |x|) / (k + 1)`` of rounding, on both sides.
- Mean of L frames: moves by slack times the mean of their norms; off by (L + 2) u times that.
- Split: scores of two candidates differ by the sum of p - q over the frames between them, p - q being the product of
  the frame's direction with the difference of those of both means. Each p - q moves by twice the frame's turn and the
  turns of the means, and is off by two cosines' error. Sums of W cosines are off by `_sum`'s operations times W u.

Bounds are first-order and computed in float64; `SAFE` covers both.

numba's cache of `segment_cpu` holds these functions compiled in and looks at the date of that file only: after a change
here, touch it.
"""

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "SAFE",
    "SLACK",
    "TIED",
    "UNIT",
    "boundary_tied",
    "centre_tied",
    "cosine_tied",
    "dot_rounding",
    "margins_for",
    "mean_turn",
    "moved_centre",
    "norm_tied",
]

# margins, float64: the slack (0: nothing is watched), `dot_rounding`, by how much the running centre may have moved
# (Euclidean norm), and 1 once there was a near-tie.
SLACK, _ROUNDING, _CENTRE, TIED = range(4)

UNIT = 2.0**-24
SAFE = 1.01


def dot_rounding(bounds: NDArray[np.int64], pairs: NDArray[np.int64]) -> float:
    """Most operations that a term of a dot product passes, times 2^-24, for the tree of `segment_cpu.tree`."""
    # A term is multiplied, added to its lane, the lane to others, behind them what is left over, then leaves.
    depths = [1 + length // 8 + 3 + length % 8 for length in np.diff(bounds).tolist()]
    for into, other in pairs.tolist():
        depths[into] = max(depths[into], depths[other]) + 1
    return UNIT * depths[0]


def margins_for(slack: float, bounds: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Margins before the first frame; `bounds` and `pairs` are those of `segment_cpu.tree`."""
    return np.array([slack, dot_rounding(bounds, pairs) if slack > 0 else 0.0, 0.0, 0.0])


@numba.njit(nogil=True, cache=True)
def _watch(margins, distance, bound):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    # Written so that NaN, too, is a near-tie.
    if not abs(distance) > SAFE * bound:
        margins[TIED] = 1.0


@numba.njit(nogil=True, cache=True)
def _turn(move, length):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Most that the direction of a vector with r = `length` turns when it moves by `move`."""
    relative = move / length
    return relative + relative * relative


@numba.njit(nogil=True, cache=True)
def norm_tied(margins, norm, threshold):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Watch whether a frame is voiced."""
    slack = margins[SLACK] + margins[_ROUNDING] + 4 * UNIT
    _watch(margins, np.float64(norm) - threshold, slack * norm)


@numba.njit(nogil=True, cache=True)
def cosine_tied(margins, cosine, threshold, turns):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Watch a cosine of two directions that turn by at most `turns` together."""
    _watch(margins, np.float64(cosine) - threshold, turns + 2 * _cosine_rounding(margins))


@numba.njit(nogil=True, cache=True)
def _cosine_rounding(margins):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    return 2 * margins[_ROUNDING] + 8 * UNIT


@numba.njit(nogil=True, cache=True)
def centre_tied(margins, cosine, threshold, centre_square):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Watch the cosine of a frame with the running centre."""
    turns = _turn(margins[SLACK], 1.0) + _turn(margins[_CENTRE], np.sqrt(np.float64(centre_square) + 1e-8))
    cosine_tied(margins, cosine, threshold, turns)


@numba.njit(nogil=True, cache=True)
def moved_centre(margins, count, centre_square, square):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Follow the running centre as it takes in a frame; `count` is 0 where it begins with the frame."""
    norm, centre_norm = np.sqrt(np.float64(square)), np.sqrt(np.float64(centre_square))
    move = count * margins[_CENTRE] + margins[SLACK] * norm
    if count > 0:
        move += 2 * 3 * UNIT * (count * centre_norm + norm)
    margins[_CENTRE] = move / (count + 1)


@numba.njit(nogil=True, cache=True)
def mean_turn(margins, squares, begin, end, mean_square):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Most that the direction of the mean of frames [begin, end) turns; `squares` are those of their norms."""
    total = 0.0
    for t in range(begin, end):
        total += np.sqrt(np.float64(squares[t]))
    frames = end - begin
    move = (margins[SLACK] + 2 * (frames + 2) * UNIT) * total / max(1, frames)
    return _turn(move, np.sqrt(np.float64(mean_square) + 1e-8))


@numba.njit(nogil=True, cache=True)
def boundary_tied(margins, p, q, turns):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Watch the split of frames with cosines p and q to two means whose directions turn by `turns` together."""
    size = len(p)
    total, top, best = 0.0, 0.0, 0
    for i in range(1, size):
        total += np.float64(p[i - 1]) - np.float64(q[i - 1])
        if total > top:
            top, best = total, i
    # p and q are rounded on both sides; the frame's direction counts twice, for its product with each mean's.
    each = 2 * _turn(margins[SLACK], 1.0) + turns + 4 * _cosine_rounding(margins)
    # Operations of a term of `_sum`: lanes, their sum, what is left over, the tree, and the sum of both sums.
    depth = min(size, 128) / 8 + 3 + 7 + np.log2(np.float64(size)) + 1
    rounding = 2 * depth * size * UNIT
    total = 0.0
    for i in range(size):
        if i != best:
            _watch(margins, top - total, each * abs(i - best) + rounding)
        total += np.float64(p[i]) - np.float64(q[i])
