"""SEANet as the decoder of a tokenizer: the second half of a codec."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from speechtok.codecs.base import Decoder
from speechtok.encoders.checkpoint import load_network
from speechtok.encoders.seanet import check_streamable, stated
from speechtok.nn.edges import ChunkPast
from speechtok.nn.seanet import SeanetConfig, SeanetDecoder

__all__ = ["SeanetWaves"]


class SeanetWaves(Decoder):
    """Waves of one channel out of the frames of a causal SEANet.

    With ``pad_mode="reflect"``, as published, the samples of the first frames depend on those up to frame 6; a block
    holds all of them.

    Parameters
    ----------
    config : SeanetConfig
    weights : mapping of str to Tensor, optional
        State dict of a `SeanetDecoder` of that configuration, plain or with weight norm; None: random weights.

    Raises
    ------
    CheckpointError
        If the model is not causal or has more than one channel, or the weights do not fit.
    """

    type = "seanet"

    def __init__(self, config: SeanetConfig, *, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        check_streamable(config)
        self.config, self.dim, self.hop = config, config.hidden_size, config.hop
        self.sample_rate, self.block = config.sample_rate, config.chunk
        self.network = SeanetDecoder(config)
        if weights is not None:
            load_network(self.network, weights)

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, without defaults."""
        return stated(self.config)

    def forward(self, frames: Tensor) -> Tensor:
        """Whole sounds in one pass: float [B, T, D] -> float [B, T * hop]."""
        wave: Tensor = self.network(frames.transpose(1, 2))
        return wave[:, 0]

    def stream_state(self, batch: int) -> ChunkPast:
        """State of `batch` sounds before their first block."""
        return self.network.past(batch)

    def advance(self, frames: Tensor, counts: Tensor, state: ChunkPast) -> tuple[Tensor, ChunkPast]:
        """Compute the next block of every sound, see `Decoder.advance`."""
        wave, state = self.network.advance(frames.transpose(1, 2), counts, counts, state)
        return wave[:, 0], state
