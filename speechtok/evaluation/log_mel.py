"""Log mel frames as an encoder: the plainest baseline of a table. Not a part of saved tokenizers."""

from dataclasses import dataclass

from torch import Tensor

from speechtok.audio.features import FRAME, HOP, kaldi_fbank
from speechtok.encoders.base import Encoder, Frames
from speechtok.frames import Context, FrameGrid

__all__ = ["LogMelEncoder"]


@dataclass(frozen=True)
class _Config:
    """Nothing to set."""


class LogMelEncoder(Encoder):
    """Kaldi's log mel filter bank, 80 bins at 100 Hz, see `speechtok.audio.features.kaldi_fbank`. Holds no weights."""

    type = "log_mel"
    dim = 80
    layer = None
    context = Context(0, 0)

    def __init__(self) -> None:
        super().__init__()
        self.config = _Config()
        self.grid = FrameGrid(16000, HOP, FRAME)

    def encode(self, wave: Tensor, lengths: Tensor) -> Frames:
        """Frames of a checked batch: wave float32 [B, N], lengths int64 [B] -> features float32 [B, T, 80]."""
        return Frames(*kaldi_fbank(wave, lengths))
