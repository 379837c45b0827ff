"""Convolutional sub-sampling of filter bank frames by four, as in w2v-BERT of 2021 (Chung et al., section 3.1)."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ConvSubsampling"]


class ConvSubsampling(nn.Module):
    """Two 3 x 3 convolutions with stride 2 over time and bins, each followed by a rectifier; no padding.

    An output frame reads seven input frames, four further on than the one before.

    Parameters
    ----------
    bins : int
        Size of an input frame.
    channels : int
        Filters of both convolutions.

    Attributes
    ----------
    dim : int
        Size of an output frame: `channels` times the bins that are left.
    """

    def __init__(self, bins: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2)
        self.dim = channels * (((bins - 1) // 2 - 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, T, bins] -> float [B, ((T - 1) // 2 - 1) // 2, dim]; T is at least 7."""
        x = F.relu(self.conv2(F.relu(self.conv1(x[:, None]))))
        return x.transpose(1, 2).flatten(2)
