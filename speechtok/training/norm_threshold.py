"""The norm that tells syllables from the rest: where two running Gaussians of frame norms cross (Sylber)."""

import math

import torch
from torch import Tensor, nn

from speechtok.errors import InputError
from speechtok.training.distributed import sum_over_processes

__all__ = ["NormThreshold", "crossing"]


def crossing(signal: tuple[float, float], noise: tuple[float, float], prior: float = 1.0) -> float:
    """Norm at which two Gaussian densities are equal.

    Parameters
    ----------
    signal, noise : (float, float)
        Mean and variance.
    prior : float
        How much more frequent noise is than signal; above 1 the threshold rises.

    Returns
    -------
    float
        The crossing between the two means; where one density is above the other all the way, the means' midpoint.
    """
    (ms, vs), (mn, vn) = signal, noise
    a, b = vs - vn, 2 * (vn * ms - vs * mn)
    c = vs * mn**2 - vn * ms**2 - 2 * vs * vn * (math.log(prior) + 0.5 * math.log(vs / vn))
    if abs(a) < 1e-12:  # equal widths: one crossing
        found = [-c / b] if b else []
    else:
        root = b * b - 4 * a * c
        found = [] if root < 0 else [(-b + sign * math.sqrt(root)) / (2 * a) for sign in (1, -1)]
    between = [x for x in found if min(ms, mn) <= x <= max(ms, mn)]
    return between[0] if between else 0.5 * (ms + mn)


class NormThreshold(nn.Module):
    """Running mean and variance of the norms of frames with and without a syllable.

    Parameters
    ----------
    signal, noise : (float, float)
        Mean and variance to begin with. Sylber's stage 2 has (6.10, 0.87) and (0.34, 0.34), which gives 2.59989.
    decay : float
        Of the running values, for each update.
    prior : float
        See `crossing`.
    """

    signal: Tensor
    noise: Tensor

    def __init__(
        self,
        signal: tuple[float, float] = (6.10, 0.87),
        noise: tuple[float, float] = (0.34, 0.34),
        decay: float = 0.9999,
        prior: float = 1.0,
    ) -> None:
        super().__init__()
        if not (0 <= decay <= 1 and prior > 0 and signal[1] > 0 and noise[1] > 0):
            raise InputError(f"decay {decay} must lie in [0, 1]; prior {prior} and the variances must be positive")
        self.decay, self.prior = decay, prior
        self.register_buffer("signal", torch.tensor(signal, dtype=torch.float64))
        self.register_buffer("noise", torch.tensor(noise, dtype=torch.float64))

    @property
    def value(self) -> float:
        """The threshold."""
        (ms, vs), (mn, vn) = self.signal.tolist(), self.noise.tolist()
        return crossing((ms, vs), (mn, vn), self.prior)

    @torch.no_grad()
    def update(self, signal: Tensor, noise: Tensor) -> None:
        """Move both Gaussians towards the norms, float [n] and float [m], of a batch (of all processes together)."""
        for running, norms in ((self.signal, signal), (self.noise, noise)):
            values = norms.double()
            count, total, squares = sum_over_processes(
                torch.stack([values.new_tensor(float(len(values))), values.sum(), values.square().sum()])
            )
            if count < 2:
                continue
            mean = total / count
            found = torch.stack([mean, (squares / count - mean.square()).clamp_min(1e-6)])
            running.mul_(self.decay).add_(found.to(running), alpha=1 - self.decay)
