"""LiPCoT: the linear prediction filter of every window as a frame, without training (Anjum, arXiv 2408.07292).

For sound and for any other series of samples: nothing here knows about hearing but the default of `warp`. Units are
clusters of the frames, and a unit goes back to a filter, hence to a spectrum and to noise of that spectrum, see
`speechtok.codecs.lipcot`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from speechtok.audio.features import valid_frames
from speechtok.audio.lpc import (
    LIMIT,
    cepstrum_to_lpc,
    lar_to_reflection,
    lpc_to_cepstrum,
    lpc_to_lsf,
    lpc_to_poles,
    lpc_to_reflection,
    lsf_to_lpc,
    poles_to_lpc,
    reflection_to_lar,
    reflection_to_lpc,
    stabilized,
)
from speechtok.encoders.base import Encoder, Frames
from speechtok.errors import InputError
from speechtok.frames import Context, FrameGrid
from speechtok.kernels.burg import burg

__all__ = ["Feature", "LipcotConfig", "LipcotEncoder", "features_of", "filters_of"]

Feature = Literal["lpc", "lar", "lsf", "cepstrum", "poles"]

_TILE = 2048  # windows that are held in float64 at a time
_LEVEL = 0.01  # mean square of filters that came without their gain
_GAP = 1e-3  # radians between line spectral frequencies, from 0 and from pi


@dataclass(frozen=True)
class LipcotConfig:
    """Settings of `LipcotEncoder`. The defaults are for speech at 16 kHz, with 50 frames per second.

    Parameters
    ----------
    sample_rate : int
        Rate of the wave (Hz), any positive number. What is slower than 1 Hz can be counted in another unit of time.
    window, hop : int
        Samples that a frame is estimated from, and samples from frame to frame.
    order : int
        Poles of each filter.
    warp : float
        Coefficient of the all-pass sections, between -1 and 1: about 0.58 for the Bark scale at 16 kHz and 0.42 at
        8 kHz; 0 leaves the frequency axis alone. LiPCoT has 0.2 for brain waves at 500 Hz.
    feature : {"cepstrum", "lar", "lsf", "lpc", "poles"}
        What of the filter is clustered. "cepstrum": c_1 ... c_p times sqrt(n), whose Euclidean distance is Martin's
        distance of filters; do not standardise it. Standardise the others: "lar" log area ratios; "lsf" line spectral
        frequencies; "lpc" the coefficients, as in the publication; "poles" ``-2 log10(1 - radius)`` of each pole in
        the order of their angles, then the angles (radians). A small move of a pole moves all coefficients, and
        neighbours change places among poles, so that "lpc" and "poles" cluster worst.
    gain : float
        Weight of the last dimension, ``log10`` of the prediction's error variance. 0 leaves it out: units are the same
        at any level then, silence looks like white noise, and what is decoded has a mean square of 0.01 throughout.
    floor : float
        Mean square (squared units of the wave) up to which a window is silent: all such windows have one and the same
        frame, that of white noise of this power. Also the least error variance. 1e-9 is -90 dB of full scale; for a
        series in other units take a value far below what its sensor can tell.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    sample_rate: int = 16000
    window: int = 400
    hop: int = 320
    order: int = 12
    warp: float = 0.58
    feature: Feature = "cepstrum"
    gain: float = 1.0
    floor: float = 1e-9

    def __post_init__(self) -> None:
        for name in ("sample_rate", "window", "hop", "order"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name} {value!r}: give a whole number of at least 1")
        if self.order >= self.window:
            raise InputError(f"order {self.order} needs more than the {self.window} samples of window; make it smaller")
        if self.feature not in get_args(Feature):
            raise InputError(f"feature {self.feature!r} is unknown; take one of {', '.join(get_args(Feature))}")
        for name, (inside, wanted) in _RANGES.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not inside(value):
                raise InputError(f"{name} {value!r}: give a number {wanted}")
            object.__setattr__(self, name, float(value))  # 0 and 0.0 are one configuration with one fingerprint

    @property
    def dim(self) -> int:
        """Size of a frame."""
        return self.order * (2 if self.feature == "poles" else 1) + (self.gain > 0)


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "warp": (lambda value: -1 < value < 1, "between -1 and 1"),
    "gain": (lambda value: 0 <= value < math.inf, "of at least 0"),
    "floor": (lambda value: 0 < value < math.inf, "greater than 0"),
}


class LipcotEncoder(Encoder):
    """Features of the linear prediction filter of every window, by Burg's method. Holds no weights.

    A frame depends on its own window alone. Windows that fit completely have a frame; no mean is removed, no taper and
    no pre-emphasis applied. A window is silent or not by `LipcotConfig.floor`; silent ones give one and the same frame,
    so that they have the same unit, whichever the centroids.

    Parameters
    ----------
    config : LipcotConfig, optional
        Settings.
    layer : None
        There are no layers.

    Raises
    ------
    InputError
        If a layer is asked for.

    Examples
    --------
    Any series of numbers, here one of 500 samples per second, with tokenizer and arrays at the same rate, so that
    nothing is resampled. Cut long ones with a rule in seconds that fits their pace::

        encoder = LipcotEncoder(LipcotConfig(sample_rate=500, window=500, hop=250, warp=0.2, floor=1e-6))
        rule = WindowRule(max_seconds=3600, context_seconds=0)
        tokenizer, _ = speechtok.training.kmeans.fit(recordings, encoder, 64, name="eeg", window=rule)  # arrays [N]
        units = tokenizer.encode(recording, sample_rate=500)
    """

    type = "lipcot"
    layer = None
    context = Context(0, 0)

    def __init__(self, config: LipcotConfig | None = None, layer: int | None = None) -> None:
        super().__init__()
        if layer is not None:
            raise InputError(f"layer {layer}: the LiPCoT encoder has no layers; leave the layer out")
        self.config = config or LipcotConfig()
        self.dim = self.config.dim
        self.grid = FrameGrid(self.config.sample_rate, self.config.hop, self.config.window)

    def encode(self, wave: Tensor, lengths: Tensor) -> Frames:
        """Frames of a checked batch: wave float32 [B, N], lengths int64 [B] -> features float32 [B, T, D]."""
        counts = self.frame_lengths(lengths)
        windows = wave.unfold(1, self.config.window, self.config.hop)  # a view [B, T, window]
        tiles = [self._features(tile) for tile in windows.split(max(1, _TILE // max(1, len(wave))), 1)]
        features = torch.cat(tiles, 1)
        return Frames(features.masked_fill(~valid_frames(counts, features.shape[1])[..., None], 0.0), counts)

    def _features(self, windows: Tensor) -> Tensor:
        config = self.config
        rows = windows.double().reshape(-1, config.window)
        _, variance, reflection = burg(rows, config.order, config.warp, config.floor)
        return features_of(reflection, variance, config).float().view(*windows.shape[:2], self.dim)


def features_of(reflection: Tensor, variance: Tensor, config: LipcotConfig) -> Tensor:
    """Frames of filters.

    Parameters
    ----------
    reflection : float64 [..., p]
        Reflection coefficients.
    variance : float64 [...]
        Error variance.
    config : LipcotConfig

    Returns
    -------
    float64 [..., D]
    """
    # Only what is predicted without error is changed by this.
    reflection = reflection.clamp(-LIMIT, LIMIT)
    match config.feature:
        case "lpc":
            features = reflection_to_lpc(reflection)
        case "lar":
            features = reflection_to_lar(reflection)
        case "lsf":
            features = lpc_to_lsf(reflection_to_lpc(reflection))
        case "cepstrum":
            features = lpc_to_cepstrum(reflection_to_lpc(reflection)) * _martin(reflection)
        case "poles":
            features = _pole_features(lpc_to_poles(reflection_to_lpc(reflection)))
    if config.gain == 0:
        return features
    level = config.gain * variance.clamp_min(config.floor).log10()
    return torch.cat((features, level[..., None]), -1)


def filters_of(features: Tensor, config: LipcotConfig) -> tuple[Tensor, Tensor]:
    """Filters that frames stand for; of any frames, such as means of others, they are stable.

    Parameters
    ----------
    features : float [..., D]
    config : LipcotConfig

    Returns
    -------
    lpc : float64 [..., p]
        Coefficients; of the warped filter, where the configuration has a `warp`.
    variance : float64 [...]
        Error variance.
    """
    features = features.double()
    values = features[..., : config.dim - (config.gain > 0)]
    match config.feature:
        case "lpc":
            lpc = values
        case "lar":
            lpc = reflection_to_lpc(lar_to_reflection(values))
        case "lsf":
            lpc = lsf_to_lpc(_ascending(values))
        case "cepstrum":
            lpc = cepstrum_to_lpc(values / _martin(values))
        case "poles":
            size = (1 - 10 ** (-values[..., : config.order] / 2)).clamp(0, LIMIT)
            lpc = poles_to_lpc(torch.polar(size, values[..., config.order :].contiguous()))
    if config.gain > 0:
        return stabilized(lpc, 10 ** (features[..., -1] / config.gain))
    lpc, _ = stabilized(lpc, torch.ones_like(values[..., 0]))
    return lpc, _LEVEL * (1 - lpc_to_reflection(lpc).square()).prod(-1)


def _martin(like: Tensor) -> Tensor:
    """Weights of a cepstrum, [p]."""
    return torch.arange(1, like.shape[-1] + 1, dtype=like.dtype, device=like.device).sqrt()


def _pole_features(poles: Tensor) -> Tensor:
    """Sizes and angles of poles in the order of the angles' magnitude, of a pair first the one below: [..., 2 p]."""
    size = poles.abs().clamp_max(LIMIT)
    # The angle of what is real is 0 or pi, whatever the signs of its zeros.
    angle = torch.where(poles.imag == 0, torch.pi * (poles.real < 0), poles.angle())
    angle, order = angle.sort(-1)
    again = angle.abs().argsort(dim=-1, stable=True)
    size, angle = size.gather(-1, order).gather(-1, again), angle.gather(-1, again)
    return torch.cat((-2 * (1 - size).log10(), angle), -1)


def _ascending(lsf: Tensor) -> Tensor:
    """Line spectral frequencies in order and apart, as those of a stable filter."""
    places = _GAP * torch.arange(1, lsf.shape[-1] + 1, dtype=lsf.dtype, device=lsf.device)
    room = math.pi - _GAP * (lsf.shape[-1] + 1)
    return (lsf.sort(-1).values - places).cummax(-1).values.clamp(0, room) + places
