"""SEANet as an encoder: the first half of a codec."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from speechtok.audio.features import valid_frames
from speechtok.encoders.base import Encoder, Frames
from speechtok.encoders.checkpoint import load_network
from speechtok.errors import CheckpointError, InputError
from speechtok.frames import Context, FrameGrid
from speechtok.nn.edges import ChunkPast, Edges
from speechtok.nn.seanet import SeanetConfig, SeanetEncoder

__all__ = ["SeanetFrames", "check_streamable", "stated"]


class SeanetFrames(Encoder):
    """Frames of a causal SEANet, ``ceil(N / hop)`` of N samples: the last one counts however little of it there is.

    With ``pad_mode="constant"`` and without LSTM a frame depends on a bounded past. With an LSTM it depends on all of
    the past, and with ``pad_mode="reflect"``, as published, the first frames also depend on those up to frame 6: such
    an encoder is `recurrent`, and tokenizers compute it chunk by chunk from a sound's start, offline as in streams.

    Parameters
    ----------
    config : SeanetConfig
    layer : None
        There are no layers to choose from.
    weights : mapping of str to Tensor, optional
        State dict of a `SeanetEncoder` of that configuration, plain or with weight norm; None: random weights.

    Raises
    ------
    CheckpointError
        If the model is not causal or has more than one channel, or the weights do not fit.
    InputError
        If a layer is asked for.
    """

    type = "seanet"
    # The largest difference of half an hour of sound, between chunks and the whole, was 5.0e-6 with trained weights.
    rounding = 2e-5
    layer = None

    def __init__(
        self, config: SeanetConfig, layer: int | None = None, *, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        if layer is not None:
            raise InputError(f"layer {layer}: a SEANet encoder has no layers to choose from; leave the layer out")
        check_streamable(config)
        self.config, self.dim = config, config.hidden_size
        self.grid = FrameGrid(config.sample_rate, config.hop, config.hop, partial=True)
        self.network = SeanetEncoder(config)
        if weights is not None:
            load_network(self.network, weights)
        self.recurrent = not config.bounded
        # In frames, whole chunks: windows begin at one.
        past = -(-self.network.left // (config.hop * config.chunk)) * config.chunk
        self.context = Context(0 if self.recurrent else past, 0, config.chunk)

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, without defaults: new fields leave fingerprints as they are."""
        return stated(self.config)

    def encode(self, wave: Tensor, lengths: Tensor) -> Frames:
        """Frames of a checked batch: wave float32 [B, N], lengths int64 [B] -> features float32 [B, T, D]."""
        counts = self.frame_lengths(lengths)
        x = self.network(wave[:, None], Edges(lengths)).transpose(1, 2)
        return Frames(x.masked_fill(~valid_frames(counts, x.shape[1])[..., None], 0.0), counts)

    def stream_state(self, batch: int) -> ChunkPast:
        """State of `batch` streams before their first chunk."""
        return self.network.past(batch)

    def advance(self, wave: Tensor, lengths: Tensor, positions: Tensor, state: ChunkPast) -> tuple[Tensor, ChunkPast]:
        """Compute the next chunk of every stream, see `Encoder.advance`; streams may be at different places."""
        x, state = self.network.advance(wave[:, None], lengths, positions, state)
        return x.transpose(1, 2), state


def check_streamable(config: SeanetConfig) -> None:
    """Refuse models that cannot be part of a tokenizer.

    Raises
    ------
    CheckpointError
    """
    reasons = [
        (config.audio_channels != 1, f"it has {config.audio_channels} channels"),
        (not config.use_causal_conv, "its convolutions look ahead"),
        (config.norm_type != "weight_norm", "its norms are over all of a sound"),
        (config.trim_right_ratio != 1.0, "its transposed convolutions look ahead (trim_right_ratio is not 1)"),
    ]
    found = [reason for bad, reason in reasons if bad]
    if found:
        raise CheckpointError(
            f"this SEANet cannot be part of a tokenizer: {', '.join(found)}; speechtok.codecs.encodec encodes and "
            "decodes waves with it"
        )


def stated(config: SeanetConfig) -> dict[str, Any]:
    """The fields that are not defaults, as plain JSON values."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    defaults = {field.name: field.default for field in fields(config)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value != defaults[name]
    }
