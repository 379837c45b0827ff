"""From frames to the units of frames: what a tokenizer without segmenter does behind its encoder.

Frames differ by float32 rounding from batch to batch. A frame that is so close to another id that rounding might decide
is a near-tie; `decided` decides it again on one canonical path. Recurrent encoders depend on all of the past, so that
there is no short canonical path: with them `encoded_in_order` goes from chunk to chunk, always in the same way.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechtok.canonical import one_thread, padded
from speechtok.encoders.base import ChunkState, Frames
from speechtok.errors import CheckpointError, InputError
from speechtok.frames import Window
from speechtok.windows import EncodedWindow

if TYPE_CHECKING:
    from speechtok.tokenizer import Tokenizer

__all__ = ["encoded_chunks", "encoded_frames", "encoded_in_order", "frames_of"]


def frames_of(tokenizer: "Tokenizer", waves: Sequence[NDArray[np.float32]]) -> Frames:
    """Frames of waves float32 [n], padded and encoded as one batch."""
    return tokenizer.encoder(*padded(waves, max(len(wave) for wave in waves), tokenizer.device))


def quantized(
    tokenizer: "Tokenizer", features: Tensor, kept: Sequence[slice]
) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Quantize float [B, T, D] frames: ids int32 [K, t] and near-ties bool [t] of the kept ones of each row.

    Raises
    ------
    CheckpointError
        If frames are NaN.
    """
    codes = tokenizer.quantizer(features)
    ids, margins = codes.ids.cpu().numpy(), codes.margins.cpu().numpy()
    if any(np.isnan(row[frames]).any() for row, frames in zip(margins, kept, strict=True)):
        raise CheckpointError(
            f"{tokenizer.name}: the encoder gave NaN frames for finite sound; its weights are damaged"
        )
    tied = margins < tokenizer.encoder.rounding
    return [(ids[i, :, frames], tied[i, frames]) for i, frames in enumerate(kept)]


def decided(
    tokenizer: "Tokenizer", window: Window, wave: NDArray[np.float32], ids: NDArray[np.int32], ties: NDArray[np.intp]
) -> NDArray[np.int32]:
    """Ids int32 [K, T] of a window's kept frames, the near-tied ones of them by their canonical decision.

    That is the encoder's pass over just what the frame depends on (the window, where that is unbounded), alone and on
    one thread.
    """
    if not len(ties):
        return ids
    grid, context = tokenizer.encoder.grid, tokenizer.encoder.context
    total = grid.num_frames(len(wave))
    spans: dict[tuple[int, int], list[int]] = {}  # the frames of a chunk depend on the same samples
    for tie in ties.tolist():
        frame = window.skip + tie
        begin, end = (0, total) if context is None else context.needs(frame, frame + 1)
        spans.setdefault((begin, min(end, total)), []).append(tie)
    ids = ids.copy()
    with one_thread():
        for (begin, end), chosen in spans.items():
            piece = wave if context is None else wave[begin * grid.hop :][: grid.num_samples(end - begin)]
            frames = frames_of(tokenizer, [piece])
            again, _ = quantized(tokenizer, frames.features, [slice(0, int(frames.lengths[0]))])[0]
            ids[:, chosen] = again[:, window.skip - begin + np.array(chosen)]
    return ids


def encoded_frames(
    tokenizer: "Tokenizer", batch: Sequence[tuple[Window, NDArray[np.float32]]], frames: Frames, canonical: bool
) -> list[EncodedWindow]:
    """Results of windows from their frames; near-ties are decided unless the frames are `canonical` themselves."""
    results = []
    found = quantized(tokenizer, frames.features, [slice(0, count) for count in frames.lengths.tolist()])
    for (window, wave), (ids, tied) in zip(batch, found, strict=True):
        kept = slice(window.skip, window.skip + window.count)
        ids, ties = ids[:, kept], np.flatnonzero(tied[kept])
        ids = ids if canonical else decided(tokenizer, window, wave, ids, ties)
        results.append(_result(window, wave, ids, len(ties)))
    return results


def encoded_chunks(
    tokenizer: "Tokenizer",
    batch: Sequence[tuple[Window, NDArray[np.float32]]],
    frames: Sequence[int],
    state: ChunkState,
) -> tuple[list[EncodedWindow], ChunkState]:
    """See `Tokenizer.encode_chunks`."""
    encoder, context = tokenizer.encoder, tokenizer.encoder.context
    if context is None:
        raise InputError(f"{tokenizer.name}: its encoder depends on the whole sound and has no chunks")
    seen, hop = state.seen.tolist(), encoder.hop
    width = encoder.grid.num_samples(context.chunk)
    pieces = [wave[at * hop - w.start :][:width] for (w, wave), at in zip(batch, seen, strict=True)]
    positions = [min(context.chunk, n + context.look_ahead - at) for n, at in zip(frames, seen, strict=True)]
    features, state = encoder.advance(
        *padded(pieces, width, tokenizer.device), torch.tensor(positions, device=tokenizer.device), state
    )
    skips = [w.first + context.look_ahead - at for (w, _), at in zip(batch, seen, strict=True)]
    kept = [slice(skip, skip + w.count) for skip, (w, _) in zip(skips, batch, strict=True)]
    results = []
    for (window, wave), (ids, tied) in zip(batch, quantized(tokenizer, features, kept), strict=True):
        ties = np.flatnonzero(tied)
        results.append(_result(window, wave, decided(tokenizer, window, wave, ids, ties), len(ties)))
    return results, state


def _result(window: Window, wave: NDArray[np.float32], ids: NDArray[np.int32], ties: int) -> EncodedWindow:
    return EncodedWindow(window.first, window.count, ids, ties, stop=window.start + len(wave))


@torch.inference_mode()
def encoded_in_order(
    tokenizer: "Tokenizer", window: Window, wave: NDArray[np.float32], state: ChunkState
) -> tuple[EncodedWindow, ChunkState]:
    """The next window of a sound with a recurrent encoder: its chunks alone, one after the other, on one thread.

    Parameters
    ----------
    tokenizer : Tokenizer
    window : Window
        Whole chunks, except where the sound ends.
    wave : float32 [n]
        Its samples.
    state : ChunkState
        Of the encoder before them, one row.

    Returns
    -------
    EncodedWindow
    ChunkState
        After them.
    """
    encoder = tokenizer.encoder
    assert encoder.context is not None  # noqa: S101 - for the type checker: encoders in chunks have one
    chunk, grid = encoder.context.chunk, encoder.grid
    width = grid.num_samples(chunk)
    parts = [np.zeros((tokenizer.codebooks, 0), np.int32)]
    with one_thread():
        for at in range(0, window.count, chunk):
            count = min(chunk, window.count - at)
            piece, lengths = padded([wave[at * grid.hop :][:width]], width, tokenizer.device)
            positions = torch.tensor([count], device=tokenizer.device)
            features, state = encoder.advance(piece, lengths, positions, state)
            parts.append(quantized(tokenizer, features, [slice(0, count)])[0][0])
    return _result(window, wave, np.concatenate(parts, axis=1), 0), state
