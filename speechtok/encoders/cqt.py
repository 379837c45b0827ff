"""Logarithmic constant-Q spectrum as an encoder: pitch laid out evenly, no weights. A baseline for music probes."""

from dataclasses import dataclass

from torch import Tensor

from speechtok.audio.cqt import C1, CQT
from speechtok.audio.features import valid_frames
from speechtok.encoders.base import Encoder, Frames
from speechtok.errors import InputError
from speechtok.frames import Context, FrameGrid

__all__ = ["CqtConfig", "CqtEncoder"]


@dataclass(frozen=True)
class CqtConfig:
    """Settings of `CqtEncoder`, see `speechtok.audio.cqt.CQT`; by default the bins that MERT is trained to predict.

    Parameters
    ----------
    sample_rate : int
        Rate of the wave (Hz).
    hop : int
        Samples from frame to frame.
    bins, bins_per_octave : int
        Number of bins, and of bins from a frequency to its double.
    fmin : float
        Frequency of the lowest bin (Hz).
    filter_scale : float
        Factor on the length of all filters.
    """

    sample_rate: int = 24000
    hop: int = 320
    bins: int = 336
    bins_per_octave: int = 48
    fmin: float = C1
    filter_scale: float = 1.0


class CqtEncoder(Encoder):
    """``log(1 + magnitude)`` of the constant-Q transform. Holds no weights that are saved.

    Frame t is centred at sample ``t * hop``; there is one for every such sample of the sound, the first included, and
    before and behind the sound there is silence. So a frame's own sample is a single one, and what its wavelets reach
    is context: with the defaults a good second on either side.

    Parameters
    ----------
    config : CqtConfig, optional
        Settings.
    layer : None
        There are no layers.

    Raises
    ------
    InputError
        If a layer is asked for or the settings do not fit.
    """

    type = "cqt"
    layer = None

    def __init__(self, config: CqtConfig | None = None, layer: int | None = None) -> None:
        super().__init__()
        if layer is not None:
            raise InputError(f"layer {layer}: the CQT encoder has no layers; leave the layer out")
        self.config = config = config or CqtConfig()
        self.transform = CQT(
            config.sample_rate,
            hop=config.hop,
            fmin=config.fmin,
            bins=config.bins,
            bins_per_octave=config.bins_per_octave,
            filter_scale=config.filter_scale,
        )
        self.dim = config.bins
        self.grid = FrameGrid(config.sample_rate, config.hop, receptive_field=1)
        before, behind = self.transform.reach
        self.context = Context(-(-before // config.hop), -(-behind // config.hop))

    def encode(self, wave: Tensor, lengths: Tensor) -> Frames:
        """Frames of a checked batch: wave float32 [B, N], lengths int64 [B] -> features float32 [B, T, bins]."""
        counts = self.frame_lengths(lengths)
        # The transform also has a frame that is centred just behind a sound of a multiple of the hop.
        frames = self.transform(wave, lengths).mT[:, : self.grid.num_frames(wave.shape[1])]
        return Frames(frames.log1p().masked_fill(~valid_frames(counts, frames.shape[1])[..., None], 0.0), counts)
