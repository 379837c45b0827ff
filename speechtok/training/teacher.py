"""Frames of a frozen encoder over a training corpus on disk: computed once, read at random from then on.

One flat float16 array of frames, one item behind the other, and an index. At 50 frames per second an hour takes 360 kB
for each dimension: 369 MB for w2v-BERT 2.0. The teacher reads whole items (pieces of at most a minute, as in `Mels`),
neither masked nor perturbed.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.features import FRAME, HOP
from speechtok.corpus.engine import Event
from speechtok.corpus.shard import Decoder
from speechtok.corpus.sources import scan
from speechtok.devices import usable_device
from speechtok.encoders.base import Encoder
from speechtok.errors import CheckpointError, FormatError, InputError, OutputError
from speechtok.frames import FrameGrid, WindowRule
from speechtok.training.mels import RATE, Mels

__all__ = ["TaughtMels", "TeacherFrames", "describe_encoder", "frames_holding"]

FRAMES, JOURNAL, IDENTITY, INDEX = "frames.f16", "pieces.jsonl", "teacher.json", "index.json"
_MEL_RATE = 16000  # of the waves that `Mels` reads (Hz)
_PIECE = WindowRule(max_seconds=60.0, context_seconds=0.0)  # the pieces of `Mels`
_FLOOR = 1e-5  # least deviation: a constant dimension stays 0
_BLOCK = 1 << 16  # frames that are summed at once
_CLUSTERED, _ITERATIONS = 200_000, 25  # frames that k-means is fitted on, and its steps


def frames_holding(frames: NDArray[np.int64], grid: FrameGrid, other: FrameGrid) -> NDArray[np.int64]:
    """For frames of a grid, the frames of another one whose span holds their centres; int64 of the same shape.

    Spans are half open, the arithmetic is exact. Results may be negative or lie behind the other's last frame.
    """
    centre = 2 * grid.offset + (2 * frames + 1) * grid.hop  # in half samples at the grid's rate
    offset, hop = 2 * other.offset, 2 * other.hop
    return (centre * other.sample_rate - offset * grid.sample_rate) // (hop * grid.sample_rate)


@dataclass(frozen=True)
class TeacherFrames:
    """What a teacher says about the items of a `Mels`.

    Parameters
    ----------
    frames : float16 [N, D]
        Frames of all items, one behind the other; a memory map.
    starts, lengths : int64 [items]
        Where each item begins and how many frames it has.
    grid : FrameGrid
        Of the teacher, from the start of an item.
    mean, deviation : float32 [D]
        Per dimension, over all frames; no deviation is 0.
    folder : Path
        Where all this is kept.
    """

    frames: NDArray[np.float16]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    grid: FrameGrid
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    folder: Path

    def on_grid(
        self, grid: FrameGrid, item: int, first: int, count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
        """Teacher's frames for frames ``[first, first + count)`` of a student's grid, by time.

        Where the teacher is as fast as the student or faster, a student frame gets the mean of the teacher frames
        whose centres lie in its span, and is a group by itself. Where it is slower, a student frame gets the teacher
        frame whose span holds its centre, and all student frames of one teacher frame are a group. A mask that hides
        whole groups leaves no teacher frame half hidden.

        Parameters
        ----------
        grid : FrameGrid
            Of the student.
        item, first, count : int

        Returns
        -------
        frames : float32 [count, D]
            Zeros where there is none.
        groups : int64 [count]
            Ascending names of the groups.
        known : bool [count]
            Where there is a teacher frame: not always at the ends of an item.
        """
        begin, total = int(self.starts[item]), int(self.lengths[item])
        ours = np.arange(first, first + count)
        if self.grid.hop * grid.sample_rate > grid.hop * self.grid.sample_rate:
            groups = frames_holding(ours, grid, self.grid)
            known = (groups >= 0) & (groups < total)
            frames = np.zeros((count, self.frames.shape[1]), np.float32)
            frames[known] = self.frames[begin + groups[known]]
            return frames, groups, known
        owners = frames_holding(np.arange(total), self.grid, grid)
        low, high = np.searchsorted(owners, [first, first + count])
        place = owners[low:high] - first
        sums = np.zeros((count, self.frames.shape[1]), np.float32)
        np.add.at(sums, place, self.frames[begin + low : begin + high].astype(np.float32))
        heard = np.bincount(place, minlength=count)
        sums /= np.maximum(heard, 1)[:, None]
        return sums, ours, heard > 0

    def centroids(
        self, clusters: int, *, seed: int = 0, on_event: Callable[[Event], None] = lambda event: None
    ) -> NDArray[np.float32]:
        """k-means of a uniform sample of the standardised frames, kept in `folder`: float32 [clusters, D].

        Raises
        ------
        InputError
            If there are fewer frames than clusters.
        """
        import faiss

        path = self.folder / f"centroids-{clusters}-{seed}.npy"
        if path.exists():
            try:
                known = np.load(path, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise FormatError(f"{path} is damaged ({error}); delete it") from error
            return np.asarray(known, np.float32)
        total, dim = self.frames.shape
        if total < clusters:
            raise InputError(f"[objective] clusters is {clusters}, but the teacher gives only {total} frames; lower it")
        chosen = np.sort(np.random.default_rng(seed).choice(total, min(total, _CLUSTERED), replace=False))
        rows = (self.frames[chosen].astype(np.float32) - self.mean) / self.deviation
        on_event(Event("fit", 0, 1))
        kmeans = faiss.Kmeans(
            dim, clusters, niter=_ITERATIONS, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(rows)
        )
        kmeans.train(rows)
        centroids = np.asarray(kmeans.centroids, np.float32)
        partial = path.with_name(f".{path.name}")
        with partial.open("wb") as file:
            np.save(file, centroids)
        partial.replace(path)
        on_event(Event("fit", 1, 1))
        return centroids

    @classmethod
    def build(
        cls,
        source: str | os.PathLike[str],
        teacher: Encoder,
        mels: Mels,
        folder: Path,
        *,
        device: str = "cpu",
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> "TeacherFrames":
        """Compute the frames, go on where an interrupted call stopped, or read what a finished one left.

        Parameters
        ----------
        source : path or glob
            What `mels` was built from.
        teacher : Encoder
            At its layer.
        mels : Mels
            At speed 1 alone; its items are followed.
        folder : Path
            Where the frames are kept: ``frames.f16``, the journal ``pieces.jsonl``, at the end ``index.json``.
        device : str
            Of the teacher.
        on_event : callable
            Progress: stage "run", seconds of sound.

        Raises
        ------
        OutputError
            If the folder holds frames of another teacher, of another layer or of another corpus.
        InputError
            If the sound is no longer what `mels` was built from, or is too short for the teacher.
        CheckpointError
            If the teacher gives frames that are not finite.
        FormatError
            If the cache is damaged.
        """
        listing = scan(str(source))
        files = [[utterance.key, utterance.size] for utterance in listing.utterances]
        _claim(folder, {"teacher": describe_encoder(teacher), "files": _digest(json.dumps(files).encode())})
        if (folder / INDEX).exists():
            return cls._open(folder, teacher)
        pieces = _resume(folder, teacher.dim)
        # The last file of the journal may not be complete: it is done again.
        first = pieces[-1][0] if pieces else 0
        pieces = [piece for piece in pieces if piece[0] < first]
        end = pieces[-1][3] + pieces[-1][4] if pieces else 0
        place, total = usable_device(device), mels.hours * 3600
        teacher = teacher.to(place).eval()
        rate = teacher.sample_rate
        # One decode thread keeps the order of the corpus, which is that of the items.
        grid = FrameGrid(rate, HOP * rate // _MEL_RATE, FRAME * rate // _MEL_RATE)
        decoder = Decoder(listing.utterances[first:], grid, _PIECE, threads=1)
        done = sum(piece[2] for piece in pieces) / RATE
        _write(folder / JOURNAL, "".join(json.dumps(piece) + "\n" for piece in pieces))
        with (folder / FRAMES).open("r+b" if pieces else "wb") as file, (folder / JOURNAL).open("a") as journal:
            file.truncate(end * teacher.dim * 2)
            file.seek(0, os.SEEK_END)
            for index, window, wave in decoder:
                if window.count == 0:  # too short for a filter bank frame: no item
                    continue
                frames = _encode(teacher, wave, place, listing.utterances[first + index].path)
                _append(file, frames)
                pieces.append((first + index, window.first, window.count, end, len(frames)))
                journal.write(json.dumps(pieces[-1]) + "\n")
                journal.flush()
                end += len(frames)
                done += window.count / RATE
                on_event(Event("run", min(done, total), total))
        _check(pieces, mels, exact=rate == _MEL_RATE, source=str(source))
        if end == 0:
            raise InputError(f"{source}: every item is too short for a frame of the teacher")
        mean, deviation = _statistics(np.memmap(folder / FRAMES, np.float16, "r").reshape(-1, teacher.dim))
        known = {"items": [piece[3:] for piece in pieces], "mean": mean.tolist(), "deviation": deviation.tolist()}
        _write(folder / INDEX, json.dumps(known))
        return cls._open(folder, teacher)

    @classmethod
    def _open(cls, folder: Path, teacher: Encoder) -> "TeacherFrames":
        path = folder / FRAMES
        try:
            known = json.loads((folder / INDEX).read_text())
            items = np.array(known["items"], np.int64).reshape(-1, 2)
            mean, deviation = (np.array(known[name], np.float32) for name in ("mean", "deviation"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{folder / INDEX} is damaged ({error}); delete {folder}") from error
        size = int(items[:, 1].sum()) * teacher.dim * 2
        if not path.exists() or path.stat().st_size != size:
            raise FormatError(f"{path} is not the {size} bytes that its index says; delete {folder} and start again")
        frames = np.memmap(path, np.float16, "r").reshape(-1, teacher.dim)
        return cls(frames, items[:, 0], items[:, 1], teacher.grid, mean, deviation, folder)


@dataclass(frozen=True)
class TaughtMels(Mels):
    """Filter bank frames of a corpus together with a teacher's frames.

    Parameters
    ----------
    teacher : TeacherFrames
        Of the same items.
    """

    teacher: TeacherFrames = field(kw_only=True)

    @classmethod
    def join(cls, mels: Mels, teacher: TeacherFrames) -> "TaughtMels":
        """Put the two together.

        Raises
        ------
        InputError
            If they do not have the same number of items.
        """
        if len(mels.lengths) != len(teacher.lengths):
            raise InputError(
                f"the teacher has {len(teacher.lengths)} items and the filter bank {len(mels.lengths)}; "
                "build both from the same sound, at speed 1 only"
            )
        return cls(**{entry.name: getattr(mels, entry.name) for entry in fields(Mels)}, teacher=teacher)


_Piece = tuple[int, int, int, int, int]  # file, first frame in it, filter bank frames, start and number of frames


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """What makes an encoder this one: kind, settings, layer, weights; plain JSON values."""
    weights = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    settings: dict[str, Any] = {"type": encoder.type, "config": encoder.config_dict(), "layer": encoder.layer}
    settings |= {"grid": asdict(encoder.grid), "dim": encoder.dim, "weights": weights.hexdigest()}
    return dict(json.loads(json.dumps(settings)))


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.replace(path)


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Say whose frames the folder holds, or check it."""
    path, identity = folder / IDENTITY, json.loads(json.dumps(identity))
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _write(path, json.dumps(identity, indent=2) + "\n")
        return
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is damaged ({error}); delete {folder}") from error
    for part, words in (("teacher", "another teacher or layer"), ("files", "another corpus")):
        if known.get(part) != identity[part]:
            raise OutputError(f"{folder} holds frames of {words}; choose another folder for the run or delete it")


def _resume(folder: Path, dim: int) -> list[_Piece]:
    """Pieces whose frames are on disk."""
    path, pieces = folder / JOURNAL, list[_Piece]()
    size = (folder / FRAMES).stat().st_size // (2 * dim) if (folder / FRAMES).exists() else 0
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            piece: _Piece = tuple(json.loads(line))
        except ValueError:
            break  # the process died while it wrote this line
        if piece[3] + piece[4] > size:
            break
        pieces.append(piece)
    return pieces


@torch.inference_mode()
def _encode(teacher: Encoder, wave: NDArray[np.float32], place: torch.device, path: str) -> NDArray[np.float16]:
    frames = teacher(torch.from_numpy(wave)[None].to(place)).features[0].float().cpu().numpy()
    if not np.isfinite(frames).all():
        raise CheckpointError(f"{path}: the teacher gives frames that are not finite; check its weights")
    limit = np.finfo(np.float16).max
    return frames.clip(-limit, limit).astype(np.float16)


def _append(file: BinaryIO, frames: NDArray[np.float16]) -> None:
    file.write(frames.tobytes())
    file.flush()  # before the journal tells of it


def _check(pieces: list[_Piece], mels: Mels, *, exact: bool, source: str) -> None:
    """Hold the pieces to account for the items; at another rate the last frame of a file may be there or not."""
    heard, wanted = np.array([piece[2] for piece in pieces], np.int64), mels.lengths
    if len(heard) != len(wanted) or np.abs(heard - wanted).max(initial=0) > (0 if exact else 1):
        raise InputError(
            f"{source} is not what its filter bank frames were made from: {len(heard)} items instead of "
            f"{len(wanted)}, or other lengths; use speed 1 only, or delete the run's folder if files changed"
        )


def _statistics(frames: NDArray[np.float16]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation of each dimension: float64 [D], in two passes."""
    blocks = range(0, len(frames), _BLOCK)
    mean = sum(frames[i : i + _BLOCK].sum(0, dtype=np.float64) for i in blocks) / len(frames)
    squares = sum(np.square(frames[i : i + _BLOCK].astype(np.float64) - mean).sum(0) for i in blocks) / len(frames)
    return mean, np.maximum(np.sqrt(squares), _FLOOR)
