"""WavLM encoders: HuBERT's graph with a gated relative position bias in the attention.

Chen et al. 2022 (arXiv 2110.13900), section III-A; the buckets are those of T5 (Raffel et al. 2020).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speechtok.encoders.hubert import HubertConfig, HubertEncoder
from speechtok.nn.transformer import SelfAttention, Transformer

__all__ = ["WavLMConfig", "WavLMEncoder"]


@dataclass(frozen=True)
class WavLMConfig(HubertConfig):
    """A HuBERT configuration and the buckets of the relative position bias.

    `num_buckets` counts both directions; distances from `max_bucket_distance` frames on share the last bucket.
    """

    num_buckets: int = 320
    max_bucket_distance: int = 800

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("num_buckets", self.num_buckets % 4 == 0, "; it must be a multiple of 4")
        self._check(
            "max_bucket_distance", self.max_bucket_distance > self.num_buckets // 4, "; it must exceed num_buckets / 4"
        )


def relative_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of a distance: exact when short, logarithmic when long, one half of the buckets for each direction.

    Parameters
    ----------
    distance : int64 [...]
        Key frame minus query frame.
    num_buckets, max_distance : int
        As in `WavLMConfig`.

    Returns
    -------
    int64 [...]
        Values 0 ... ``num_buckets - 1``.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    size = distance.abs()
    # In float32 and in this order of operations, as in training: a distance on the edge of a bucket stays there.
    ratio = torch.log(size.clamp_min(exact).float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + ratio).long().clamp_max(half - 1)
    return (distance > 0).long() * half + torch.where(size < exact, size, far)


class GatedAttention(SelfAttention):
    """Attention whose scores get a relative position term, scaled by a gate that each query frame computes.

    With the query's input ``x`` of a head: ``a, b = sigmoid(sum of 4 of 8 projections each)``, and the term is
    multiplied by ``a * (b * c - 1) + 2``, ``c`` being one learned number for each head.

    Parameters
    ----------
    width, heads : int
        As in `SelfAttention`.
    num_buckets : int
        Rows of the bias table, which only the first block has; 0 for the others.
    max_distance : int
        As in `WavLMConfig`.
    """

    def __init__(self, width: int, heads: int, num_buckets: int, max_distance: int) -> None:
        super().__init__(width, heads)
        self.max_distance = max_distance
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, heads, 1, 1))
        self.gru_rel_pos_linear = nn.Linear(width // heads, 8)
        self.rel_attn_embed = nn.Embedding(num_buckets, heads) if num_buckets else None

    def terms(self, frames: int) -> Tensor | None:
        """Position term [H, T, T] of each query and key frame, before the gate; None without a table."""
        table = self.rel_attn_embed
        if table is None:
            return None
        distance = torch.arange(1 - frames, frames, device=table.weight.device)
        terms = table(relative_buckets(distance, table.num_embeddings, self.max_distance)).T
        # Window s of the 2T - 1 terms starts at distance s - (T - 1): that is the row of query frame T - 1 - s.
        return terms.unfold(1, frames, 1).flip(1)

    def bias(self, x: Tensor, keys: Tensor | None, position: Tensor | None) -> Tensor | None:
        """Gated position term [B, H, T, T], minus infinity at invalid keys; see `SelfAttention.bias`."""
        if position is None:
            return keys
        heads = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D/H]
        a, b = self.gru_rel_pos_linear(heads).unflatten(-1, (2, 4)).sum(-1, keepdim=True).sigmoid().unbind(-2)
        term = (a * (b * self.gru_rel_pos_const - 1.0) + 2.0) * position
        return term if keys is None else term.masked_fill(~keys, -math.inf)


class GatedTransformer(Transformer):
    """Transformer whose first block holds the table of position terms for all."""

    def position(self, frames: int) -> Tensor | None:
        """Term [H, T, T] of each query and key frame."""
        first: Any = self.layers[0]
        return first.attention.terms(frames)


class WavLMEncoder(HubertEncoder):
    """Frames of one hidden layer of a WavLM model; parameters and names as in `HubertEncoder`."""

    type: ClassVar[str] = "wavlm"
    config: WavLMConfig
    transformer: ClassVar[Callable[..., Transformer]] = GatedTransformer

    def _attention(self, block: int) -> SelfAttention:
        config = self.config
        buckets = 0 if block else config.num_buckets
        return GatedAttention(self.dim, config.num_attention_heads, buckets, config.max_bucket_distance)
