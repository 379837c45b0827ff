"""Short-time Fourier transforms back to waves, whole or piece by piece."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.errors import InputError
from speechtok.nn.edges import Edges

__all__ = ["InverseStft"]

_SMALLEST = 1e-11  # of a sum of squared windows; samples that are given have far more


class InverseStft(nn.Module):
    """Windowed inverse transforms, added up and divided by the sum of squared windows (Griffin & Lim 1984, formula 6).

    Parameters
    ----------
    n_fft : int
        Samples of a transform and its periodic Hann window.
    hop : int
        Samples from frame to frame, at most half of `n_fft`.
    padding : {"same", "center"}
        What was put around the sound before it was analysed: ``(n_fft - hop) / 2`` samples, so that T frames are
        ``T * hop`` samples (Vocos, Siuzdak 2023, arXiv 2306.00814), or ``n_fft / 2`` as `torch.stft` does, so that they
        are ``(T - 1) * hop``.

    Attributes
    ----------
    cut : int
        Samples that are cut off on both sides. A stream's samples come so many later.

    Raises
    ------
    InputError
        If the sizes do not fit.
    """

    window: Tensor

    def __init__(self, n_fft: int, hop: int, padding: str = "same") -> None:
        super().__init__()
        if not 0 < 2 * hop <= n_fft or (n_fft - hop) % 2 or n_fft % 2:
            raise InputError(f"n_fft={n_fft}, hop={hop}: the hop is at most half of n_fft, and both are even")
        if padding not in ("same", "center"):
            raise InputError(f"padding {padding!r}: known are same, center")
        self.n_fft, self.hop, self.cut = n_fft, hop, (n_fft - hop if padding == "same" else n_fft) // 2
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, spectrum: Tensor, valid: Tensor | None = None) -> Tensor:
        """Waves of whole sounds.

        Parameters
        ----------
        spectrum : complex64 [B, T, n_fft // 2 + 1]
            At least one frame; two for ``padding="center"``.
        valid : bool [B, T], optional
            Frames that count; the others are left out as if they were not there.

        Returns
        -------
        float32 [B, N]
            N as for `padding`. What no valid frame reaches is zero.
        """
        total, weight = self._added(spectrum, valid)
        kept = slice(self.cut, total.shape[1] - self.cut)
        return total[:, kept] / weight[:, kept].clamp_min(_SMALLEST)

    def past(self, batch: int) -> list[Tensor]:
        """What it remembers before a stream's first frames: samples and squared windows that are not complete yet."""
        tail = self.window.new_zeros(batch, self.n_fft - self.hop)
        return [tail, tail]

    def advance(self, spectrum: Tensor, valid: Tensor, edges: Edges) -> Tensor:
        """Add the next frames of streams.

        Parameters
        ----------
        spectrum : complex64 [B, T, n_fft // 2 + 1]
        valid : bool [B, T]
            Frames that are there: not those before a sound's start or behind its end.
        edges : Edges
            With the past of the streams.

        Returns
        -------
        float32 [B, T * hop]
            The waves of `forward`, `cut` samples later. What comes before the first and after the last sample means
            nothing.
        """
        total, weight = self._added(spectrum, valid)
        end = spectrum.shape[1] * self.hop
        complete = []
        for added in (total, weight):
            before = edges.remembered()
            added = torch.cat([added[:, : before.shape[1]] + before, added[:, before.shape[1] :]], 1)
            edges.kept.append(added[:, end:])
            complete.append(added[:, :end])
        return complete[0] / complete[1].clamp_min(_SMALLEST)

    def _added(self, spectrum: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Overlapping windows added up, and their squares (of one row for all, or of each): float32 [B, samples]."""
        frames = torch.fft.irfft(spectrum, n=self.n_fft) * self.window
        squares = self.window.square().expand(1, spectrum.shape[1], -1)
        if valid is not None:
            frames, squares = frames * valid[..., None], squares * valid[..., None]
        size = (1, (spectrum.shape[1] - 1) * self.hop + self.n_fft)
        total, weight = (
            F.fold(x.transpose(1, 2), size, (1, self.n_fft), stride=(1, self.hop))[:, 0, 0] for x in (frames, squares)
        )
        return total, weight
