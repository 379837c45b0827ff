"""Build tokenizers by name."""

import os
from dataclasses import replace

from speechtok.errors import FormatError
from speechtok.registry import DEFAULT, Published, fetch, resolve
from speechtok.tokenizer import Tokenizer

__all__ = ["load"]


def load(name: str | os.PathLike[str] = DEFAULT, *, device: str = "cpu") -> Tokenizer:
    """Load a tokenizer.

    Parameters
    ----------
    name : str or path
        A bundle's folder, a shipped name, or a published name (downloaded on first use); in this order.
    device : str
        A torch device.

    Raises
    ------
    UnknownNameError
        If there is no such tokenizer.
    CheckpointError, FormatError, FingerprintError
        If its files cannot be had or do not fit.
    """
    entry = resolve(name)
    tokenizer = _published(str(name), entry) if isinstance(entry, Published) else Tokenizer.load(entry)
    return tokenizer.to(device)


def _published(name: str, entry: Published) -> Tokenizer:
    from speechtok.encoders.pretrained import from_pretrained
    from speechtok.quantizers.centroids import read_centroids
    from speechtok.quantizers.kmeans import KMeans

    encoder = from_pretrained(entry.repository, entry.layer, revision=entry.revision)
    encoder.config = replace(encoder.config, do_normalize=entry.normalize)
    quantizer = KMeans(read_centroids(fetch(entry.centroids, entry.sha256)))
    if quantizer.vocab_size != entry.vocab_size:
        raise FormatError(
            f"{name}: the centroid file holds {quantizer.vocab_size} clusters, {entry.vocab_size} were expected"
        )
    return Tokenizer(
        encoder,
        quantizer,
        name=name,
        licence=entry.licence,
        training={"repository": entry.repository, "revision": entry.revision, "centroids": entry.centroids},
    )
