"""The canonical path: one way to compute a sound's frames that knows no batch, no threads and no pushed pieces.

Frames of other paths differ from it by float32 rounding. Where that could matter, this path decides: for near-ties of
tokenizers (`speechtok.tokenizer`), and for all that segment tokenizers do in streams and with long files
(`speechtok.segments`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechtok.encoders.base import ChunkState, Encoder
from speechtok.frames import Context, Window

__all__ = ["FramePass", "block_context", "one_thread", "padded"]

_BLOCK = 16  # frames; what encoders of bounded context without chunks compute together on this path


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, so that nothing splits its sums in another way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def padded(waves: Sequence[NDArray[np.float32]], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Waves float32 [n] as one float32 [B, width] with zeros behind them, and their lengths, int64 [B]."""
    rows = torch.zeros(len(waves), width)
    for row, wave in zip(rows, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    lengths = torch.tensor([len(wave) for wave in waves], dtype=torch.int64)
    return rows.to(device), lengths.to(device)


def block_context(encoder: Encoder) -> Context | None:
    """An encoder's context, in blocks of 16 frames where it has no chunks of its own; None where it is unbounded."""
    context = encoder.context
    return context if context is None or encoder.chunked else replace(context, chunk=_BLOCK)


@dataclass
class FramePass:
    """One sound on the canonical path: its windows in order, their frames out.

    Encoders in chunks go from chunk to chunk with their state, others of bounded context from block to block; both
    give the same bits however the sound was cut into windows (of the `block_context`). The rest compute each window
    alone.

    Parameters
    ----------
    encoder : ChunkState or None
        Of encoders in chunks, one row.
    chunks : int
        Chunks or blocks that are done.
    """

    encoder: ChunkState | None
    chunks: int = 0

    @staticmethod
    def new(encoder: Encoder) -> "FramePass":
        """Before the first window."""
        return FramePass(encoder.stream_state(1) if encoder.chunked else None)

    def to(self, device: torch.device) -> "FramePass":
        """The same on a device."""
        return self if self.encoder is None else replace(self, encoder=self.encoder.to(device))

    @torch.inference_mode()
    def frames(
        self, encoder: Encoder, window: Window, wave: NDArray[np.float32], device: torch.device
    ) -> NDArray[np.float32]:
        """Frames float32 [count, D] that a window adds.

        Parameters
        ----------
        encoder : Encoder
            On `device`.
        window : Window
            The next one.
        wave : float32 [n]
            Its samples.
        """
        with one_thread():
            if encoder.chunked:
                parts = list(self._advance(encoder, window, wave, device))
            elif (context := block_context(encoder)) is not None:
                parts = list(self._blocks(encoder, context, window, wave, device))
            else:
                parts = [_alone(encoder, wave, window.skip, window.count, device)]
        return np.concatenate(parts) if parts else np.zeros((0, encoder.dim), np.float32)

    def _advance(
        self, encoder: Encoder, window: Window, wave: NDArray[np.float32], device: torch.device
    ) -> Iterator[NDArray[np.float32]]:
        assert encoder.context is not None  # noqa: S101 - for the type checker: encoders in chunks have one
        grid, chunk, ahead = encoder.grid, encoder.context.chunk, encoder.context.look_ahead
        known, end = window.start // grid.hop + grid.num_frames(len(wave)), window.first + window.count
        # Chunks that answer for no frame wait for a window that does: it reaches back to them.
        stop = end + ahead if window.count else 0
        width = grid.num_samples(chunk)
        while (at := self.chunks * chunk) < stop:
            piece = wave[at * grid.hop - window.start :][:width]
            counted = torch.tensor([min(chunk, known + ahead - at)], device=device)
            features, self.encoder = encoder.advance(*padded([piece], width, device), counted, self.encoder)
            self.chunks += 1
            yield features[0, max(0, window.first + ahead - at) : end + ahead - at].cpu().numpy()

    def _blocks(
        self,
        encoder: Encoder,
        context: Context,
        window: Window,
        wave: NDArray[np.float32],
        device: torch.device,
    ) -> Iterator[NDArray[np.float32]]:
        grid = encoder.grid
        known = window.start // grid.hop + grid.num_frames(len(wave))
        while self.chunks * context.chunk < window.first + window.count:
            block = context.window(grid, known, self.chunks, self.chunks + 1)
            piece = wave[block.start - window.start : (block.stop or 0) - window.start]
            self.chunks += 1
            yield _alone(encoder, piece, block.skip, block.count, device)


def _alone(
    encoder: Encoder, wave: NDArray[np.float32], skip: int, count: int, device: torch.device
) -> NDArray[np.float32]:
    """Frames ``[skip, skip + count)`` of a wave, float32 [count, D]."""
    frames: NDArray[np.float32] = (
        encoder(*padded([wave], len(wave), device)).features[0, skip : skip + count].cpu().numpy()
    )
    return frames
