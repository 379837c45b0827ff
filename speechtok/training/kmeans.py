"""Fit k-means units on a corpus (HuBERT, Hsu et al. 2021, section III-B) in bounded memory.

The rows, which are frames or the means of segments, stream by once; a uniform random sample of them is kept (each row
draws a number, the smallest win) and faiss clusters the sample. Drawing depends on the seed, the file and the row's
place in it, on nothing else.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.decode import as_mono
from speechtok.canonical import block_context
from speechtok.codecs.build import inverse
from speechtok.corpus.engine import Event
from speechtok.corpus.shard import Decoder
from speechtok.corpus.sources import scan
from speechtok.devices import usable_device
from speechtok.encoders.base import Encoder
from speechtok.errors import InputError
from speechtok.frames import Context, FrameGrid, Window, WindowRule
from speechtok.kernels.nearest import nearest_centroids
from speechtok.quantizers.kmeans import KMeans
from speechtok.segmenters.base import Segmenter
from speechtok.segmenters.pool import pool
from speechtok.tokenizer import DEFAULT_WINDOW, Tokenizer
from speechtok.windows import cut

__all__ = ["FrameSample", "SegmentMeans", "fit"]


class FrameSample:
    """A uniform sample without replacement of at most `size` rows from a stream (bottom-k sampling).

    Parameters
    ----------
    size : int
    dim : int
    seed : int
    """

    def __init__(self, size: int, dim: int, seed: int):
        self.size, self.seed, self.seen = size, seed, 0
        self._rows = [np.zeros((0, dim), np.float32)]
        self._draws = [np.zeros(0)]
        self._limit, self._held = np.inf, 0

    def add(self, rows: NDArray[np.float32], stream: tuple[int, ...]) -> None:
        """Offer float32 [n, D] rows; `stream` names where they come from and seeds their draws."""
        self.seen += len(rows)
        draws = np.random.default_rng([self.seed, *stream]).random(len(rows))
        kept = draws < self._limit
        self._rows.append(rows[kept])
        self._draws.append(draws[kept])
        self._held += int(kept.sum())
        if self._held > 2 * self.size:
            self._shrink()

    def _shrink(self) -> None:
        rows, draws = np.concatenate(self._rows), np.concatenate(self._draws)
        order = np.argsort(draws, kind="stable")[: self.size]
        self._rows, self._draws, self._held = [rows[order]], [draws[order]], len(order)
        if len(order) == self.size:
            self._limit = float(draws[order[-1]])

    def rows(self) -> NDArray[np.float32]:
        """The sample, float32 [min(size, seen), D], in order of the draws."""
        self._shrink()
        return self._rows[0]


# Of which file, number of its first row within the file, and the rows, float32 [n, D].
_Rows = tuple[int, int, NDArray[np.float32]]


_Pieces = Iterable[tuple[int, Window, NDArray[np.float32]]]


def _cut(arrays: Iterable[Any], grid: FrameGrid, rule: WindowRule, context: Context | None) -> _Pieces:
    """Windows of arrays, as `Decoder` gives those of files."""
    for index, array in enumerate(arrays):
        for window, wave in cut([as_mono(array)], grid, rule, context):
            yield index, window, wave


def _frames(pieces: _Pieces, encoder: Encoder, device: torch.device) -> Iterator[_Rows]:
    """Frames of all files, window by window."""
    for index, piece, wave in pieces:
        with torch.inference_mode():
            frames = encoder(torch.from_numpy(wave)[None].to(device)).features[0]
        yield index, piece.first, frames[piece.skip : piece.skip + piece.count].cpu().numpy()


class SegmentMeans:
    """Means of the segments of files; iterate over it for (file, number of its first segment, rows).

    Parameters
    ----------
    frames : iterable of (file, first frame, float32 [n, D])
        In order; a segment may cross windows. Frames are held until no later segment can hold them.
    segmenter : Segmenter

    Attributes
    ----------
    frames : int
        Number of frames that were cut so far.
    errors : dict
        File -> why it could not be cut to its end.
    """

    def __init__(self, frames: Iterable[_Rows], segmenter: Segmenter) -> None:
        self.frames, self.errors = 0, dict[int, str]()
        self._source, self._segmenter = frames, segmenter

    def __iter__(self) -> Iterator[_Rows]:
        for index, pieces in groupby(self._source, itemgetter(0)):
            found = 0
            try:
                for means in self._means(rows for _, _, rows in pieces):
                    yield index, found, means
                    found += len(means)
            except InputError as error:
                self.errors[index] = str(error)

    def _means(self, pieces: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        stream, held, begin = self._segmenter.stream(), list[NDArray[np.float32]](), 0
        for piece in pieces:
            self.frames += len(piece)
            held.append(piece)
            spans = stream.push(piece)
            if len(spans):
                yield pool(np.concatenate(held), spans - begin)
            while held and begin + len(held[0]) <= stream.settled:
                begin += len(held.pop(0))
        spans = stream.flush()
        if len(spans):
            yield pool(np.concatenate(held), spans - begin)


def _read(
    source: str | Sequence[Any], grid: FrameGrid, rule: WindowRule, context: Context | None
) -> tuple[list[str], list[str], _Pieces]:
    """Names of sounds, why files were rejected, and the windows of the sounds."""
    if not isinstance(source, str):
        return [f"array {index}" for index in range(len(source))], [], _cut(source, grid, rule, context)
    listing = scan(source)
    # One decode thread: files keep their order, batches are the same in every run, and so is the result, to the bit.
    decoder = Decoder(listing.utterances, grid, rule, threads=1, context=context)
    return [str(one.path) for one in listing.utterances], [bad.reason for bad in listing.rejected], decoder


def fit(
    source: str | Sequence[Any],
    encoder: Encoder,
    clusters: int,
    *,
    name: str,
    segmenter: Segmenter | None = None,
    silence_gap: int | None = None,
    standardize: bool = False,
    spherical: bool = False,
    sample_frames: int = 1_000_000,
    iterations: int = 50,
    restarts: int = 3,
    seed: int = 0,
    window: WindowRule = DEFAULT_WINDOW,
    licence: str = "unknown",
    device: str = "cpu",
    on_event: Callable[[Event], None] = lambda event: None,
) -> tuple[Tokenizer, dict[str, Any]]:
    """Fit a tokenizer.

    Parameters
    ----------
    source : path or glob, or sequence of arrays
        As for ``tokenize``; files that cannot be used are counted and left out. Arrays, float [N], have the encoder's
        own sample rate, so that any series of numbers can be taken.
    encoder : Encoder
    clusters : int
        K.
    segmenter : Segmenter, optional
        Units are segments: what is clustered are the means of their frames.
    silence_gap : int, optional
        See `Tokenizer`; has no part in the fit.
    standardize : bool
        Scale each dimension to zero mean and unit variance over the sample first.
    spherical : bool
        Scale each row to length 1 (after that), so that angles decide. Rows that are zero are left out of the sample.
    sample_frames : int
        Rows of the sample, frames or segments. Memory is about six times this times the frame size times 4 bytes. Time
        grows with their number times K times `iterations` times `restarts`.
    iterations, restarts, seed : int
        Of k-means; the restart with the lowest error wins.

    Returns
    -------
    tokenizer : Tokenizer
        With a decoder, if the encoder has one that needs no training and units are whole frames.
    report : dict
        Frames or segments seen and sampled, segments per second of sound, failed files, mean squared distance, dead
        clusters, perplexity of the units.

    Raises
    ------
    InputError
        If there are fewer frames or segments than clusters, the window rule does not fit the encoder, or there is a
        `silence_gap` without a segmenter.
    AudioError
        If an array is no series of finite numbers.
    """
    import faiss

    if silence_gap is not None and (segmenter is None or silence_gap < 0):
        raise InputError(f"silence_gap {silence_gap} counts frames between segments; give 0 or more, and a segmenter")
    context = encoder.context if segmenter is None else block_context(encoder)
    window.core(encoder.grid, context)  # refuses a rule that does not fit before anything is read
    names, rejected, pieces = _read(source, encoder.grid, window, context)
    sample = FrameSample(sample_frames, encoder.dim, seed)
    place = usable_device(device)
    frames = _frames(pieces, encoder.to(place).eval(), place)
    segments = None if segmenter is None else SegmentMeans(frames, segmenter)
    for index, first, piece in frames if segments is None else segments:
        sample.add(piece, (index, first))
        on_event(Event("sample", index + 1, len(names)))
    rows, what, pace = sample.rows(), "frames", {}
    sources = pieces.sources if isinstance(pieces, Decoder) else []
    errors = {index: entry.error for index, entry in enumerate(sources) if entry.error is not None}
    if segments is not None:
        what, pace = "segments", {"segments per second": sample.seen / max(1, segments.frames) * encoder.grid.rate}
        errors |= {index: f"{names[index]}: {reason}" for index, reason in segments.errors.items()}
    failed = [errors[index] for index in sorted(errors)] + rejected
    mean = scale = None
    if standardize and len(rows):
        mean, scale = rows.mean(0), np.maximum(rows.std(0), 1e-5)
        rows = (rows - mean) / scale
    if spherical:
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]
    if len(rows) < clusters:
        hint = f"; the first unusable file: {failed[0]}" if failed else ""
        where = source if isinstance(source, str) else f"a list of {len(names)} arrays"
        raise InputError(f"{where} gives {len(rows)} {what}, fewer than {clusters} clusters{hint}")
    on_event(Event("fit", 0, 1))
    kmeans = faiss.Kmeans(
        encoder.dim,
        clusters,
        niter=iterations,
        nredo=restarts,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    kmeans.train(np.ascontiguousarray(rows))
    on_event(Event("fit", 1, 1))
    ids, distances = nearest_centroids(torch.from_numpy(rows), torch.from_numpy(kmeans.centroids))
    counts = np.bincount(ids.numpy(), minlength=clusters)
    share = counts[counts > 0] / counts.sum()
    report = {
        "files": len(names) + len(rejected) - len(failed),
        "files failed": len(failed),
        f"{what} seen": sample.seen,
        f"{what} sampled": len(rows),
        **pace,
        "clusters": clusters,
        "dead clusters": int((counts == 0).sum()),
        "mean squared distance": float(distances[:, 0].double().square().mean()),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
        "standardized": standardize,
        "spherical": spherical,
        "iterations": iterations,
        "restarts": restarts,
        "seed": seed,
    }
    tokenizer = Tokenizer(
        encoder,
        KMeans(np.asarray(kmeans.centroids), mean, scale, spherical),
        name=name,
        segmenter=segmenter,
        silence_gap=silence_gap,
        decoder=None if segmenter is not None or spherical else inverse(encoder),
        window=window,
        licence=licence,
        training=report,
    )
    return tokenizer, report
