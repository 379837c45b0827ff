"""First weights with which a SEANet codec passes sound from its first step on.

With random weights the decoded sound has nothing to do with the given one for thousands of updates. Here the strided
convolutions begin as cosine transforms of the samples of one frame, stage after stage, the transposed ones as their
inverses, and residual units as the identity. Sound is scaled down so far that the activations are nearly linear. A
frame then holds the lowest of its hop's cosine coefficients, and the decoder gives them back.
"""

import torch
from torch import Tensor, nn

from speechtok.nn.seanet import Conv, ConvTranspose, ResidualUnit, SeanetDecoder, SeanetEncoder

__all__ = ["begin_as_cosine_transform"]

_GAIN = 0.36  # of random weights, relative to those that keep the variance: enough to tell the channels apart


@torch.no_grad()
def begin_as_cosine_transform(encoder: SeanetEncoder, decoder: SeanetDecoder, level: float = 0.1) -> None:
    """Set the weights of a causal encoder and decoder of the same configuration, without LSTM or norms.

    Parameters
    ----------
    encoder, decoder
        Random weights are drawn from torch's global generator for what is not set.
    level : float
        Factor of the sound inside.
    """
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            fan = module.in_channels * module.kernel_size[0]
            fan = fan // module.stride[0] if isinstance(module, nn.ConvTranspose1d) else fan
            nn.init.normal_(module.weight, std=_GAIN / fan**0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, ResidualUnit):
            pointwise = [layer for layer in module.block if isinstance(layer, Conv)][-1]
            nn.init.zeros_(pointwise.conv.weight)
            if isinstance(module.shortcut, Conv):
                nn.init.eye_(module.shortcut.conv.weight[..., 0])
    first, *strided, last = (layer for layer in encoder.layers if isinstance(layer, Conv))
    _pass_on(first.conv.weight, 1, level)
    used = [1]  # channels that hold coefficients
    for layer in strided:
        count = min(used[-1] * layer.stride, layer.conv.out_channels)
        layer.conv.weight[:count] = 0.0
        # The second half of the kernel lies on a frame's own samples.
        layer.conv.weight[:count, : used[-1], layer.stride :] = _transform(count, used[-1], layer.stride)
        used.append(count)
    kept = min(used[-1], last.conv.out_channels)
    _pass_on(last.conv.weight, kept, 1.0)
    first, last = (layer for layer in decoder.layers if isinstance(layer, Conv))
    first.conv.weight[: used[-1]] = 0.0
    _pass_on(first.conv.weight, kept, 1.0)
    for raising in (layer for layer in decoder.layers if isinstance(layer, ConvTranspose)):
        outputs, inputs = used[-2], used.pop()
        raising.conv.weight[:, :outputs] = 0.0
        raising.conv.weight[:inputs, :outputs, : raising.stride] = _transform(inputs, outputs, raising.stride)
    _pass_on(last.conv.weight, 1, 1.0 / level)


def _pass_on(weight: Tensor, channels: int, gain: float) -> None:
    """Let a convolution [C', C, k] hand its first channels on."""
    weight[:channels] = 0.0
    weight[range(channels), range(channels), -1] = gain


def _transform(outputs: int, inputs: int, size: int) -> Tensor:
    """Orthonormal cosine transform (DCT-II) of `size` samples of each input channel: [outputs, inputs, size].

    Outputs go from low to high frequencies; inside an odd channel, a band of the stage before, frequencies run
    backwards.
    """
    place, order = torch.arange(size) + 0.5, torch.arange(size)[:, None]
    basis = torch.cos(torch.pi / size * order * place) * (2.0 / size) ** 0.5
    basis[0] /= 2.0**0.5
    weight = torch.zeros(outputs, inputs, size)
    for output in range(outputs):
        channel, frequency = divmod(output, size)
        weight[output, channel] = basis[frequency if channel % 2 == 0 else size - 1 - frequency]
    return weight
