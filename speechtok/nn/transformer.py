"""Transformer encoder of the wav2vec 2.0 family: positional convolution, then post-LN or pre-LN blocks.

Vaswani et al. 2017 (arXiv 1706.03762), Baevski et al. 2020 (arXiv 2006.11477), Xiong et al. 2020 for pre-LN
(arXiv 2002.04745; "stable layer norm" in Hugging Face configurations). Inference only: dropout, LayerDrop and
SpecAugment do not exist here. Parameter names are those of Hugging Face checkpoints.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechtok.nn.stem import ACTIVATIONS

__all__ = ["Block", "FeedForward", "PositionalConv", "SelfAttention", "Transformer"]


class PositionalConv(nn.Module):
    """Grouped convolution over time that stands in for position embeddings.

    The weight norm of the checkpoints (over all but the kernel axis) is folded into a plain weight when they are
    loaded. Batch norm in front of the convolution (`batch_norm`) always uses its stored statistics.

    Parameters
    ----------
    width : int
        Size D of a frame.
    kernel, groups : int
        Of the convolution. The output has as many frames as the input: an even kernel reads ``kernel // 2`` frames
        before and ``kernel // 2 - 1`` frames after.
    activation : str
        A key of `ACTIVATIONS`.
    batch_norm : bool
        Whether there is a batch norm (and no weight norm).
    """

    def __init__(self, width: int, kernel: int, groups: int, *, activation: str, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        self.batch_norm = nn.BatchNorm1d(width) if batch_norm else None
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Position term for x [B, T, D]; frames where `valid` bool [B, T] is False count as zeros."""
        frames = x.shape[1]
        x = x.transpose(1, 2)
        norm = self.batch_norm
        if norm is not None:
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, eps=norm.eps)
        if valid is not None:
            # After the batch norm: a single file is padded with zeros there, not with the norm's image of zero.
            x = torch.where(valid[:, None], x, 0.0)
        return self.activation(self.conv(x)[..., :frames]).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head attention without position term.

    Parameters
    ----------
    width : int
        Size D of a frame.
    heads : int
        A divisor of `width`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def bias(self, x: Tensor, keys: Tensor | None, position: Tensor | None) -> Tensor | None:
        """Give what is put on the scores: a bool mask of the valid keys, or a float term to be added.

        Parameters
        ----------
        x : float [B, T, D]
            Input of the attention.
        keys : bool [B, 1, 1, T] or None
            Valid keys; None where all are.
        position : float [H, T, T] or None
            Position term of the whole model, unused here.
        """
        return keys

    def forward(self, x: Tensor, keys: Tensor | None, position: Tensor | None) -> Tensor:
        """Attend within x [B, T, D]; see `bias` for the other arguments."""
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D/H]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(query, key, value, self.bias(x, keys, position))
        return self.out_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(width, inner)
        self.activation = ACTIVATIONS[activation]
        self.output_dense = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to the same shape."""
        return self.output_dense(self.activation(self.intermediate_dense(x)))


class Block(nn.Module):
    """Attention and feed-forward part, each with a residual; layer norms after (post-LN) or before them (pre-LN)."""

    def __init__(
        self, attention: SelfAttention, width: int, inner: int, *, activation: str, eps: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = attention
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = FeedForward(width, inner, activation)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, keys: Tensor | None, position: Tensor | None) -> Tensor:
        """Map x [B, T, D] to the same shape; `keys` and `position` as in `SelfAttention.bias`."""
        if self.pre_norm:
            x = x + self.attention(self.layer_norm(x), keys, position)
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.layer_norm(x + self.attention(x, keys, position))
        return self.final_layer_norm(x + self.feed_forward(x))


class Transformer(nn.Module):
    """Positional convolution and the first `num_blocks` blocks of a model.

    Parameters
    ----------
    attention : callable
        Makes the attention of block ``i``: ``attention(i)``.
    width, inner : int
        Sizes of a frame and of the feed-forward part.
    num_blocks : int
        Blocks that are built.
    complete : bool
        Whether these are all blocks of the model. A pre-LN model has one layer norm after its last block; a
        shortened one ends without it and has no such parameters.
    position : PositionalConv
        Position term.
    activation : str
        A key of `ACTIVATIONS`.
    eps : float
        Of the layer norms.
    pre_norm : bool
        Pre-LN instead of post-LN.
    """

    def __init__(
        self,
        attention: Callable[[int], SelfAttention],
        width: int,
        inner: int,
        num_blocks: int,
        *,
        complete: bool,
        position: PositionalConv,
        activation: str,
        eps: float,
        pre_norm: bool,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.pos_conv_embed = position
        self.layer_norm = nn.LayerNorm(width, eps=eps) if complete or not pre_norm else None
        self.layers = nn.ModuleList(
            Block(attention(i), width, inner, activation=activation, eps=eps, pre_norm=pre_norm)
            for i in range(num_blocks)
        )

    def position(self, frames: int) -> Tensor | None:
        """Term [H, T, T] that all blocks share, for T frames; None where the attention has none."""
        return None

    def forward(self, x: Tensor, lengths: Tensor | None) -> Iterator[Tensor]:
        """Give the hidden states one after another.

        Parameters
        ----------
        x : float [B, T, D]
            Projected frames of the stem.
        lengths : int64 [B] or None
            Valid frames of each row; None where all are.

        Yields
        ------
        float [B, T, D]
            The input of the first block, then the output of each block; of a complete pre-LN model the last one is
            after the final layer norm. Frames behind the end of a row hold nothing of use, but are finite.
        """
        valid = keys = None
        if lengths is not None:
            index = torch.arange(x.shape[1], device=x.device)
            valid = index < lengths[:, None]
            # A row without frames attends to its first one: a softmax over nothing is NaN in some kernels.
            keys = (index < lengths.clamp_min(1)[:, None])[:, None, None]
        x = x + self.pos_conv_embed(x, valid)
        if self.layer_norm is not None and not self.pre_norm:
            x = self.layer_norm(x)
        yield x
        position = self.position(x.shape[1]) if len(self.layers) else None
        for i, block in enumerate(self.layers):
            x = block(x, keys, position)
            if self.pre_norm and self.layer_norm is not None and i == len(self.layers) - 1:
                x = self.layer_norm(x)
            yield x
