"""Discriminators of vocoders: many periods of the wave, many resolutions of its spectrum.

Periods as in HiFi-GAN (Kong et al. 2020, arXiv 2010.05646), spectra in bands as in the Descript codec (Kumar et al.
2023, arXiv 2306.06546), both as in Vocos (Siuzdak 2023, arXiv 2306.00814). Losses are in `speechtok.nn.discriminators`.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from speechtok.errors import InputError
from speechtok.nn.discriminators import Verdict

__all__ = ["MultiPeriod", "MultiResolution"]

_SLOPE = 0.1
_PEAK = 0.8
_BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # edges, as shares of the frequencies


class MultiPeriod(nn.Module):
    """Networks that each see every p-th sample of a wave, as an image [N / p, p].

    Parameters
    ----------
    periods : sequence of int
        As published: 2, 3, 5, 7, 11.
    channels : sequence of int
        Of the convolutions over time, kernel 5; all but the last have stride 3. As published: 32, 128, 512, 1024, 1024.

    Raises
    ------
    InputError
        If there are no periods, or fewer than two convolutions.
    """

    def __init__(
        self, periods: Sequence[int] = (2, 3, 5, 7, 11), channels: Sequence[int] = (32, 128, 512, 1024, 1024)
    ) -> None:
        super().__init__()
        if not periods or min(periods) < 1 or len(channels) < 2:
            raise InputError(f"periods {list(periods)}, channels {list(channels)}: give at least one and two")
        self.shortest = max(periods)
        self.scales = nn.ModuleList(_Period(period, channels) for period in periods)

    def forward(self, wave: Tensor) -> Verdict:
        """Judge sounds; what lies behind a row's end should be zero, in real and decoded ones.

        Parameters
        ----------
        wave : float [B, N]
            N at least the longest period.

        Returns
        -------
        logits : list of float [B, n]
            Of every period; positive where the sound seems real.
        features : list of list of float [B, C, n, p]
            Outputs of the layers of every period, without the first one, the logits included.
        """
        _check(wave, self.shortest)
        return _verdict(self.scales, wave)


class _Period(nn.Module):
    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        widths = [1, *channels]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(inputs, outputs, (5, 1), (3 if index < len(channels) - 1 else 1, 1), (2, 0)))
            for index, (inputs, outputs) in enumerate(pairwise(widths))
        )
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = F.pad(wave[:, None], (0, -wave.shape[1] % self.period), "reflect").unflatten(2, (-1, self.period))
        features = _maps(self.layers, x)
        x = self.last(features[-1])
        return x.flatten(1), [*features[1:], x]


class MultiResolution(nn.Module):
    """Networks on complex spectra of several window lengths, each with a network of its own for each of five bands.

    Waves are brought to mean 0 and peak 0.8 first. A silent row has none, and should not be judged.

    Parameters
    ----------
    windows : sequence of int
        Samples of Fourier transforms, multiples of 4; hops are a quarter. As published: 2048, 1024, 512.
    channels : int
        Of all layers (32 as published).

    Raises
    ------
    InputError
        If a window is no multiple of 4, or there is none.
    """

    def __init__(self, windows: Sequence[int] = (2048, 1024, 512), channels: int = 32) -> None:
        super().__init__()
        if not windows or any(window < 64 or window % 4 for window in windows):
            raise InputError(f"windows {list(windows)}: give at least one, and multiples of 4 from 64 on")
        self.shortest = max(windows) // 2 + 1
        self.scales = nn.ModuleList(_Resolution(window, channels) for window in windows)

    def forward(self, wave: Tensor) -> Verdict:
        """Judge sounds; see `MultiPeriod.forward`. A row has more than half of the longest window.

        Returns
        -------
        logits : list of float [B, n]
        features : list of list of float [B, C, T, F]
            Of all bands but their first layers, and the logits.
        """
        _check(wave, self.shortest)
        with torch.autocast(wave.device.type, enabled=False):
            wave = wave.float()
            wave = wave - wave.mean(1, keepdim=True)
            wave = _PEAK * wave / (wave.abs().amax(1, keepdim=True) + 1e-9)
        return _verdict(self.scales, wave)


class _Resolution(nn.Module):
    window: Tensor

    def __init__(self, window: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        bins = window // 2 + 1
        self.widths = [int(high * bins) - int(low * bins) for low, high in pairwise(_BANDS)]

        def conv(inputs: int, kernel: tuple[int, int], stride: int) -> nn.Module:
            padding = (kernel[0] // 2, kernel[1] // 2)
            return weight_norm(nn.Conv2d(inputs, channels, kernel, (1, stride), padding))

        self.bands = nn.ModuleList(
            nn.ModuleList([
                conv(2, (3, 9), 1), *(conv(channels, (3, 9), 2) for _ in range(3)), conv(channels, (3, 3), 1),
            ])
            for _ in self.widths
        )  # fmt: skip
        self.last = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(wave.device.type, enabled=False):
            size = len(self.window)
            spectrum = torch.stft(wave, size, size // 4, window=self.window, center=True, return_complex=True)
            image = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # [B, 2, T, F]
        features, ends = list[Tensor](), []
        for band, part in zip(self.bands, image.split(self.widths, 3), strict=True):
            maps = _maps(band.children(), part)
            features += maps[1:]
            ends.append(maps[-1])
        x = self.last(torch.cat(ends, 3))
        return x.flatten(1), [*features, x]


def _maps(layers: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """Outputs of all layers, one after the other."""
    maps = []
    for layer in layers:
        x = F.leaky_relu(layer(x), _SLOPE)
        maps.append(x)
    return maps


def _check(wave: Tensor, shortest: int) -> None:
    if wave.ndim != 2 or wave.shape[1] < shortest:
        raise InputError(f"waves {tuple(wave.shape)} must be [B, N] with at least {shortest} samples a row")


def _verdict(scales: nn.ModuleList, wave: Tensor) -> Verdict:
    judged = [scale(wave) for scale in scales]
    return [logits for logits, _ in judged], [features for _, features in judged]
