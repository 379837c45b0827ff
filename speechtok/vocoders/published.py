"""Checkpoints of code HiFi-GANs as speech-resynthesis, textless and slamkit publish them, read and written.

Files hold a state dict, or ``{"generator": state dict}``, with weight norm as pairs ``weight_g`` and ``weight_v``. The
configuration beside them is the JSON file of the training. Pickles are read with ``weights_only=True`` only.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from speechtok.encoders.checkpoint import as_float, check_weights, flat, fold_weight_norm, read_file, read_json
from speechtok.errors import CheckpointError, InputError
from speechtok.vocoders.code_hifigan import CodeHifiGan, CodeHifiGanConfig

__all__ = [
    "from_tensors",
    "fuse_weight_norm",
    "published_state",
    "put_on_weight_norm",
    "read_code_hifigan",
    "read_config",
]

_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
_F0_QUANTIZER = "quantizer."  # speech-resynthesis keeps the network that made the F0 codes in the same file


def read_code_hifigan(
    weights: str | os.PathLike[str], config: str | os.PathLike[str] | None = None, *, training: bool = False
) -> CodeHifiGan:
    """Read a published code HiFi-GAN.

    Parameters
    ----------
    weights : path
        ``.pt``, ``.ckpt``, ``.bin`` or ``.safetensors``.
    config : path, optional
        Its JSON file; None: ``config.json`` beside the weights.
    training : bool
        Keep weight norm, and give the network in training mode. Otherwise weights are plain, in evaluation mode.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, a setting is not supported, or keys, shapes or values do not fit.
    """
    path = Path(weights)
    content = read_file(path)
    if isinstance(content, Mapping) and set(content) == {"generator"}:
        content = content["generator"]
    description = read_json(path.parent / "config.json" if config is None else Path(config))
    try:
        return from_tensors(read_config(description), flat(content, path), training=training)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_config(description: Mapping[str, Any]) -> CodeHifiGanConfig:
    """Take the shape of the network out of a published configuration; settings of the training are left aside.

    Raises
    ------
    CheckpointError
        If a setting is missing, not supported, or contradicts another one.
    """
    if str(description.get("resblock", "1")) != "1":
        raise CheckpointError(f"configuration: resblock={description['resblock']!r} is not supported, only 1")
    if description.get("lambda_commit") or description.get("lambda_commit_code"):
        raise CheckpointError("configuration: lambda_commit: models that learn their codes are not supported")
    speakers = description.get("num_speakers", 200) if description.get("multispkr") else 0
    linear = description.get("embedder_dim", 256) if description.get("embedder_params") else 0
    durations = description.get("dur_predictor_params") or {}
    try:
        config = CodeHifiGanConfig(
            vocab_size=description["num_embeddings"],
            embedding=description["embedding_dim"],
            rates=description["upsample_rates"],
            kernels=description["upsample_kernel_sizes"],
            channels=description["upsample_initial_channel"],
            residual_kernels=description["resblock_kernel_sizes"],
            residual_dilations=description["resblock_dilation_sizes"],
            speakers=0 if linear else speakers,
            speaker_dim=linear,
            styles=description.get("num_styles", 100) if description.get("multistyle") else 0,
            f0_bins=_f0_bins(description),
            duration_dim=durations["var_pred_hidden_dim"] if durations else 0,
            duration_kernel=durations.get("var_pred_kernel_size", 3),
            duration_dropout=durations.get("var_pred_dropout", 0.5),
            sample_rate=description.get("sampling_rate", 16000),
        )
    except KeyError as error:
        raise CheckpointError(f"configuration: {error.args[0]} is missing") from error
    except (InputError, TypeError) as error:
        raise CheckpointError(f"configuration: {error}") from error
    heard = durations.get("encoder_embed_dim", config.embedding)
    if heard != config.embedding:
        raise CheckpointError(f"configuration: encoder_embed_dim={heard!r} must be embedding_dim={config.embedding}")
    if description.get("model_in_dim", config.inputs) != config.inputs:
        raise CheckpointError(
            f"configuration: model_in_dim={description['model_in_dim']!r}, but the embeddings of units, speaker, style "
            f"and F0 that it names are {config.inputs}"
        )
    return config


def _f0_bins(description: Mapping[str, Any]) -> int:
    if not description.get("f0"):
        return 0
    if description.get("f0_quantizer"):
        bins: int = description["f0_quantizer"]["f0_vq_params"]["l_bins"]
        return bins
    bins = description.get("f0_quant_num_bin", 0)
    if bins <= 0:
        raise CheckpointError("configuration: f0 without codes (f0_quantizer or f0_quant_num_bin) is not supported")
    return bins


def from_tensors(config: CodeHifiGanConfig, tensors: Mapping[str, Tensor], *, training: bool = False) -> CodeHifiGan:
    """Put a checkpoint's tensors into a network; every key and shape must be that of the configuration.

    The F0 codes have one table, ``f0_quant_embed`` (textless) or ``f0_dict`` (speech-resynthesis). The network that
    makes codes out of F0 contours (``quantizer.*``) is left aside: F0 codes come from outside.

    Raises
    ------
    CheckpointError
    """
    found = {
        "f0_quant_embed.weight" if name == "f0_dict.weight" else name: as_float(name, tensor)
        for name, tensor in tensors.items()
    }
    if len(found) != len(tensors):
        raise CheckpointError("there are two tables of F0 codes, f0_dict and f0_quant_embed; remove one of them")
    network, plain = CodeHifiGan(config), fold_weight_norm(found)
    beside = (_F0_QUANTIZER,) if config.f0_bins else ()
    check_weights({name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}, plain, beside)
    network.load_state_dict({name: plain[name] for name in network.state_dict()})
    if not training:
        return network.eval()
    put_on_weight_norm(network)
    # Magnitudes and directions as they were: the lengths of directions decide how fast they turn.
    kept = {_named(name, _NORM): tensor for name, tensor in found.items() if name.endswith(tuple(_NORM))}
    network.load_state_dict(network.state_dict() | kept)
    return network


def put_on_weight_norm(network: CodeHifiGan) -> None:
    """Give the generator's convolutions weight norm, as in training; what they compute stays the same."""
    for conv in _convolutions(network):
        weight_norm(conv)


def fuse_weight_norm(network: CodeHifiGan) -> None:
    """Undo `put_on_weight_norm`: plain weights, which is faster."""
    for conv in _convolutions(network):
        remove_parametrizations(conv, "weight")


def published_state(network: CodeHifiGan) -> dict[str, Tensor]:
    """State dict with the names of published checkpoints: ``weight_g`` and ``weight_v`` where there is weight norm."""
    names = {ours: theirs for theirs, ours in _NORM.items()}
    return {_named(name, names): tensor for name, tensor in network.state_dict().items()}


def _convolutions(network: CodeHifiGan) -> list[nn.Module]:
    parts = (network.conv_pre, network.ups, network.resblocks, network.conv_post)
    return [m for part in parts for m in part.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]


def _named(name: str, endings: Mapping[str, str]) -> str:
    """Replace the ending of a name."""
    for old, new in endings.items():
        if name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name
