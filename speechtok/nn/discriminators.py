"""A discriminator that tells decoded sound from real, and the losses of all discriminators.

Multi-scale STFT discriminator as in EnCodec (Défossez et al. 2022, arXiv 2210.13438, section 3.4); vocoders have
those of `speechtok.nn.wave_discriminators`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from speechtok.errors import InputError

__all__ = ["MultiScaleStft", "Verdict", "feature_distance", "feature_matching", "generator_loss", "hinge_loss"]

Verdict = tuple[list[Tensor], list[list[Tensor]]]  # logits and features of every scale
_SLOPE = 0.2


class MultiScaleStft(nn.Module):
    """Convolutions over complex spectra of several window lengths, one network for each.

    Parameters
    ----------
    windows : sequence of int
        Samples of Fourier transforms, multiples of 4; hops are a quarter. As published: 2048, 1024, 512, 256, 128.
    filters : int
        Channels of all layers (32 as published).
    dilations : sequence of int
        In time, of the layers that halve the frequencies.
    kernel : tuple of int
        In time and frequency.

    Raises
    ------
    InputError
        If a window is no multiple of 4, or there is none.
    """

    def __init__(
        self,
        windows: Sequence[int] = (2048, 1024, 512, 256, 128),
        filters: int = 32,
        dilations: Sequence[int] = (1, 2, 4),
        kernel: tuple[int, int] = (3, 9),
    ) -> None:
        super().__init__()
        if not windows or any(window < 4 or window % 4 for window in windows):
            raise InputError(f"windows {list(windows)}: give at least one, and multiples of 4")
        self.longest = max(windows)
        self.scales = nn.ModuleList(_Stft(window, filters, dilations, kernel) for window in windows)

    def forward(self, wave: Tensor) -> Verdict:
        """Judge sounds; what lies behind a row's end should be zero, in real and decoded ones.

        Parameters
        ----------
        wave : float [B, N]
            N at least the longest window.

        Returns
        -------
        logits : list of float [B, T, F]
            Of every scale; positive where the sound seems real.
        features : list of list of float [B, C, T, F]
            Outputs of every layer of every scale.
        """
        if wave.ndim != 2 or wave.shape[1] < self.longest:
            raise InputError(f"waves {tuple(wave.shape)} must be [B, N] with at least {self.longest} samples a row")
        judged = [scale(wave) for scale in self.scales]
        return [logits for logits, _ in judged], [features for _, features in judged]


class _Stft(nn.Module):
    window: Tensor

    def __init__(self, window: int, filters: int, dilations: Sequence[int], kernel: tuple[int, int]) -> None:
        super().__init__()
        hann = torch.hann_window(window, dtype=torch.float64)
        self.register_buffer("window", (hann / hann.norm()).float(), persistent=False)
        square = (kernel[0], kernel[0])
        self.layers = nn.ModuleList([_conv(2, filters, kernel)])
        self.layers.extend(_conv(filters, filters, kernel, (1, 2), dilation) for dilation in dilations)
        self.layers.append(_conv(filters, filters, square))
        self.last = _conv(filters, 1, square)

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(wave.device.type, enabled=False):
            size = len(self.window)
            spectrum = torch.stft(wave.float(), size, size // 4, size, self.window, center=False, return_complex=True)
            x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # [B, 2, T, F]
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE)
            features.append(x)
        return self.last(x).squeeze(1), features


def _conv(
    inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1), dilation: int = 1
) -> nn.Module:
    padding = ((kernel[0] - 1) * dilation // 2, (kernel[1] - 1) // 2)
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding, (dilation, 1)))


def hinge_loss(real: Sequence[Tensor], decoded: Sequence[Tensor]) -> Tensor:
    """Loss of the discriminator: ``mean(relu(1 - real)) + mean(relu(1 + decoded))`` of each row, mean over scales.

    Parameters
    ----------
    real, decoded : sequence of float [B, ...]
        Logits of every scale.

    Returns
    -------
    float32 [B]
    """
    return _mean([_rows(F.relu(1.0 - a.float())) + _rows(F.relu(1.0 + b.float())) for a, b in _pairs(real, decoded)])


def generator_loss(decoded: Sequence[Tensor], *, clipped: bool = False) -> Tensor:
    """Hinge loss of who is judged: ``-mean(decoded)`` of each row, mean over scales: float32 [B].

    `clipped`: ``mean(relu(1 - decoded))`` instead, as in EnCodec and Vocos. What seems real beyond doubt gives no
    gradient then, which matters where no balancer bounds it.
    """
    return _mean([_rows(F.relu(1.0 - logits.float()) if clipped else -logits.float()) for logits in decoded])


def feature_distance(real: Sequence[Sequence[Tensor]], decoded: Sequence[Sequence[Tensor]]) -> Tensor:
    """Relative L1 of features: ``mean(|real - decoded|) / mean(|real|)`` of each row, mean over layers and scales.

    Parameters
    ----------
    real, decoded : sequence of sequence of float [B, ...]
        Features of every layer of every scale. No gradient flows into `real`.

    Returns
    -------
    float32 [B]
    """
    return _mean(
        [
            _rows((a.detach().float() - b.float()).abs()) / _rows(a.detach().float().abs()).clamp_min(1e-8)
            for one, two in _pairs(real, decoded)
            for a, b in _pairs(one, two)
        ]
    )


def feature_matching(real: Sequence[Sequence[Tensor]], decoded: Sequence[Sequence[Tensor]]) -> Tensor:
    """L1 of features: ``mean(|real - decoded|)`` of each row, sum over the layers of a scale, mean over scales.

    As in HiFi-GAN and Vocos: absolute differences, for losses that no balancer weighs.

    Parameters
    ----------
    real, decoded : sequence of sequence of float [B, ...]
        Features of every layer of every scale. No gradient flows into `real`.

    Returns
    -------
    float32 [B]
    """
    return _mean(
        [
            torch.stack([_rows((a.detach().float() - b.float()).abs()) for a, b in _pairs(one, two)]).sum(0)
            for one, two in _pairs(real, decoded)
        ]
    )


def _pairs(one: Sequence, two: Sequence) -> zip:
    return zip(one, two, strict=True)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _mean(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean(0)
