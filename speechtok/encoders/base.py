"""The interface of all encoders: wave in, frames out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from speechtok.errors import AudioError
from speechtok.frames import Context, FrameGrid

__all__ = ["ChunkState", "Encoder", "Frames"]


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


class ChunkState(Protocol):
    """What an encoder in chunks remembers of a batch of streams.

    Attributes
    ----------
    seen : int64 [B]
        Positions that were computed of each stream.
    """

    seen: Tensor

    def rows(self) -> Iterator[Self]:
        """The states of the single streams; they share no memory."""

    def to(self, device: torch.device) -> Self:
        """The same state on a device."""

    @staticmethod
    def join(states: Sequence[Any]) -> "ChunkState":
        """One batch of the states of single streams."""


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
    context : Context or None
        Frames that a frame depends on besides its own samples; None where a frame
        depends on the whole utterance (streams of such encoders only approximate the offline result).
    rounding : float
        Bound on the relative rounding error of a frame (Euclidean norm) between batch shapes.
    recurrent : bool
        Whether all of the past reaches a frame through the state of `advance` (encoders in chunks only). `context` is
        that of one chunk then: tokenizers go from chunk to chunk with the state, offline as in streams.
    """

    type: ClassVar[str]  # type: ignore[assignment]  # hides nn.Module.type, a dtype cast that nobody needs here
    rounding: ClassVar[float] = 5e-6
    config: Any
    grid: FrameGrid
    dim: int
    layer: int | None
    context: Context | None
    recurrent: bool = False

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
        return None if self.context is None else self.context.most_ahead * self.hop

    @property
    def exact_stream(self) -> bool:
        """Whether a stream gives the frames of the offline pass."""
        return self.context is not None

    @property
    def chunked(self) -> bool:
        """Whether streams go chunk by chunk through `advance`."""
        return self.context is not None and self.context.chunk > 1

    def stream_state(self, batch: int) -> ChunkState:
        """State of `batch` streams before their first chunk (encoders in chunks only)."""
        raise NotImplementedError(f"{self.type} does not work in chunks")

    def advance(self, wave: Tensor, lengths: Tensor, positions: Tensor, state: Any) -> tuple[Tensor, ChunkState]:
        """Compute the next chunk of every stream (encoders in chunks only).

        Position p of a stream reads frame p and answers for frame ``p - look_ahead``; a stream begins at position 0
        and ends, `look_ahead` positions after its last frame, with positions that read nothing.

        Parameters
        ----------
        wave : float32 [B, grid.num_samples(chunk)]
            The samples of the frames of this chunk.
        lengths : int64 [B]
            Samples that there are: all, except where the sound ends.
        positions : int64 [B]
            Positions that count: `chunk`, except in the last chunk of a stream.
        state : ChunkState
            From `stream_state` or the last call.

        Returns
        -------
        frames : float32 [B, chunk, D]
            Frames ``seen - look_ahead + [0, chunk)``; those before frame 0 mean nothing.
        state : ChunkState
        """
        raise NotImplementedError(f"{self.type} does not work in chunks")

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
        if self.grid.partial:
            lengths = torch.where(lengths > 0, lengths + self.hop - 1, 0)
        return ((lengths - self.receptive_field).div(self.hop, rounding_mode="floor") + 1).clamp_min(0)
