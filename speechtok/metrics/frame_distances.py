"""Distances between single frames, the ground on which sequences are compared (`speechtok.metrics.abx`).

Computed in float64 and rounded once to float32, so that equal frames are at distance 0 and equal pairs tie wherever
they stand in a matrix product.
"""

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechtok.errors import InputError

__all__ = ["Distance", "frame_distances", "validate_frames"]

Distance = Literal["angular", "euclidean", "symmetric_kl", "identical"]

# Closer to equality than this (relative, of squares) is rounding: float32 frames cannot say more.
_EQUAL = 1e-12
_KL_FLOOR = 1e-6  # added to probabilities before the logarithm, as in fastabx
_SUM_TOLERANCE = 1e-3


def validate_frames(frames: NDArray[Any], distance: str) -> None:
    """Check frames for a distance.

    Parameters
    ----------
    frames : float [F, D]; for ``identical`` int [F] or [F, K]
    distance : str

    Raises
    ------
    InputError
        If the name is unknown, the array has another form, or values are not finite, or for ``symmetric_kl`` rows are
        not probabilities.
    """
    if distance not in get_args(Distance):
        raise InputError(f"distance {distance!r} is none of {', '.join(get_args(Distance))}")
    if distance == "identical":
        if frames.dtype.kind not in "iu" or frames.ndim not in (1, 2):
            raise InputError(f"distance 'identical' compares units, integer [F] or [F, K], not {frames.dtype}")
        return
    if frames.dtype.kind != "f" or frames.ndim != 2 or frames.shape[1] == 0:
        raise InputError(f"distance {distance!r} compares float frames [F, D], not {frames.dtype} {frames.shape}")
    if not np.isfinite(frames).all():
        raise InputError("frames hold NaN or infinite values")
    if distance == "symmetric_kl" and len(frames):
        sums = frames.sum(1, dtype=np.float64)
        if frames.min() < 0 or np.abs(sums - 1).max() > _SUM_TOLERANCE:
            raise InputError("distance 'symmetric_kl' compares probabilities: values >= 0 that sum to 1 in each frame")


def frame_distances(x: Tensor, y: Tensor, distance: Distance) -> Tensor:
    """Distance of every frame of `x` from every frame of `y`.

    Parameters
    ----------
    x, y : float [A, D] and [B, D]; for ``identical`` int [A] and [B], or [A, K] and [B, K]
    distance : {"angular", "euclidean", "symmetric_kl", "identical"}
        Angle over pi, in [0, 1]; a null vector is at 1 from all others and at 0 from null vectors, as in libri-light.
        Euclidean norm. Mean of both Kullback-Leibler divergences (nats). Share of codebooks that differ (0 or 1 for
        one codebook).

    Returns
    -------
    float32 [A, B]
    """
    match distance:
        case "angular":
            return _angular(x.double(), y.double()).float()
        case "euclidean":
            return _euclidean(x.double(), y.double()).float()
        case "symmetric_kl":
            return _symmetric_kl(x.double(), y.double()).float()
        case "identical":
            rows, columns = x.reshape(len(x), -1), y.reshape(len(y), -1)
            differ = torch.zeros(len(x), len(y), device=x.device)
            for a, b in zip(rows.T, columns.T, strict=True):
                differ += a[:, None] != b[None]
            return differ / rows.shape[1]
    raise InputError(f"distance {distance!r} is none of {', '.join(get_args(Distance))}")


def _angular(x: Tensor, y: Tensor) -> Tensor:
    x_norm, y_norm = x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
    x_null, y_null = x_norm == 0, (y_norm == 0).T
    cosine = (x / x_norm.masked_fill(x_null, 1)) @ (y / y_norm.masked_fill(y_null.T, 1)).T
    angle = torch.acos(cosine.clamp(-1, 1)) / math.pi
    angle.masked_fill_((cosine > 1 - _EQUAL) | (x_null & y_null), 0)
    return angle.masked_fill_(x_null != y_null, 1)


def _euclidean(x: Tensor, y: Tensor) -> Tensor:
    x_square, y_square = x.square().sum(1, keepdim=True), y.square().sum(1, keepdim=True).T
    scale = x_square + y_square
    square = torch.addmm(scale, x, y.T, alpha=-2)
    return square.masked_fill_(square < _EQUAL * scale, 0).sqrt_()


def _symmetric_kl(x: Tensor, y: Tensor) -> Tensor:
    x_log, y_log = (x + _KL_FLOOR).log(), (y + _KL_FLOOR).log()
    own = (x * x_log).sum(1, keepdim=True) + (y * y_log).sum(1, keepdim=True).T
    value = (own - x @ y_log.T - x_log @ y.T) / 2
    return value.masked_fill_(value < _EQUAL, 0)
