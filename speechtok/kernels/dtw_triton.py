"""Triton form of dynamic time warping. Imported only where Triton is needed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["scan"]

# Each thread owns one pair and alone reads back what it wrote to the scratch rows, so no barrier is needed.
_WARPS = 4
_LANES = 32 * _WARPS


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    distances, spans, cost, cells, results, pairs, stride, most_rows, most_columns, LANES: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    real = pair < pairs
    top = tl.load(spans + pair * 4, mask=real, other=0)
    rows = tl.load(spans + pair * 4 + 1, mask=real, other=0)
    start = tl.load(spans + pair * 4 + 2, mask=real, other=0)
    columns = tl.load(spans + pair * 4 + 3, mask=real, other=0)
    total = tl.zeros((LANES,), tl.float32)
    length = tl.zeros((LANES,), tl.int32)
    for i in range(most_rows):
        # Nothing lies above the first row nor left of the first column: infinite costs, except before the first cell.
        diagonal = tl.full((LANES,), float("inf"), tl.float32)
        diagonal_cells = tl.zeros((LANES,), tl.int32)
        left = tl.full((LANES,), float("inf"), tl.float32)
        left_cells = tl.zeros((LANES,), tl.int32)
        for j in range(most_columns):
            inside = real & (i < rows) & (j < columns)
            up = tl.load(cost + j * pairs + pair, mask=inside & (i > 0), other=float("inf"))
            up_cells = tl.load(cells + j * pairs + pair, mask=inside & (i > 0), other=0)
            here = tl.load(distances + (top + i) * stride + start + j, mask=inside, other=0.0)
            take_diagonal = (diagonal <= left) & (diagonal <= up)
            take_left = left <= up
            before = tl.where(take_diagonal, diagonal, tl.where(take_left, left, up))
            before_cells = tl.where(take_diagonal, diagonal_cells, tl.where(take_left, left_cells, up_cells))
            before = tl.where((i == 0) & (j == 0), 0.0, before)
            diagonal = up
            diagonal_cells = up_cells
            left = here + before
            left_cells = before_cells + 1
            tl.store(cost + j * pairs + pair, left, mask=inside)
            tl.store(cells + j * pairs + pair, left_cells, mask=inside)
            total = tl.where(inside, left, total)
            length = tl.where(inside, left_cells, length)
    # The rounded quotient: equal ratios of unequal sums must tie.
    tl.store(results + pair, tl.div_rn(total, length.to(tl.float32)), mask=real)


def scan(distances: Tensor, spans: Tensor) -> Tensor:
    """Path means float32 [P] of blocks int64 [P, 4] of float32 [R, C] distances; both contiguous."""
    pairs = len(spans)
    results = torch.empty(pairs, device=distances.device)
    if pairs:
        most_rows, most_columns = int(spans[:, 1].max()), int(spans[:, 3].max())
        cost = torch.empty(most_columns, pairs, device=distances.device)
        cells = torch.empty(most_columns, pairs, dtype=torch.int32, device=distances.device)
        _scan[(triton.cdiv(pairs, _LANES),)](
            distances, spans, cost, cells, results, pairs, distances.shape[1], most_rows, most_columns,
            LANES=_LANES, num_warps=_WARPS, num_stages=1,
        )  # fmt: skip
    return results
