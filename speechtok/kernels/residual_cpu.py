"""The CPU form of `speechtok.kernels.residual`: matrix products on tiles that stay in cache, a scan in numba."""

import numba
import numpy as np
import torch
from torch import Tensor

__all__ = ["encode_cpu"]

_TILE = 256  # rows of one matrix product: with 1024 codes its result is 1 MB, the size of a second-level cache
_LANES = 16  # rows are padded to a multiple: what is left over would be scanned one by one


@numba.njit(nogil=True, cache=True)
def _two_smallest(products, bias, low, next_low, first, second):  # type: ignore[no-untyped-def]  # pragma: no cover
    """For each column of products [V, n] the rows of the two smallest ``bias - products``.

    Codes are rows so that the inner loop runs over vectors that have nothing to do with each other: no branches, so the
    compiler takes 8 or 16 at once.
    """
    low[:], next_low[:], first[:], second[:] = np.inf, np.inf, -1, -1
    for code in range(products.shape[0]):
        offset = bias[code]
        for i in range(products.shape[1]):
            score = offset - products[code, i]
            wins, places = score < low[i], score < next_low[i]
            second[i] = first[i] if wins else (code if places else second[i])
            next_low[i] = low[i] if wins else (score if places else next_low[i])
            first[i] = code if wins else first[i]
            low[i] = score if wins else low[i]


@numba.njit(nogil=True, cache=True)
def _subtract(residual, codes, first, second, ids, slack):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Settle the two candidates by distances from differences, then subtract the nearest code, in place."""
    for i in range(residual.shape[0]):
        near, far = max(first[i], 0), second[i]  # no score of a row with NaN is smallest; it gets code 0
        a, b = 0.0, np.inf
        for k in range(residual.shape[1]):
            difference = np.float64(residual[i, k]) - codes[near, k]
            a += difference * difference
        if far >= 0:
            b = 0.0
            for k in range(residual.shape[1]):
                difference = np.float64(residual[i, k]) - codes[far, k]
                b += difference * difference
            # Equal distances go to the lower index, as argmin does.
            if b < a or (b == a and far < near):
                near, a, b = far, b, a
        for k in range(residual.shape[1]):
            residual[i, k] -= codes[near, k]
        ids[i] = near
        half = (np.sqrt(b) - np.sqrt(a)) / 2
        slack[i] = slack[i] if half >= slack[i] else half  # NaN stays NaN


def encode_cpu(rows: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and slack of rows float32 [N, D] in books float32 [K, V, D]: int32 [N, K], float32 [N]."""
    count, codes = len(rows), codebooks.shape[1]
    padded = -(-count // _LANES) * _LANES
    residual = torch.zeros(padded, rows.shape[1])
    residual[:count] = rows
    ids = torch.empty(len(codebooks), padded, dtype=torch.int32)
    slack = torch.full((padded,), torch.inf)
    products = torch.empty(codes * min(_TILE, padded))
    scores = np.empty((2, _TILE), np.float32)
    candidates = np.empty((2, _TILE), np.int32)
    for book, found in zip(codebooks.contiguous(), ids, strict=True):
        # Scores cancel where everything lies far from the origin; distances do not change under a common shift.
        shift = book.mean(0)
        shifted = book - shift
        bias = torch.linalg.vector_norm(shifted, dim=1).square_().div_(2).numpy()
        for begin in range(0, padded, _TILE):
            tile = residual[begin : begin + _TILE]
            size = len(tile)
            product = products[: codes * size].view(codes, size)
            torch.mm(shifted, (tile - shift).T, out=product)
            first, second = candidates[:, :size]
            _two_smallest(product.numpy(), bias, scores[0, :size], scores[1, :size], first, second)
            part = slice(begin, begin + size)
            _subtract(tile.numpy(), book.numpy(), first, second, found[part].numpy(), slack[part].numpy())
    return ids[:, :count].T.contiguous(), slack[:count].clone()
