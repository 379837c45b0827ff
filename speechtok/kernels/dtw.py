"""Dynamic time warping of many pairs: ``torch.ops.speechtok.dtw``.

Pairs are blocks of one matrix of frame distances, so a matrix product of all frames against all frames serves every
pair of items without a padded copy per pair; the caller bounds memory by the size of that matrix.

Convention (ZeroSpeech's, which published ABX figures follow): steps (1, 0), (0, 1) and (1, 1) of weight one; the cost
of the last cell is divided by the number of cells on the backtracked path; backtracking goes to the diagonal cell where
it is no dearer than both others, else left (one column back) where that is no dearer than up, else up. The path's
length follows the same decisions forward, so no path is stored. Sums are float32 in one fixed order: all
implementations give the same bits.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from speechtok.errors import InputError

__all__ = ["dtw", "dtw_reference"]


def dtw_reference(distances: Tensor, spans: Tensor) -> Tensor:
    """Plain form of `dtw`: the full cost matrix of each pair, then an explicit walk back."""
    table = distances.cpu().numpy()
    results = np.zeros(len(spans), np.float32)
    for index, (top, rows, left, columns) in enumerate(spans.tolist()):
        cost = np.zeros((rows, columns), np.float32)
        for i in range(rows):
            for j in range(columns):
                before = [cost[a, b] for a, b in ((i - 1, j), (i - 1, j - 1), (i, j - 1)) if a >= 0 and b >= 0]
                cost[i, j] = table[top + i, left + j] + (min(before) if before else np.float32(0))
        i, j, cells = rows - 1, columns - 1, 1
        while i > 0 or j > 0:
            if i == 0 or j == 0:
                i, j = max(0, i - 1), max(0, j - 1)
            elif cost[i - 1, j - 1] <= min(cost[i, j - 1], cost[i - 1, j]):
                i, j = i - 1, j - 1
            elif cost[i, j - 1] <= cost[i - 1, j]:
                j -= 1
            else:
                i -= 1
            cells += 1
        results[index] = cost[-1, -1] / np.float32(cells)
    return torch.from_numpy(results).to(distances.device)


def dtw(distances: Tensor, spans: Tensor) -> Tensor:
    """Mean distance along the best path of each pair.

    Parameters
    ----------
    distances : float32 [R, C]
        Frame distances, not NaN. A padded batch [P, N, M] is the matrix [P * N, M].
    spans : int64 [P, 4]
        The block of each pair: first row, number of rows, first column, number of columns (each at least one long).

    Returns
    -------
    float32 [P]

    Raises
    ------
    InputError
        If shapes do not fit or a block is empty or leaves the matrix.
    """
    if distances.ndim != 2 or spans.ndim != 2 or spans.shape[1] != 4:
        raise InputError(
            f"dtw takes distances [R, C] and spans [P, 4], not {tuple(distances.shape)} and {tuple(spans.shape)}"
        )
    if len(spans):
        first, count = spans[:, 0::2], spans[:, 1::2]
        limit = torch.tensor(distances.shape, device=spans.device)
        if bool((first < 0).any() | (count < 1).any() | (first + count > limit).any()):
            raise InputError(f"a span is empty or leaves the distances of shape {tuple(distances.shape)}")
    return torch.ops.speechtok.dtw(distances.detach().float(), spans.long())


@numba.njit(nogil=True, cache=True)
def _scan(distances, spans, results):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    widest = 0
    for pair in range(spans.shape[0]):
        widest = max(widest, spans[pair, 3])
    # Cost and path length of the previous row, overwritten from left to right by the current one.
    cost, cells = np.empty(widest, np.float32), np.empty(widest, np.int32)
    for pair in range(spans.shape[0]):
        top, rows, start, columns = spans[pair, 0], spans[pair, 1], spans[pair, 2], spans[pair, 3]
        total, length = np.float32(0), np.int32(0)
        for j in range(columns):
            total, length = distances[top, start + j] + total, length + np.int32(1)
            cost[j], cells[j] = total, length
        for i in range(1, rows):
            diagonal, diagonal_cells = cost[0], cells[0]
            total, length = distances[top + i, start] + cost[0], cells[0] + np.int32(1)
            cost[0], cells[0] = total, length
            for j in range(1, columns):
                up, up_cells = cost[j], cells[j]
                if diagonal <= total and diagonal <= up:
                    total, length = diagonal, diagonal_cells
                elif not total <= up:
                    total, length = up, up_cells
                total, length = distances[top + i, start + j] + total, length + np.int32(1)
                diagonal, diagonal_cells = up, up_cells
                cost[j], cells[j] = total, length
        results[pair] = total / np.float32(length)


def _dtw_cpu(distances: Tensor, spans: Tensor) -> Tensor:
    results = torch.empty(len(spans))
    _scan(distances.contiguous().numpy(), spans.contiguous().numpy(), results.numpy())
    return results


def dtw_triton(distances: Tensor, spans: Tensor) -> Tensor:
    """One pair per GPU thread. Also runs under Triton's interpreter."""
    from speechtok.kernels.dtw_triton import scan

    return scan(distances.contiguous(), spans.contiguous())


def _dtw_fake(distances: Tensor, spans: Tensor) -> Tensor:
    return distances.new_empty(spans.shape[0])


_library = torch.library.Library("speechtok", "FRAGMENT")
_library.define("dtw(Tensor distances, Tensor spans) -> Tensor")
_library.impl("dtw", _dtw_cpu, "CPU")
_library.impl("dtw", dtw_triton, "CUDA")
torch.library.register_fake("speechtok::dtw", _dtw_fake, lib=_library)
