"""Constant-Q magnitudes at the moments of an encoder's frames: an input of MERT, and what it is taught.

Li et al. 2023 (arXiv 2306.00107). Published training compares frame i of the transform, centred on sample ``320 i``,
with frame i of the convolutions, centred on ``320 i + 200``. Here both have one centre.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.frames import FrameGrid

if TYPE_CHECKING:
    from speechtok.audio.cqt import CQT

__all__ = ["FMIN", "OCTAVES", "CqtFeatures", "centred_cqt"]

FMIN, OCTAVES = 32.7, 7  # of MERT: C1 to C8 (Hz)


class CqtFeatures(nn.Module):
    """``log(1 + magnitude)`` of a constant-Q transform over seven octaves, beside the convolutions' features.

    The published option takes raw magnitudes, which loud tonal frames dominate, at another frame rate than that of the
    convolutions.

    Parameters
    ----------
    grid : FrameGrid
        Of the encoder.
    bins : int
        Over all octaves.
    """

    def __init__(self, grid: FrameGrid, bins: int) -> None:
        super().__init__()
        from speechtok.audio.cqt import CQT

        self.grid = grid
        with torch.device("cpu"):  # filters hold values, also where weights are shapes alone
            self.transform = CQT(grid.sample_rate, hop=grid.hop, fmin=FMIN, bins=bins, bins_per_octave=bins // OCTAVES)

    def forward(self, wave: Tensor) -> Tensor:
        """Features of a wave [B, N] that is zero behind the end of each row: float32 [B, T, bins]."""
        return centred_cqt(self.transform, wave, self.grid, self.grid.num_frames(wave.shape[1]))


def centred_cqt(transform: "CQT", wave: Tensor, grid: FrameGrid, frames: int, before: int = 0) -> Tensor:
    """Compressed magnitudes, ``log(1 + magnitude)``, in float32.

    Parameters
    ----------
    transform : CQT
        Of the grid's rate and hop; its own frame i is centred on sample ``i * hop``.
    wave : float [B, N]
    grid : FrameGrid
    frames : int
        How many.
    before : int
        Hops of the wave that lie before frame 0 of the grid: context for the long filters.

    Returns
    -------
    float32 [B, frames, bins]
        Frame i is centred on the middle of frame i of the grid.
    """
    centre = grid.offset + grid.hop // 2
    shift = -centre % grid.hop  # zeros in front of the sound change nothing but where frames lie
    first = (centre + shift) // grid.hop + before
    with torch.autocast(wave.device.type, enabled=False):
        magnitudes = transform(F.pad(wave.float(), (shift, 0))).abs()
        return magnitudes[..., first : first + frames].transpose(1, 2).log1p()
