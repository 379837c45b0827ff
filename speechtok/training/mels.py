"""Filter bank frames of a training corpus on disk: decoded once, read at random from then on.

One flat float16 array of log mel frames (100 per second, 80 bins, see `kaldi_fbank`) and an index. An hour of sound
takes 58 MB, times the number of speeds.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.features import FRAME, HOP, kaldi_fbank
from speechtok.audio.resample import Resampler
from speechtok.corpus.engine import Event
from speechtok.errors import InputError
from speechtok.frames import FrameGrid
from speechtok.training.items import Items, identity_of, store

__all__ = ["Mels", "identity_of"]

BINS, RATE = 80, 100
_GRID = FrameGrid(16000, HOP, FRAME)


@dataclass(frozen=True)
class Mels(Items):
    """Items of a corpus: pieces of files of at most a minute, each at one or several speeds.

    Parameters
    ----------
    frames : float16 [N, 80]
        Log mel frames of all items, one behind the other; a memory map.
    starts, lengths : int64 [items]
        Where each item begins and how many frames it has; items are in the order of the corpus.
    mean, deviation : float32 [80]
        Per bin, over all frames.
    failed : tuple of str
        Why files were left out.
    """

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    failed: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Frames per second."""
        return float(RATE)

    def cut(self, item: int, first: int, count: int) -> NDArray[np.float32]:
        """`count` frames of an item from `first` on, fewer at its end: float32 [n, 80]."""
        return self.piece(item, first, count).astype(np.float32)

    @classmethod
    def build(
        cls,
        source: str | os.PathLike[str],
        folder: Path,
        speeds: Sequence[float] = (1.0,),
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> "Mels":
        """Read a corpus, or what an earlier call with the same corpus left in `folder`.

        Parameters
        ----------
        source : path or glob
            As for ``tokenize``; files that cannot be used are counted and left out.
        folder : Path
            Where the frames are kept.
        speeds : sequence of float
            Each file is played at each of these speeds (by resampling, which moves pitch and formants too).
        on_event : callable
            Progress.

        Raises
        ------
        InputError
            If nothing in the corpus can be used, or a speed is not positive.
        """
        if not speeds or min(speeds) <= 0:
            raise InputError(f"speeds {list(speeds)}: give at least one, and only positive numbers")
        total, sums, squares = 0, np.zeros(BINS), np.zeros(BINS)

        def convert(wave: NDArray[np.float32], name: str) -> list[NDArray[np.float16]]:
            nonlocal total, sums, squares
            versions = [_mel(wave, speed) for speed in speeds]
            for mel in versions:
                total += len(mel)
                sums += mel.sum(0, dtype=np.float64)
                squares += np.square(mel, dtype=np.float64).sum(0)
            return versions

        def facts() -> dict[str, Any]:
            mean = sums / total
            deviation = np.sqrt(np.maximum(squares / total - mean**2, 1e-10))
            return {"mean": mean.tolist(), "deviation": deviation.tolist()}

        settings = {"speeds": list(speeds)}
        frames, starts, lengths, known = store(
            source, folder, "frames.f16", settings, grid=_GRID, dtype=np.float16, dim=BINS, convert=convert,
            facts=facts, on_event=on_event,
        )  # fmt: skip
        mean, deviation = (np.array(known[name], np.float32) for name in ("mean", "deviation"))
        return cls(frames, starts, lengths, mean, deviation, tuple(known["failed"]))


def _mel(wave: NDArray[np.float32], speed: float) -> NDArray[np.float16]:
    """Log mel frames of a wave at 16 kHz played `speed` times as fast: float16 [T, 80]."""
    if speed != 1.0:
        resampler = Resampler(round(16000 * speed), 16000)
        wave = np.concatenate([resampler.push(wave), resampler.flush()])
    mel, _ = kaldi_fbank(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))
    return mel[0].numpy().astype(np.float16)
