"""Bundles: the folder of a tokenizer, a description and the weights of its parts.

Weights that are whole bfloat16 numbers take half the space: a float32 tensor is stored as bfloat16 where that loses
nothing, and read back as float32.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from speechtok.errors import FormatError, OutputError
from speechtok.frames import WindowRule
from speechtok.quantizers.base import Quantizer

if TYPE_CHECKING:
    from speechtok.segmenters.base import Segmenter

__all__ = ["FORMAT", "read", "read_description", "read_tensors", "write"]

FORMAT = 1

_FIELDS = (
    "name", "fingerprint", "encoder", "encoder_config", "layer", "quantizer", "vocab_size", "sample_rate", "window",
)  # fmt: skip


def write(folder: Path, description: Mapping[str, Any], parts: Mapping[str, nn.Module]) -> None:
    """Write ``tokenizer.json`` and, of each part that has weights, ``<part>.safetensors``.

    Raises
    ------
    OutputError
        If the folder holds another tokenizer or cannot be written.
    """
    from safetensors.torch import save_file

    path = folder / "tokenizer.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and json.loads(path.read_text()).get("fingerprint") != description["fingerprint"]:
            raise OutputError(f"{folder} holds another tokenizer; choose another folder or delete it")
        for part, module in parts.items():
            tensors = {name: _narrow(tensor.cpu().contiguous()) for name, tensor in module.state_dict().items()}
            if tensors:
                save_file(tensors, folder / f"{part}.safetensors")
                (folder / f"{part}.safetensors").chmod(0o644)  # the library writes files that only the owner reads
        path.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OutputError(f"{folder}: the tokenizer cannot be written ({error})") from error


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


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Description and parts of a tokenizer: ``encoder``, ``quantizer``, ``segmenter``, ``silence_gap``, ``window``.

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
    weights = read_tensors(folder / "encoder.safetensors") if encoder.state_dict() else {}
    try:
        encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise FormatError(f"{folder / 'encoder.safetensors'} does not fit its configuration: {error}") from error
    quantizer = _quantizer(description, read_tensors(folder / "quantizer.safetensors"), folder)
    segmenter, silence_gap = _segmenter(description, folder)
    parts = {"encoder": encoder, "quantizer": quantizer, "window": window}
    return description, parts | {"segmenter": segmenter, "silence_gap": silence_gap}


def _quantizer(description: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path) -> Quantizer:
    """Quantizer of a bundle.

    Raises
    ------
    FormatError
        If this version does not know its kind, or configuration or tensors do not fit it.
    """
    from speechtok.quantizers.kmeans import KMeans

    path, config = folder / "tokenizer.json", description.get("quantizer_config", {})
    match description["quantizer"]:
        case "kmeans":
            spherical = config.get("spherical", False) if isinstance(config, dict) else None
            if not isinstance(spherical, bool):
                raise FormatError(f"{path}: quantizer_config {config!r} is malformed; write or fetch the bundle again")
            return KMeans.from_tensors(tensors, spherical)
        case kind:
            raise FormatError(f"{path}: unknown quantizer {kind!r}; this version knows 'kmeans'")


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
