"""Codes of a residual vector quantizer: ``torch.ops.speechtok.residual_encode``.

For each codebook in turn: the nearest code, subtract it, go on with what is left. Candidates come from the matrix
product, distances from differences, as in `speechtok.kernels.nearest`.

The second result, the *slack* of a row, tells how far the row may move before any of its ids changes. As long as no id
changes, every book subtracts the same constants, so a move of the row by a vector moves what each book is given by that
same vector. A move shorter than half the gap between a book's two nearest distances keeps its nearest code nearest
(triangle inequality). From the first book to the last, a move shorter than the smallest of these halves changes no id.
"""

import torch
from torch import Tensor

from speechtok.errors import InputError
from speechtok.kernels.residual_cpu import encode_cpu

__all__ = ["residual_encode", "residual_encode_reference"]


def residual_encode_reference(rows: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Plain float64 form of `residual_encode`; N x V distances in memory."""
    residual = rows.double()
    slack = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device)
    ids = []
    for book in codebooks.double():
        distances = torch.cdist(residual, book, compute_mode="donot_use_mm_for_euclid_dist")
        ids.append(distances.argmin(1))
        if len(book) > 1:
            first, second = distances.topk(2, dim=1, largest=False).values.unbind(1)
            slack = torch.minimum(slack, (second - first) / 2)
        residual = residual - book[ids[-1]]
    return torch.stack(ids, 1).int(), slack.float()


def residual_encode(rows: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of each row.

    Parameters
    ----------
    rows : float32 [N, D]
    codebooks : float32 [K, V, D]

    Returns
    -------
    ids : int32 [N, K]
        In each book the index of the nearest code; the lowest of equals.
    slack : float32 [N]
        No change of the row of smaller Euclidean length changes an id (infinite for V = 1).

    Raises
    ------
    InputError
        If shapes do not fit.
    """
    if rows.ndim != 2 or codebooks.ndim != 3 or 0 in codebooks.shape or rows.shape[1] != codebooks.shape[2]:
        raise InputError(
            f"rows have shape {tuple(rows.shape)}, codebooks {tuple(codebooks.shape)}; [N, D] and [K, V, D] are needed"
        )
    with torch.autocast(rows.device.type, enabled=False):  # a half-precision product would name other codes
        ids, slack = torch.ops.speechtok.residual_encode(rows.detach(), codebooks.detach())
    return ids, slack


def residual_encode_triton(rows: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """All books in one launch, no [N, V] matrix in memory. Also runs under Triton's interpreter."""
    from speechtok.kernels.residual_triton import encode

    return encode(rows, codebooks.contiguous())


def _encode_fake(rows: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0], codebooks.shape[0], dtype=torch.int32), rows.new_empty(rows.shape[0])


# As for nearest_centroids: torch.library.custom_op would import the compiler on the first call.
_library = torch.library.Library("speechtok", "FRAGMENT")
_library.define("residual_encode(Tensor rows, Tensor codebooks) -> (Tensor ids, Tensor slack)")
_library.impl("residual_encode", encode_cpu, "CPU")
_library.impl("residual_encode", residual_encode_triton, "CUDA")
torch.library.register_fake("speechtok::residual_encode", _encode_fake, lib=_library)
