"""Sound out of LiPCoT frames: noise of the spectrum that each frame's filter has, which sounds like whispering."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechtok.audio.lpc import power_spectrum
from speechtok.codecs.base import Decoder
from speechtok.encoders.lipcot import LipcotConfig, filters_of
from speechtok.nn.edges import ChunkPast

__all__ = ["LipcotWaves"]

_FINER = 8  # frequencies for each bin of a window's noise


class LipcotWaves(Decoder):
    """White noise through the filters of the frames. Holds no weights: the frames' settings say all.

    A filter has neither pitch nor phase, so speech comes back whispered. Each frame gives noise over the samples of its
    window (of its hop, if that is longer), and where windows overlap they are faded into one another so that powers add
    up to 1. The noise of frame t of a sound is always the same. The first sample is that of the sound's first window.

    Parameters
    ----------
    config : LipcotConfig, optional
        Of the encoder.
    """

    type = "lipcot"
    block = 8
    angles: Tensor
    fade: Tensor

    def __init__(self, config: LipcotConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LipcotConfig()
        self.dim, self.hop, self.sample_rate = config.dim, config.hop, config.sample_rate
        self.size = max(config.window, config.hop)
        # A bin has the mean power of its band: a resonance may be far narrower and lie between two bins.
        bins = torch.arange(self.size // 2 + 1, dtype=torch.float64)[:, None]
        within = (torch.arange(_FINER, dtype=torch.float64) + 0.5) / _FINER - 0.5
        self.register_buffer("angles", 2 * torch.pi / self.size * (bins + within).flatten(), persistent=False)
        places = (torch.arange(self.size, dtype=torch.float64) + 0.5) / self.size
        power = (torch.pi * places).sin().square()
        # In the middle of a sound every sample belongs to the windows that begin whole hops apart.
        whole = -(-self.size // self.hop) * self.hop
        total = torch.nn.functional.pad(power, (0, whole - self.size)).view(-1, self.hop).sum(0)
        fade = (power / total.repeat(whole // self.hop)[: self.size]).sqrt()
        self.register_buffer("fade", fade, persistent=False)

    def spectrum(self, frames: Tensor, bins: int = 257) -> Tensor:
        """Power spectra of frames.

        Parameters
        ----------
        frames : float [..., D]
            Of the encoder, or of units: ``tokenizer.quantizer.decode(ids)``.
        bins : int
            Number of frequencies from 0 to half the sample rate, both included; at least 2.

        Returns
        -------
        float64 [..., bins]
            Two-sided power per sample, see `speechtok.audio.lpc.power_spectrum`.
        """
        angles = torch.linspace(0, torch.pi, bins, dtype=torch.float64, device=frames.device)
        return power_spectrum(*filters_of(frames, self.config), angles, self.config.warp)

    def forward(self, frames: Tensor) -> Tensor:
        """Whole sounds in one pass: float [B, T, D] -> float32 [B, T * hop]."""
        return self._waves(frames, self.stream_state(len(frames)))[0]

    def stream_state(self, batch: int) -> ChunkPast:
        """State of `batch` sounds before their first block: what fades out of earlier windows."""
        tail = self.fade.new_zeros(batch, self.size - self.hop)
        return ChunkPast([tail], torch.zeros(batch, dtype=torch.int64, device=tail.device))

    def advance(self, frames: Tensor, counts: Tensor, state: ChunkPast) -> tuple[Tensor, ChunkPast]:
        """Compute the next block of every sound, see `Decoder.advance`."""
        wave, tail = self._waves(frames, state)
        return wave, ChunkPast([tail], state.seen + counts)

    def _waves(self, frames: Tensor, state: ChunkPast) -> tuple[Tensor, Tensor]:
        """Wave float32 [B, T * hop] of frames [B, T, D], and what is left of their windows, float64 [B, size - hop]."""
        batch, count, _ = frames.shape
        noise = np.stack([_noise(first, count, self.size) for first in state.seen.tolist()])
        fine = power_spectrum(*filters_of(frames, self.config), self.angles, self.config.warp)
        spectrum = fine.unflatten(-1, (-1, _FINER)).mean(-1)
        white = torch.fft.rfft(torch.from_numpy(noise).to(spectrum.device))
        windows = torch.fft.irfft(white * spectrum.sqrt(), n=self.size) * self.fade
        end = count * self.hop
        wave = windows.new_zeros(batch, end + self.size - self.hop)
        wave[:, : self.size - self.hop] = state.layers[0]
        for frame in range(count):
            wave[:, frame * self.hop : frame * self.hop + self.size] += windows[:, frame]
        return wave[:, :end].float(), wave[:, end:].clone()


def _noise(first: int, count: int, size: int) -> NDArray[np.float64]:
    """White noise of variance 1 for the frames from `first` on, of each frame its own: [count, size]."""
    steps = -(-size // 4)  # the generator counts in fours
    raw = np.random.Philox(key=0, counter=first * steps).random_raw(count * steps * 4)
    uniform = (raw >> np.uint64(11)) * 2.0**-53 - 0.5
    return uniform.reshape(count, -1)[:, :size] * np.sqrt(12.0)
