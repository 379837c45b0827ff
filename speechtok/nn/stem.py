"""Convolutional stem of the wav2vec 2.0 family: wave -> 512-dimensional frames -> transformer width.

Schneider et al. 2019 (arXiv 1904.05862), Baevski et al. 2020 (arXiv 2006.11477). Two kinds exist: group norm
after the first convolution only (one group per channel: statistics over the time of a file), and layer norm after
every convolution (statistics over the channels of a frame). Parameter names are those of Hugging Face checkpoints.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechtok.frames import FrameGrid

__all__ = ["ACTIVATIONS", "ConvStem", "FeatureProjection", "conv_grid"]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_gelu_tanh = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
"""Activations by the names that Hugging Face configurations use."""


def conv_grid(sample_rate: int, kernels: Sequence[int], strides: Sequence[int]) -> FrameGrid:
    """Frame grid of a stack of convolutions without padding.

    Parameters
    ----------
    sample_rate : int
        Rate of the wave (Hz).
    kernels, strides : sequence of int
        Of each convolution, first one first.

    Returns
    -------
    FrameGrid
        ``hop = prod(strides)``, ``receptive_field = 1 + sum_i (kernel_i - 1) * prod(strides[:i])``.
    """
    field = 1 + sum((kernel - 1) * prod(strides[:i]) for i, kernel in enumerate(kernels))
    return FrameGrid(sample_rate, prod(strides), field)


def masked_group_norm(x: Tensor, norm: nn.GroupNorm, counts: Sequence[int]) -> Tensor:
    """Group norm whose statistics see only a row's own frames.

    Parameters
    ----------
    x : float [B, C, T]
        Channels over time.
    norm : GroupNorm
        Its weight, bias, groups and eps are used.
    counts : sequence of int [B]
        Valid frames of each row, 0 ... T.

    Returns
    -------
    float [B, C, T]
        Zeros behind the end of each row.
    """

    def apply(rows: Tensor) -> Tensor:  # torch.group_norm also takes a single frame, which F.group_norm refuses
        return torch.group_norm(rows, norm.num_groups, norm.weight, norm.bias, norm.eps)

    if all(count == x.shape[2] for count in counts):
        return apply(x)
    # Row by row, the kernel sees exactly what it sees for a single file: no rounding differs.
    out = torch.zeros_like(x)
    for row, count in enumerate(counts):
        if count > 0:
            out[row, :, :count] = apply(x[row : row + 1, :, :count])[0]
    return out


class ConvLayer(nn.Module):
    """Convolution, norm (group, layer or none) and activation: [B, C, N] -> [B, C', N']."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        *,
        bias: bool,
        norm: str | None,
        activation: str,
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, bias=bias)
        self.layer_norm: nn.GroupNorm | nn.LayerNorm | None = None
        if norm == "group":
            self.layer_norm = nn.GroupNorm(outputs, outputs)
        elif norm == "layer":
            self.layer_norm = nn.LayerNorm(outputs)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Apply to x [B, C, N], whose rows have `counts` valid frames; give the result and its counts."""
        x, counts = self.conv(x), [max(0, (count - self.kernel) // self.stride + 1) for count in counts]
        if isinstance(self.layer_norm, nn.GroupNorm):
            x = masked_group_norm(x, self.layer_norm, counts)
        elif self.layer_norm is not None:
            x = self.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        return self.activation(x), counts


class ConvStem(nn.Module):
    """The stack of convolutions without padding.

    Parameters
    ----------
    dims, kernels, strides : sequence of int
        Channels, kernel and stride of each convolution.
    norm : {"group", "layer"}
        Masked group norm after the first convolution, or layer norm after each.
    activation : str
        A key of `ACTIVATIONS`.
    bias : bool
        Whether the convolutions have a bias.
    """

    def __init__(
        self,
        dims: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        *,
        norm: str,
        activation: str,
        bias: bool,
    ) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(
            ConvLayer(
                dims[i - 1] if i else 1,
                dims[i],
                kernels[i],
                strides[i],
                bias=bias,
                norm=norm if norm == "layer" or i == 0 else None,
                activation=activation,
            )
            for i in range(len(dims))
        )

    def forward(self, wave: Tensor, lengths: Sequence[int]) -> Tensor:
        """Compute frames.

        Parameters
        ----------
        wave : float [B, N]
            Waves, zero behind the end of each row; N gives at least one frame.
        lengths : sequence of int [B]
            Valid samples of each row.

        Returns
        -------
        float [B, T, C]
            Frames. Those that read samples behind the end of their row hold nothing of use.
        """
        x, counts = wave[:, None], list(lengths)
        for layer in self.conv_layers:
            x, counts = layer(x, counts)
        return x.transpose(1, 2)


class FeatureProjection(nn.Module):
    """Optional layer norm, then a linear map from the stem's channels to the transformer's width."""

    def __init__(self, inputs: int, outputs: int, *, norm: bool, eps: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(inputs, eps=eps) if norm else None
        self.projection = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, C] to [B, T, D]."""
        return self.projection(x if self.layer_norm is None else self.layer_norm(x))
