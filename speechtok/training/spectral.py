"""Mel losses: of neural codecs (Défossez et al. 2022, arXiv 2210.13438, section 3.4) and of vocoders.

Codecs compare spectra of several window lengths, since no single one shows both clicks and pitch. Computed in float32
whatever the model computes in.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.audio.features import log_mel, mel_bank, valid_frames
from speechtok.errors import InputError

__all__ = ["MultiScaleMel", "log_mel_distance", "mel_power"]


class MultiScaleMel(nn.Module):
    """Difference of two sounds: for each window length, L1 of mel spectra and squared error of their log10.

    Both means are over frames and bins; the loss is the mean over the windows, the logarithms weighted by `log_weight`
    (sum of all terms divided by the sum of their weights). Spectra are powers of Fourier transforms that are divided by
    the norm of the window, so that a window's length does not change the level of noise. Hops are a quarter of the
    window; rows are padded by 3/8 of it with zeros, so that every hop has a frame.

    Parameters
    ----------
    sample_rate : int
        Hz.
    windows : sequence of int
        Samples, multiples of 4.
    bins : int
        Mel filters (HTK's formula, peak 1). Some are empty where windows are short.
    low, high : float
        Band (Hz); `high` is half the sample rate where None.
    log_weight : float
        Of the squared error of logarithms, relative to L1.
    floor : float
        Added before the logarithm.

    Raises
    ------
    InputError
        If a window is no multiple of 4, or there is none.
    AudioError
        If the band does not fit the sample rate.
    """

    def __init__(
        self,
        sample_rate: int = 24000,
        windows: Sequence[int] = (64, 128, 256, 512, 1024),
        bins: int = 64,
        low: float = 64.0,
        high: float | None = None,
        log_weight: float = 1.0,
        floor: float = 1e-5,
    ) -> None:
        super().__init__()
        if not windows or any(window < 4 or window % 4 for window in windows):
            raise InputError(f"windows {list(windows)}: give at least one, and multiples of 4")
        self.windows, self.log_weight, self.floor = tuple(windows), log_weight, floor
        high = sample_rate / 2 if high is None else high
        for size in windows:
            window = torch.hann_window(size, dtype=torch.float64)
            self.register_buffer(f"window{size}", (window / window.norm()).float(), persistent=False)
            bank = mel_bank(bins, size, sample_rate, low, high, "htk", False)
            self.register_buffer(f"bank{size}", bank.clone(), persistent=False)

    def forward(self, decoded: Tensor, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Loss of each row.

        Parameters
        ----------
        decoded, wave : float [B, N]
            N at least a quarter of the longest window.
        lengths : int64 [B], optional
            Valid samples; what lies behind has no say.

        Returns
        -------
        float32 [B]
        """
        if decoded.shape != wave.shape or decoded.ndim != 2 or 4 * decoded.shape[1] < max(self.windows):
            raise InputError(
                f"decoded {tuple(decoded.shape)} and wave {tuple(wave.shape)} must be [B, N] alike, "
                f"N at least {max(self.windows) // 4}"
            )
        with torch.autocast(decoded.device.type, enabled=False):
            decoded, wave = decoded.float(), wave.float()
            if lengths is not None:
                inside = valid_frames(lengths, wave.shape[1])
                decoded, wave = decoded * inside, wave * inside
            total = decoded.new_zeros(len(decoded))
            for size in self.windows:
                hop, pad = size // 4, size * 3 // 8
                window, bank = getattr(self, f"window{size}"), getattr(self, f"bank{size}")
                ours, theirs = (mel_power(F.pad(x, (pad, pad)), window, bank, hop) for x in (decoded, wave))
                logs = (ours + self.floor).log10() - (theirs + self.floor).log10()
                frames = ((ours - theirs).abs() + self.log_weight * logs.square()).mean(2)  # [B, T]
                if lengths is None:
                    total = total + frames.mean(1)
                else:
                    counts = (lengths // hop).clamp(1, frames.shape[1])
                    total = total + (frames * valid_frames(counts, frames.shape[1])).sum(1) / counts
            return total / (len(self.windows) * (1.0 + self.log_weight))


def log_mel_distance(
    decoded: Tensor, wave: Tensor, lengths: Tensor | None = None, *, sample_rate: int, n_fft: int = 1024,
    hop: int = 256, bins: int = 100, floor: float = 1e-7,
) -> Tensor:  # fmt: skip
    """L1 of log mel spectra of magnitudes, mean over bins and frames (Siuzdak 2023, arXiv 2306.00814).

    Parameters
    ----------
    decoded, wave : float [B, N]
    lengths : int64 [B], optional
        Valid samples; what lies behind has no say.
    sample_rate : int
        Hz.
    n_fft, hop, bins, floor
        See `log_mel`; filters are HTK's with peak 1. The defaults are the published ones.

    Returns
    -------
    float32 [B]
        0 for a row without samples.
    """
    if decoded.shape != wave.shape or decoded.ndim != 2:
        raise InputError(f"decoded {tuple(decoded.shape)} and wave {tuple(wave.shape)} must be [B, N] alike")
    if lengths is None:
        lengths = torch.full((len(wave),), wave.shape[1], device=wave.device)
    with torch.autocast(decoded.device.type, enabled=False):
        (ours, counts), (theirs, _) = (
            log_mel(
                x, lengths, sample_rate=sample_rate, n_fft=n_fft, hop=hop, bins=bins, scale="htk", area_norm=False,
                floor=floor, pad_mode="reflect",
            )
            for x in (decoded, wave)
        )  # fmt: skip
        # Both are zero behind a row's end.
        return (ours - theirs).abs().mean(2).sum(1) / counts.clamp_min(1)


def mel_power(wave: Tensor, window: Tensor, bank: Tensor, hop: int) -> Tensor:
    """Mel spectrum of the power of frames that fit completely, with a fast gradient.

    Parameters
    ----------
    wave : float [B, N]
    window : float [W]
        W is a multiple of `hop`.
    bank : float [W // 2 + 1, bins]
    hop : int
        Samples.

    Returns
    -------
    float [B, T, bins]
    """
    mel: Tensor = _MelPower.apply(wave, window, bank, hop)
    return mel


class _MelPower(torch.autograd.Function):
    """`mel_power`. The gradient of torch's rfft goes through a complex transform of full length; this one does not."""

    @staticmethod
    def forward(ctx: Any, wave: Tensor, window: Tensor, bank: Tensor, hop: int) -> Tensor:
        spectrum = torch.fft.rfft(wave.unfold(1, len(window), hop) * window)
        ctx.save_for_backward(spectrum, window, bank)
        ctx.hop, ctx.samples = hop, wave.shape[1]
        return torch.addcmul(spectrum.real.square(), spectrum.imag, spectrum.imag) @ bank

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        spectrum, window, bank = ctx.saved_tensors
        size, hop = len(window), ctx.hop
        # Of the real and imaginary part 2 g S; the inverse transform counts all bins but the first and last twice.
        power = gradient @ bank.T
        power[..., 0] *= 2.0
        power[..., -1] *= 2.0
        frames = torch.fft.irfft(spectrum * power, n=size, norm="forward") * window
        rows, count = frames.shape[:2]
        parts = size // hop
        wave = frames.new_zeros(rows, count + parts - 1, hop)
        for i, part in enumerate(frames.view(rows, count, parts, hop).unbind(2)):
            wave[:, i : i + count] += part
        return F.pad(wave.flatten(1), (0, ctx.samples - wave.shape[1] * hop)), None, None, None
