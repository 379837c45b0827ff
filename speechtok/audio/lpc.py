"""Linear prediction: the forms of an all-pole filter, and its power spectrum.

A filter ``1 / A(z)`` with ``A(z) = 1 + sum_k a_k z^-k`` is given by ``a_1 ... a_p`` (`lpc`), or by its reflection
coefficients, log area ratios, line spectral frequencies (Itakura, 1975), cepstrum or poles. Where the sections of a
warped filter stand in for ``z^-1``, all of them describe it on the warped frequency axis; `power_spectrum` goes back.

Tensors are float64 [..., p].
"""

import math

import torch
from torch import Tensor

__all__ = [
    "LIMIT",
    "cepstrum_to_lpc",
    "is_stable",
    "lar_to_reflection",
    "lpc_to_cepstrum",
    "lpc_to_lsf",
    "lpc_to_poles",
    "lpc_to_reflection",
    "lsf_to_lpc",
    "poles_to_lpc",
    "power_spectrum",
    "reflection_to_lar",
    "reflection_to_lpc",
    "stabilized",
    "warped",
]

# Nearest that poles and reflection coefficients come to the border of stability, where logarithms have no end.
LIMIT = 1 - 1e-5
# By which parts of their radius poles are moved inwards, one after the other, until rounding takes none outside.
_INWARDS = [2.0**-step for step in range(14, 0, -1)]


# ---------------------------------------------------------------------------------------------------------------------
# reflection coefficients and log area ratios


def reflection_to_lpc(reflection: Tensor) -> Tensor:
    """Coefficients of the filter with these reflection coefficients, by Levinson's recursion: [..., p] -> [..., p]."""
    lpc = reflection[..., :0]
    for k in reflection.split(1, -1):
        lpc = torch.cat((lpc + k * lpc.flip(-1), k), -1)
    return lpc


def lpc_to_reflection(lpc: Tensor) -> Tensor:
    """Reflection coefficients of a filter, by the recursion backwards: [..., p] -> [..., p].

    All are inside (-1, 1) if and only if the filter is stable. Below the last one that is not, they mean nothing and
    may be infinite or NaN.
    """
    found = []
    for stage in range(lpc.shape[-1], 0, -1):
        k = lpc[..., stage - 1 :]
        found.append(k)
        lpc = (lpc[..., :-1] - k * lpc[..., :-1].flip(-1)) / (1 - k.square())
    return torch.cat([lpc, *reversed(found)], -1)


def is_stable(lpc: Tensor) -> Tensor:
    """Whether all poles are inside the unit circle: [..., p] -> bool [...]."""
    return (lpc_to_reflection(lpc).abs() < 1).all(-1)


def reflection_to_lar(reflection: Tensor) -> Tensor:
    """Log area ratios ``2 atanh k = ln((1 + k) / (1 - k))``, with k held inside +-`LIMIT`: [..., p] -> [..., p]."""
    return 2 * reflection.clamp(-LIMIT, LIMIT).atanh()


def lar_to_reflection(lar: Tensor) -> Tensor:
    """Undo `reflection_to_lar`; any values give a stable filter: [..., p] -> [..., p]."""
    return (lar / 2).tanh().clamp(-LIMIT, LIMIT)


# ---------------------------------------------------------------------------------------------------------------------
# line spectral frequencies


def lpc_to_lsf(lpc: Tensor) -> Tensor:
    """Line spectral frequencies of a stable filter: [..., p] -> radians [..., p], ascending in (0, pi).

    They are the angles of the zeros of ``A(z) + z^-(p+1) A(1/z)`` and ``A(z) - z^-(p+1) A(1/z)``, in turns.
    """
    one = torch.ones_like(lpc[..., :1])
    longer, mirrored = torch.cat((one, lpc, 0 * one), -1), torch.cat((0 * one, lpc.flip(-1), one), -1)
    both, difference = longer + mirrored, longer - mirrored
    # The zeros at 1 and -1, which all filters have, are divided out.
    if lpc.shape[-1] % 2:
        both, difference = both, _undo(difference, 2, 1.0)
    else:
        both, difference = _undo(both, 1, -1.0), _undo(difference, 1, 1.0)
    cosines = torch.cat([_symmetric_zeros(part) for part in (both, difference)], -1)
    return cosines.clamp(-1, 1).acos().sort(-1).values


def _undo(polynomial: Tensor, lag: int, factor: float) -> Tensor:
    """Divide a polynomial [..., n] by ``1 - factor z^-lag``, which leaves no remainder: [..., n - lag]."""
    found: list[Tensor] = []
    for i, value in enumerate(polynomial.unbind(-1)[: polynomial.shape[-1] - lag]):
        found.append(value + factor * found[i - lag] if i >= lag else value)
    return torch.stack(found, -1)


def _symmetric_zeros(polynomial: Tensor) -> Tensor:
    """Cosines of the zeros' angles of symmetric polynomials [..., 2 m + 1] with all zeros on the unit circle: [..., m].

    On the circle such a polynomial is a sum of Chebyshev polynomials of the cosine, and its zeros there are the
    eigenvalues of the colleague matrix (Good, 1961), which unlike the coefficients' companion matrix keeps all digits.
    """
    size = polynomial.shape[-1] // 2
    if size == 0:
        return polynomial[..., :0]
    matrix = polynomial.new_zeros(*polynomial.shape[:-1], size, size)
    rows = torch.arange(size - 1, device=polynomial.device)
    matrix[..., rows, rows + 1] = matrix[..., rows + 1, rows] = 0.5
    if size > 1:
        matrix[..., 0, 1] = matrix[..., 1, 0] = math.sqrt(0.5)
    series = polynomial[..., 1 : size + 1].flip(-1) / polynomial[..., :1]  # of T_0 ... T_(m-1) over that of T_m
    series = torch.cat((series[..., :1] * (math.sqrt(0.5) if size > 1 else 1.0), series[..., 1:]), -1)
    matrix[..., -1] -= series / 2
    return torch.linalg.eigvals(matrix).real


def lsf_to_lpc(lsf: Tensor) -> Tensor:
    """Coefficients of the filter with these line spectral frequencies: radians [..., p] -> [..., p].

    Stable if they are ascending in (0, pi).
    """
    one = torch.ones_like(lsf[..., :1])
    parts = []
    for first in (0, 1):
        polynomial = one
        for cosine in lsf[..., first::2].cos().unbind(-1):
            polynomial = _times(polynomial, torch.cat((one, -2 * cosine[..., None], one), -1))
        parts.append(polynomial)
    both, difference = parts
    if lsf.shape[-1] % 2:
        difference = _times(difference, torch.cat((one, 0 * one, -one), -1))
    else:
        both, difference = _times(both, torch.cat((one, one), -1)), _times(difference, torch.cat((one, -one), -1))
    return ((both + difference) / 2)[..., 1:-1]


def _times(polynomial: Tensor, factor: Tensor) -> Tensor:
    """Product of polynomials [..., n] and [..., m]: [..., n + m - 1]."""
    last = factor.shape[-1] - 1
    padded = torch.nn.functional.pad(polynomial, (last, last))
    return (padded.unfold(-1, last + 1, 1) * factor.flip(-1)[..., None, :]).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# cepstrum and poles


def lpc_to_cepstrum(lpc: Tensor, count: int | None = None) -> Tensor:
    """Cepstrum of ``1 / A``: [..., p] -> c_1 ... c_count [..., count], as many as poles where `count` is None.

    The logarithm of the power spectrum is ``ln variance + 2 sum_n c_n cos(n w)``. With each c_n times sqrt(n), the
    Euclidean distance of two filters is Martin's (2000), which weighs their poles.
    """
    order = lpc.shape[-1]
    coefficients = lpc.unbind(-1)
    found: list[Tensor] = []
    for n in range(1, (order if count is None else count) + 1):
        value = -coefficients[n - 1] if n <= order else torch.zeros_like(lpc[..., 0])
        for m in range(1, min(n - 1, order) + 1):
            value = value - (1 - m / n) * coefficients[m - 1] * found[n - m - 1]
        found.append(value)
    return torch.stack(found, -1)


def cepstrum_to_lpc(cepstrum: Tensor) -> Tensor:
    """Undo `lpc_to_cepstrum`: c_1 ... c_p [..., p] -> [..., p].

    A cepstrum that is no filter's of that order, such as a mean of several, may give one that is not stable.
    """
    given = cepstrum.unbind(-1)
    found: list[Tensor] = []
    for n in range(1, cepstrum.shape[-1] + 1):
        value = -given[n - 1]
        for m in range(1, n):
            value = value - (m / n) * given[m - 1] * found[n - m - 1]
        found.append(value)
    return torch.stack(found, -1)


def lpc_to_poles(lpc: Tensor) -> Tensor:
    """Poles of the filter: [..., p] -> complex128 [..., p], in no order."""
    companion = torch.diag_embed(torch.ones_like(lpc[..., 1:]), -1)
    companion[..., 0, :] = -lpc
    return torch.linalg.eigvals(companion)


def poles_to_lpc(poles: Tensor) -> Tensor:
    """Coefficients of the filter with these poles, the real part if they are no pairs: complex [..., p] -> [..., p]."""
    polynomial = torch.ones_like(poles[..., :1])
    for pole in poles.split(1, -1):
        polynomial = _times(polynomial, torch.cat((torch.ones_like(pole), -pole), -1))
    return polynomial.real[..., 1:]


def stabilized(lpc: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The stable filter of the same power spectrum: poles outside the unit circle are reflected inside.

    Parameters
    ----------
    lpc : float64 [..., p]
    variance : float64 [...]
        Of the noise that the filter is given.

    Returns
    -------
    lpc : float64 [..., p]
        As given, bit for bit, where the filter is stable. Others have no pole further out than `LIMIT`. Where poles
        lie so close together near the circle that the coefficients cannot hold them apart, all are moved inwards.
    variance : float64 [...]
        Divided by the squared magnitude of every pole that was outside.
    """
    loose = ~is_stable(lpc)
    if not bool(loose.any()):
        return lpc, variance
    poles = lpc_to_poles(lpc[loose])
    size = poles.abs()
    inside = torch.where(size > 1, 1 / size.clamp_min(1), size).clamp_max(LIMIT)
    mended = poles_to_lpc(torch.polar(inside, poles.angle()))
    places = torch.arange(1, lpc.shape[-1] + 1, dtype=lpc.dtype, device=lpc.device)
    for inwards in _INWARDS:
        mended = torch.where(is_stable(mended)[..., None], mended, mended * (1 - inwards) ** places)
    lpc, variance = lpc.clone(), variance.clone()
    lpc[loose] = mended
    variance[loose] /= size.clamp_min(1).square().prod(-1)
    return lpc, variance


# ---------------------------------------------------------------------------------------------------------------------
# spectra


def warped(angles: Tensor, warp: float) -> Tensor:
    """Angles (radians) to which all-pass sections ``(z^-1 - warp) / (1 - warp z^-1)`` turn frequencies in [0, pi]."""
    return angles + 2 * torch.atan2(warp * angles.sin(), 1 - warp * angles.cos())


def power_spectrum(lpc: Tensor, variance: Tensor, angles: Tensor, warp: float = 0.0) -> Tensor:
    """Power spectrum of white noise through a filter, also one of all-pass sections.

    ``variance / |A|^2`` at the warped angles, times the slope of the warping. Burg's sums run over time, so they whiten
    on the plain frequency axis; with the slope (Strube, 1980) the spectrum is that of the sound, and its mean over all
    frequencies the mean square.

    Parameters
    ----------
    lpc : float64 [..., p]
    variance : float64 [...]
    angles : float64 [F]
        Frequencies, radians per sample.
    warp : float
        Coefficient of the sections, see `speechtok.kernels.burg.burg`; 0: plain delays.

    Returns
    -------
    float64 [..., F]
        Two-sided power per sample; divided by the sample rate, per Hz.
    """
    places = torch.arange(lpc.shape[-1] + 1, dtype=angles.dtype, device=angles.device)
    turns = places[:, None] * warped(angles, warp)
    whole = torch.nn.functional.pad(lpc, (1, 0), value=1.0)
    gain = (whole @ turns.cos()).square() + (whole @ turns.sin()).square()
    slope = (1 - warp**2) / (1 + warp**2 - 2 * warp * angles.cos())
    return variance[..., None] * slope / gain
