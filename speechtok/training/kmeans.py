"""Fit k-means units on a corpus (HuBERT, Hsu et al. 2021, section III-B) in bounded memory.

The frames stream by once; a uniform random sample of them is kept (each frame draws a number, the smallest win)
and faiss clusters the sample. Drawing depends on the seed, the file and the frame, on nothing else.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.corpus.engine import Event
from speechtok.corpus.shard import Decoder
from speechtok.corpus.sources import scan
from speechtok.encoders.base import Encoder
from speechtok.errors import InputError
from speechtok.frames import WindowRule
from speechtok.kernels.nearest import nearest_centroids
from speechtok.quantizers.kmeans import KMeans
from speechtok.tokenizer import DEFAULT_WINDOW, Tokenizer, usable_device

__all__ = ["FrameSample", "fit"]


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


def fit(
    source: str,
    encoder: Encoder,
    clusters: int,
    *,
    name: str,
    standardize: bool = False,
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
    source : path or glob
        As for ``tokenize``; files that cannot be used are counted and left out.
    encoder : Encoder
    clusters : int
        K.
    standardize : bool
        Scale each dimension to zero mean and unit variance over the sample first.
    sample_frames : int
        Memory is about six times this times the frame size times 4 bytes.
    iterations, restarts, seed : int
        Of k-means; the restart with the lowest error wins.

    Returns
    -------
    tokenizer : Tokenizer
    report : dict
        Frames seen and sampled, failed files, mean squared distance, dead clusters, perplexity of the units.

    Raises
    ------
    InputError
        If there are fewer frames than clusters.
    """
    import faiss

    listing = scan(source)
    sample = FrameSample(sample_frames, encoder.dim, seed)
    # One decode thread: files keep their order, batches are the same in every run, and so is the result, to the bit.
    decoder = Decoder(listing.utterances, encoder.grid, window, threads=1, context=encoder.context)
    place = usable_device(device)
    encoder = encoder.to(place).eval()
    with torch.inference_mode():
        for index, piece, wave in decoder:
            frames = encoder(torch.from_numpy(wave)[None].to(place)).features[0]
            sample.add(frames[piece.skip : piece.skip + piece.count].cpu().numpy(), (index, piece.first))
            on_event(Event("sample", index + 1, len(listing.utterances)))
    rows = sample.rows()
    failed = [entry.error for entry in decoder.sources if entry.error is not None] + [
        bad.reason for bad in listing.rejected
    ]
    if len(rows) < clusters:
        hint = f"; the first unusable file: {failed[0]}" if failed else ""
        raise InputError(f"{source} gives {len(rows)} frames, fewer than {clusters} clusters{hint}")
    mean = scale = None
    if standardize:
        mean, scale = rows.mean(0), np.maximum(rows.std(0), 1e-5)
        rows = (rows - mean) / scale
    on_event(Event("fit", 0, 1))
    kmeans = faiss.Kmeans(
        encoder.dim,
        clusters,
        niter=iterations,
        nredo=restarts,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    kmeans.train(np.ascontiguousarray(rows))
    on_event(Event("fit", 1, 1))
    ids, distances = nearest_centroids(torch.from_numpy(rows), torch.from_numpy(kmeans.centroids))
    counts = np.bincount(ids.numpy(), minlength=clusters)
    share = counts[counts > 0] / counts.sum()
    report = {
        "files": len(listing.utterances) + len(listing.rejected) - len(failed),
        "files failed": len(failed),
        "frames seen": sample.seen,
        "frames sampled": len(rows),
        "clusters": clusters,
        "dead clusters": int((counts == 0).sum()),
        "mean squared distance": float(distances[:, 0].double().square().mean()),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
        "standardized": standardize,
        "iterations": iterations,
        "restarts": restarts,
        "seed": seed,
    }
    quantizer = KMeans(np.asarray(kmeans.centroids), mean, scale)
    return Tokenizer(encoder, quantizer, name=name, window=window, licence=licence, training=report), report
