"""Linear prediction of many windows by Burg's method: ``torch.ops.speechtok.burg``.

Burg (1975): stage by stage, the reflection coefficient that makes forward and backward prediction errors together
smallest over the window. Its filters are stable without a taper or an autocorrelation. The warped form predicts from
all-pass sections instead of delays, as in LiPCoT (Anjum, arXiv 2408.07292), which spends the poles where `warp`
stretches the frequency axis: with a positive value at the low end, near the Bark scale at 0.58 for 16 kHz (Smith and
Abel, 1999).
"""

import torch
from torch import Tensor

from speechtok.errors import InputError
from speechtok.kernels.burg_cpu import RESIDUE, burg_cpu

__all__ = ["burg", "burg_reference"]


def burg_reference(windows: Tensor, order: int, warp: float = 0.0, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Plain form of `burg` in torch: all windows at once, sample by sample through the all-pass sections."""
    forward = backward = windows
    power = windows.square().sum(1)
    variance = power / windows.shape[1]
    least = torch.where(variance <= floor, torch.inf, 2 * RESIDUE * power)
    coefficients = windows.new_ones(len(windows), 1)
    reflection = windows.new_empty(len(windows), order)
    for stage in range(order):
        ahead, delayed = forward[:, 1:], [torch.zeros_like(variance)]
        for i in range(backward.shape[1] - 1):
            delayed.append(backward[:, i] - warp * backward[:, i + 1] + warp * delayed[-1])
        behind = torch.stack(delayed[1:], 1)
        power = (ahead.square() + behind.square()).sum(1)
        k = torch.where(power <= least, 0.0, -2 * (ahead * behind).sum(1) / power).clamp(-1, 1)
        forward, backward = ahead + k[:, None] * behind, behind + k[:, None] * ahead
        longer = torch.nn.functional.pad(coefficients, (0, 1))
        coefficients = longer + k[:, None] * longer.flip(1)
        variance = variance * (1 - k.square())
        reflection[:, stage] = k
    return coefficients[:, 1:].contiguous(), variance, reflection


def burg(windows: Tensor, order: int, warp: float = 0.0, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction filters of windows; no mean is removed and no taper applied.

    Parameters
    ----------
    windows : float64 [W, n]
        Samples; n is greater than `order`.
    order : int
        Poles p of each filter.
    warp : float
        Coefficient of the all-pass sections, between -1 and 1; 0: plain delays, Burg's method itself.
    floor : float
        Mean square (squared units of the samples) up to which a window counts as silent: nothing is predicted, all its
        coefficients are 0. With 0 these are windows of zeros.

    Returns
    -------
    coefficients : float64 [W, p]
        a_1 ... a_p of ``A(z) = 1 + sum_k a_k z^-k``, with the all-pass section in the place of ``z^-1`` where `warp` is
        not 0. What ``A`` leaves over is white, so the spectrum follows ``variance / |A|^2``, see
        `speechtok.audio.lpc.power_spectrum`.
    variance : float64 [W]
        Of what is left over: the mean square of the window times the product of all ``1 - k^2``; 0 for zeros.
    reflection : float64 [W, p]
        Reflection coefficients k, in [-1, 1]; at the ends only where a window is predicted without error. From where
        nothing but rounding error is left they are 0.

    Raises
    ------
    InputError
        If windows are not float64 [W, n] or too short, or `order`, `warp` or `floor` is out of its range.
    """
    if windows.ndim != 2 or windows.dtype != torch.float64:
        raise InputError(f"windows are {windows.dtype} {list(windows.shape)}; float64 [windows, samples] is needed")
    if not 1 <= order < windows.shape[1]:
        raise InputError(
            f"order {order} does not fit windows of {windows.shape[1]} samples; at least 1 and less than that is needed"
        )
    if not -1 < warp < 1 or not 0 <= floor < float("inf"):
        raise InputError(f"warp {warp}, floor {floor}: warp must be between -1 and 1, floor finite and at least 0")
    coefficients, variance, reflection = torch.ops.speechtok.burg(windows.detach(), order, float(warp), float(floor))
    return coefficients, variance, reflection


def burg_triton(windows: Tensor, order: int, warp: float, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """One window per lane, sums in the order of the samples. Also runs under Triton's interpreter."""
    from speechtok.kernels.burg_triton import scan

    return scan(windows, order, warp, floor, RESIDUE)


def _burg_fake(windows: Tensor, order: int, warp: float, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    coefficients, reflection = (windows.new_empty(windows.shape[0], order) for _ in range(2))
    return coefficients, windows.new_empty(windows.shape[0]), reflection


_library = torch.library.Library("speechtok", "FRAGMENT")
_library.define(
    "burg(Tensor windows, int order, float warp, float floor)"
    " -> (Tensor coefficients, Tensor variance, Tensor reflection)"
)
_library.impl("burg", burg_cpu, "CPU")
_library.impl("burg", burg_triton, "CUDA")
torch.library.register_fake("speechtok::burg", _burg_fake, lib=_library)
