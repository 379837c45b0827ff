"""Triton form of `speechtok.kernels.burg`. Imported only where Triton is needed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["scan"]


@triton.jit
def _burg(  # type: ignore[no-untyped-def]
    forward, backward, coefficients, reflection, variance, settings, windows, samples, order, BLOCK_W: tl.constexpr
):
    # Every lane owns a column of all arrays and reads there only what it has written itself, so nothing need wait.
    w = tl.program_id(0).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = w < windows
    # Scalars that are handed over as such would be float32.
    warp, floor, residue = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    energy = tl.zeros((BLOCK_W,), tl.float64)
    for i in range(samples):
        sample = tl.load(forward + i * windows + w, mask=inside, other=0.0)
        energy += sample * sample
    error = energy / samples
    least = tl.where(error <= floor, float("inf"), 2 * residue * energy)
    for m in range(order):
        count = samples - 1 - m
        product = tl.zeros((BLOCK_W,), tl.float64)
        power = tl.zeros((BLOCK_W,), tl.float64)
        delayed = tl.zeros((BLOCK_W,), tl.float64)
        here = tl.load(backward + w, mask=inside, other=0.0)
        for i in range(count):
            there = tl.load(backward + (i + 1) * windows + w, mask=inside, other=0.0)
            ahead = tl.load(forward + (i + 1) * windows + w, mask=inside, other=0.0)
            delayed = (here - warp * there) + warp * delayed
            tl.store(backward + i * windows + w, delayed, mask=inside)
            product += ahead * delayed
            power += ahead * ahead + delayed * delayed
            here = there
        k = tl.where(power <= least, 0.0, -2 * product / power)
        k = tl.where(k > 1.0, 1.0, tl.where(k < -1.0, -1.0, k))
        for i in range(count):
            ahead = tl.load(forward + (i + 1) * windows + w, mask=inside, other=0.0)
            behind = tl.load(backward + i * windows + w, mask=inside, other=0.0)
            tl.store(forward + i * windows + w, ahead + k * behind, mask=inside)
            tl.store(backward + i * windows + w, behind + k * ahead, mask=inside)
        for i in range((m + 1) // 2):
            first = tl.load(coefficients + i * windows + w, mask=inside, other=0.0)
            last = tl.load(coefficients + (m - 1 - i) * windows + w, mask=inside, other=0.0)
            tl.store(coefficients + i * windows + w, first + k * last, mask=inside)
            tl.store(coefficients + (m - 1 - i) * windows + w, last + k * first, mask=inside)
        tl.store(coefficients + m * windows + w, k, mask=inside)
        tl.store(reflection + m * windows + w, k, mask=inside)
        error *= 1 - k * k
    tl.store(variance + w, error, mask=inside)


def scan(windows: Tensor, order: int, warp: float, floor: float, residue: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [W, p], variance [W] and reflection [W, p] of windows [W, n], all float64."""
    count, samples = windows.shape
    variance = windows.new_empty(count)
    coefficients, reflection = (windows.new_empty(order, count) for _ in range(2))
    if count:
        # Samples by windows, so that the lanes of a warp read what lies side by side.
        forward, backward = (windows.T.clone(memory_format=torch.contiguous_format) for _ in range(2))
        settings = windows.new_tensor([warp, floor, residue])
        block = 32
        _burg[(triton.cdiv(count, block),)](
            forward, backward, coefficients, reflection, variance, settings, count, samples, order,
            BLOCK_W=block, num_warps=1,
        )  # fmt: skip
    return coefficients.T.contiguous(), variance, reflection.T.contiguous()
