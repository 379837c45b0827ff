"""The interface of all quantizers: frames in, ids out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

__all__ = ["Codes", "Quantizer"]


@dataclass(frozen=True)
class Codes:
    """What a quantizer returns.

    Parameters
    ----------
    ids : int32 [B, K, T]
        One id per codebook and frame.
    margins : float32 [B, T]
        The smallest relative change of the frame (Euclidean norm) that could change an id.
        A frame whose margin is below the encoder's rounding error is a near-tie.
    """

    ids: Tensor
    margins: Tensor


class Quantizer(nn.Module, ABC):
    """Turns frames into ids.

    Attributes
    ----------
    dim : int
        Size of a frame.
    vocab_size : int
        Ids per codebook.
    codebooks : int
        K.
    invertible : bool
        Whether `decode` gives frames.
    """

    type: ClassVar[str]  # type: ignore[assignment]  # hides nn.Module.type
    dim: int
    vocab_size: int
    codebooks: int = 1
    invertible: bool = True

    @abstractmethod
    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""

    @abstractmethod
    def forward(self, features: Tensor) -> Codes:
        """Quantize float [B, T, D] frames; what to do with padding is the caller's business."""

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """Frames that ids stand for: int [B, K, T] -> float32 [B, T, D].

        Raises
        ------
        FormatError
            If an id is out of range, or the quantizer is not `invertible`.
        """
