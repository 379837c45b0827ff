"""Sound of a training corpus on disk: decoded and resampled once, read at random from then on.

One flat array of int16 samples and an index. An hour at 24 kHz takes 173 MB.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from speechtok.corpus.engine import Event
from speechtok.errors import InputError
from speechtok.frames import FrameGrid
from speechtok.training.items import Items, identity_of, store

__all__ = ["Waves", "identity_of"]

_SCALE = 32768  # int16 of full scale


@dataclass(frozen=True)
class Waves(Items):
    """Items of a corpus: pieces of files of at most a minute, trimmed to whole hops.

    Places and lengths are counted in hops: they are the frames of an encoder with this hop.

    Parameters
    ----------
    frames : int16 [N, hop]
        Samples of all items, one hop a row; a memory map.
    starts, lengths : int64 [items]
        Where each item begins and how many hops it has; items are in the order of the corpus.
    sample_rate : int
        Hz.
    failed : tuple of str
        Why files were left out.
    """

    sample_rate: int
    failed: tuple[str, ...]

    @property
    def hop(self) -> int:
        """Samples of a hop."""
        return int(self.frames.shape[1])

    @property
    def rate(self) -> float:
        """Hops per second."""
        return self.sample_rate / self.hop

    def cut(self, item: int, first: int, count: int) -> NDArray[np.float32]:
        """`count` hops of an item from hop `first` on, fewer at its end: float32 [n * hop] in [-1, 1)."""
        samples = self.piece(item, first, count).reshape(-1)
        return samples.astype(np.float32) / np.float32(_SCALE)

    @classmethod
    def build(
        cls,
        source: str | os.PathLike[str],
        folder: Path,
        on_event: Callable[[Event], None] = lambda event: None,
        sample_rate: int = 24000,
        hop: int = 320,
    ) -> "Waves":
        """Read a corpus, or what an earlier call with the same corpus, rate and hop left in `folder`.

        Parameters
        ----------
        source : path or glob
            As for ``tokenize``; files that cannot be used are counted and left out. Channels are averaged. Samples
            beyond full scale are clipped.
        folder : Path
            Where the samples are kept.
        on_event : callable
            Progress.
        sample_rate : int
            To which all sound is converted (Hz).
        hop : int
            Samples.

        Raises
        ------
        InputError
            If nothing in the corpus can be used, or `sample_rate` or `hop` is not positive.
        """
        if sample_rate < 1 or hop < 1:
            raise InputError(f"sample_rate {sample_rate}, hop {hop}: give positive numbers")
        settings = {"sample_rate": sample_rate, "hop": hop}
        grid = FrameGrid(sample_rate, hop, hop)  # hops that do not overlap: nothing between pieces is lost

        def convert(wave: NDArray[np.float32], name: str) -> list[NDArray[np.int16]]:
            whole = wave[: len(wave) // hop * hop].reshape(-1, hop)
            return [np.clip(np.rint(whole * _SCALE), -_SCALE, _SCALE - 1).astype(np.int16)]

        frames, starts, lengths, known = store(
            source, folder, "samples.i16", settings, grid=grid, dtype=np.int16, dim=hop, convert=convert,
            on_event=on_event,
        )  # fmt: skip
        return cls(frames, starts, lengths, sample_rate, tuple(known["failed"]))
