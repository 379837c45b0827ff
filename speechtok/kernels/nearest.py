"""Nearest centroids: ``torch.ops.speechtok.nearest_centroids``.

For each row the nearest centroid and the Euclidean distances to the two nearest. The second distance
tells how far a row may move before its id changes, which decides near-ties (`speechtok.tokenizer`).
Candidates come from the matrix product ``|c|^2 - 2 x.c``; the two distances are then computed from
differences, so that cancellation does not reach them.
"""

import numba
import numpy as np
import torch
from torch import Tensor

__all__ = ["nearest_centroids", "nearest_centroids_reference"]

_TILE = 1024  # rows of one matrix product on CPU: bounds the memory to _TILE * K floats


def nearest_centroids_reference(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Plain float64 form of `nearest_centroids`; K distances per row in memory."""
    distances = torch.cdist(rows.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    if centroids.shape[0] == 1:
        best, second = distances, torch.full_like(distances, torch.inf)
        return torch.zeros(len(rows), dtype=torch.int32, device=rows.device), torch.cat((best, second), 1).float()
    values, indices = distances.topk(2, dim=1, largest=False)
    return indices[:, 0].int(), values.float()


@numba.njit(nogil=True, cache=True)
def _scan(rows, centroids, scores, ids, distances):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Two smallest of each row of scores [n, K], then their distances from differences."""
    for row in range(scores.shape[0]):
        first, second = 0, -1
        low, next_low = scores[row, 0], np.float32(np.inf)
        for column in range(1, scores.shape[1]):
            score = scores[row, column]
            if score < next_low:
                if score < low:
                    second, next_low = first, low
                    first, low = column, score
                else:
                    second, next_low = column, score
        a, b = 0.0, 0.0
        for k in range(rows.shape[1]):
            difference = np.float64(rows[row, k]) - centroids[first, k]
            a += difference * difference
        if second < 0:
            b = np.inf
        else:
            for k in range(rows.shape[1]):
                difference = np.float64(rows[row, k]) - centroids[second, k]
                b += difference * difference
        # Equal distances go to the lower index, as argmin does.
        if b < a or (b == a and second < first):
            first, a, b = second, b, a
        ids[row] = first
        distances[row, 0], distances[row, 1] = np.sqrt(a), np.sqrt(b)


def nearest_centroids(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each row.

    Parameters
    ----------
    rows : float32 [N, D]
    centroids : float32 [K, D]

    Returns
    -------
    ids : int32 [N]
        Index of the nearest centroid; the lowest of equals.
    distances : float32 [N, 2]
        Euclidean distance to it and to the second nearest (infinite for K = 1).
    """
    with torch.autocast(rows.device.type, enabled=False):  # a half-precision product would name other centroids
        ids, distances = torch.ops.speechtok.nearest_centroids(rows.detach(), centroids.detach())
    return ids, distances


def _nearest_cpu(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.empty(len(rows), dtype=torch.int32)
    distances = torch.empty(len(rows), 2)
    rows, centroids = rows.contiguous(), centroids.contiguous()
    # Scores cancel where everything lies far from the origin; distances do not change under a common shift.
    shift = centroids.mean(0)
    shifted = centroids - shift
    bias = shifted.square().sum(1)
    for begin in range(0, len(rows), _TILE):
        tile = rows[begin : begin + _TILE]
        scores = torch.addmm(bias, tile - shift, shifted.T, alpha=-2)
        _scan(
            tile.numpy(), centroids.numpy(), scores.numpy(),
            ids[begin : begin + _TILE].numpy(), distances[begin : begin + _TILE].numpy(),
        )  # fmt: skip
    return ids, distances


def nearest_centroids_triton(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Fused search on GPU: no [N, K] matrix in memory. Also runs under Triton's interpreter."""
    from speechtok.kernels.nearest_triton import top_two

    rows, centroids = rows.contiguous(), centroids.contiguous()
    shift = centroids.mean(0)
    first, second = top_two(rows - shift, centroids - shift)
    pair = torch.stack((first, second.clamp_min(0)), 1)
    distances = torch.stack([(rows - centroids[pair[:, i]]).norm(dim=1) for i in (0, 1)], 1)
    if len(centroids) == 1:
        distances[:, 1] = torch.inf
        return first.int(), distances
    swap = (distances[:, 1] < distances[:, 0]) | ((distances[:, 1] == distances[:, 0]) & (second < first))
    ids = torch.where(swap, second, first)
    return ids.int(), torch.where(swap[:, None], distances.flip(1), distances)


def _nearest_fake(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0], dtype=torch.int32), rows.new_empty(rows.shape[0], 2)


# torch.library.custom_op would import the compiler on the first call, which takes two seconds.
_library = torch.library.Library("speechtok", "FRAGMENT")
_library.define("nearest_centroids(Tensor rows, Tensor centroids) -> (Tensor ids, Tensor distances)")
_library.impl("nearest_centroids", _nearest_cpu, "CPU")
_library.impl("nearest_centroids", nearest_centroids_triton, "CUDA")
torch.library.register_fake("speechtok::nearest_centroids", _nearest_fake, lib=_library)
