"""How close decoded sound is to the original: waves in, numbers out.

Conventions: waves are float [N], both of one length and rate. Signal to distortion in dB, higher is better; mel
distances, lower is better, 0 for equal sounds; STOI (Taal et al. 2011) about 0 to 1 and PESQ (ITU-T P.862.2, wideband)
about 1 to 4.6 are for speech. STOI and PESQ are computed by the packages pystoi and pesq.
"""

import math
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.features import log_mel
from speechtok.audio.resample import resample
from speechtok.errors import InputError

__all__ = ["mel_distance", "multi_scale_mel_distance", "pesq", "require_packages", "si_sdr", "stoi", "validate"]

Wave = NDArray[np.floating]

SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))  # window and bins
_FLOOR = 1e-5
_PESQ_RATE = 16000  # Hz
_SHORTEST = 0.4  # s: 30 frames of STOI


def validate(reference: Wave, estimate: Wave) -> None:
    """Check two waves: InputError unless they are finite float [N] of one length and not empty."""
    if reference.ndim != 1 or reference.shape != estimate.shape or len(reference) == 0:
        raise InputError(f"waves {reference.shape} and {estimate.shape} must be [N] with the same number of samples")
    for name, wave in (("reference", reference), ("estimate", estimate)):
        if wave.dtype.kind != "f" or not np.isfinite(wave).all():
            raise InputError(f"the {name} must hold finite floats")


def si_sdr(reference: Wave, estimate: Wave) -> float:
    """Scale-invariant signal-to-distortion ratio (Le Roux et al. 2019), dB.

    Both without their means; ``10 log10(|a r|^2 / |e - a r|^2)`` with ``a = <e, r> / <r, r>``. Infinite for an exact
    copy; minus infinity where nothing of the reference is in the estimate.

    Raises
    ------
    InputError
        If the reference is constant, or waves do not fit.
    """
    validate(reference, estimate)
    r, e = (x.astype(np.float64) - x.mean(dtype=np.float64) for x in (reference, estimate))
    power = float(r @ r)
    if power == 0.0:
        raise InputError("the reference is silent: no ratio to it is defined")
    target = (float(e @ r) / power) * r
    signal, distortion = float(target @ target), float(np.square(e - target).sum())
    if signal == 0.0:
        return -math.inf
    return math.inf if distortion == 0.0 else 10.0 * math.log10(signal / distortion)


def _log_mel(wave: Wave, sample_rate: int, window: int, hop: int, bins: int) -> torch.Tensor:
    """Natural logarithm of magnitude mel spectra, frames centred, ends mirrored: float32 [T, bins]."""
    samples = torch.from_numpy(np.ascontiguousarray(wave, np.float32))[None]
    lengths = torch.tensor([samples.shape[1]])
    return log_mel(
        samples, lengths, sample_rate=sample_rate, n_fft=window, hop=hop, bins=bins, floor=_FLOOR, pad_mode="reflect"
    )[0][0]


def mel_distance(reference: Wave, estimate: Wave, sample_rate: int) -> float:
    """Mean over frames and bins of ``|ln max(m, 1e-5) - ln max(m', 1e-5)|``.

    m are magnitude mel spectra of 80 bins (Slaney's formula and area normalisation) up to half the rate, Hann windows
    of 1024 samples, hop 256: the front end of HiFi-GAN.

    Parameters
    ----------
    reference, estimate : float [N]
    sample_rate : int
        Hz.
    """
    validate(reference, estimate)
    one, two = (_log_mel(wave, sample_rate, 1024, 256, 80) for wave in (reference, estimate))
    return float((one - two).abs().mean(dtype=torch.float64))


def multi_scale_mel_distance(
    reference: Wave, estimate: Wave, sample_rate: int, scales: Sequence[tuple[int, int]] = SCALES
) -> float:
    """Mel distance of the DAC paper (Kumar et al. 2023, arXiv 2306.06546, sections 3.4 and 4.2).

    Sum over windows of 32, 64, ... 2048 samples, with 5, 10, ... 320 mel bins and hops of a quarter window, of the mean
    over frames and bins of ``|log10 max(m, 1e-5) - log10 max(m', 1e-5)|``; m as in `mel_distance`.

    Parameters
    ----------
    reference, estimate : float [N]
    sample_rate : int
        Hz.
    scales : sequence of (int, int)
        Windows (samples) with their bins.
    """
    validate(reference, estimate)
    total = 0.0
    for window, bins in scales:
        one, two = (_log_mel(wave, sample_rate, window, window // 4, bins) for wave in (reference, estimate))
        total += float((one - two).abs().mean(dtype=torch.float64)) / math.log(10.0)
    return total


def require_packages() -> None:
    """Raise InputError if pystoi or pesq is not installed."""
    for name in ("pystoi", "pesq"):
        _package(name)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(f"STOI and PESQ need pystoi and pesq ({error}); install speechtok[eval]") from error


def stoi(reference: Wave, estimate: Wave, sample_rate: int) -> float:
    """Short-time objective intelligibility of speech (Taal et al. 2011), by pystoi.

    Parameters
    ----------
    reference, estimate : float [N]
    sample_rate : int
        Hz.

    Raises
    ------
    InputError
        If less than 0.4 s of the reference is within 40 dB of its loudest part, or pystoi is not installed.
    """
    validate(reference, estimate)
    pystoi = _package("pystoi")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames")  # it would return 1e-5
        try:
            if not reference.any() or len(reference) < _SHORTEST * sample_rate:
                raise RuntimeWarning("silent or short")
            return float(pystoi.stoi(reference.astype(np.float64), estimate.astype(np.float64), sample_rate))
        except RuntimeWarning as error:
            raise InputError(f"STOI needs {_SHORTEST} s of sound; the reference holds less ({error})") from error


def pesq(reference: Wave, estimate: Wave, sample_rate: int) -> float:
    """Perceptual evaluation of speech quality, wideband at 16 kHz (ITU-T P.862.2), by the package pesq.

    Parameters
    ----------
    reference, estimate : float [N]
        Converted to 16 kHz.
    sample_rate : int
        Hz.

    Raises
    ------
    InputError
        If no speech is found in a wave or it is shorter than 0.25 s, or pesq is not installed.
    """
    validate(reference, estimate)
    package = _package("pesq")
    waves = [np.asarray(wave, np.float32) for wave in (reference, estimate)]
    if sample_rate != _PESQ_RATE:
        waves = [resample(wave, sample_rate, _PESQ_RATE) for wave in waves]
    if not all(wave.any() for wave in waves):
        raise InputError("PESQ needs speech: a wave is silent")
    try:
        return float(package.pesq(_PESQ_RATE, *waves, "wb"))
    except package.PesqError as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else error
        raise InputError(f"PESQ needs speech: {reason}") from error
