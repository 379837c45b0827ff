"""Straight paths from noise to data, and the way along a field of velocities (flow matching).

Lipman et al. 2023 (arXiv 2210.02747, optimal transport paths). From noise z at time 0 to data x at time 1 a point moves
along ``(1 - (1 - s) t) z + t x``, with velocity ``x - (1 - s) z``.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from speechtok.errors import InputError

__all__ = ["Method", "integrate", "point", "velocity"]

Method = Literal["euler", "midpoint"]


def point(target: Tensor, noise: Tensor, time: Tensor, sigma: float) -> Tensor:
    """Where a path is at a time: ``(1 - (1 - sigma) t) noise + t target``; `time` is float [B], the others [B, ...]."""
    time = time.view(-1, *[1] * (target.ndim - 1))
    return (1 - (1 - sigma) * time) * noise + time * target


def velocity(target: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """How fast it moves, at all times: ``target - (1 - sigma) noise``."""
    return target - (1 - sigma) * noise


def integrate(field: Callable[[Tensor, Tensor], Tensor], start: Tensor, steps: int, method: Method = "euler") -> Tensor:
    """Follow a field of velocities from time 0 to 1.

    Parameters
    ----------
    field : callable
        Velocities at points float [B, ...] and one time, float [].
    start : float [B, ...]
    steps : int
        Of equal length.
    method : {"euler", "midpoint"}
        Velocity of a step's start, or of its middle, which takes two evaluations and errs by the square of the length.

    Returns
    -------
    float [B, ...]

    Raises
    ------
    InputError
    """
    if steps < 1 or method not in ("euler", "midpoint"):
        raise InputError(f"steps={steps}, method={method!r}: at least one step of euler or midpoint")
    x, length = start, 1.0 / steps
    for step in range(steps):
        time = torch.tensor(step * length, device=start.device)
        speed = field(x, time)
        if method == "midpoint":
            speed = field(x + 0.5 * length * speed, time + 0.5 * length)
        x = x + length * speed
    return x
