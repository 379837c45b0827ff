"""ConvNeXt blocks over time (Liu et al. 2022, arXiv 2201.03545) as in Vocos (Siuzdak 2023, arXiv 2306.00814).

One frame in, one frame out: nothing is sampled up. Batches of sounds of different lengths and pieces of streams go
through `speechtok.nn.edges.Edges`. Without a condition parameter names are those of the published backbone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.nn.edges import Edges

__all__ = ["ConvNext", "FrameConv", "Norm", "begin_small"]

_EPS = 1e-6


def begin_small(layer: nn.Linear | nn.Conv1d) -> None:
    """Draw first weights as published: a truncated normal distribution of deviation 0.02, no bias."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class FrameConv(nn.Conv1d):
    """Convolution that gives as many frames as it takes: [B, C, T] -> [B, C', T], zeros around each sound.

    Parameters
    ----------
    inputs, outputs, kernel, groups : int
        Of the convolution; the kernel is odd.
    causal : bool
        Pad on the left only.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, causal: bool, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, groups=groups)
        self.right = 0 if causal else kernel // 2
        self.left = kernel - 1 - self.right

    def forward(self, x: Tensor, edges: Edges | None = None) -> Tensor:
        """Convolve x [B, C, T]; without `edges` all rows are whole sounds of T frames."""
        if edges is None:
            x = F.pad(x, (self.left, self.right))
        else:
            x = edges.around(x, self.left, self.right, 1, "constant")
        return super().forward(x)

    def past(self, batch: int) -> list[Tensor]:
        """What it remembers before a stream's first frames."""
        return [self.weight.new_zeros(batch, self.in_channels, self.left)]


class Norm(nn.LayerNorm):
    """Layer norm; with a condition, its scale and shift are linear in it (adaptive layer norm).

    It begins as the plain norm, whatever the condition.

    Parameters
    ----------
    dim : int
        Size of a frame.
    condition : int
        Size of the condition; 0: none.
    """

    def __init__(self, dim: int, condition: int = 0) -> None:
        super().__init__(dim, eps=_EPS, elementwise_affine=not condition)
        self.affine = nn.Linear(condition, 2 * dim) if condition else None
        if self.affine is not None:
            nn.init.zeros_(self.affine.weight)
            with torch.no_grad():
                self.affine.bias.copy_(torch.cat([torch.ones(dim), torch.zeros(dim)]))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Norm x [B, T, D]; `condition` is float [B, C], or None where there is none."""
        x = super().forward(x)
        if self.affine is None or condition is None:
            return x
        scale, shift = self.affine(condition)[:, None].chunk(2, -1)
        return torch.addcmul(shift, x, scale)


class Block(nn.Module):
    """Depthwise convolution, norm, two linear maps with GELU between them, layer scale; a residual around all."""

    def __init__(self, dim: int, inner: int, kernel: int, *, causal: bool, condition: int, scale: float) -> None:
        super().__init__()
        self.dwconv = FrameConv(dim, dim, kernel, causal=causal, groups=dim)
        self.norm = Norm(dim, condition)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))
        for layer in (self.dwconv, self.pwconv1, self.pwconv2):
            begin_small(layer)

    def forward(self, x: Tensor, condition: Tensor | None, edges: Edges | None) -> Tensor:
        """Map x [B, T, D] to the same shape."""
        y = self.norm(self.dwconv(x.transpose(1, 2), edges).transpose(1, 2), condition)
        return torch.addcmul(x, self.pwconv2(F.gelu(self.pwconv1(y))), self.gamma)


class ConvNext(nn.Module):
    """First convolution, norm, blocks, norm: float [B, T, inputs] -> float [B, T, dim].

    Parameters
    ----------
    inputs, dim, inner : int
        Sizes of an input frame, of a frame and of what is between the linear maps of a block.
    blocks : int
        Layer scales begin as 1 / blocks.
    kernel : int
        Frames of every convolution, odd.
    causal : bool
        Whether frames depend on earlier ones only: on ``(kernel - 1) * (blocks + 1)`` of them.
    condition : int
        Size of what the norms depend on; 0: nothing.
    """

    def __init__(
        self, inputs: int, dim: int, inner: int, blocks: int, *, kernel: int = 7, causal: bool = False,
        condition: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = FrameConv(inputs, dim, kernel, causal=causal)
        self.norm = Norm(dim, condition)
        self.convnext = nn.ModuleList(
            Block(dim, inner, kernel, causal=causal, condition=condition, scale=1 / blocks) for _ in range(blocks)
        )
        self.final_layer_norm = Norm(dim)
        begin_small(self.embed)

    def forward(self, x: Tensor, condition: Tensor | None = None, edges: Edges | None = None) -> Tensor:
        """Transform frames [B, T, inputs]; `condition` is float [B, C]. Without `edges` rows are whole sounds."""
        x = self.norm(self.embed(x.transpose(1, 2), edges).transpose(1, 2), condition)
        for block in self.convnext:
            x = block(x, condition, edges)
        return self.final_layer_norm(x)

    def past(self, batch: int) -> list[Tensor]:
        """What it remembers before a stream's first frames, in the order in which `forward` goes."""
        convs = [module for module in self.modules() if isinstance(module, FrameConv)]
        return [memory for conv in convs for memory in conv.past(batch)]
