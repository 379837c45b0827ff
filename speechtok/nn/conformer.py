"""Conformer block of w2v-BERT 2.0: Shaw positions in the keys, causal convolution, LayerNorm inside it.

Parameter names are those of transformers' ``Wav2Vec2BertEncoderLayer``. With chunked attention a block can also go
through a stream step by step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BlockState",
    "CausalConvModule",
    "ChunkedAttention",
    "ConformerBlock",
    "FeedForward",
    "RelativeKeyAttention",
]

QUERY_BLOCK = 256  # queries per attention call: bounds the bias to [B, heads, 256, T]


class FeedForward(nn.Module):
    """Linear, swish, linear.

    Parameters
    ----------
    dim : int
        Size of a frame.
    inner : int
        Size of the hidden layer.
    """

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(dim, inner)
        self.output_dense = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform frames: float [..., dim] -> float [..., dim]."""
        return self.output_dense(F.silu(self.intermediate_dense(x)))


class RelativeKeyAttention(nn.Module):
    """Self-attention with relative positions added to the keys (Shaw et al. 2018, arXiv:1803.02155).

    ``score[i, j] = q_i . (k_j + e[clip(j - i, -left, right) + left]) / sqrt(head_dim)``; all heads share ``e``, the
    values carry no position. ``q . e`` is taken once per distinct distance ([.., T, left + 1 + right]) and then
    spread over the keys, instead of building the embeddings of all pairs ([T, T, head_dim]).

    Parameters
    ----------
    dim, heads : int
        Size of a frame, number of heads.
    left, right : int
        Distances (frames) beyond which all keys share one embedding.

    Attributes
    ----------
    observer : callable or None
        Called with the attention probabilities, float [..., queries, keys], of every forward pass: for diagnostics.
    """

    def __init__(self, dim: int, heads: int, left: int, right: int) -> None:
        super().__init__()
        self.heads, self.left, self.right = heads, left, right
        self.linear_q = nn.Linear(dim, dim)
        self.linear_k = nn.Linear(dim, dim)
        self.linear_v = nn.Linear(dim, dim)
        self.linear_out = nn.Linear(dim, dim)
        self.distance_embedding = nn.Embedding(left + 1 + right, dim // heads)
        self.observer: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor, valid: Tensor | None = None, key_bias: Tensor | None = None) -> Tensor:
        """Attend.

        Parameters
        ----------
        x : float [B, T, dim]
            Frames.
        valid : bool [B, T], optional
            Keys that may be attended to; all where it is None. A row without any valid key gives finite values.
        key_bias : float [B, T], optional
            Added to all scores of a key.

        Returns
        -------
        float [B, T, dim]
        """
        heads = (self.heads, x.shape[-1] // self.heads)
        q, k, v = (f(x).unflatten(-1, heads).transpose(1, 2) for f in (self.linear_q, self.linear_k, self.linear_v))
        by_distance = (q * heads[1] ** -0.5) @ self.distance_embedding.weight.T  # [B, H, T, left + 1 + right]
        at = torch.arange(x.shape[1], device=x.device)
        outputs = []
        for start in range(0, x.shape[1], QUERY_BLOCK):
            rows = slice(start, start + QUERY_BLOCK)
            slot = (at - at[rows, None]).clamp(-self.left, self.right) + self.left
            bias = by_distance[:, :, rows].gather(3, slot.expand(*q.shape[:2], -1, -1))
            if key_bias is not None:
                bias = bias + key_bias[:, None, None]
            if valid is not None:
                # Half the lowest number: with a score added it stays finite in half precision too.
                bias = bias.masked_fill(~valid[:, None, None], torch.finfo(bias.dtype).min / 2)
            if self.observer is not None:
                self.observer(torch.softmax((q[:, :, rows] @ k.mT) * heads[1] ** -0.5 + bias, -1))
            mixed = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=bias.to(q.dtype))
            outputs.append(mixed.transpose(1, 2).flatten(2))
        return self.linear_out(torch.cat(outputs, dim=1))


class ChunkedAttention(RelativeKeyAttention):
    """Attention inside chunks: a frame sees its own chunk and a fixed number of frames before it.

    The row is cut into chunks from its start; training, offline inference and streams share this one mask. All
    distances that occur have an embedding of their own.

    Parameters
    ----------
    dim, heads : int
        Size of a frame, number of heads.
    chunk : int
        Frames of a chunk, at least 2.
    past : int
        Frames before the chunk that its frames see, a multiple of `chunk`.
    """

    def __init__(self, dim: int, heads: int, chunk: int, past: int) -> None:
        super().__init__(dim, heads, left=past + chunk - 1, right=chunk - 1)
        self.chunk, self.past = chunk, past

    def forward(self, x: Tensor, valid: Tensor | None = None, key_bias: Tensor | None = None) -> Tensor:
        """Attend within whole rows; parameters and result as `RelativeKeyAttention.forward`."""
        batch, frames = x.shape[:2]
        behind = -frames % self.chunk
        q = F.pad(self._split(self.linear_q(x)), (0, 0, 0, 0, 0, behind)).unflatten(1, (-1, self.chunk))
        k, v = (self._reach(F.pad(self._split(f(x)), (0, 0, 0, 0, 0, behind))) for f in (self.linear_k, self.linear_v))
        seen = torch.ones(1, frames, dtype=torch.bool, device=x.device) if valid is None else valid
        mask = self._reach(F.pad(seen, (0, behind)))[:, :, None, None]
        if key_bias is not None:
            key_bias = self._reach(F.pad(key_bias, (0, behind)))[:, :, None, None]
        k, v = k.permute(0, 1, 3, 4, 2), v.permute(0, 1, 3, 4, 2)  # [B, n, H, head_dim, past + chunk]
        mixed = self._attend(q.transpose(2, 3), k, v, mask, key_bias)  # [B, n, H, chunk, head_dim]
        return self.linear_out(mixed.transpose(2, 3).reshape(batch, frames + behind, -1)[:, :frames])

    def step(
        self, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from the next chunk of every row.

        Parameters
        ----------
        x : float [B, chunk, dim]
            Next frames, filled up behind the end of a sound.
        keys, values : float [B, past, H, head_dim]
            State that the last call returned; zeros at the start.
        seen : int64 [B]
            Frames before this chunk.
        valid : bool [B, chunk]
            Frames that belong to the sound.

        Returns
        -------
        y : float [B, chunk, dim]
        keys, values : float [B, past, H, head_dim]
        """
        k = torch.cat([keys, self._split(self.linear_k(x))], dim=1)
        v = torch.cat([values, self._split(self.linear_v(x))], dim=1)
        kept = torch.arange(self.past, device=x.device) >= self.past - seen[:, None]
        mask = torch.cat([kept, valid], dim=1)[:, None, None]
        mixed = self._attend(
            self._split(self.linear_q(x)).transpose(1, 2), k.permute(0, 2, 3, 1), v.permute(0, 2, 3, 1), mask, None
        )
        return self.linear_out(mixed.transpose(1, 2).flatten(2)), k[:, self.chunk :], v[:, self.chunk :]

    def _reach(self, x: Tensor) -> Tensor:
        """What each chunk sees: [B, n * chunk, ...] -> [B, n, past + chunk, ...], zeros before the start."""
        before = self.past // self.chunk
        pieces = x.unflatten(1, (-1, self.chunk))
        count = pieces.shape[1]
        pieces = torch.cat([pieces.new_zeros(x.shape[0], before, *pieces.shape[2:]), pieces], dim=1)
        return torch.cat([pieces[:, i : i + count] for i in range(before + 1)], dim=2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, key_bias: Tensor | None) -> Tensor:
        """Mix values: q [..., chunk, head_dim], k and v [..., head_dim, past + chunk] -> [..., chunk, head_dim]."""
        q = q * q.shape[-1] ** -0.5
        by_distance = q @ self.distance_embedding.weight.T.to(q.dtype)  # [..., chunk, left + 1 + right]
        # Row i needs the distances from -past - i on: in the flattened matrix they lie one place earlier per row.
        width = self.left + self.right
        skewed = by_distance.flatten(-2)[..., self.chunk - 1 : -1].unflatten(-1, (self.chunk, width))
        scores = q @ k + skewed[..., : self.past + self.chunk]
        if key_bias is not None:
            scores = scores + key_bias
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)
        weights = torch.softmax(scores, -1)
        if self.observer is not None:
            self.observer(weights)
        return weights.to(v.dtype) @ v.mT


class CausalConvModule(nn.Module):
    """Gated pointwise, causal depthwise, pointwise convolution.

    Parameters
    ----------
    dim : int
        Size of a frame.
    kernel : int
        Frames the depthwise convolution reads: the current one and ``kernel - 1`` before it.
    eps : float
        Of the layer norms.
    """

    def __init__(self, dim: int, kernel: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim, eps=eps)
        self.pointwise_conv1 = nn.Conv1d(dim, 2 * dim, 1, bias=False)
        self.depthwise_conv = nn.Conv1d(dim, dim, kernel, groups=dim, bias=False)
        self.depthwise_layer_norm = nn.LayerNorm(dim, eps=eps)
        self.pointwise_conv2 = nn.Conv1d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Convolve whole rows: float [B, T, dim], bool [B, T] (all valid where None) -> float [B, T, dim]."""
        return self.step(x, None, valid)[0]

    def step(self, x: Tensor, past: Tensor | None, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Continue a stream.

        Parameters
        ----------
        x : float [B, T, dim]
            Next frames.
        past : float [B, dim, kernel - 1] or None
            State that the last call returned; None at the start.
        valid : bool [B, T], optional
            Frames that count; the others act as zeros.

        Returns
        -------
        y : float [B, T, dim]
        past : float [B, dim, kernel - 1]
        """
        x = self.layer_norm(x)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0.0)
        # A convolution of width 1 is a linear map: no need to turn the axes for it.
        gated = F.glu(F.linear(x, self.pointwise_conv1.weight[..., 0])).transpose(1, 2)
        reach = self.depthwise_conv.kernel_size[0] - 1
        context = F.pad(gated, (reach, 0)) if past is None else torch.cat([past, gated], dim=-1)
        mixed = self.depthwise_conv(context).transpose(1, 2)
        y = F.linear(F.silu(self.depthwise_layer_norm(mixed)), self.pointwise_conv2.weight[..., 0])
        return y, context[..., context.shape[-1] - reach :]


@dataclass
class BlockState:
    """What one block remembers of a stream; row b belongs to stream b.

    Parameters
    ----------
    keys, values : float [B, past, H, head_dim]
        Of the attention, see `ChunkedAttention.step`.
    conv : float [B, dim, kernel - 1]
        Of the convolution, see `CausalConvModule.step`.
    """

    keys: Tensor
    values: Tensor
    conv: Tensor


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, each around a residual; then a layer norm.

    Gulati et al. 2020 (arXiv:2005.08100) as in w2v-BERT 2.0.

    Parameters
    ----------
    dim, heads, inner, kernel, left, right, eps
        See `RelativeKeyAttention`, `FeedForward` and `CausalConvModule`.
    chunk : int, optional
        Use `ChunkedAttention` (`left` and `right` are not used then); None: attention to the whole row.
    past : int
        See `ChunkedAttention`.
    dropout : float
        Share of each residual branch that is dropped in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        inner: int,
        kernel: int,
        left: int = 64,
        right: int = 8,
        eps: float = 1e-5,
        *,
        chunk: int | None = None,
        past: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.ffn1_layer_norm = nn.LayerNorm(dim, eps=eps)
        self.ffn1 = FeedForward(dim, inner)
        self.self_attn_layer_norm = nn.LayerNorm(dim, eps=eps)
        self.self_attn = (
            RelativeKeyAttention(dim, heads, left, right)
            if chunk is None
            else ChunkedAttention(dim, heads, chunk, past)
        )
        self.conv_module = CausalConvModule(dim, kernel, eps)
        self.ffn2_layer_norm = nn.LayerNorm(dim, eps=eps)
        self.ffn2 = FeedForward(dim, inner)
        self.final_layer_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor | None = None, key_bias: Tensor | None = None) -> Tensor:
        """Transform rows: float [B, T, dim], bool [B, T] (all valid where None) -> float [B, T, dim].

        What comes out at invalid frames means nothing. `key_bias`: see `RelativeKeyAttention.forward`.
        """
        drop = self.dropout
        x = torch.add(x, drop(self.ffn1(self.ffn1_layer_norm(x))), alpha=0.5)
        x = x + drop(self.self_attn(self.self_attn_layer_norm(x), valid, key_bias))
        x = x + drop(self.conv_module(x, valid))
        x = torch.add(x, drop(self.ffn2(self.ffn2_layer_norm(x))), alpha=0.5)
        return self.final_layer_norm(x)

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        """Set the last map of every branch to 0: the block passes on its input, layer-normed."""
        for branch in (self.ffn1.output_dense, self.self_attn.linear_out, self.ffn2.output_dense):
            branch.weight.zero_()
            branch.bias.zero_()
        self.conv_module.pointwise_conv2.weight.zero_()

    def state(self, batch: int) -> BlockState:
        """State of `batch` streams before their first chunk (chunked attention only)."""
        attention = self._chunked()
        weight = attention.linear_k.weight
        keys = weight.new_zeros(batch, attention.past, attention.heads, weight.shape[0] // attention.heads)
        kernel = self.conv_module.depthwise_conv.kernel_size[0]
        return BlockState(keys, keys, weight.new_zeros(batch, weight.shape[0], kernel - 1))

    def step(self, x: Tensor, state: BlockState, seen: Tensor, valid: Tensor) -> tuple[Tensor, BlockState]:
        """Transform the next chunk of every stream: the frames that `forward` gives for the whole rows.

        Parameters
        ----------
        x : float [B, chunk, dim]
            Next frames, filled up behind the end of a sound.
        state : BlockState
            From `state` or the last call.
        seen : int64 [B]
            Frames before this chunk.
        valid : bool [B, chunk]
            Frames that belong to the sound.
        """
        x = torch.add(x, self.ffn1(self.ffn1_layer_norm(x)), alpha=0.5)
        y, keys, values = self._chunked().step(self.self_attn_layer_norm(x), state.keys, state.values, seen, valid)
        x = x + y
        y, conv = self.conv_module.step(x, state.conv, valid)
        x = x + y
        x = torch.add(x, self.ffn2(self.ffn2_layer_norm(x)), alpha=0.5)
        return self.final_layer_norm(x), BlockState(keys, values, conv)

    def _chunked(self) -> ChunkedAttention:
        if not isinstance(self.self_attn, ChunkedAttention):
            raise TypeError("a block that attends to the whole row cannot go step by step")
        return self.self_attn
