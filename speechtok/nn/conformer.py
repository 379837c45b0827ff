"""Conformer block of w2v-BERT 2.0: Shaw positions in the keys, causal convolution, LayerNorm inside it.

Parameter names are those of transformers' ``Wav2Vec2BertEncoderLayer``. Inference only: no dropout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CausalConvModule", "ConformerBlock", "FeedForward", "RelativeKeyAttention"]

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
    """

    def __init__(self, dim: int, heads: int, left: int, right: int) -> None:
        super().__init__()
        self.heads, self.left, self.right = heads, left, right
        self.linear_q = nn.Linear(dim, dim)
        self.linear_k = nn.Linear(dim, dim)
        self.linear_v = nn.Linear(dim, dim)
        self.linear_out = nn.Linear(dim, dim)
        self.distance_embedding = nn.Embedding(left + 1 + right, dim // heads)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attend.

        Parameters
        ----------
        x : float [B, T, dim]
            Frames.
        valid : bool [B, T], optional
            Keys that may be attended to; all where it is None. A row without any valid key gives finite values.

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
            if valid is not None:
                # Half the lowest number: with a score added it stays finite in half precision too.
                bias = bias.masked_fill(~valid[:, None, None], torch.finfo(bias.dtype).min / 2)
            mixed = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=bias)
            outputs.append(mixed.transpose(1, 2).flatten(2))
        return self.linear_out(torch.cat(outputs, dim=1))


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


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, each around a residual; then a layer norm.

    Gulati et al. 2020 (arXiv:2005.08100) as in w2v-BERT 2.0.

    Parameters
    ----------
    dim, heads, inner, kernel, left, right, eps
        See `RelativeKeyAttention`, `FeedForward` and `CausalConvModule`.
    """

    def __init__(
        self, dim: int, heads: int, inner: int, kernel: int, left: int = 64, right: int = 8, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.ffn1_layer_norm = nn.LayerNorm(dim, eps=eps)
        self.ffn1 = FeedForward(dim, inner)
        self.self_attn_layer_norm = nn.LayerNorm(dim, eps=eps)
        self.self_attn = RelativeKeyAttention(dim, heads, left, right)
        self.conv_module = CausalConvModule(dim, kernel, eps)
        self.ffn2_layer_norm = nn.LayerNorm(dim, eps=eps)
        self.ffn2 = FeedForward(dim, inner)
        self.final_layer_norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Transform rows: float [B, T, dim], bool [B, T] (all valid where None) -> float [B, T, dim].

        What comes out at invalid frames means nothing.
        """
        x = torch.add(x, self.ffn1(self.ffn1_layer_norm(x)), alpha=0.5)
        x = x + self.self_attn(self.self_attn_layer_norm(x), valid)
        x = x + self.conv_module(x, valid)
        x = torch.add(x, self.ffn2(self.ffn2_layer_norm(x)), alpha=0.5)
        return self.final_layer_norm(x)
