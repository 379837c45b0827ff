"""Transformer encoder of the wav2vec 2.0 family: positional convolution, then post-LN or pre-LN blocks.

Vaswani et al. 2017 (arXiv 1706.03762), Baevski et al. 2020 (arXiv 2006.11477), Xiong et al. 2020 for pre-LN
(arXiv 2002.04745; "stable layer norm" in Hugging Face configurations). Parameter names are those of Hugging Face
checkpoints. What training needs besides is off unless an objective switches it on: dropout, skipped blocks and
attention relaxation.
"""

import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechtok.nn.stem import ACTIVATIONS

__all__ = ["Block", "FeedForward", "PositionalConv", "SelfAttention", "Transformer", "attention_weights"]


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


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None, relaxation: float = 1.0) -> Tensor:
    """Softmax of scaled dot products, with scores that are kept small.

    Attention relaxation (WavLM, Chen et al. 2021, arXiv 2110.13900; MERT's `attention_relax`): with a constant c,
    ``softmax(s) = softmax((s / c - max(s / c)) * c)``, an identity in real arithmetic. Dividing the *query* by c keeps
    the product with the keys small, so that large scores do not overflow where they are formed in float16; dividing
    finished scores, as MERT's code does, comes too late.

    Parameters
    ----------
    query, key : float [B, H, T, D], [B, H, S, D]
    bias : bool or float, broadcast to [B, H, T, S], or None
        Which keys are valid, or a term to be added; every query has at least one key.
    relaxation : float
        c, at least 1.

    Returns
    -------
    float32 [B, H, T, S]
        Rows sum to 1; float64 for float64 input.
    """
    scores = (query * (query.shape[-1] ** -0.5 / relaxation)) @ key.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias / relaxation
    return torch.softmax((scores - scores.detach().amax(-1, keepdim=True)) * relaxation, -1)


class SelfAttention(nn.Module):
    """Multi-head attention without position term.

    Parameters
    ----------
    width : int
        Size D of a frame.
    heads : int
        A divisor of `width`.

    Attributes
    ----------
    relaxation : float
        See `attention_weights`; 1: off. With it, scores are formed step by step instead of in a fused kernel, which
        takes more time and memory. Fused kernels keep their scores in float32 and have no need of it.
    dropout : float
        Share of the weights that are dropped in training.
    observer : callable or None
        Called with the attention probabilities, float [B, H, T, T], of every forward pass: for diagnostics.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relaxation, self.dropout = 1.0, 0.0
        self.observer: Callable[[Tensor], None] | None = None
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
        bias, dropout = self.bias(x, keys, position), self.dropout if self.training else 0.0
        if self.observer is not None:
            self.observer(attention_weights(query, key, bias, self.relaxation))
        if self.relaxation == 1.0:
            out = F.scaled_dot_product_attention(query, key, value, bias, dropout)
        else:
            weights = attention_weights(query, key, bias, self.relaxation)
            out = F.dropout(weights, dropout, self.training).to(value.dtype) @ value
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
    """Attention and feed-forward part, each with a residual; layer norms after (post-LN) or before them (pre-LN).

    Attributes
    ----------
    dropout : Dropout
        Of what both parts add, in training.
    """

    def __init__(
        self, attention: SelfAttention, width: int, inner: int, *, activation: str, eps: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = attention
        self.layer_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = FeedForward(width, inner, activation)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(0.0)

    def set_dropout(self, p: float) -> None:
        """Set the dropout of attention weights and of what both parts add."""
        self.dropout.p = self.attention.dropout = p

    def begin_as_identity(self) -> None:
        """Set the last maps of both parts to zero: a pre-LN block begins as the identity, a post-LN one as its norms.

        The maps learn from the first step on, since their inputs are not zero.
        """
        for last in (self.attention.out_proj, self.feed_forward.output_dense):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, keys: Tensor | None, position: Tensor | None) -> Tensor:
        """Map x [B, T, D] to the same shape; `keys` and `position` as in `SelfAttention.bias`."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.layer_norm(x), keys, position))
            return x + self.dropout(self.feed_forward(self.final_layer_norm(x)))
        x = self.layer_norm(x + self.dropout(self.attention(x, keys, position)))
        return self.final_layer_norm(x + self.dropout(self.feed_forward(x)))


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

    Attributes
    ----------
    dropout : Dropout
        Of the input of the first block, in training.
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
        self.dropout = nn.Dropout(0.0)

    @property
    def blocks(self) -> list[Block]:
        """The blocks, the lowest first."""
        return cast(list[Block], list(self.layers))

    def position(self, frames: int) -> Tensor | None:
        """Term [H, T, T] that all blocks share, for T frames; None where the attention has none."""
        return None

    def forward(self, x: Tensor, lengths: Tensor | None, skip: Tensor | None = None) -> Iterator[Tensor]:
        """Give the hidden states one after another.

        Parameters
        ----------
        x : float [B, T, D]
            Projected frames of the stem.
        lengths : int64 [B] or None
            Valid frames of each row; None where all are.
        skip : bool [B, L], optional
            Blocks that are passed over, for each row (LayerDrop, Fan et al. 2019, arXiv 1909.11556, drawn by row: all
            weights get a gradient in every step, as training in several processes needs it).

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
        x = self.dropout(x)
        yield x
        position = self.position(x.shape[1]) if len(self.layers) else None
        for i, block in enumerate(self.layers):
            out = block(x, keys, position)
            x = out if skip is None else torch.where(skip[:, i, None, None], x.to(out.dtype), out)
            if self.pre_norm and self.layer_norm is not None and i == len(self.layers) - 1:
                x = self.layer_norm(x)
            yield x
