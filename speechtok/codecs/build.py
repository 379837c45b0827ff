"""Decoders by their type."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from speechtok.codecs.base import Decoder
from speechtok.codecs.seanet import SeanetWaves
from speechtok.errors import CheckpointError, UnknownNameError
from speechtok.nn.seanet import SeanetConfig

__all__ = ["build"]


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
    """
    if type != SeanetWaves.type:
        raise UnknownNameError(f"no decoder has the type {type!r}; known: {SeanetWaves.type}")
    unknown = sorted(set(config) - {field.name for field in fields(SeanetConfig)})
    if unknown:
        raise CheckpointError(f"{type} decoder: unknown fields {', '.join(unknown)} in its configuration")
    # JSON gives a list for the tuple of ratios, which the configuration takes as well.
    return SeanetWaves(SeanetConfig(**config), weights={k.removeprefix("network."): w for k, w in weights.items()})
