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

_PIECE = 100  # frames

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


def norm_over_time(wave: Tensor, counts: Tensor, conv: nn.Conv1d, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift that a per-channel group norm amounts to, with statistics over a row's own frames.

    The convolution is linear in the samples it reads, so mean and variance of its channels over time follow from mean
    and covariance of the samples of a frame (10 x 10, float64). They need no pass over the output, and frames behind
    the end of a row take no part.

    Parameters
    ----------
    wave : float [B, N]
        Input of the convolution (one channel).
    counts : int64 [B]
        Valid frames of each row.
    conv : Conv1d
        From one channel to C.
    norm : GroupNorm
        One group per channel; its weight, bias and eps are used.

    Returns
    -------
    scale, shift : float32 [B, C, 1]
        ``group_norm(conv(wave)) = conv(wave) * scale + shift``.
    """
    frames = wave.unfold(1, conv.kernel_size[0], conv.stride[0]).double()  # [B, T, k]
    valid = (torch.arange(frames.shape[1], device=wave.device) < counts[:, None])[..., None]
    count = counts.clamp_min(1)[:, None, None]
    mean = (frames * valid).sum(1, keepdim=True) / count  # [B, 1, k]
    centred = (frames - mean) * valid
    covariance = centred.transpose(1, 2) @ centred / count  # [B, k, k]
    weight = conv.weight[:, 0].double()  # [C, k]
    variance = ((weight @ covariance) * weight).sum(-1)  # [B, C]
    centre = (mean @ weight.T)[:, 0] + (0.0 if conv.bias is None else conv.bias.double())
    scale = norm.weight.double() * (variance + norm.eps).rsqrt()
    shift = norm.bias.double() - centre * scale
    return scale.float()[..., None], shift.float()[..., None]


class ConvLayer(nn.Module):
    """Convolution, norm (group, layer or none) and activation: [B, C, N] -> [B, C', N']."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, *, bias: bool, norm: str | None, activation: str
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, bias=bias)
        self.layer_norm: nn.GroupNorm | nn.LayerNorm | None = None
        if norm == "group":
            self.layer_norm = nn.GroupNorm(outputs, outputs)
        elif norm == "layer":
            self.layer_norm = nn.LayerNorm(outputs)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, affine: tuple[Tensor, Tensor] | None) -> Tensor:
        """Apply to x [B, C, N]; `affine` are the scale and shift that stand for a group norm (`norm_over_time`)."""
        x = self.conv(x)
        if isinstance(self.layer_norm, nn.LayerNorm):
            x = self.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        elif affine is not None:
            x = torch.addcmul(affine[1], x, affine[0])
        return self.activation(x)


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
        self.grid = conv_grid(1, kernels, strides)
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

    def forward(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Compute frames.

        Parameters
        ----------
        wave : float [B, N]
            Waves, zero behind the end of each row; N gives at least one frame.
        lengths : int64 [B]
            Valid samples of each row.

        Returns
        -------
        float [B, T, C]
            Frames. Those that read samples behind the end of their row hold nothing of use.
        """
        first, affine = self.conv_layers[0], None
        if isinstance(first, ConvLayer) and isinstance(first.layer_norm, nn.GroupNorm):
            kernel, stride = first.conv.kernel_size[0], first.conv.stride[0]
            counts = ((lengths - kernel).div(stride, rounding_mode="floor") + 1).clamp_min(0)
            affine = norm_over_time(wave, counts, first.conv, first.layer_norm)
        frames = self.grid.num_frames(wave.shape[1])
        # Two seconds at a time stay near the processor: 1.5 times as fast as whole files. GPUs take all at once.
        piece = _PIECE if wave.device.type == "cpu" else frames
        pieces = []
        for begin in range(0, frames, piece):
            count = min(piece, frames - begin)
            x = wave[:, None, begin * self.grid.hop :][:, :, : self.grid.num_samples(count)]
            for index, layer in enumerate(self.conv_layers):
                x = layer(x, affine if index == 0 else None)
            pieces.append(x)
        return torch.cat(pieces, 2).transpose(1, 2)


class FeatureProjection(nn.Module):
    """Optional layer norm, then a linear map from the stem's channels to the transformer's width."""

    def __init__(self, inputs: int, outputs: int, *, norm: bool, eps: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(inputs, eps=eps) if norm else None
        self.projection = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, C] to [B, T, D]."""
        return self.projection(x if self.layer_norm is None else self.layer_norm(x))
