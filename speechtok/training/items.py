"""Items of a training corpus on disk: one flat file of frames and an index, decoded once, read at random from then on.

What `Mels` and `Waves` share.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from speechtok.corpus.engine import Event
from speechtok.corpus.shard import Decoder
from speechtok.corpus.sources import scan
from speechtok.errors import AudioError, FormatError, InputError
from speechtok.frames import FrameGrid, WindowRule

__all__ = ["Items", "identity_of", "store"]

INDEX = "index.json"
_PIECE = WindowRule(max_seconds=60.0, context_seconds=0.0)  # longer files become several items


@dataclass(frozen=True)
class Items(ABC):
    """Items of a corpus: pieces of files of at most a minute.

    Parameters
    ----------
    frames : [N, D]
        Frames of all items, one behind the other; a memory map.
    starts, lengths : int64 [items]
        Where each item begins and how many frames it has; items are in the order of the corpus.
    """

    frames: NDArray[Any]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    @abstractmethod
    def rate(self) -> float:
        """Frames per second."""

    @property
    def hours(self) -> float:
        """Sound in all items."""
        return float(self.lengths.sum()) / self.rate / 3600

    def piece(self, item: int, first: int, count: int) -> NDArray[Any]:
        """`count` frames of an item from `first` on as they are stored, fewer at its end: [n, D]."""
        begin = self.starts[item] + first
        return self.frames[begin : begin + min(count, self.lengths[item] - first)]


def store(
    source: str | os.PathLike[str],
    folder: Path,
    file: str,
    settings: dict[str, Any],
    *,
    grid: FrameGrid,
    dtype: DTypeLike,
    dim: int,
    convert: Callable[[NDArray[np.float32], str], Sequence[NDArray[Any]]],
    facts: Callable[[], dict[str, Any]] = dict,
    on_event: Callable[[Event], None] = lambda event: None,
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64], dict[str, Any]]:
    """Read a corpus, or what an earlier call with the same corpus and settings left in `folder`.

    Parameters
    ----------
    source : path or glob
        As for ``tokenize``; files that cannot be used are counted and left out.
    folder : Path
        Where the frames are kept.
    file : str
        Name of the file of frames.
    settings : dict
        What the frames depend on besides the corpus.
    grid : FrameGrid
        Rate of the waves that `convert` gets; its frames decide where long files are cut.
    dtype : dtype
    dim : int
        Of the frames.
    convert : callable
        From a wave float32 [N] and its name to the frames of one or several items [T, D]. The name is the key of the
        file; of later pieces of a long one, with the number of their first frame. An AudioError counts as the file's.
    facts : callable
        What the index notes besides, asked when all is read.
    on_event : callable
        Progress.

    Returns
    -------
    frames : [N, D]
    starts, lengths : int64 [items]
    known : dict
        The index; ``failed`` says why files were left out.

    Raises
    ------
    InputError
        If nothing in the corpus can be used.
    FormatError
        If `folder` is damaged.
    """
    listing = scan(str(source))
    identity = {"files": [[utterance.key, utterance.size] for utterance in listing.utterances], **settings}
    index, path = folder / INDEX, folder / file
    if index.exists():
        found = _read(index)
        if found["identity"] == identity:
            return _open(path, found, dtype, dim)
    folder.mkdir(parents=True, exist_ok=True)
    index.unlink(missing_ok=True)
    path.unlink(missing_ok=True)  # not overwritten: it may be linked from another folder
    decoder = Decoder(listing.utterances, grid, _PIECE, threads=max(1, (os.cpu_count() or 2) - 1))
    pieces: dict[tuple[int, int, int], tuple[int, int]] = {}
    total = 0
    with path.open("wb") as out:
        for done, (number, window, wave) in enumerate(decoder):
            name = listing.utterances[number].key + (f"#{window.first}" if window.first else "")
            try:
                converted = convert(wave, name)
            except AudioError as error:
                decoder.sources[number].error, converted = f"{listing.utterances[number].path}: {error}", ()
            for which, frames in enumerate(converted):
                frames.tofile(out)
                pieces[number, window.first, which] = (total, len(frames))
                total += len(frames)
            on_event(Event("read", min(done + 1, len(listing.utterances)), len(listing.utterances)))
    failed = [entry.error for entry in decoder.sources if entry.error is not None]
    failed += [bad.reason for bad in listing.rejected]
    # In the order of the corpus, whatever order the decoding threads took. Of a file that fails late nothing counts.
    whole = [
        list(place) for (number, *_), place in sorted(pieces.items())
        if place[1] > 0 and decoder.sources[number].error is None
    ]  # fmt: skip
    if not whole:
        hint = f"; the first unusable file: {failed[0]}" if failed else ""
        raise InputError(f"{source}: no usable sound{hint}")
    known: dict[str, Any] = {
        "identity": identity,
        "items": whole,
        **facts(),
        "failed": failed,
    }
    partial = folder / f".{INDEX}"
    partial.write_text(json.dumps(known))
    partial.replace(index)
    return _open(path, known, dtype, dim)


def _open(
    path: Path, known: dict[str, Any], dtype: DTypeLike, dim: int
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64], dict[str, Any]]:
    items = np.array(known["items"], np.int64).reshape(-1, 2)
    count = int(items.sum(1).max())
    size = count * dim * np.dtype(dtype).itemsize
    if not path.exists() or path.stat().st_size < size:
        raise FormatError(f"{path} has not the {size} bytes that its index says; delete {path.parent} and start again")
    return np.memmap(path, dtype, "r", shape=(count, dim)), items[:, 0], items[:, 1], known


def _read(index: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(index.read_text())
        known["identity"], known["failed"]
        np.array(known["items"], np.int64).reshape(-1, 2)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{index} is damaged ({error!r}); delete {index.parent}") from error
    return known


def identity_of(folder: Path) -> str:
    """Hash of what a folder of `store` was made of: names and sizes of the files, and the settings."""
    known = _read(folder / INDEX)["identity"]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
