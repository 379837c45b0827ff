"""Decoders by their type, and those that come with an encoder."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from speechtok.codecs.base import Decoder
from speechtok.codecs.lipcot import LipcotWaves
from speechtok.codecs.seanet import SeanetWaves
from speechtok.encoders.base import Encoder
from speechtok.encoders.lipcot import LipcotConfig, LipcotEncoder
from speechtok.errors import CheckpointError, UnknownNameError
from speechtok.nn.seanet import SeanetConfig

__all__ = ["WITHOUT_WEIGHTS", "build", "inverse"]

WITHOUT_WEIGHTS = {LipcotWaves.type}  # of which a bundle has no file
_CONFIGS = {LipcotWaves.type: LipcotConfig, SeanetWaves.type: SeanetConfig}


def build(type: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Decoder:  # noqa: A002
    """Make a decoder from what a bundle says about it.

    Parameters
    ----------
    type : str
        ``Decoder.type``.
    config : mapping
        ``Decoder.config_dict()``.
    weights : mapping of str to Tensor
        Its state dict.

    Raises
    ------
    UnknownNameError
        If there is no such type.
    CheckpointError
        If configuration or weights do not fit.
    InputError
        If a value of the configuration is out of range.
    """
    if type not in _CONFIGS:
        raise UnknownNameError(f"no decoder has the type {type!r}; known: {', '.join(_CONFIGS)}")
    unknown = sorted(set(config) - {field.name for field in fields(_CONFIGS[type])})
    if unknown:
        raise CheckpointError(f"{type} decoder: unknown fields {', '.join(unknown)} in its configuration")
    if type == LipcotWaves.type:
        return LipcotWaves(LipcotConfig(**config))
    # JSON gives a list for the tuple of ratios, which the configuration takes as well.
    return SeanetWaves(SeanetConfig(**config), weights={k.removeprefix("network."): w for k, w in weights.items()})


def inverse(encoder: Encoder) -> Decoder | None:
    """Give the decoder that undoes an encoder without having been trained; None where there is none."""
    return LipcotWaves(encoder.config) if isinstance(encoder, LipcotEncoder) else None
