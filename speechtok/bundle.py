"""Bundles: the folder of a tokenizer, a description and the weights of its parts.

Weights that are whole bfloat16 numbers take half the space: a float32 tensor is stored as bfloat16 where that loses
nothing, and read back as float32. Encoder weights that a bundle in the folder beside it has, too, can be left to that
one (``encoder_base`` in the description); the fingerprint covers them all the same.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from speechtok.errors import CheckpointError, FormatError, InputError, OutputError, UnknownNameError
from speechtok.frames import WindowRule
from speechtok.quantizers.base import Quantizer

if TYPE_CHECKING:
    from speechtok.codecs.base import Decoder
    from speechtok.segmenters.base import Segmenter
    from speechtok.tokenizer import Tokenizer

__all__ = ["FORMAT", "describe", "digest", "identity", "read", "read_description", "read_tensors", "write"]

FORMAT = 1

_FIELDS = (
    "name", "fingerprint", "encoder", "encoder_config", "layer", "quantizer", "vocab_size", "sample_rate", "window",
)  # fmt: skip


def write(folder: Path, description: dict[str, Any], parts: Mapping[str, nn.Module], base: str | None = None) -> None:
    """Write ``tokenizer.json`` and, of each part that has weights, ``<part>.safetensors``.

    Parameters
    ----------
    folder : Path
    description : dict
        See `describe`.
    parts : mapping of str to module
    base : str, optional
        Name of a bundle beside `folder`: encoder weights that it has, too, are left to it.

    Raises
    ------
    InputError
        If `base` is no bundle beside the folder, or shares no weights.
    OutputError
        If the folder holds another tokenizer or cannot be written.
    """
    from safetensors.torch import save_file

    shared = dict[str, Tensor]()
    if base is not None:
        own, others = parts["encoder"].state_dict(), _of_base(folder, base)
        shared = {name: value for name, value in others.items() if name in own and torch.equal(own[name].cpu(), value)}
        if not shared:
            raise InputError(f"{folder.parent / base} has no weights of this encoder; save it without a base")
        description = {**description, "encoder_base": base}
    path = folder / "tokenizer.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text()) if path.exists() else description
        if any(known.get(part) != description.get(part) for part in ("fingerprint", "decoder_fingerprint")):
            raise OutputError(f"{folder} holds another tokenizer; choose another folder or delete it")
        for part, module in parts.items():
            tensors = {name: _narrow(tensor.cpu().contiguous()) for name, tensor in module.state_dict().items()}
            if part == "encoder":
                tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
            if tensors:
                save_file(tensors, folder / f"{part}.safetensors")
                (folder / f"{part}.safetensors").chmod(0o644)  # the library writes files that only the owner reads
        path.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OutputError(f"{folder}: the tokenizer cannot be written ({error})") from error


def digest(identity: Mapping[str, Any], parts: Mapping[str, nn.Module]) -> str:
    """Hash of a configuration and of weights, 32 hexadecimal digits."""
    found = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for part, module in parts.items():
        for name, tensor in sorted(module.state_dict().items()):
            found.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:32]


def identity(tokenizer: "Tokenizer") -> dict[str, Any]:
    """What decides the units, besides the weights."""
    segments = {}
    if tokenizer.segmenter is not None:  # without one nothing is said, so that older fingerprints stay as they are
        segments = {
            "segmenter": tokenizer.segmenter.type,
            "segmenter_config": tokenizer.segmenter.config_dict(),
            "silence_gap": tokenizer.silence_gap,
        }
    return {
        "format": FORMAT,
        "encoder": tokenizer.encoder.type,
        "encoder_config": tokenizer.encoder.config_dict(),
        "layer": tokenizer.encoder.layer,
        "quantizer": tokenizer.quantizer.type,
        "quantizer_config": tokenizer.quantizer.config_dict(),
        **segments,
        "window": asdict(tokenizer.window),
    }


def describe(tokenizer: "Tokenizer") -> dict[str, Any]:
    """See `Tokenizer.describe`."""
    grid, decoder = tokenizer.encoder.grid, dict[str, Any]()
    if tokenizer.decoder is not None:
        decoder = {"decoder": tokenizer.decoder.type, "decoder_config": tokenizer.decoder.config_dict()}
        # It is no part of the fingerprint above, but its file is checked, too.
        decoder["decoder_fingerprint"] = tokenizer.decoder_fingerprint
    return {
        "name": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        **identity(tokenizer),
        **decoder,
        "vocab_size": tokenizer.vocab_size,
        "codebooks": tokenizer.quantizer.codebooks,
        "sample_rate": tokenizer.sample_rate,
        "hop_seconds": grid.hop_seconds,
        "offset_seconds": grid.offset_seconds,
        "bitrate": None if tokenizer.bitrate is None else round(tokenizer.bitrate, 3),
        "licence": tokenizer.licence,
        "training": tokenizer.training,
        "versions": {name: version(name) for name in ("speechtok", "torch", "numpy")},
    }


def _narrow(tensor: Tensor) -> Tensor:
    """The same values as bfloat16, if that is possible."""
    if tensor.dtype != torch.float32:
        return tensor
    narrow = tensor.bfloat16()
    # Bits are compared, not values: a negative zero stays one, and NaN is left as it is.
    return narrow if torch.equal(narrow.float().view(torch.int32), tensor.view(torch.int32)) else tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Weights of a part; float32 where the file has bfloat16.

    Raises
    ------
    FormatError
        If the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({error})") from error
    return {name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in tensors.items()}


def read_description(folder: Path) -> dict[str, Any]:
    """Contents of a folder's ``tokenizer.json``, checked for the fields that everything relies on.

    Raises
    ------
    FormatError
        If it is missing or malformed.
    """
    path = folder / "tokenizer.json"
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FormatError(f"{folder} is no tokenizer or output folder: it has no tokenizer.json") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error})") from error
    missing = [name for name in _FIELDS if not isinstance(description, dict) or name not in description]
    if missing:
        raise FormatError(f"{path} lacks the fields {', '.join(missing)}")
    wrong = [name for name in ("name", "fingerprint", "encoder", "quantizer") if not isinstance(description[name], str)]
    if wrong or not isinstance(description["encoder_config"], dict):
        raise FormatError(f"{path}: {', '.join(wrong) or 'encoder_config'} is not of the right type")
    if description.get("format", FORMAT) != FORMAT:
        raise FormatError(f"{path} has format {description['format']}; this version reads format {FORMAT}")
    return description


def _of_base(folder: Path, base: Any) -> dict[str, Tensor]:
    """Encoder weights of the bundle `base` beside `folder`; FormatError if there is none."""
    if not isinstance(base, str) or Path(base).name != base or base in ("", ".", ".."):
        raise FormatError(f"{folder / 'tokenizer.json'}: encoder_base {base!r} must be the name of a folder beside it")
    try:
        return read_tensors(folder.parent / base / "encoder.safetensors")
    except FormatError as error:
        raise FormatError(f"{folder} shares encoder weights with {base}, which must lie beside it: {error}") from error


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Description of a tokenizer, and its parts as arguments of `Tokenizer`.

    Raises
    ------
    FormatError
        If a file is missing or malformed.
    """
    from speechtok.encoders.pretrained import build

    description = read_description(folder)
    try:
        encoder = build(description["encoder"], description["encoder_config"], description["layer"])
        window = WindowRule(**description["window"])
    except (TypeError, KeyError, AttributeError) as error:
        raise FormatError(f"{folder / 'tokenizer.json'}: malformed configuration ({error})") from error
    names = encoder.state_dict().keys()
    path, weights = folder / "encoder.safetensors", dict[str, Tensor]()
    if (base := description.get("encoder_base")) is not None:
        weights = {name: value for name, value in _of_base(folder, base).items() if name in names}
    if names and (base is None or path.exists()):  # all of them may be shared
        weights |= read_tensors(path)
    try:
        encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise FormatError(f"{path} does not fit its configuration: {error}") from error
    quantizer = _quantizer(description, read_tensors(folder / "quantizer.safetensors"), folder)
    segmenter, silence_gap = _segmenter(description, folder)
    parts = {"encoder": encoder, "quantizer": quantizer, "window": window, "decoder": _decoder(description, folder)}
    return description, parts | {"segmenter": segmenter, "silence_gap": silence_gap}


def _quantizer(description: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path) -> Quantizer:
    """Quantizer of a bundle.

    Raises
    ------
    FormatError
        If this version does not know its kind, or configuration or tensors do not fit it.
    """
    from speechtok.quantizers.kmeans import KMeans
    from speechtok.quantizers.mlp import MlpQuantizer
    from speechtok.quantizers.residual import ResidualQuantizer

    path, config = folder / "tokenizer.json", description.get("quantizer_config", {})
    match description["quantizer"]:
        case "kmeans":
            spherical = config.get("spherical", False) if isinstance(config, dict) else None
            if not isinstance(spherical, bool):
                raise FormatError(f"{path}: quantizer_config {config!r} is malformed; write or fetch the bundle again")
            return KMeans.from_tensors(tensors, spherical)
        case "residual" | "mlp" as kind:
            if not isinstance(config, dict):
                raise FormatError(f"{path}: quantizer_config {config!r} is malformed; write or fetch the bundle again")
            rebuild = ResidualQuantizer.from_tensors if kind == "residual" else MlpQuantizer.from_tensors
            try:
                return rebuild(tensors, **config)
            except FormatError as error:
                raise FormatError(f"{folder / 'quantizer.safetensors'}: {error}") from error
        case kind:
            raise FormatError(f"{path}: unknown quantizer {kind!r}; this version knows 'kmeans', 'mlp' and 'residual'")


def _decoder(description: Mapping[str, Any], folder: Path) -> "Decoder | None":
    """Decoder of a bundle; None where it has none.

    Raises
    ------
    FormatError
        If this version does not know its kind, or configuration or weights do not fit it.
    """
    from speechtok.codecs.build import WITHOUT_WEIGHTS, build

    path, kind = folder / "tokenizer.json", description.get("decoder")
    if kind is None:
        return None
    config = description.get("decoder_config", {})
    if not isinstance(kind, str) or not isinstance(config, dict):
        raise FormatError(f"{path}: decoder or decoder_config is malformed; write or fetch the bundle again")
    weights = {} if kind in WITHOUT_WEIGHTS else read_tensors(folder / "decoder.safetensors")
    try:
        return build(kind, config, weights)
    except (CheckpointError, InputError, UnknownNameError, TypeError) as error:
        raise FormatError(f"{folder}: its decoder cannot be built: {error}") from error


def _segmenter(description: Mapping[str, Any], folder: Path) -> "tuple[Segmenter | None, int | None]":
    """Segmenter of a bundle and its ``silence_gap``; None, None for tokenizers of frames.

    Raises
    ------
    FormatError
        If this version does not know its kind, or a field is malformed.
    """
    from speechtok.segmenters.base import build

    path, gap = folder / "tokenizer.json", description.get("silence_gap")
    if gap is not None and type(gap) is not int:
        raise FormatError(f"{path}: silence_gap must be a whole number, not {gap!r}; write or fetch the bundle again")
    kind, config = description.get("segmenter"), description.get("segmenter_config", {})
    if kind is None:
        return None, gap
    if not isinstance(kind, str) or not isinstance(config, dict):
        raise FormatError(f"{path}: segmenter or segmenter_config is malformed; write or fetch the bundle again")
    try:
        return build(kind, config), gap
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
