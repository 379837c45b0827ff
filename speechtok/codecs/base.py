"""The interface of all decoders: frames of a quantizer in, wave out."""

from abc import ABC, abstractmethod
from dataclasses import asdict
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speechtok.encoders.base import ChunkState

__all__ = ["Decoder"]


class Decoder(nn.Module, ABC):
    """Turns quantized frames back into sound, block by block and without looking ahead.

    Attributes
    ----------
    dim : int
        Size of a frame.
    hop : int
        Samples that a frame stands for.
    sample_rate : int
        Of the wave (Hz).
    block : int
        Frames that are computed together. The wave of a frame depends on its block and on earlier ones only.
    """

    type: ClassVar[str]  # type: ignore[assignment]  # hides nn.Module.type
    config: Any
    dim: int
    hop: int
    sample_rate: int
    block: int

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self.config)

    @abstractmethod
    def forward(self, frames: Tensor) -> Tensor:
        """Whole sounds in one pass: float [B, T, D] -> float [B, T * hop]."""

    @abstractmethod
    def stream_state(self, batch: int) -> ChunkState:
        """State of `batch` sounds before their first block."""

    @abstractmethod
    def advance(self, frames: Tensor, counts: Tensor, state: Any) -> tuple[Tensor, ChunkState]:
        """Compute the next block of every sound.

        Parameters
        ----------
        frames : float [B, block, D]
        counts : int64 [B]
            Frames that there are: all, except where a sound ends.
        state : ChunkState
            From `stream_state` or the last call.

        Returns
        -------
        wave : float [B, block * hop]
            What lies behind ``counts * hop`` means nothing.
        state : ChunkState
        """

    @property
    def device(self) -> torch.device:
        """Where its weights, or what it has in their place, are."""
        return next(chain(self.parameters(), self.buffers())).device
