"""The interface of all encoders: wave in, frames out."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speechtok.errors import AudioError
from speechtok.frames import FrameGrid

__all__ = ["Encoder", "Frames"]


@dataclass(frozen=True)
class Frames:
    """What an encoder returns.

    Parameters
    ----------
    features : float [B, T, D]
        Frames; zeros behind the end of each row.
    lengths : int64 [B]
        Valid frames of each row.
    """

    features: Tensor
    lengths: Tensor


class Encoder(nn.Module, ABC):
    """Turns waves into frames. A row of a batch gives the frames it would give alone.

    Attributes
    ----------
    grid : FrameGrid
        Sample rate, hop and receptive field.
    dim : int
        Size of a frame.
    layer : int or None
        Index into transformers' ``hidden_states``; None for encoders without layers.
    context : int or None
        Frames on each side that a frame depends on besides its own samples; None where a frame
        depends on the whole utterance (streams of such encoders only approximate the offline result).
    rounding : float
        Bound on the relative rounding error of a frame (Euclidean norm) between batch shapes.
    """

    type: ClassVar[str]  # type: ignore[assignment]  # hides nn.Module.type, a dtype cast that nobody needs here
    rounding: ClassVar[float] = 5e-6
    config: Any
    grid: FrameGrid
    dim: int
    layer: int | None
    context: int | None

    @property
    def sample_rate(self) -> int:
        """Rate of the wave (Hz)."""
        return self.grid.sample_rate

    @property
    def hop(self) -> int:
        """Samples from frame to frame."""
        return self.grid.hop

    @property
    def receptive_field(self) -> int:
        """Samples that one frame reads, without context."""
        return self.grid.receptive_field

    @property
    def look_ahead(self) -> int | None:
        """Samples after the end of a frame's own samples that it needs; None: the whole utterance."""
        return None if self.context is None else self.context * self.hop

    @property
    def exact_stream(self) -> bool:
        """Whether a stream gives the frames of the offline pass."""
        return self.context is not None

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self.config)

    @abstractmethod
    def encode(self, wave: Tensor, lengths: Tensor) -> Frames:
        """Frames of a checked batch: wave float32 [B, N], lengths int64 [B], all on one device."""

    def forward(self, wave: Tensor, lengths: Tensor | None = None) -> Frames:
        """Encode a batch.

        Parameters
        ----------
        wave : float [B, N]
            Waves at `sample_rate`, in [-1, 1].
        lengths : int64 [B], optional
            Valid samples of each row; all N where it is None. What lies behind is ignored.

        Returns
        -------
        Frames
            ``features [B, T, D]`` with ``T = grid.num_frames(N)``, and ``lengths [B]``.

        Raises
        ------
        AudioError
            If shapes do not fit.
        """
        if wave.ndim != 2:
            raise AudioError(
                f"an encoder takes wave [batch, samples], not {tuple(wave.shape)}; add or remove a dimension"
            )
        if lengths is None:
            lengths = torch.full((wave.shape[0],), wave.shape[1], dtype=torch.int64)
        lengths = lengths.to(device=wave.device, dtype=torch.int64)
        if lengths.shape != wave.shape[:1] or bool((lengths > wave.shape[1]).any()) or bool((lengths < 0).any()):
            raise AudioError(f"lengths {lengths.tolist()} do not fit a wave of shape {tuple(wave.shape)}")
        valid = torch.arange(wave.shape[1], device=wave.device) < lengths[:, None]
        wave = torch.where(valid, wave.float(), 0.0)
        if self.grid.num_frames(wave.shape[1]) == 0:
            return Frames(wave.new_zeros(wave.shape[0], 0, self.dim), torch.zeros_like(lengths))
        return self.encode(wave, lengths)

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """Valid frames for int64 [B] lengths in samples."""
        return ((lengths - self.receptive_field).div(self.hop, rounding_mode="floor") + 1).clamp_min(0)
