"""MFCC with deltas as an encoder: the teacher of HuBERT's first iteration, and a baseline without weights."""

from dataclasses import dataclass

from torch import Tensor

from speechtok.audio.features import FRAME, HOP, mfcc39
from speechtok.encoders.base import Encoder, Frames
from speechtok.errors import InputError
from speechtok.frames import Context, FrameGrid

__all__ = ["MfccConfig", "MfccEncoder"]


@dataclass(frozen=True)
class MfccConfig:
    """Settings of `MfccEncoder`.

    Parameters
    ----------
    sample_rate : int
        Rate of the wave (Hz); the recipe is defined for 16000 only.
    """

    sample_rate: int = 16000

    def __post_init__(self) -> None:
        if self.sample_rate != 16000:
            raise InputError(f"sample_rate {self.sample_rate}: the MFCC encoder works at 16000 Hz; resample the wave")


class MfccEncoder(Encoder):
    """39-dimensional MFCC at 100 Hz, see `speechtok.audio.features.mfcc39`. Holds no weights.

    A frame reads 25 ms and, through its delta-deltas, four frames on each side.

    Parameters
    ----------
    config : MfccConfig, optional
        Settings.
    layer : None
        There are no layers.

    Raises
    ------
    InputError
        If a layer is asked for.
    """

    type = "mfcc"
    dim = 39
    layer = None
    context = Context(4, 4)

    def __init__(self, config: MfccConfig | None = None, layer: int | None = None) -> None:
        super().__init__()
        if layer is not None:
            raise InputError(f"layer {layer}: the MFCC encoder has no layers; leave the layer out")
        self.config = config or MfccConfig()
        self.grid = FrameGrid(self.config.sample_rate, HOP, FRAME)

    def encode(self, wave: Tensor, lengths: Tensor) -> Frames:
        """MFCC frames of a checked batch: wave float32 [B, N], lengths int64 [B] -> features float32 [B, T, 39]."""
        return Frames(*mfcc39(wave, lengths))
