"""Build tokenizers by name, and of published codecs."""

import os
from dataclasses import replace
from pathlib import Path

from speechtok.errors import CheckpointError, FormatError
from speechtok.registry import DEFAULT, Published, PublishedCodec, fetch, resolve
from speechtok.tokenizer import Tokenizer

__all__ = ["encodec", "load"]


def load(name: str | os.PathLike[str] = DEFAULT, *, device: str = "cpu") -> Tokenizer:
    """Load a tokenizer.

    Parameters
    ----------
    name : str or path
        A bundle's folder, a shipped name, or a published name (downloaded on first use); in this order. A folder with
        a checkpoint of EnCodec is taken as well, see `encodec`.
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
    if isinstance(entry, Published):
        tokenizer = _published(str(name), entry)
    elif isinstance(entry, PublishedCodec):
        tokenizer = encodec(entry.repository, name=str(name), revision=entry.revision, licence=entry.licence)
    elif (entry / "config.json").exists() and not (entry / "tokenizer.json").exists():
        tokenizer = encodec(entry)
    else:
        tokenizer = Tokenizer.load(entry)
    return tokenizer.to(device)


def encodec(
    path_or_name: str | Path, *, name: str | None = None, revision: str | None = None, licence: str = "unknown"
) -> Tokenizer:
    """Make a tokenizer with all codebooks of a published EnCodec of 24 kHz; `Tokenizer.with_codebooks` takes fewer.

    Its frames depend on all of the past (LSTM), and the first ones on those up to frame 6 (mirrored padding). So it is
    computed in chunks of 8 frames, offline as in streams, which wait for whole chunks.

    Parameters
    ----------
    path_or_name, revision
        See `speechtok.codecs.encodec.read_encodec`.
    name : str, optional
        Of the tokenizer; None: the path or name.
    licence : str
        Of the weights.

    Raises
    ------
    CheckpointError
        If the files do not fit, or it is the model of 48 kHz: its units need scales and overlap.
    """
    from speechtok.codecs.encodec import read_encodec
    from speechtok.codecs.seanet import SeanetWaves
    from speechtok.encoders.seanet import SeanetFrames

    model = read_encodec(path_or_name, revision=revision)
    if model.config.normalize or model.config.chunk_samples is not None:
        raise CheckpointError(
            f"{path_or_name}: this EnCodec cuts sound into chunks that overlap and need scales beside their units, so "
            "it cannot be a tokenizer; speechtok.codecs.encodec.read_encodec encodes and decodes waves with it"
        )
    seanet = model.config.seanet
    return Tokenizer(
        SeanetFrames(seanet, weights=model.encoder.state_dict()),
        model.quantizer,
        decoder=SeanetWaves(seanet, weights=model.decoder.state_dict()),
        name=name or str(path_or_name),
        licence=licence,
        training={"repository": str(path_or_name), "revision": revision},
    )


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
