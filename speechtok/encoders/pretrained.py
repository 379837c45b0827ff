"""Encoders from published checkpoints: read the files, hold every key and shape to account, build the encoder.

Layouts: a folder as Hugging Face writes it (``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, whole
or sharded), or one file with a flat Sylber state dict. Pickles are read with ``weights_only=True`` only.
"""

import importlib
import json
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speechtok.encoders.base import Encoder
from speechtok.errors import CheckpointError, InputError, UnknownNameError

__all__ = ["build", "download", "expected_shapes", "from_pretrained", "load_checkpoint", "read_tensors"]


class _Entry(NamedTuple):
    module: str
    config: str
    encoder: str


_ENCODERS = {
    "hubert": _Entry("hubert", "HubertConfig", "HubertEncoder"),
    "mfcc": _Entry("mfcc", "MfccConfig", "MfccEncoder"),
    "w2v_bert": _Entry("w2v_bert", "W2vBertConfig", "W2vBertEncoder"),
    "wavlm": _Entry("wavlm", "WavLMConfig", "WavLMEncoder"),
}
_WITHOUT_WEIGHTS = {"mfcc"}
_MODEL_TYPES = {
    "hubert": "hubert",
    "mert_model": "hubert",
    "wav2vec2": "hubert",
    "wav2vec2-bert": "w2v_bert",
    "wavlm": "wavlm",
}
_PREFIXES = ("hubert.", "wav2vec2.", "wav2vec2_bert.", "wavlm.", "mert.")
_LIGHTNING = "net.speech_model."  # of Sylber's training code
# Parts of published checkpoints that no hidden state depends on.
_HEADS = (
    *("classifier.", "final_proj.", "label_embs_concat", "layer_weights", "lm_head.", "masked_spec_embed"),
    *("objective.", "project_hid.", "project_q.", "projector.", "quantizer.", "tdnn."),
)
_SPEAKER_HEAD = ("feature_extractor.weight", "feature_extractor.bias")  # a linear map beside the prefixed model
_JSON_FILES = ("config.json", "preprocessor_config.json")
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".ckpt", ".pt", ".bin", ".safetensors")
# What torch.load raises for damaged files and for pickles it refuses.
_UNPICKLING = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _classes(kind: str) -> tuple[type[Any], type[Encoder]]:
    if kind not in _ENCODERS:
        raise UnknownNameError(f"no encoder has the type {kind!r}; known: {', '.join(_ENCODERS)}")
    entry = _ENCODERS[kind]
    module = importlib.import_module(f"speechtok.encoders.{entry.module}")
    return getattr(module, entry.config), getattr(module, entry.encoder)


def build(type: str, config: Mapping[str, Any], layer: int | None) -> Encoder:  # noqa: A002
    """Make an encoder with random weights from what a bundle says about it.

    Parameters
    ----------
    type : str
        ``Encoder.type``.
    config : mapping
        ``Encoder.config_dict()``; lists may stand for tuples.
    layer : int or None
        ``Encoder.layer``.

    Raises
    ------
    UnknownNameError
        If there is no such type.
    CheckpointError
        If the configuration has unknown fields or unsupported values.
    """
    config_class, encoder_class = _classes(type)
    unknown = sorted(set(config) - {field.name for field in fields(config_class)})
    if unknown:
        raise CheckpointError(
            f"{type} encoder: unknown fields {_some(unknown)} in its configuration; update speechtok or mend the file"
        )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return _make(encoder_class, config_class(**values), layer).eval()


def from_pretrained(
    path_or_name: str | Path, layer: int | None = None, *, revision: str | None = None, normalize: bool | None = None
) -> Encoder:
    """Load a published checkpoint.

    Parameters
    ----------
    path_or_name : str or Path
        A folder (of Hugging Face's layout, or written by `speechtok.encoders.saved.save_encoder`), a file of Sylber
        (its flat state dict or a checkpoint of its training, see `HubertConfig.from_shapes`), the name
        ``owner/repository`` of a Hugging Face repository, or the type of an encoder without weights ("mfcc").
        A weight file that has a ``config.json`` beside it is read with that configuration.
    layer : int, optional
        Index into ``hidden_states``, see `HubertEncoder`; None: the last.
    revision : str, optional
        Branch, tag or commit of the repository; unused for paths.
    normalize : bool, optional
        Whether each wave is scaled to zero mean and unit variance first (HuBERT's family only). None: what the
        preprocessor_config.json or encoder.json beside the weights says; without one it is taken as it is.

    Returns
    -------
    Encoder
        In evaluation mode, on the CPU, in float32.

    Raises
    ------
    UnknownNameError
        If it is neither a path nor a repository.
    CheckpointError
        If files are missing, unreadable, of an unknown kind, or do not fit their configuration.
    InputError
        If the model has no such layer, or `normalize` is given for an encoder that does not know it.
    """
    encoder = _load(path_or_name, layer, revision)
    if normalize is not None:
        if not hasattr(encoder.config, "do_normalize"):
            raise InputError(f"{path_or_name}: {encoder.type} encoders cannot normalise the wave; leave normalize out")
        encoder.config = replace(encoder.config, do_normalize=normalize)
    return encoder


def _load(path_or_name: str | Path, layer: int | None, revision: str | None) -> Encoder:
    """`from_pretrained` with the normalisation that the checkpoint names."""
    path = Path(path_or_name).expanduser()
    if path_or_name in _WITHOUT_WEIGHTS and not path.exists():
        return build(str(path_or_name), {}, layer)
    if not path.exists():
        if not isinstance(path_or_name, str):
            raise CheckpointError(f"{path} does not exist; check the path")
        path = download(path_or_name, revision)
        if not (path / "config.json").exists() and (path / "sylber.ckpt").exists():
            path = path / "sylber.ckpt"
    if path.is_file() and not (path.parent / "config.json").exists():
        tensors = _sylber_tensors(path)
        config_class, encoder_class = _classes("hubert")
        with _naming(path):
            config = config_class.from_shapes({name: tuple(tensor.shape) for name, tensor in _plain(tensors).items()})
            return load_checkpoint(encoder_class, config, layer, tensors)
    folder = path.parent if path.is_file() else path
    if (folder / "encoder.json").exists():
        from speechtok.encoders.saved import read_encoder

        return read_encoder(folder, layer)
    description = _read_json(folder / "config.json")
    preprocessor = folder / "preprocessor_config.json"
    kind = _MODEL_TYPES.get(str(description.get("model_type")))
    if kind is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type={description.get('model_type')!r} is not supported; "
            f"known: {', '.join(_MODEL_TYPES)}"
        )
    config_class, encoder_class = _classes(kind)
    settings = _read_json(preprocessor) if preprocessor.exists() else None
    tensors = read_tensors(path)
    with _naming(path):
        return load_checkpoint(encoder_class, config_class.from_hf(description, settings), layer, tensors)


def load_checkpoint(
    encoder_class: type[Encoder], config: Any, layer: int | None, tensors: Mapping[str, Tensor]
) -> Encoder:
    """Put the weights of a whole model into an encoder of its first layers; nothing is skipped silently.

    The keys must be exactly those of the whole model, behind one known prefix or none. Besides, only known training
    heads may be there. All three ways to write a weight norm are accepted: ``weight_g`` and ``weight_v``,
    ``parametrizations.weight.original0`` and ``original1``, or the plain weight. Half precision becomes float32.

    Pre-LN and post-LN models have the same keys and shapes: which one it is comes from the configuration alone and
    cannot be checked here.

    Parameters
    ----------
    encoder_class : type
        Class of the encoder; made as ``encoder_class(config, layer)``.
    config : object
        Its configuration, with `num_hidden_layers`.
    layer : int or None
        Hidden layer to end with; None: the last.
    tensors : mapping of str to Tensor
        The checkpoint.

    Returns
    -------
    Encoder
        In evaluation mode; its tensors share no memory with the checkpoint.

    Raises
    ------
    CheckpointError
        If keys are missing, unexpected or wrongly shaped, or weights are not finite.
    InputError
        If the model has no such layer.
    """
    encoder = _hollow(encoder_class, config, layer)
    expected = expected_shapes(encoder_class, config)
    found = _plain(tensors)
    beside = (*_HEADS, *getattr(encoder_class, "ignored_prefixes", ()))
    missing = [name for name in expected if name not in found and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in found if name not in expected and not name.startswith(beside)]
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the weights do not fit the configuration; {'; '.join(problems)}. Use the config.json of this checkpoint"
        )
    bad = [name for name in expected if name in found and not bool(torch.isfinite(found[name]).all())]
    if bad:
        raise CheckpointError(f"{len(bad)} tensors hold NaN or infinity: {_some(bad)}; fetch the checkpoint again")
    state = {
        name: found[name].detach().to(tensor.dtype, copy=True) if name in found else torch.zeros((), dtype=tensor.dtype)
        for name, tensor in encoder.state_dict().items()
    }
    encoder.load_state_dict(state, strict=True, assign=True)
    return encoder.eval()


def expected_shapes(encoder_class: type[Encoder], config: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a whole model, by its name without prefix, with the weight norm folded."""
    with torch.device("meta"):
        model = _make(encoder_class, config, None)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def download(repository: str, revision: str | None = None) -> Path:
    """Fetch configuration and weights of a Hugging Face repository, or find them in the local cache.

    Parameters
    ----------
    repository : str
        ``owner/name``.
    revision : str, optional
        Branch, tag or commit; None: the main branch.

    Returns
    -------
    Path
        Folder of the files. With ``HF_HUB_OFFLINE=1`` only the cache is read.

    Raises
    ------
    UnknownNameError
        If there is no such repository or revision.
    CheckpointError
        If the files cannot be fetched.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repository):
        raise UnknownNameError(f"{repository!r} is neither an existing path nor a name like owner/name; check it")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))

    at = repository if revision is None else f"{repository} at revision {revision}"
    try:
        folder = fetch(*_JSON_FILES, "model*.safetensors", "model.safetensors.index.json")
        if not any((folder / name).exists() for name in _WEIGHT_FILES):  # older repositories hold pickles only
            folder = fetch(*_JSON_FILES, "pytorch_model*.bin", "pytorch_model.bin.index.json", "sylber.ckpt")
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UnknownNameError(
            f"{at}: no such path, repository or revision, or it is private; check the name, or log in (hf auth login)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{at} is not in the local cache and cannot be fetched; connect to the network and unset HF_HUB_OFFLINE, "
            "or give the path of a copy"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{at} cannot be fetched ({error}); try again or give the path of a copy") from error
    return folder


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint.

    Parameters
    ----------
    path : Path
        A folder with ``model.safetensors`` or ``pytorch_model.bin``, whole or sharded, or one such file.

    Raises
    ------
    CheckpointError
        If files are missing, damaged, or pickles that hold anything but tensors.
    """
    if path.is_dir():
        names = [name for name in _WEIGHT_FILES if (path / name).exists()]
        if not names:
            raise CheckpointError(f"{path} has no weights: put model.safetensors or pytorch_model.bin there")
        path = path / names[0]
    if path.suffix == ".json":
        return _read_shards(path)
    return _flat(_read_file(path), path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map; fetch the checkpoint again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if name != Path(name).name or name in ("", ".."):
            raise CheckpointError(f"{index} points to {name!r}, outside of its folder; it is not a usable checkpoint")
        shard = _flat(_read_file(index.parent / name), index.parent / name)
        if set(shard) != {key for key, place in places.items() if place == name}:
            raise CheckpointError(f"{index.parent / name} does not hold the keys its index lists; fetch it again")
        tensors |= shard
    return tensors


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; fetch the checkpoint again")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(f"{path}: unknown kind of file; known: {', '.join(_SUFFIXES)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNPICKLING as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and is not unpickled ({reason}); "
            "convert it to safetensors where you trust it"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; put it beside the weights") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; fetch it again")
    return content


def _flat(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path} is no state dict: it must map names to tensors; save model.state_dict() instead")
    return dict(content)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without prefix, weights in float32, weight norm folded."""
    return _fold_weight_norm({name: _as_float(name, tensor) for name, tensor in _strip(tensors).items()})


def _strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the model's prefix off. Beside a prefixed model there are heads only, which are left out."""
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            bare = [name for name in tensors if not name.startswith(prefix)]
            stray = [name for name in bare if not name.startswith(_HEADS) and name not in _SPEAKER_HEAD]
            if stray:
                raise CheckpointError(f"{len(stray)} unexpected beside {prefix}*: {_some(stray)}; remove them")
            return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    return dict(tensors)


def _as_float(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.float()
    if name.endswith(".num_batches_tracked") or name.startswith(_HEADS):
        return tensor
    raise CheckpointError(f"{name} has type {tensor.dtype}; use the checkpoint with weights in floating point")


def _fold_weight_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace each pair of weight norm tensors by ``weight = g * v / |v|``, the norm over the axes where g has size 1.

    Salimans & Kingma 2016 (arXiv 1602.07868), formula 2.
    """
    out = dict(tensors)
    for name in tensors:
        for magnitude, direction in (
            ("weight_g", "weight_v"),
            ("parametrizations.weight.original0", "parametrizations.weight.original1"),
        ):
            stem = name.removesuffix(magnitude)
            if stem == name or stem + direction not in tensors:
                continue
            if stem + "weight" in out:
                raise CheckpointError(f"{stem}weight is there twice, plain and with weight norm; remove one of them")
            g, v = out.pop(name), out.pop(stem + direction)
            if g.ndim != v.ndim or any(a not in (1, b) for a, b in zip(g.shape, v.shape, strict=True)):
                raise CheckpointError(f"{name} {tuple(g.shape)} does not fit {stem}{direction} {tuple(v.shape)}")
            axes = [axis for axis in range(g.ndim) if g.shape[axis] == 1]
            out[stem + "weight"] = g * (v / v.norm(dim=axes, keepdim=True))
    return out


def _make(encoder_class: type[Encoder], config: Any, layer: int | None) -> Encoder:
    make: Any = encoder_class  # the base class does not state the arguments of `__init__`
    encoder: Encoder = make(config, getattr(config, "num_hidden_layers", None) if layer is None else layer)
    return encoder


def _hollow(encoder_class: type[Encoder], config: Any, layer: int | None) -> Encoder:
    """Make an encoder whose weights will all be assigned: without the seconds of random numbers where possible."""
    with torch.device("meta"):
        encoder = _make(encoder_class, config, layer)
    state = set(encoder.state_dict())
    tables = {name for name, _ in encoder.named_buffers()} - state
    attributes = [v for module in encoder.modules() for v in vars(module).values() if isinstance(v, Tensor)]
    return _make(encoder_class, config, layer) if tables or attributes else encoder


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put a path in front of the message of a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _sylber_tensors(path: Path) -> dict[str, Tensor]:
    """State dict of a single file: flat, or a Lightning checkpoint of the training code."""
    content = _read_file(path)
    if not (isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping)):
        return _flat(content, path)
    tensors = _flat(content["state_dict"], path)
    if not any(name.startswith(_LIGHTNING) for name in tensors):
        return tensors
    # Beside the encoder there are the running statistics of the training's silence threshold.
    bare = [name for name in tensors if not name.startswith((_LIGHTNING, "net.thresholder."))]
    if bare:
        raise CheckpointError(f"{path}: {len(bare)} unexpected beside {_LIGHTNING}*: {_some(bare)}; remove them")
    return {name.removeprefix(_LIGHTNING): tensors[name] for name in tensors if name.startswith(_LIGHTNING)}
