"""Encoders from published checkpoints: read the files, hold every key and shape to account, build the encoder.

Layouts: a folder as Hugging Face writes it (``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, whole
or sharded), or one file with a flat Sylber state dict. Pickles are read with ``weights_only=True`` only.
"""

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speechtok.encoders.base import Encoder
from speechtok.encoders.checkpoint import (
    WEIGHT_FILES,
    as_float,
    check_weights,
    flat,
    fold_weight_norm,
    read_file,
    read_json,
    read_tensors,
    some,
)
from speechtok.errors import CheckpointError, InputError, UnknownNameError

__all__ = ["build", "download", "expected_shapes", "from_pretrained", "load_checkpoint", "read_tensors"]


class _Entry(NamedTuple):
    module: str
    config: str
    encoder: str


_ENCODERS = {
    "cqt": _Entry("cqt", "CqtConfig", "CqtEncoder"),
    "hubert": _Entry("hubert", "HubertConfig", "HubertEncoder"),
    "lipcot": _Entry("lipcot", "LipcotConfig", "LipcotEncoder"),
    "mfcc": _Entry("mfcc", "MfccConfig", "MfccEncoder"),
    "seanet": _Entry("seanet", "SeanetConfig", "SeanetFrames"),
    "w2v_bert": _Entry("w2v_bert", "W2vBertConfig", "W2vBertEncoder"),
    "wavlm": _Entry("wavlm", "WavLMConfig", "WavLMEncoder"),
}
_WITHOUT_WEIGHTS = {"cqt", "lipcot", "mfcc"}
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
            f"{type} encoder: unknown fields {some(unknown)} in its configuration; update speechtok or mend the file"
        )
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return _make(encoder_class, config_class(**values), layer).eval()


def from_pretrained(
    path_or_name: str | Path,
    layer: int | None = None,
    *,
    revision: str | None = None,
    normalize: bool | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Encoder:
    """Load a published checkpoint.

    Parameters
    ----------
    path_or_name : str or Path
        A folder (of Hugging Face's layout, or written by `speechtok.encoders.saved.save_encoder`), a file of Sylber
        (its flat state dict or a checkpoint of its training, see `HubertConfig.from_shapes`), the name
        ``owner/repository`` of a Hugging Face repository, or the type of an encoder without weights ("cqt", "lipcot",
        "mfcc").
        A weight file that has a ``config.json`` beside it is read with that configuration.
    layer : int, optional
        Index into ``hidden_states``, see `HubertEncoder`; None: the last.
    revision : str, optional
        Branch, tag or commit of the repository; unused for paths.
    normalize : bool, optional
        Whether each wave is scaled to zero mean and unit variance first (HuBERT's family only). None: what the
        preprocessor_config.json or encoder.json beside the weights says; without one it is taken as it is.
    settings : mapping, optional
        Fields of the configuration of an encoder without weights, such as `LipcotConfig`.

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
        If the model has no such layer, or `normalize` or `settings` are given for an encoder that does not know them.
    """
    encoder = _load(path_or_name, layer, revision, settings or {})
    if normalize is not None:
        if not hasattr(encoder.config, "do_normalize"):
            raise InputError(f"{path_or_name}: {encoder.type} encoders cannot normalise the wave; leave normalize out")
        encoder.config = replace(encoder.config, do_normalize=normalize)
    return encoder


def _load(path_or_name: str | Path, layer: int | None, revision: str | None, settings: Mapping[str, Any]) -> Encoder:
    """`from_pretrained` with the normalisation that the checkpoint names."""
    path = Path(path_or_name).expanduser()
    if path_or_name in _WITHOUT_WEIGHTS and not path.exists():
        config, _ = _classes(str(path_or_name))
        if unknown := sorted(set(settings) - {field.name for field in fields(config)}):
            known = ", ".join(field.name for field in fields(config))
            raise InputError(f"{path_or_name} encoders have no setting {unknown[0]!r}; known are {known}")
        return build(str(path_or_name), settings, layer)
    if settings:
        raise InputError(
            f"{path_or_name}: its checkpoint says all about it, so {some(sorted(settings))} cannot be set; only "
            f"{', '.join(sorted(_WITHOUT_WEIGHTS))} have settings"
        )
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
    description = read_json(folder / "config.json")
    preprocessor = folder / "preprocessor_config.json"
    kind = _MODEL_TYPES.get(str(description.get("model_type")))
    if kind is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type={description.get('model_type')!r} is not supported; "
            f"known: {', '.join(_MODEL_TYPES)}"
        )
    config_class, encoder_class = _classes(kind)
    extractor = read_json(preprocessor) if preprocessor.exists() else None
    tensors = read_tensors(path)
    with _naming(path):
        return load_checkpoint(encoder_class, config_class.from_hf(description, extractor), layer, tensors)


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
    check_weights(expected, found, beside=(*_HEADS, *getattr(encoder_class, "ignored_prefixes", ())))
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
        if not any((folder / name).exists() for name in WEIGHT_FILES):  # older repositories hold pickles only
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


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without prefix, weights in float32, weight norm folded."""
    return fold_weight_norm({name: as_float(name, tensor, _HEADS) for name, tensor in _strip(tensors).items()})


def _strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the model's prefix off. Beside a prefixed model there are heads only, which are left out."""
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            bare = [name for name in tensors if not name.startswith(prefix)]
            stray = [name for name in bare if not name.startswith(_HEADS) and name not in _SPEAKER_HEAD]
            if stray:
                raise CheckpointError(f"{len(stray)} unexpected beside {prefix}*: {some(stray)}; remove them")
            return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    return dict(tensors)


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


def _sylber_tensors(path: Path) -> dict[str, Tensor]:
    """State dict of a single file: flat, or a Lightning checkpoint of the training code."""
    content = read_file(path)
    if not (isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping)):
        return flat(content, path)
    tensors = flat(content["state_dict"], path)
    if not any(name.startswith(_LIGHTNING) for name in tensors):
        return tensors
    # Beside the encoder there are the running statistics of the training's silence threshold.
    bare = [name for name in tensors if not name.startswith((_LIGHTNING, "net.thresholder."))]
    if bare:
        raise CheckpointError(f"{path}: {len(bare)} unexpected beside {_LIGHTNING}*: {some(bare)}; remove them")
    return {name.removeprefix(_LIGHTNING): tensors[name] for name in tensors if name.startswith(_LIGHTNING)}
