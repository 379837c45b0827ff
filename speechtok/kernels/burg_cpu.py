"""The CPU form of `speechtok.kernels.burg`: one window after the other, its two error sequences in the first cache."""

import numba
import numpy as np
from torch import Tensor

__all__ = ["RESIDUE", "burg_cpu"]

# Part of a window's energy below which what is left of it is rounding error: no stage predicts it any further.
RESIDUE = 1e-28


# "reassoc" lets the sums use vector registers; their order is fixed at compile time, so a window gives the same bits in
# every batch. No "nnan": what is not finite must stay so.
@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _burg(windows, warp, floor, coefficients, variance, reflection):  # type: ignore[no-untyped-def]  # pragma: no cover
    samples, order = windows.shape[1], reflection.shape[1]
    forward, backward = np.empty(samples), np.empty(samples)
    for w in range(len(windows)):
        energy = 0.0
        for i in range(samples):
            sample = windows[w, i]
            forward[i], backward[i] = sample, sample
            energy += sample * sample
        error = energy / samples
        # Of a silent window nothing is worth a prediction. A comparison with NaN is false, so that NaN goes on.
        least = np.inf if error <= floor else 2 * RESIDUE * energy
        for m in range(order):
            count = samples - 1 - m
            if warp != 0.0:  # without warping the delayed error is the error itself, one place further on
                delayed = 0.0
                for i in range(count):
                    delayed = (backward[i] - warp * backward[i + 1]) + warp * delayed
                    backward[i] = delayed
            product, power = 0.0, 0.0
            for i in range(count):
                product += forward[i + 1] * backward[i]
                power += forward[i + 1] * forward[i + 1] + backward[i] * backward[i]
            k = 0.0 if power <= least else -2 * product / power
            k = 1.0 if k > 1.0 else (-1.0 if k < -1.0 else k)  # rounding may pass what Cauchy and Schwarz allow
            for i in range(count):
                ahead, behind = forward[i + 1], backward[i]
                forward[i], backward[i] = ahead + k * behind, behind + k * ahead
            for i in range((m + 1) // 2):
                first, last = coefficients[w, i], coefficients[w, m - 1 - i]
                coefficients[w, i], coefficients[w, m - 1 - i] = first + k * last, last + k * first
            coefficients[w, m] = reflection[w, m] = k
            error *= 1 - k * k
        variance[w] = error


def burg_cpu(windows: Tensor, order: int, warp: float, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [W, p], variance [W] and reflection [W, p] of windows [W, n], all float64."""
    coefficients, reflection = (windows.new_empty(len(windows), order) for _ in range(2))
    variance = windows.new_empty(len(windows))
    _burg(windows.contiguous().numpy(), warp, floor, coefficients.numpy(), variance.numpy(), reflection.numpy())
    return coefficients, variance, reflection
