"""Code HiFi-GAN: units to waves by transposed convolutions, with speakers, styles, quantized F0 and durations.

Polyak et al. 2021 (arXiv 2104.00355); Kong et al. 2020 (arXiv 2010.05646) for the generator, Lee et al. 2021 (arXiv
2107.05604) for durations. Parameter names are those of the checkpoints of speech-resynthesis, textless and slamkit,
which `speechtok.vocoders.published` reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.encoders.checkpoint import load_network
from speechtok.errors import InputError
from speechtok.vocoders.durations import DurationNetwork, frames_of

__all__ = ["CodeHifiGan", "CodeHifiGanConfig"]

_SLOPE = 0.1
_LAST_SLOPE = 0.01  # published checkpoints were trained with torch's default there
_DEVIATION = 0.01  # of first weights


@dataclass(frozen=True)
class CodeHifiGanConfig:
    """Shape of a code HiFi-GAN. The defaults are those of 50 units a second at 16 kHz.

    Parameters
    ----------
    vocab_size : int
        Units.
    embedding : int
        Size of the embedding of a unit, speaker, style or F0 code.
    rates, kernels : tuple of int
        Of the transposed convolutions; each kernel is its rate plus an even number. The product of the rates are the
        samples of a frame. 25 units a second: 5, 4, 4, 4, 2.
    channels : int
        Behind the first convolution; halved by every stage.
    residual_kernels : tuple of int
        Of the residual blocks of a stage, odd; their outputs are averaged.
    residual_dilations : tuple of tuple of int
        Of each of these blocks.
    speakers : int
        Size of the table of speakers; 0: none.
    speaker_dim : int
        Size of a speaker's embedding that a linear map takes, instead of a table; 0: none.
    styles, f0_bins : int
        Sizes of the tables of styles and of F0 codes; 0: none.
    duration_dim : int
        Hidden size of the duration predictor; 0: none.
    duration_kernel : int
    duration_dropout : float
    sample_rate : int
        Of the wave (Hz).

    Raises
    ------
    InputError
        If a value is unusable; the message names the field.
    """

    vocab_size: int
    embedding: int = 128
    rates: tuple[int, ...] = (5, 4, 4, 2, 2)
    kernels: tuple[int, ...] = (11, 8, 8, 4, 4)
    channels: int = 512
    residual_kernels: tuple[int, ...] = (3, 7, 11)
    residual_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    speakers: int = 0
    speaker_dim: int = 0
    styles: int = 0
    f0_bins: int = 0
    duration_dim: int = 0
    duration_kernel: int = 3
    duration_dropout: float = 0.5
    sample_rate: int = 16000

    def __post_init__(self) -> None:
        for name in ("rates", "kernels", "residual_kernels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            value = getattr(self, name)
            self._check(name, bool(value) and all(type(n) is int and n > 0 for n in value), "positive integers")
        object.__setattr__(self, "residual_dilations", tuple(tuple(each) for each in self.residual_dilations))
        dilations = self.residual_dilations
        good = len(dilations) == len(self.residual_kernels) and all(dilations)
        self._check("residual_dilations", good, "some for each of residual_kernels")
        self._check("residual_kernels", all(n % 2 for n in self.residual_kernels), "odd numbers")
        fits = len(self.kernels) == len(self.rates) and all(
            kernel >= rate and (kernel - rate) % 2 == 0 for kernel, rate in zip(self.kernels, self.rates, strict=True)
        )
        self._check("kernels", fits, f"rates={list(self.rates)} plus even numbers")
        for name in ("vocab_size", "embedding", "sample_rate", "duration_kernel"):
            self._check(name, type(getattr(self, name)) is int and getattr(self, name) > 0, "a positive integer")
        for name in ("speakers", "speaker_dim", "styles", "f0_bins", "duration_dim"):
            self._check(name, type(getattr(self, name)) is int and getattr(self, name) >= 0, "an integer from 0 on")
        self._check("speaker_dim", not (self.speakers and self.speaker_dim), "0 where there is a table of speakers")
        self._check("duration_kernel", self.duration_kernel % 2 == 1, "an odd number")
        self._check("duration_dropout", 0 <= self.duration_dropout < 1, "a share")
        whole = type(self.channels) is int and self.channels > 0 and self.channels % 2 ** len(self.rates) == 0
        self._check("channels", whole, f"a multiple of {2 ** len(self.rates)}")

    def _check(self, name: str, good: bool, needed: str) -> None:
        if not good:
            raise InputError(f"vocoder configuration: {name}={getattr(self, name)!r} is not possible: {needed} needed")

    @property
    def hop(self) -> int:
        """Samples of a frame."""
        return prod(self.rates)

    @property
    def inputs(self) -> int:
        """Size of all embeddings of a frame together."""
        told = (self.f0_bins, self.speakers or self.speaker_dim, self.styles)
        return self.embedding * (1 + sum(each > 0 for each in told))


class ResidualBlock(nn.Module):
    """Pairs of a dilated and a plain convolution, a residual around each pair: [B, C, N] -> [B, C, N]."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, N] to the same shape."""
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, _SLOPE)), _SLOPE))
        return x


class CodeHifiGan(nn.Module):
    """Units to waves. Every row of a batch is a whole sound, so all are equally long.

    Parameters
    ----------
    config : CodeHifiGanConfig
    weights : mapping of str to Tensor, optional
        Its state dict, plain or with weight norm; None: random weights.

    Attributes
    ----------
    hop, sample_rate : int
        Samples of a unit; Hz.

    Raises
    ------
    CheckpointError
        If the weights do not fit.
    """

    type: ClassVar[str] = "code_hifigan"  # type: ignore[assignment]  # hides nn.Module.type

    def __init__(self, config: CodeHifiGanConfig, *, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.config, self.hop, self.sample_rate = config, config.hop, config.sample_rate
        size, width = config.embedding, config.channels
        self.dict = nn.Embedding(config.vocab_size, size)
        if config.speakers:
            self.spkr: nn.Module = nn.Embedding(config.speakers, size)
        elif config.speaker_dim:
            self.spkr = nn.Linear(config.speaker_dim, size)
        if config.styles:
            self.style = nn.Embedding(config.styles, size)
        if config.f0_bins:
            self.f0_quant_embed = nn.Embedding(config.f0_bins, size)
        if config.duration_dim:
            self.dur_predictor = DurationNetwork(
                size, config.duration_dim, config.duration_kernel, config.duration_dropout
            )
        self.conv_pre = nn.Conv1d(config.inputs, width, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(config.rates, config.kernels, strict=True):
            self.ups.append(nn.ConvTranspose1d(width, width // 2, kernel, rate, padding=(kernel - rate) // 2))
            width //= 2
            for odd, dilations in zip(config.residual_kernels, config.residual_dilations, strict=True):
                self.resblocks.append(ResidualBlock(width, odd, dilations))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)
        for part in (self.ups, self.resblocks, self.conv_post):
            for conv in part.modules():
                if isinstance(conv, nn.Conv1d | nn.ConvTranspose1d):
                    nn.init.normal_(conv.weight, std=_DEVIATION)
        if weights is not None:
            load_network(self, weights)

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self.config)

    def forward(
        self, units: Tensor, speaker: Tensor | None = None, style: Tensor | None = None, f0: Tensor | None = None
    ) -> Tensor:
        """Waves of whole sounds.

        Parameters
        ----------
        units : int [B, T]
            With durations: every unit as often as it lasts.
        speaker : int64 [B] or float [B, speaker_dim], optional
            Index of the table, or embedding, as the configuration says.
        style : int64 [B], optional
        f0 : int64 [B, F], optional
            F0 codes. The longer one of T and F is a multiple of the shorter, which is repeated.

        Returns
        -------
        float [B, max(T, F) * hop]
            In [-1, 1].

        Raises
        ------
        InputError
            If something is missing, is given in vain, or does not fit.
        """
        self._check(units, speaker, style, f0)
        parts = [self.dict(units)]
        if f0 is not None:
            parts.append(self.f0_quant_embed(f0))
        if speaker is not None:
            parts.append(self.spkr(speaker)[:, None])
        if style is not None:
            parts.append(self.style(style)[:, None])
        frames = max(part.shape[1] for part in parts)
        repeated = [part.repeat_interleave(frames // part.shape[1], 1) for part in parts]
        x = self.conv_pre(torch.cat(repeated, -1).transpose(1, 2))
        blocks = len(self.config.residual_kernels)
        for index, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, _SLOPE))
            stage = self.resblocks[index * blocks : (index + 1) * blocks]
            x = sum(block(x) for block in stage) / blocks
        return torch.tanh(self.conv_post(F.leaky_relu(x, _LAST_SLOPE)))[:, 0]

    def log_durations(self, units: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logarithms of duration + 1 of deduplicated units, int [B, R] -> float [B, R], for `duration_loss`.

        Gradients reach the embedding of the units, as published. What lies behind a row's length has no say.

        Raises
        ------
        InputError
            If the model predicts no durations, or a unit is not in the vocabulary.
        """
        if not self.config.duration_dim:
            raise InputError("this vocoder predicts no durations; give every unit as often as it lasts")
        self._check_ids("units", units, self.config.vocab_size, 2)
        predicted: Tensor = self.dur_predictor(self.dict(units), lengths)
        return predicted[..., 0]

    def durations(self, units: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Frames of deduplicated units, int [B, R] -> int64 [B, R], at least 1; errors as `log_durations`."""
        return frames_of(self.log_durations(units, lengths))

    def _check(self, units: Tensor, speaker: Tensor | None, style: Tensor | None, f0: Tensor | None) -> None:
        config, batch = self.config, len(units)
        for name, value, wanted in (
            ("speaker", speaker, config.speakers or config.speaker_dim),
            ("style", style, config.styles),
            ("f0", f0, config.f0_bins),
        ):
            if (value is None) == bool(wanted):
                raise InputError(f"this vocoder needs {'a' if wanted else 'no'} {name}")
        self._check_ids("units", units, config.vocab_size, 2)
        if not units.shape[1]:
            raise InputError("no units: a sound has at least one")
        for name, ids, size, axes in (
            ("f0", f0, config.f0_bins, 2),
            ("style", style, config.styles, 1),
            ("speaker", speaker if config.speakers else None, config.speakers, 1),
        ):
            if ids is not None:
                self._check_ids(name, ids, size, axes)
                if len(ids) != batch:
                    raise InputError(f"{name} of {len(ids)} sounds for {batch}")
        if speaker is not None and config.speaker_dim and speaker.shape != (batch, config.speaker_dim):
            raise InputError(f"speaker must be [{batch}, {config.speaker_dim}], not {tuple(speaker.shape)}")
        if f0 is not None:
            short, long = sorted((units.shape[1], f0.shape[1]))
            if not short or long % short:
                raise InputError(
                    f"{units.shape[1]} units and {f0.shape[1]} F0 codes: one must be a multiple of the other"
                )

    @staticmethod
    def _check_ids(name: str, ids: Tensor, size: int, axes: int) -> None:
        if ids.ndim != axes or ids.is_floating_point():
            raise InputError(f"{name} must be integers with {axes} axes, not {ids.dtype} {tuple(ids.shape)}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise InputError(f"{name} from {int(ids.min())} to {int(ids.max())}: this vocoder has {size}")
