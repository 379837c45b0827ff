"""Filter bank frames of a training corpus on disk: decoded once, read at random from then on.

One flat float16 array of log mel frames (100 per second, 80 bins, see `kaldi_fbank`) and an index. An hour of sound
takes 58 MB, times the number of speeds.
"""

import hashlib
import json
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
from speechtok.corpus.shard import Decoder
from speechtok.corpus.sources import scan
from speechtok.errors import FormatError, InputError
from speechtok.frames import FrameGrid, WindowRule

__all__ = ["Mels", "identity_of"]

BINS, RATE = 80, 100
_GRID = FrameGrid(16000, HOP, FRAME)
_PIECE = WindowRule(max_seconds=60.0, context_seconds=0.0)  # longer files become several items


@dataclass(frozen=True)
class Mels:
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

    frames: NDArray[np.float16]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    failed: tuple[str, ...]

    @property
    def hours(self) -> float:
        """Sound in all items."""
        return float(self.lengths.sum()) / RATE / 3600

    def cut(self, item: int, first: int, count: int) -> NDArray[np.float32]:
        """`count` frames of an item from `first` on, fewer at its end: float32 [n, 80]."""
        begin = self.starts[item] + first
        return self.frames[begin : begin + min(count, self.lengths[item] - first)].astype(np.float32)

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
        listing = scan(str(source))
        identity = {
            "files": [[utterance.key, utterance.size] for utterance in listing.utterances],
            "speeds": list(speeds),
        }
        index = folder / "index.json"
        if index.exists():
            try:
                found = json.loads(index.read_text())
            except ValueError as error:
                raise FormatError(f"{index} is damaged ({error}); delete {folder}") from error
            if found["identity"] == identity:
                return cls._open(folder, found)
        folder.mkdir(parents=True, exist_ok=True)
        index.unlink(missing_ok=True)
        (folder / "frames.f16").unlink(missing_ok=True)  # not overwritten: it may be linked from another folder
        decoder = Decoder(listing.utterances, _GRID, _PIECE, threads=max(1, (os.cpu_count() or 2) - 1))
        pieces: dict[tuple[int, int, int], tuple[int, int]] = {}
        total, sums, squares = 0, np.zeros(BINS), np.zeros(BINS)
        with (folder / "frames.f16").open("wb") as file:
            for done, (number, window, wave) in enumerate(decoder):
                for which, speed in enumerate(speeds):
                    mel = _mel(wave, speed)
                    mel.tofile(file)
                    pieces[number, window.first, which] = (total, len(mel))
                    total += len(mel)
                    sums += mel.sum(0, dtype=np.float64)
                    squares += np.square(mel, dtype=np.float64).sum(0)
                on_event(Event("read", min(done + 1, len(listing.utterances)), len(listing.utterances)))
        failed = [entry.error for entry in decoder.sources if entry.error is not None]
        failed += [bad.reason for bad in listing.rejected]
        if total == 0:
            hint = f"; the first unusable file: {failed[0]}" if failed else ""
            raise InputError(f"{source}: no usable sound{hint}")
        mean = sums / total
        known: dict[str, Any] = {
            "identity": identity,
            # In the order of the corpus, whatever order the decoding threads took.
            "items": [list(place) for _, place in sorted(pieces.items()) if place[1] > 0],
            "mean": mean.tolist(),
            "deviation": np.sqrt(np.maximum(squares / total - mean**2, 1e-10)).tolist(),
            "failed": failed,
        }
        partial = folder / ".index.json"
        partial.write_text(json.dumps(known))
        partial.replace(index)
        return cls._open(folder, known)

    @classmethod
    def _open(cls, folder: Path, known: dict[str, Any]) -> "Mels":
        path = folder / "frames.f16"
        items = np.array(known["items"], np.int64).reshape(-1, 2)
        size = int(items[:, 1].sum()) * BINS * 2
        if not path.exists() or path.stat().st_size != size:
            raise FormatError(f"{path} is not the {size} bytes that its index says; delete {folder} and start again")
        frames = np.memmap(path, np.float16, "r").reshape(-1, BINS)
        mean, deviation = (np.array(known[name], np.float32) for name in ("mean", "deviation"))
        return cls(frames, items[:, 0], items[:, 1], mean, deviation, tuple(known["failed"]))


def identity_of(folder: Path) -> str:
    """Hash of what a folder of `Mels.build` was made of: names and sizes of the files, and the speeds."""
    known = json.loads((folder / "index.json").read_text())["identity"]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def _mel(wave: NDArray[np.float32], speed: float) -> NDArray[np.float16]:
    """Log mel frames of a wave at 16 kHz played `speed` times as fast: float16 [T, 80]."""
    if speed != 1.0:
        resampler = Resampler(round(16000 * speed), 16000)
        wave = np.concatenate([resampler.push(wave), resampler.flush()])
    mel, _ = kaldi_fbank(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))
    return mel[0].numpy().astype(np.float16)
