"""Cheap perturbations of log-mel frames for training: another vocal tract, another channel, another level, noise.

They act on what `speechtok.audio.features.kaldi_fbank` returns: natural logarithms of mel powers, 80 bins from 20 to
8000 Hz linear in Kaldi's mel, 100 frames a second, samples on the scale of 16-bit integers. Nothing here draws from a
global generator: `draw` makes the parameters of one item from the item's own generator, the other functions apply
given parameters row by row. Pitch cannot be moved in these frames; see `speechtok.audio.augment` for that.

The order of `perturb` is that of nature: the speaker (warp), the surroundings (noise), the channel (curve, gain).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from speechtok.audio.features import KALDI_FLOOR, valid_frames
from speechtok.errors import AudioError

__all__ = [
    "BINS",
    "PerturbConfig",
    "PerturbParameters",
    "add_noise",
    "channel_curve",
    "draw",
    "fit_noise",
    "perturb",
    "speech_power",
    "warp_matrix",
]

BINS, LOW, HIGH = 80, 20.0, 8000.0  # of the Kaldi front end; HIGH is half the sample rate
KNEE = 4800.0  # Hz; above, the warp bends so that half the sample rate stays where it is (Jaitly and Hinton 2013)
SPEECH_RANGE_DB = 20.0  # a frame this far below the mean power of its row counts as a pause
_LOG_FLOOR = math.log(KALDI_FLOOR)
_DECIBEL = math.log(10.0) / 10.0  # natural logarithm of one decibel of power
_SILENCE = 1e-3  # mel power of a frame; one 16-bit step of white noise has more than 1e2


@dataclass(frozen=True)
class PerturbConfig:
    """Ranges from which `draw` draws.

    Parameters
    ----------
    vtlp : float
        The warp factor is ``exp(U(-vtlp, vtlp))``: 0.15 gives 0.86 ... 1.16.
    noise_probability : float
        Share of items that get noise.
    snr : (float, float)
        Lowest and highest signal-to-noise ratio (dB), uniform; see `add_noise` for its definition.
    tilt_db : float
        Coefficient k = 1, 2, ... of the channel curve is ``U(-tilt_db, tilt_db) / k`` dB; see `channel_curve`.
    curve_terms : int
        Coefficients of the channel curve: 1 is a pure tilt.
    gain_db : float
        The gain is ``U(-gain_db, gain_db)`` dB.

    Raises
    ------
    AudioError
        If a range is negative, reversed or not finite.
    """

    vtlp: float = 0.15
    noise_probability: float = 0.5
    snr: tuple[float, float] = (5.0, 20.0)
    tilt_db: float = 4.0
    curve_terms: int = 4
    gain_db: float = 6.0

    def __post_init__(self) -> None:
        for name in ("vtlp", "tilt_db", "gain_db", "curve_terms"):
            if not 0 <= getattr(self, name) < math.inf:
                raise AudioError(f"{name}={getattr(self, name)}: a finite value of at least 0 is needed")
        if not 0 <= self.noise_probability <= 1:
            raise AudioError(f"noise_probability={self.noise_probability} is no probability")
        if not -math.inf < self.snr[0] <= self.snr[1] < math.inf:
            raise AudioError(f"snr={self.snr}: give the lower end first, both in dB")


@dataclass(frozen=True)
class PerturbParameters:
    """What is done to one item; the defaults do nothing.

    Parameters
    ----------
    warp : float
        Factor on the frequency of a spectral peak; 1 leaves it.
    gain_db : float
        Level (dB).
    curve : tuple of float
        Coefficients of the channel curve (dB).
    snr : float
        Signal-to-noise ratio (dB); infinite for no noise.
    noise_clip, noise_start : float
        In [0, 1): which of the caller's noises, and where in it to begin. Whoever holds n noises takes number
        ``int(noise_clip * n)`` and hands `noise_start` to `fit_noise`.
    """

    warp: float = 1.0
    gain_db: float = 0.0
    curve: tuple[float, ...] = ()
    snr: float = math.inf
    noise_clip: float = 0.0
    noise_start: float = 0.0


def draw(generator: np.random.Generator, config: PerturbConfig | None = None) -> PerturbParameters:
    """Draw the parameters of one item.

    Every call takes the same number of values from the generator, whatever comes out.

    Parameters
    ----------
    generator : numpy.random.Generator
        The item's own.
    config : PerturbConfig, optional
        Ranges; the defaults where None.

    Returns
    -------
    PerturbParameters
    """
    config = config or PerturbConfig()
    warp, gain, noisy, snr, clip, start = generator.random(6).tolist()
    curve = 2.0 * generator.random(config.curve_terms) - 1.0
    return PerturbParameters(
        warp=math.exp(config.vtlp * (2.0 * warp - 1.0)),
        gain_db=config.gain_db * (2.0 * gain - 1.0),
        curve=tuple((config.tilt_db * curve / np.arange(1, config.curve_terms + 1)).tolist()),
        snr=config.snr[0] + (config.snr[1] - config.snr[0]) * snr if noisy < config.noise_probability else math.inf,
        noise_clip=clip,
        noise_start=start,
    )


# ---------------------------------------------------------------------------------------------------------------------
# the single perturbations


def warp_matrix(factors: Tensor) -> Tensor:
    """Vocal tract length perturbation as a matrix per row.

    A peak at f Hz moves to ``factor * f`` where that is below 4800 Hz times min(factor, 1); above, a second line
    leads to half the sample rate, which stays (Jaitly and Hinton 2013, "Vocal Tract Length Perturbation improves
    speech recognition", section 2). An output bin is interpolated, linearly in mel, between the two input bins on
    either side of the frequency it comes from; beyond the first or last bin that bin is repeated.

    Parameters
    ----------
    factors : float [B]
        Positive warp factors; 1 gives the identity.

    Returns
    -------
    float32 [B, 80, 80]
        To be multiplied with from the right: ``features @ warp_matrix(factors)``. Columns sum to 1.

    Raises
    ------
    AudioError
        If a factor is outside 0.5 ... 2.
    """
    if factors.ndim != 1 or not bool(((factors >= 0.5) & (factors <= 2.0)).all()):
        raise AudioError("warp factors [B] between 0.5 and 2 are needed")
    alpha = factors.double()[:, None]
    low, high = _mel(torch.tensor([LOW, HIGH], dtype=torch.float64)).tolist()
    step = (high - low) / (BINS + 1)
    index = torch.arange(BINS, dtype=torch.float64, device=factors.device)
    target = 700.0 * torch.expm1((low + step * (index + 1)) / 1127.0)  # centres of the bins in Hz
    knee = KNEE * alpha.clamp_max(1.0)
    slope = (HIGH - knee / alpha) / (HIGH - knee)
    source = torch.where(target <= knee, target / alpha, HIGH - (HIGH - target) * slope)
    position = ((_mel(source) - low) / step - 1).clamp(0, BINS - 1)  # in bins
    return (1.0 - (position[:, None, :] - index[:, None]).abs()).clamp_min(0.0).float()


def channel_curve(coefficients: Tensor) -> Tensor:
    """Smooth curve over the bins: ``sum_k c_k cos(pi k (m + 1/2) / 80)``, k = 1, 2, ...

    Term 1 is a tilt of c_1 dB at the lowest bin to -c_1 dB at the highest one, the others bend it. The mean over the
    bins is 0: the level is left to the gain.

    Parameters
    ----------
    coefficients : float [B, K]
        In dB.

    Returns
    -------
    float32 [B, 80]
        In dB.
    """
    return coefficients.float() @ _cosines(coefficients.shape[1], coefficients.device)


def speech_power(features: Tensor, lengths: Tensor) -> Tensor:
    """Mean power of a row's speech: over its frames that are not 20 dB or more below its mean power.

    The power of a frame is the sum over the bins. It is that of the pre-emphasised sound, so ratios differ from those
    of the waveform: rumble counts for less, hiss for more.

    Parameters
    ----------
    features : float [B, T, 80]
        Log-mel frames.
    lengths : int64 [B]
        Valid frames of each row.

    Returns
    -------
    float32 [B]
        0 for a row without frames.
    """
    valid = valid_frames(lengths, features.shape[1])
    power = features.float().exp().sum(-1).masked_fill(~valid, 0.0)  # [B, T]
    mean = power.sum(1) / lengths.clamp_min(1)
    speech = valid & (power > mean[:, None] * 10.0 ** (-SPEECH_RANGE_DB / 10.0))
    return torch.where(speech, power, 0.0).sum(1) / speech.sum(1).clamp_min(1)


def fit_noise(noise: Tensor, frames: int, start: float) -> Tensor:
    """Cut or repeat noise to a given length.

    Parameters
    ----------
    noise : float [N, 80]
        Log-mel frames of a noise.
    frames : int
        Length wanted; noise that ends before goes on from its beginning.
    start : float
        Where to begin, in [0, 1): among all positions that need no repetition, or among all where there are none.

    Returns
    -------
    float [frames, 80]

    Raises
    ------
    AudioError
        If the noise has no frames.
    """
    count = len(noise)
    if count == 0:
        raise AudioError("noise without frames")
    begin = int(start * (count - frames + 1 if count >= frames else count))
    return noise[(begin + torch.arange(frames, device=noise.device)) % count]


def add_noise(features: Tensor, lengths: Tensor, noise: Tensor, snr: Tensor) -> Tensor:
    """Add noise in the power domain: ``log(exp(x) + gain * exp(noise))``.

    Powers add where noise and speech are uncorrelated, which holds on average but not in a single frame. The gain
    makes ``10 log10(speech_power / (gain * noise power))`` the given ratio, with `speech_power` over the speech frames
    of the row and the mean power of the noise over all valid frames. Rows whose noise is digital silence are left
    as they are.

    Parameters
    ----------
    features : float [B, T, 80]
        Log-mel frames of speech.
    lengths : int64 [B]
        Valid frames of each row.
    noise : float [B, T, 80]
        Log-mel frames of noise.
    snr : float [B]
        Signal-to-noise ratios (dB); infinite for no noise.

    Returns
    -------
    float32 [B, T, 80]

    Raises
    ------
    AudioError
        If shapes differ.
    """
    if noise.shape != features.shape:
        raise AudioError(f"noise of shape {tuple(noise.shape)} does not fit features {tuple(features.shape)}")
    valid = valid_frames(lengths, features.shape[1])
    power = noise.float().exp().sum(-1).masked_fill(~valid, 0.0).sum(1) / lengths.clamp_min(1)
    # Sums of logarithms: the quotient of a loud and a faint power does not overflow.
    gain = speech_power(features, lengths).log() - power.clamp_min(_SILENCE).log() - snr.float() * _DECIBEL
    gain = gain.masked_fill(power < _SILENCE, -math.inf)
    return torch.logaddexp(features.float(), noise.float() + gain[:, None, None])


# ---------------------------------------------------------------------------------------------------------------------
# all together


def perturb(
    features: Tensor, lengths: Tensor, parameters: Sequence[PerturbParameters], noise: Tensor | None = None
) -> Tensor:
    """Perturb each row by its own parameters.

    Parameters
    ----------
    features : float [B, T, 80]
        Log-mel frames as `kaldi_fbank` gives them, before any normalisation.
    lengths : int64 [B]
        Valid frames of each row.
    parameters : sequence of B PerturbParameters
        One for each row.
    noise : float [B, T, 80], optional
        Log-mel frames of noise (`fit_noise`); only rows with a finite `snr` are read.

    Returns
    -------
    float32 [B, T, 80]
        At least the logarithm of Kaldi's floor; zeros behind the end of each row.

    Raises
    ------
    AudioError
        If shapes do not fit, or a row wants noise and there is none.
    """
    if features.ndim != 3 or features.shape[2] != BINS or lengths.shape != features.shape[:1]:
        raise AudioError(
            f"features [B, T, {BINS}] and lengths [B] are needed, not {tuple(features.shape)} and "
            f"{tuple(lengths.shape)}"
        )
    if len(parameters) != len(features):
        raise AudioError(f"{len(parameters)} parameters for {len(features)} rows")
    device, lengths = features.device, lengths.to(features.device)
    terms = max((len(row.curve) for row in parameters), default=0)
    # What is small is made on the CPU: no chain of tiny kernels, no waiting for a device.
    curve = torch.tensor([[*row.curve, *[0.0] * (terms - len(row.curve))] for row in parameters])
    gain = torch.tensor([row.gain_db for row in parameters])
    shift = ((channel_curve(curve.view(len(parameters), terms)) + gain[:, None]) * _DECIBEL).to(device)
    matrix = warp_matrix(torch.tensor([row.warp for row in parameters], dtype=torch.float64)).to(device)
    noisy = [index for index, row in enumerate(parameters) if row.snr < math.inf]
    if noisy:
        if noise is None or noise.shape != features.shape:
            raise AudioError(
                f"rows {noisy[:10]} want noise: give noise {tuple(features.shape)}"
                + ("" if noise is None else f", not {tuple(noise.shape)}")
            )
        rows = torch.tensor(noisy, device=device)
        out = torch.bmm(features.float(), matrix)
        snr = torch.tensor([parameters[index].snr for index in noisy], device=device)
        out[rows] = add_noise(out[rows], lengths[rows], noise.to(device)[rows], snr)
        out += shift[:, None]
    else:
        out = torch.baddbmm(shift[:, None], features.float(), matrix)
    return out.clamp_min_(_LOG_FLOOR).masked_fill_(~valid_frames(lengths, out.shape[1])[..., None], 0.0)


def _mel(hertz: Tensor) -> Tensor:
    """Kaldi's mel scale."""
    return 1127.0 * torch.log1p(hertz / 700.0)


@lru_cache(maxsize=16)
def _cosines(terms: int, device: torch.device) -> Tensor:
    """Rows k = 1 ... of the cosine transform: float32 [terms, 80]."""
    with torch.inference_mode(False):
        order = torch.arange(1, terms + 1, dtype=torch.float64)[:, None]
        middle = torch.arange(BINS, dtype=torch.float64) + 0.5
        return torch.cos(math.pi / BINS * order * middle).float().to(device)
