"""SEANet encoder and decoder as in EnCodec (Défossez et al. 2022, arXiv 2210.13438, section 3.1).

Parameter names are those of Hugging Face checkpoints. Weight norm is folded into plain weights when a checkpoint is
loaded; training puts it on again (`speechtok.training.codec`).

Both networks take batches of sounds of different lengths, and chunks of streams, with `speechtok.nn.edges.Edges`. What
is padded then is what would be padded if each sound were alone and whole.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor, nn

from speechtok.errors import CheckpointError
from speechtok.nn.edges import ChunkPast, Edges, pad

__all__ = ["SeanetConfig", "SeanetDecoder", "SeanetEncoder"]


@dataclass(frozen=True)
class SeanetConfig:
    """Shape of encoder and decoder, with Hugging Face's names and defaults (the 24 kHz model).

    Parameters
    ----------
    sample_rate : int
        Hz.
    audio_channels : int
    num_filters : int
        Channels at the sample rate; they double with every down-sampling.
    hidden_size : int
        Size D of a frame.
    num_residual_layers : int
        Residual units per rate; their dilations are 1, `dilation_growth_rate`, its square, ...
    upsampling_ratios : tuple of int
        Of the decoder; the encoder goes through them from the last to the first. The hop is their product.
    kernel_size, last_kernel_size, residual_kernel_size : int
    dilation_growth_rate : int
    use_causal_conv : bool
        Pad on the left only.
    pad_mode : {"reflect", "constant"}
        What stands in front of the first sample. With "reflect", as published, the first frames depend on later ones.
    compress : int
        Residual units work on a part of 1 / compress of the channels.
    num_lstm_layers : int
        0: none, so that frames depend on a bounded past.
    trim_right_ratio : float
        Share of a transposed convolution's surplus that is cut off on the right (causal models).
    use_conv_shortcut : bool
        Whether the skip connection of residual units is a convolution.
    norm_type : {"weight_norm", "time_group_norm"}
        "time_group_norm": a norm over all channels and time behind every convolution (the 48 kHz model).

    Raises
    ------
    CheckpointError
        If a value is unusable; the message names the field.
    """

    sample_rate: int = 24000
    audio_channels: int = 1
    num_filters: int = 32
    hidden_size: int = 128
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 5, 4, 2)
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    use_causal_conv: bool = True
    pad_mode: str = "reflect"
    compress: int = 2
    num_lstm_layers: int = 2
    trim_right_ratio: float = 1.0
    use_conv_shortcut: bool = True
    norm_type: str = "weight_norm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "upsampling_ratios", tuple(self.upsampling_ratios))
        counts = (
            "sample_rate", "audio_channels", "num_filters", "hidden_size", "kernel_size", "last_kernel_size",
            "residual_kernel_size", "dilation_growth_rate", "compress",
        )  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            self._check(name, type(value) is int and value > 0)
        for name in ("num_residual_layers", "num_lstm_layers"):
            value = getattr(self, name)
            self._check(name, type(value) is int and value >= 0)
        ratios = self.upsampling_ratios
        self._check("upsampling_ratios", bool(ratios) and all(type(r) is int and r > 0 for r in ratios))
        self._check("num_filters", self.num_filters % self.compress == 0, f"; compress is {self.compress}")
        self._check("pad_mode", self.pad_mode in ("reflect", "constant"), "; known: reflect, constant")
        known = ("weight_norm", "time_group_norm")
        self._check("norm_type", self.norm_type in known, f"; known: {', '.join(known)}")
        for name in ("use_causal_conv", "use_conv_shortcut"):
            self._check(name, isinstance(getattr(self, name), bool))
        whole = self.trim_right_ratio == 1.0
        self._check("trim_right_ratio", whole or (self.use_causal_conv and 0 <= self.trim_right_ratio <= 1))

    def _check(self, name: str, good: bool, why: str = "") -> None:
        if not good:
            raise CheckpointError(
                f"model configuration: {name}={getattr(self, name)!r} is not supported{why}; check config.json"
            )

    @property
    def hop(self) -> int:
        """Samples from frame to frame."""
        return prod(self.upsampling_ratios)

    @property
    def chunk(self) -> int:
        """Frames that streams compute together: 8, or more where mirroring a first chunk needs more of it."""
        dilation = self.dilation_growth_rate ** max(0, self.num_residual_layers - 1)
        residual = (self.residual_kernel_size - 1) * dilation + 1
        return max(8, self.kernel_size, self.last_kernel_size, ceil(residual / self.upsampling_ratios[0]))

    @property
    def bounded(self) -> bool:
        """Whether a frame depends on a bounded past and on nothing that comes later."""
        return self.num_lstm_layers == 0 and self.pad_mode == "constant"


class Conv(nn.Module):
    """Convolution that gives ``ceil(N / stride)`` frames: [B, C, N] -> [B, C', ceil(N / stride)]."""

    def __init__(
        self, config: SeanetConfig, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride, dilation=dilation)
        self.norm = nn.GroupNorm(1, outputs) if config.norm_type == "time_group_norm" else None
        surplus = (kernel - 1) * dilation + 1 - stride
        right = 0 if config.use_causal_conv else surplus // 2
        self.left, self.right, self.stride, self.mode = surplus - right, right, stride, config.pad_mode

    def forward(self, x: Tensor, edges: Edges | None = None) -> Tensor:
        """Convolve x [B, C, N]."""
        if edges is None:
            x = pad(x, self.left, self.right + -x.shape[-1] % self.stride, self.mode)
        else:
            x = edges.around(x, self.left, self.right, self.stride, self.mode)
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)

    def past(self, batch: int) -> list[Tensor]:
        """What it remembers before a stream's first chunk."""
        weight = self.conv.weight
        return [weight.new_zeros(batch, self.conv.in_channels, self.left)] if self.left else []


class ConvTranspose(nn.Module):
    """Transposed convolution that gives `stride` samples for each frame: [B, C, T] -> [B, C', stride T]."""

    def __init__(self, config: SeanetConfig, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(inputs, outputs, kernel, stride)
        self.norm = nn.GroupNorm(1, outputs) if config.norm_type == "time_group_norm" else None
        surplus = kernel - stride
        right = ceil(surplus * config.trim_right_ratio) if config.use_causal_conv else surplus // 2
        self.left, self.right, self.stride = surplus - right, right, stride
        self.memory = -(-kernel // stride) - 1  # earlier frames that reach into a frame's samples

    def forward(self, x: Tensor, edges: Edges | None = None) -> Tensor:
        """Convolve x [B, C, T]; streams are those of causal models that trim on the right only."""
        skipped = self.left
        if edges is not None and edges.past is not None and self.memory:
            x = torch.cat([edges.remembered(), x], dim=-1)
            edges.kept.append(x[..., -self.memory :])
            skipped += self.memory * self.stride
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        if edges is not None:
            edges.lengths = edges.lengths * self.stride
        return x[..., skipped : x.shape[-1] - self.right]

    def past(self, batch: int) -> list[Tensor]:
        """What it remembers before a stream's first chunk."""
        weight = self.conv.weight
        return [weight.new_zeros(batch, self.conv.in_channels, self.memory)] if self.memory else []


class Lstm(nn.Module):
    """LSTM over the frames of [B, C, T], with a skip connection."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers)

    def forward(self, x: Tensor, edges: Edges | None = None) -> Tensor:
        """Map x [B, C, T] to the same shape."""
        frames, before = x.permute(2, 0, 1), None
        if edges is not None and edges.past is not None:
            hidden, cell = edges.remembered().permute(1, 2, 0, 3).contiguous()
            before = hidden, cell
        y, after = self.lstm(frames, before)
        if edges is not None and edges.past is not None:
            edges.kept.append(torch.stack(after).permute(2, 0, 1, 3))
        return (y + frames).permute(1, 2, 0)

    def past(self, batch: int) -> list[Tensor]:
        """What it remembers before a stream's first chunk: hidden and cell states, [B, 2, layers, C]."""
        weight = next(self.lstm.parameters())
        return [weight.new_zeros(batch, 2, self.lstm.num_layers, self.lstm.hidden_size)]


class ResidualUnit(nn.Module):
    """Two convolutions (dilated, then pointwise) beside a skip connection."""

    def __init__(self, config: SeanetConfig, width: int, dilation: int) -> None:
        super().__init__()
        inner = width // config.compress
        self.block = nn.ModuleList([
            nn.ELU(), Conv(config, width, inner, config.residual_kernel_size, dilation=dilation),
            nn.ELU(), Conv(config, inner, width, 1),
        ])  # fmt: skip
        self.shortcut = Conv(config, width, width, 1) if config.use_conv_shortcut else nn.Identity()

    def forward(self, x: Tensor, edges: Edges | None = None) -> Tensor:
        """Map x [B, C, N] to the same shape."""
        y = _through(self.block, x, edges)
        return _through([self.shortcut], x, edges) + y


def _through(layers: Iterable[nn.Module], x: Tensor, edges: Edges | None) -> Tensor:
    for layer in layers:
        x = layer(x) if isinstance(layer, nn.ELU | nn.Identity) else layer(x, edges)
    return x


class Seanet(nn.Module):
    """A stack of layers, and what it remembers of streams."""

    layers: nn.ModuleList

    def forward(self, x: Tensor, edges: Edges | None = None) -> Tensor:
        """Map x [B, C, N]; `edges` where rows are sounds of different lengths (their values behind them mean nothing).

        The networks of time_group_norm take rows of one length only: their norm is over all of them.
        """
        return _through(self.layers, x, edges)

    def past(self, batch: int) -> ChunkPast:
        """Of `batch` streams before their first chunk; streams need a causal network without time_group_norm."""
        known = [module for module in self.modules() if isinstance(module, Conv | ConvTranspose | Lstm)]
        device = next(self.parameters()).device
        layers = [memory for module in known for memory in module.past(batch)]
        return ChunkPast(layers, torch.zeros(batch, dtype=torch.int64, device=device))

    def advance(self, x: Tensor, lengths: Tensor, frames: Tensor, past: ChunkPast) -> tuple[Tensor, ChunkPast]:
        """The next chunk of every stream.

        Parameters
        ----------
        x : float [B, C, N]
            As many columns in every call.
        lengths : int64 [B]
            Columns that there are: all, except where a sound ends.
        frames : int64 [B]
            Frames that this chunk adds, for ``ChunkPast.seen``.
        past : ChunkPast
            From `past` or the last call.

        Returns
        -------
        float [B, C', N']
        ChunkPast
        """
        edges = Edges(lengths, past)
        x = self(x, edges)
        return x, edges.after(frames)


class SeanetEncoder(Seanet):
    """Waves [B, channels, N] to frames [B, D, ceil(N / hop)]."""

    def __init__(self, config: SeanetConfig) -> None:
        super().__init__()
        width = config.num_filters
        layers: list[nn.Module] = [Conv(config, config.audio_channels, width, config.kernel_size)]
        for ratio in reversed(config.upsampling_ratios):
            layers += [ResidualUnit(config, width, dilation) for dilation in _dilations(config)]
            layers += [nn.ELU(), Conv(config, width, 2 * width, 2 * ratio, ratio)]
            width *= 2
        layers += [Lstm(width, config.num_lstm_layers)] if config.num_lstm_layers else []
        layers += [nn.ELU(), Conv(config, width, config.hidden_size, config.last_kernel_size)]
        self.layers = nn.ModuleList(layers)

    @property
    def left(self) -> int:
        """Samples before its own that a frame reads through the convolutions."""
        reach, stride = 0, 1
        for layer in self.layers:
            for conv in layer.block if isinstance(layer, ResidualUnit) else [layer]:
                if isinstance(conv, Conv):
                    reach += conv.left * stride
                    stride *= conv.stride
        return reach


class SeanetDecoder(Seanet):
    """Frames [B, D, T] to waves [B, channels, T hop]."""

    def __init__(self, config: SeanetConfig) -> None:
        super().__init__()
        width = config.num_filters * 2 ** len(config.upsampling_ratios)
        layers: list[nn.Module] = [Conv(config, config.hidden_size, width, config.kernel_size)]
        layers += [Lstm(width, config.num_lstm_layers)] if config.num_lstm_layers else []
        for ratio in config.upsampling_ratios:
            layers += [nn.ELU(), ConvTranspose(config, width, width // 2, 2 * ratio, ratio)]
            width //= 2
            layers += [ResidualUnit(config, width, dilation) for dilation in _dilations(config)]
        layers += [nn.ELU(), Conv(config, width, config.audio_channels, config.last_kernel_size)]
        self.layers = nn.ModuleList(layers)


def _dilations(config: SeanetConfig) -> Sequence[int]:
    return [config.dilation_growth_rate**index for index in range(config.num_residual_layers)]
