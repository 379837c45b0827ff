"""From frames to the units of segments: what a segment tokenizer does behind its encoder.

Segments are decided by thresholds, and frames differ by float32 rounding from batch to batch. So there is one canonical
path, `SegmentPass`: frames of the canonical path (`speechtok.canonical`) go through the segmenter's stream, and each
segment's mean is quantized alone. Streams and long files always take it. A sound of one window may be encoded in a
batch: `whole_sound` finds out whether one of its decisions was so close that the canonical path might have taken
another, and then asks the canonical path.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.canonical import FramePass, one_thread
from speechtok.encoders.base import Frames
from speechtok.errors import CheckpointError, InputError
from speechtok.frames import Window
from speechtok.segmenters.base import SegmentStream
from speechtok.segmenters.pool import pool
from speechtok.windows import EncodedWindow

if TYPE_CHECKING:
    from speechtok.tokenizer import Tokenizer

__all__ = ["SegmentPass", "Segments", "cut_sound", "segments_of", "whole_sound", "whole_sounds"]


@dataclass(frozen=True)
class Segments:
    """Segments and their units.

    Parameters
    ----------
    ids : int32 [S]
    spans : int64 [S, 2]
        First frame and end (exclusive) of each, counted in its sound.
    ties : int
        1 if they come from the canonical path because a decision was a near-tie.
    """

    ids: NDArray[np.int32]
    spans: NDArray[np.int64]
    ties: int = 0

    @staticmethod
    def join(parts: Sequence["Segments"]) -> "Segments":
        """One behind the other; none of none."""
        empty = Segments(np.zeros(0, np.int32), np.zeros((0, 2), np.int64))
        parts = [empty, *parts]
        return Segments(np.concatenate([part.ids for part in parts]), np.concatenate([part.spans for part in parts]))

    def with_silence(self, end: int, gap: int, unit: int) -> "Segments":
        """Put a silence unit in front of each segment that begins more than `gap` frames behind the one before it.

        `end` is where the segment before the first one ended (0 at the start of a sound).
        """
        before = np.concatenate([[end], self.spans[:-1, 1]])
        where = np.flatnonzero(self.spans[:, 0] - before > gap)
        silences = np.stack([before[where], self.spans[where, 0]], 1)
        return Segments(np.insert(self.ids, where, unit), np.insert(self.spans, where, silences, axis=0))


def cut_sound(first: int, count: int, segments: Callable[[], Segments]) -> EncodedWindow:
    """Result of a window of `count` frames from frame `first` on: its segments, or why the sound cannot be cut.

    The error is a value here: the other sounds of a batch must not suffer from it.
    """
    try:
        found, error = segments(), None
    except InputError as problem:
        found, error = Segments.join([]), problem
    return EncodedWindow(first, count, found.ids[None], found.ties, found.spans, error)


def whole_sounds(
    tokenizer: "Tokenizer", batch: Sequence[tuple[Window, NDArray[np.float32]]], frames: Frames, canonical: bool
) -> list[EncodedWindow]:
    """Results of sounds of one window each from their frames, see `whole_sound`."""
    rows = zip(frames.features, frames.lengths.tolist(), strict=True)
    sounds = [row[:count].cpu().numpy() for row, count in rows]
    return [
        cut_sound(window.first, window.count, partial(whole_sound, tokenizer, window, wave, sound, canonical))
        for (window, wave), sound in zip(batch, sounds, strict=True)
    ]


def whole_sound(
    tokenizer: "Tokenizer",
    window: Window,
    wave: NDArray[np.float32],
    frames: NDArray[np.float32],
    canonical: bool,
) -> Segments:
    """Segments of a sound of one window, decided on the canonical path where they are near-ties.

    Parameters
    ----------
    tokenizer : Tokenizer
    window : Window
    wave : float32 [n]
    frames : float32 [T, D]
        Of this sound, whatever it was encoded with.
    canonical : bool
        Whether they are those of the canonical path.

    Raises
    ------
    InputError
        If the sound cannot be cut.
    """
    segments, near = segments_of(tokenizer, frames)
    if not near:
        return segments
    sound = SegmentPass.new(tokenizer)
    first = sound.push_frames(tokenizer, frames) if canonical else sound.push(tokenizer, window, wave)
    return replace(Segments.join([first, sound.flush(tokenizer)]), ties=1)


def segments_of(tokenizer: "Tokenizer", frames: NDArray[np.float32]) -> tuple[Segments, bool]:
    """Segments of a whole sound, and whether a decision was a near-tie.

    Each frame of the canonical path lies within ``rounding`` times its norm of the given one. So a mean lies within
    ``rounding`` times the mean of its frames' norms, which may be much more than ``rounding`` times its own norm, where
    frames point in different directions. A mean that may be moved twice as far without another id is no near-tie:
    twice, because the mean and its distances are rounded, too.

    Parameters
    ----------
    tokenizer : Tokenizer
    frames : float32 [T, D]

    Returns
    -------
    Segments
    bool
    """
    assert tokenizer.segmenter is not None  # noqa: S101 - for the type checker
    _check(tokenizer, frames)
    rounding = tokenizer.encoder.rounding
    spans, near = tokenizer.segmenter.segment(frames, slack=rounding)
    means = pool(frames, spans)
    codes = tokenizer.quantizer(torch.from_numpy(means)[None].to(tokenizer.device))
    margins = codes.margins[0].cpu().numpy().astype(np.float64)
    moved = 2 * rounding * pool(np.linalg.norm(frames, axis=1, keepdims=True), spans)[:, 0].astype(np.float64)
    sizes = np.maximum(np.linalg.norm(means.astype(np.float64), axis=1), 1e-30)
    near = near or bool((margins < moved / sizes).any())
    return _finished(tokenizer, codes.ids[0, 0].cpu().numpy(), spans, 0), near


def _check(tokenizer: "Tokenizer", frames: NDArray[np.float32]) -> None:
    if not np.isfinite(frames).all():
        raise CheckpointError(
            f"{tokenizer.name}: the encoder gave NaN frames for finite sound; its weights are damaged"
        )


def _finished(tokenizer: "Tokenizer", ids: NDArray[np.int32], spans: NDArray[np.int64], end: int) -> Segments:
    """Segments with silence units where the tokenizer has them; the segment before ended at frame `end`."""
    segments, gap, unit = Segments(ids, spans), tokenizer.silence_gap, tokenizer.silence_unit
    return segments if gap is None or unit is None else segments.with_silence(end, gap, unit)


@dataclass
class SegmentPass:
    """One sound on the canonical path: its windows in order, its segments out. A value that can be copied and pickled.

    Parameters
    ----------
    frames : FramePass
        From windows to frames.
    cutter : SegmentStream
        From frames to segments.
    held : list of float32 [n, D]
        Frames from frame `start` on: those of segments that are still to come.
    start : int
    end : int
        Where the last segment that was given ended.
    """

    frames: FramePass
    cutter: SegmentStream
    held: list[NDArray[np.float32]] = field(default_factory=list)
    start: int = 0
    end: int = 0

    @staticmethod
    def new(tokenizer: "Tokenizer") -> "SegmentPass":
        """Before the first window."""
        assert tokenizer.segmenter is not None  # noqa: S101 - for the type checker
        return SegmentPass(FramePass.new(tokenizer.encoder), tokenizer.segmenter.stream())

    def to(self, device: torch.device) -> "SegmentPass":
        """The same on a device."""
        return replace(self, frames=self.frames.to(device))

    def push(self, tokenizer: "Tokenizer", window: Window, wave: NDArray[np.float32]) -> Segments:
        """Take the next window with its samples, float32 [n]; give the segments that are final with it."""
        return self.push_frames(tokenizer, self.frames.frames(tokenizer.encoder, window, wave, tokenizer.device))

    def push_frames(self, tokenizer: "Tokenizer", frames: NDArray[np.float32]) -> Segments:
        """Take frames float32 [n, D] of the canonical path; give the segments that are final with them."""
        _check(tokenizer, frames)
        if len(frames):
            self.held.append(frames)
        segments = self._code(tokenizer, self.cutter.push(frames))
        while self.held and self.start + len(self.held[0]) <= self.cutter.settled:
            self.start += len(self.held.pop(0))
        return segments

    def flush(self, tokenizer: "Tokenizer") -> Segments:
        """End the sound; give the remaining segments."""
        return self._code(tokenizer, self.cutter.flush())

    @torch.inference_mode()
    def _code(self, tokenizer: "Tokenizer", spans: NDArray[np.int64]) -> Segments:
        if not len(spans):
            return Segments.join([])
        means = torch.from_numpy(pool(np.concatenate(self.held), spans - self.start)).to(tokenizer.device)
        with one_thread():  # one by one: the number of segments that come together has no say
            ids = torch.cat([tokenizer.quantizer(mean[None, None]).ids[0, 0] for mean in means]).cpu().numpy()
        end, self.end = self.end, int(spans[-1, 1])
        return _finished(tokenizer, ids, spans, end)
