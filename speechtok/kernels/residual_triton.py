"""Triton form of `speechtok.kernels.residual`. Imported only where Triton is needed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["encode"]


@triton.jit
def _encode(  # type: ignore[no-untyped-def]
    residual, books, shifted, shifts, bias, ids, slack, n, k, v, d,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    room = tl.full((BLOCK_N,), float("inf"), tl.float32)
    for q in range(k):
        best = tl.full((BLOCK_N,), float("inf"), tl.float32)
        next_best = tl.full((BLOCK_N,), float("inf"), tl.float32)
        best_id = tl.zeros((BLOCK_N,), tl.int32)
        next_id = tl.full((BLOCK_N,), -1, tl.int32)
        for v0 in range(0, v, BLOCK_V):
            c = v0 + tl.arange(0, BLOCK_V)
            dot = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            for d0 in range(0, d, BLOCK_D):
                j = d0 + tl.arange(0, BLOCK_D)
                x = tl.load(residual + r[:, None] * d + j[None, :], mask=(r[:, None] < n) & (j[None, :] < d), other=0.0)
                x -= tl.load(shifts + j, mask=j < d, other=0.0)[None, :]
                y = tl.load(shifted + c[None, :] * d + j[:, None], mask=(c[None, :] < v) & (j[:, None] < d), other=0.0)
                dot += tl.dot(x, y, input_precision="ieee")
            score = tl.load(bias + c, mask=c < v, other=float("inf"))[None, :] - dot
            # The two smallest of this tile, then merged with the two smallest so far.
            low = tl.min(score, axis=1)
            low_at = tl.argmin(score, axis=1)
            rest = tl.where(tl.arange(0, BLOCK_V)[None, :] == low_at[:, None], float("inf"), score)
            low2 = tl.min(rest, axis=1)
            low2_id = v0 + tl.argmin(rest, axis=1)
            low_id = v0 + low_at
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
        # Where there is one code, or no score is finite, the second place is nobody's.
        alone = next_best == float("inf")
        next_id = tl.where(alone, best_id, next_id)
        a = tl.zeros((BLOCK_N,), tl.float32)
        b = tl.zeros((BLOCK_N,), tl.float32)
        for d0 in range(0, d, BLOCK_D):
            j = d0 + tl.arange(0, BLOCK_D)
            inside = (r[:, None] < n) & (j[None, :] < d)
            x = tl.load(residual + r[:, None] * d + j[None, :], mask=inside, other=0.0)
            y = tl.load(books + best_id[:, None] * d + j[None, :], mask=inside, other=0.0)
            z = tl.load(books + next_id[:, None] * d + j[None, :], mask=inside, other=0.0)
            a += tl.sum((x - y) * (x - y), axis=1)
            b += tl.sum((x - z) * (x - z), axis=1)
        # Equal distances go to the lower index, as argmin does.
        swap = (b < a) | ((b == a) & (next_id < best_id))
        found = tl.where(swap, next_id, best_id)
        gap = tl.sqrt(tl.maximum(a, b)) - tl.sqrt(tl.minimum(a, b))
        room = tl.minimum(room, tl.where(alone, float("inf"), gap / 2))
        tl.store(ids + r * k + q, found, mask=r < n)
        tl.debug_barrier()  # all threads of this block have read the residual
        for d0 in range(0, d, BLOCK_D):
            j = d0 + tl.arange(0, BLOCK_D)
            inside = (r[:, None] < n) & (j[None, :] < d)
            place = residual + r[:, None] * d + j[None, :]
            left = tl.load(place, mask=inside, other=0.0)
            left -= tl.load(books + found[:, None] * d + j[None, :], mask=inside, other=0.0)
            tl.store(place, left, mask=inside)
        books += v * d
        shifted += v * d
        shifts += d
        bias += v
        tl.debug_barrier()  # the next book reads what others have written
    tl.store(slack + r, room, mask=r < n)


def encode(rows: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int32 [N, K] and slack float32 [N] of rows float32 [N, D]; codebooks float32 [K, V, D], contiguous."""
    (n, d), (k, v, _) = rows.shape, codebooks.shape
    ids = torch.empty(n, k, dtype=torch.int32, device=rows.device)
    slack = torch.empty(n, device=rows.device)
    if n:
        residual = rows.clone(memory_format=torch.contiguous_format)
        # Scores cancel where everything lies far from the origin; distances do not change under a common shift.
        shifts = codebooks.mean(1)
        shifted = codebooks - shifts[:, None]
        bias = shifted.square().sum(2) / 2
        block_n = 64
        _encode[(triton.cdiv(n, block_n),)](
            residual, codebooks, shifted, shifts, bias, ids, slack, n, k, v, d,
            BLOCK_N=block_n, BLOCK_V=64, BLOCK_D=32,
        )  # fmt: skip
    return ids, slack
