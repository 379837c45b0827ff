"""Triton search for the two nearest centroids. Imported only where Triton is needed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["top_two"]


@triton.jit
def _top_two(  # type: ignore[no-untyped-def]
    rows, centroids, norms, first, second, n, k, d,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    next_best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    best_id = tl.zeros((BLOCK_N,), tl.int32)
    next_id = tl.full((BLOCK_N,), -1, tl.int32)
    for k0 in range(0, k, BLOCK_K):
        c = k0 + tl.arange(0, BLOCK_K)
        dot = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for d0 in range(0, d, BLOCK_D):
            j = d0 + tl.arange(0, BLOCK_D)
            x = tl.load(rows + r[:, None] * d + j[None, :], mask=(r[:, None] < n) & (j[None, :] < d), other=0.0)
            y = tl.load(centroids + c[None, :] * d + j[:, None], mask=(c[None, :] < k) & (j[:, None] < d), other=0.0)
            dot += tl.dot(x, y, input_precision="ieee")
        score = tl.load(norms + c, mask=c < k, other=float("inf"))[None, :] - 2 * dot
        # The two smallest of this tile, then merged with the two smallest so far.
        low = tl.min(score, axis=1)
        low_at = tl.argmin(score, axis=1)
        rest = tl.where(tl.arange(0, BLOCK_K)[None, :] == low_at[:, None], float("inf"), score)
        low2 = tl.min(rest, axis=1)
        low2_id = k0 + tl.argmin(rest, axis=1)
        low_id = k0 + low_at
        wins = low < best
        # The loser of the two firsts competes with the winner's second.
        rival = tl.where(wins, best, low)
        rival_id = tl.where(wins, best_id, low_id)
        runner = tl.where(wins, low2, next_best)
        runner_id = tl.where(wins, low2_id, next_id)
        next_best = tl.minimum(rival, runner)
        next_id = tl.where(rival <= runner, rival_id, runner_id)
        best = tl.where(wins, low, best)
        best_id = tl.where(wins, low_id, best_id)
    tl.store(first + r, best_id, mask=r < n)
    tl.store(second + r, next_id, mask=r < n)


def top_two(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the two nearest centroids, int64 [N] each; rows float32 [N, D], centroids float32 [K, D]."""
    n, d = rows.shape
    k = len(centroids)
    first = torch.zeros(n, dtype=torch.int32, device=rows.device)
    second = torch.full((n,), -1, dtype=torch.int32, device=rows.device)
    if n:
        block_n = 64
        _top_two[(triton.cdiv(n, block_n),)](
            rows, centroids, centroids.square().sum(1), first, second, n, k, d, BLOCK_N=block_n, BLOCK_K=64, BLOCK_D=32
        )
    return first.long(), second.long()
