"""A small decoder that guesses hidden frames from visible ones by cross-attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.nn.conformer import FeedForward

__all__ = ["CrossBlock", "HiddenFrameDecoder", "sinusoids"]

_LONGEST = 10_000.0  # wavelength (frames, over 2 pi) of the slowest sinusoid


def sinusoids(frames: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Positions of Vaswani et al. 2017 (arXiv:1706.03762, section 3.5), sines first: float32 [frames, dim].

    Needs no table of a fixed length, so crops may be of any.
    """
    rates = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(_LONGEST) / dim))
    angles = torch.arange(frames, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :dim]


class CrossBlock(nn.Module):
    """Cross-attention and feed-forward module, each behind a layer norm and around a residual.

    Queries do not see each other.

    Parameters
    ----------
    dim, heads : int
        Size of a frame, number of heads; `heads` divides `dim`.
    inner : int
        Inner size of the feed-forward module.
    """

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.inner_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear_q, self.linear_k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.linear_v, self.linear_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.inner = FeedForward(dim, inner)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """Let queries read.

        Parameters
        ----------
        x : float [B, M, dim]
            Queries.
        keys, values : float [B, T, dim]
        visible : bool [B, T]
            Keys that may be read; a row without any gives finite values that mean nothing.

        Returns
        -------
        float [B, M, dim]
        """
        q, k, v = (
            linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, y in ((self.linear_q, self.attention_norm(x)), (self.linear_k, keys), (self.linear_v, values))
        )
        # Half the lowest number: with a score added it stays finite in half precision too.
        bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, torch.finfo(q.dtype).min / 2)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None])
        x = x + self.linear_out(read.transpose(1, 2).flatten(2))
        return x + self.inner(self.inner_norm(x))


class HiddenFrameDecoder(nn.Module):
    """Scores of classes at hidden frames; each is asked for by one mask token and its position.

    Positions are added to queries and keys, so that the decoder knows which visible frames are near; values are the
    visible frames alone.

    Parameters
    ----------
    source : int
        Size of the visible frames.
    dim, heads, blocks : int
        Of the decoder.
    classes : int
        Scores per hidden frame.
    """

    def __init__(self, source: int, dim: int, heads: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.project = nn.Linear(source, dim)
        self.mask_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, 4 * dim) for _ in range(blocks))
        self.norm, self.predict = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, frames: Tensor, visible: Tensor, where: Tensor) -> Tensor:
        """Score hidden frames.

        Parameters
        ----------
        frames : float [B, T, source]
        visible : bool [B, T]
            Frames that may be read; what stands in the others has no influence.
        where : int64 [B, M]
            Places of the hidden frames.

        Returns
        -------
        float [B, M, classes]
        """
        values = self.project(frames)
        position = sinusoids(frames.shape[1], values.shape[-1], values.device)
        x = self.mask_token + position[where]
        for block in self.blocks:
            x = block(x, values + position, values, visible)
        return self.predict(self.norm(x))
