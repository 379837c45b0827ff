"""Names of tokenizers: paths, shipped ones, published ones. Imports no model.

Hashes of the published centroids are those of textlesslib's checkpoint list.
"""

import hashlib
import json
import math
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from speechtok.errors import CheckpointError, UnknownNameError

__all__ = [
    "CODECS",
    "DEFAULT",
    "PUBLISHED",
    "Published",
    "PublishedCodec",
    "cache_folder",
    "cached_file",
    "fetch",
    "resolve",
    "shipped",
]

DEFAULT = "w2vbert-mini"


@dataclass(frozen=True)
class Published:
    """A published tokenizer: an encoder repository, a layer and a centroid file.

    Parameters
    ----------
    repository, revision : str
        On the Hugging Face hub.
    layer : int
        Index into transformers' ``hidden_states``.
    centroids, sha256 : str
        Address and hash of the k-means file.
    vocab_size : int
    rate : float
        Units per second.
    megabytes : int
        Approximate download.
    licence : str
    normalize : bool
        Whether the wave is standardised first; the fairseq base models were trained without.
    """

    repository: str
    revision: str
    layer: int
    centroids: str
    sha256: str
    vocab_size: int
    rate: float
    megabytes: int
    licence: str
    normalize: bool = False


@dataclass(frozen=True)
class PublishedCodec:
    """A published codec: one repository of the Hugging Face hub.

    Parameters
    ----------
    repository, revision : str
    vocab_size, codebooks : int
    rate : float
        Frames per second.
    megabytes : int
        Approximate download.
    licence : str
    """

    repository: str
    revision: str
    vocab_size: int
    codebooks: int
    rate: float
    megabytes: int
    licence: str


_FILES = "https://dl.fbaipublicfiles.com"


def _hubert(layer: int, clusters: int, path: str, sha256: str) -> Published:
    return Published(
        "facebook/hubert-base-ls960", "main", layer, f"{_FILES}/{path}", sha256, clusters, 50.0, 380, "Apache-2.0 / MIT"
    )


PUBLISHED: dict[str, Published] = {
    "hubert-base-ls960-l6-km50": _hubert(
        6,
        50,
        "textless_nlp/gslm/hubert/km50/km.bin",
        "d01a7d5bc2c54b7b5f25f321ba525b4d230b06e3927f90bad0394198bc89f494",
    ),
    "hubert-base-ls960-l6-km100": _hubert(
        6,
        100,
        "textless_nlp/gslm/hubert/km100/km.bin",
        "f14a3104615485381fc489701d6761c9abbdbb0d43607cf55518a1e2891023fe",
    ),
    "hubert-base-ls960-l6-km200": _hubert(
        6,
        200,
        "textless_nlp/gslm/hubert/km200/km.bin",
        "b3c46c9cdd1707ad852dd53c359aa73942e79d53c432a9a8a419ed046408024b",
    ),
    "hubert-base-ls960-l9-km500": _hubert(
        9,
        500,
        "hubert/hubert_base_ls960_L9_km500.bin",
        "4450dcbc90aa7d0553306a4b0fafef35c9b3c840468f02969273dfbb9db89a23",
    ),
    "mhubert-base-25hz-l11-km500": Published(
        "slprl/mhubert-base-25hz",
        "main",
        11,
        f"{_FILES}/textless_nlp/twist/speech_tokenizer/mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin",
        "03cc04a9c24fec4285e73e709c485756d8f116aa8e724eac555de6a7cf8d28ad",
        500,
        25.0,
        380,
        "see its model card",
    ),
}


CODECS: dict[str, PublishedCodec] = {
    "facebook/encodec_24khz": PublishedCodec(
        "facebook/encodec_24khz", "main", 1024, 32, 75.0, 94, "code MIT; weights: see its model card"
    ),
}


def shipped() -> dict[str, Path]:
    """Tokenizers that come with the package: name -> folder."""
    root = Path(str(files("speechtok.assets")))
    return {path.parent.name: path.parent for path in sorted(root.glob("*/tokenizer.json"))}


def resolve(name: str | os.PathLike[str]) -> Path | Published | PublishedCodec:
    """Folder of a bundle, or the entry of a published tokenizer or codec.

    Parameters
    ----------
    name : path or str
        A path to a bundle, else a shipped name, else a published name.

    Raises
    ------
    UnknownNameError
        If it is none of them; the message lists the names there are.
    """
    path = Path(name)
    # A bare name is a bundle only if it looks like one: an output folder called like a tokenizer must not hide it.
    if path.is_dir() and (len(path.parts) > 1 or path.is_absolute() or (path / "quantizer.safetensors").exists()):
        return path
    bundles = shipped()
    if str(name) in bundles:
        return bundles[str(name)]
    if str(name) in PUBLISHED:
        return PUBLISHED[str(name)]
    if str(name) in CODECS:
        return CODECS[str(name)]
    known = ", ".join([*bundles, *PUBLISHED, *CODECS])
    raise UnknownNameError(f"{str(name)!r} is neither a tokenizer folder nor a known name; known are: {known}")


def cache_folder() -> Path:
    """Where downloads are kept: ``$SPEECHTOK_CACHE`` or ``~/.cache/speechtok``."""
    return Path(os.environ.get("SPEECHTOK_CACHE") or Path.home() / ".cache" / "speechtok")


def cached_file(address: str, sha256: str) -> Path:
    """Where `fetch` keeps a file."""
    return cache_folder() / sha256[:16] / address.rsplit("/", 1)[-1]


def fetch(address: str, sha256: str) -> Path:
    """Download a file once and check its hash.

    Raises
    ------
    CheckpointError
        If it cannot be downloaded or its hash is another one.
    """
    path = cached_file(address, sha256)
    if not path.exists():
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
            raise CheckpointError(f"{address} is not cached and HF_HUB_OFFLINE is set; put the file at {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with urllib.request.urlopen(address, timeout=60) as source, partial.open("wb") as target:  # noqa: S310
                while block := source.read(1 << 20):
                    target.write(block)
            _check(partial, address, sha256)
            partial.replace(path)
        except (urllib.error.URLError, OSError) as error:
            raise CheckpointError(
                f"{address} cannot be downloaded ({error}); put the file at {path} by hand"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    else:
        _check(path, address, sha256)
    return path


def _check(path: Path, address: str, sha256: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise CheckpointError(f"{path} (from {address}) has sha256 {found}, expected {sha256}; delete it and try again")


def describe_all() -> list[dict[str, Any]]:
    """Facts on all tokenizers that have a name, for ``speechtok models``.

    ``rate`` and ``bitrate`` are None where units are segments: they depend on the sound.
    """
    rows = []
    for name, folder in shipped().items():
        facts = json.loads((folder / "tokenizer.json").read_text())
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        rows.append(
            {
                "name": name,
                "encoder": facts["encoder"],
                "layer": facts["layer"],
                "rate": None if "segmenter" in facts else round(1 / facts["hop_seconds"], 3),
                "codebooks": facts.get("codebooks", 1),
                "vocab_size": facts["vocab_size"],
                "bitrate": facts["bitrate"],
                "megabytes": round(size / 1e6, 3),
                "licence": facts["licence"],
                "status": "shipped",
                "revision": facts["fingerprint"],
                "repository": None,
            }
        )
    published: dict[str, Published | PublishedCodec] = {**PUBLISHED, **CODECS}
    for name, entry in published.items():
        layer, books = (entry.layer, 1) if isinstance(entry, Published) else (None, entry.codebooks)
        rows.append(
            {
                "name": name,
                "encoder": entry.repository,
                "layer": layer,
                "rate": entry.rate,
                "codebooks": books,
                "vocab_size": entry.vocab_size,
                "bitrate": round(entry.rate * books * math.log2(entry.vocab_size), 3),
                "megabytes": entry.megabytes,
                "licence": entry.licence,
                "status": "cached" if _is_cached(entry) else "to download",
                "revision": entry.revision,
                "repository": entry.repository,
            }
        )
    return rows


def _is_cached(entry: Published | PublishedCodec) -> bool:
    from huggingface_hub import try_to_load_from_cache

    weights = (
        try_to_load_from_cache(entry.repository, name, revision=entry.revision)
        for name in ("model.safetensors", "pytorch_model.bin")
    )
    here = any(isinstance(path, str) for path in weights)
    return here and (isinstance(entry, PublishedCodec) or cached_file(entry.centroids, entry.sha256).exists())
