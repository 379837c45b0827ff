"""Conditional flow matching: log mel spectra out of coarse units, which leave open how they sound.

A transformer learns the mean velocity of all paths from noise to spectra that pass a point, and a spectrum is drawn by
following it (`speechtok.vocoders.paths`), as in Matcha-TTS (Mehta et al. 2024, arXiv 2309.03199). A regression would
give the mean of all spectra that fit.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speechtok.audio.features import valid_frames
from speechtok.encoders.checkpoint import load_network
from speechtok.errors import InputError
from speechtok.nn.transformer import PositionalConv, SelfAttention, Transformer
from speechtok.vocoders.condition import GAP, PLACES, Condition
from speechtok.vocoders.paths import Method, integrate, point, velocity

__all__ = ["FlowConfig", "UnitFlow"]


@dataclass(frozen=True)
class FlowConfig:
    """Shape of a flow matching decoder.

    Parameters
    ----------
    vocab_size : int
        Units.
    bins : int
        Of the log mel spectra.
    dim, heads, blocks, inner : int
        Of the transformer.
    positions : int
        Kernel of its positional convolution, in frames.
    embedding : int
        Size of the embedding of a unit.
    speaker_dim : int
        Size of a speaker's embedding; 0: one voice.
    sigma : float
        Deviation of what is left of the noise at time 1.
    drop : float
        Share of rows that are learned without condition, for guidance.
    speaker_dropout : float
        Share of rows with a condition that get the null speaker in training.

    Raises
    ------
    InputError
        If a value is unusable; the message names the field.
    """

    vocab_size: int
    bins: int = 80
    dim: int = 256
    heads: int = 4
    blocks: int = 6
    inner: int = 1024
    positions: int = 32
    embedding: int = 128
    speaker_dim: int = 0
    sigma: float = 1e-4
    drop: float = 0.2
    speaker_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "bins", "dim", "heads", "blocks", "inner", "positions", "embedding"):
            value = getattr(self, name)
            self._check(name, type(value) is int and value > 0)
        self._check("speaker_dim", type(self.speaker_dim) is int and self.speaker_dim >= 0)
        self._check("dim", self.dim % self.heads == 0 and self.dim % 16 == 0)
        for name in ("sigma", "drop", "speaker_dropout"):
            self._check(name, 0 <= getattr(self, name) < 1)

    def _check(self, name: str, good: bool) -> None:
        if not good:
            raise InputError(f"flow configuration: {name}={getattr(self, name)!r} is not possible")


class UnitFlow(nn.Module):
    """Log mel spectra of units of segments, by following a learned field from noise.

    Parameters
    ----------
    config : FlowConfig
    weights : mapping of str to Tensor, optional
        Its state dict; None: random weights, with which nothing moves.

    Attributes
    ----------
    mean, scale : float32 [bins]
        Of the training data: spectra are ``mel = x * scale + mean`` of what flows. See `set_statistics`.

    Raises
    ------
    CheckpointError
        If the weights do not fit.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: FlowConfig, *, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.register_buffer("mean", torch.zeros(config.bins))
        self.register_buffer("scale", torch.ones(config.bins))
        self.units = nn.Embedding(config.vocab_size + 1, config.embedding)  # the last one is that of gaps
        self.condition = nn.Linear(config.embedding + PLACES, dim)
        self.no_condition = nn.Parameter(torch.zeros(dim))
        if config.speaker_dim:
            self.null_speaker = nn.Parameter(torch.zeros(config.speaker_dim))
            self.speaker = nn.Linear(config.speaker_dim, dim, bias=False)
        self.spectrum = nn.Linear(config.bins, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.transformer = Transformer(
            lambda _: SelfAttention(dim, config.heads), dim, config.inner, config.blocks, complete=True,
            position=PositionalConv(dim, config.positions, 16, activation="gelu", batch_norm=False),
            activation="gelu", eps=1e-5, pre_norm=True,
        )  # fmt: skip
        self.out = nn.Linear(dim, config.bins)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        if weights is not None:
            load_network(self, weights)

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self.config)

    def set_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """Set mean and standard deviation of the log mel bins of the training data, float [bins]."""
        self.mean.copy_(mean)
        self.scale.copy_(deviation)

    def forward(self, x: Tensor, time: Tensor, condition: Condition, dropped: Tensor | None = None) -> Tensor:
        """Velocities.

        Parameters
        ----------
        x : float [B, T, bins]
            Points, of standardised spectra.
        time : float [B] or []
            Between 0 and 1.
        condition : Condition
        dropped : bool [B], optional
            Rows whose condition is not heard; None: none.

        Returns
        -------
        float [B, T, bins]
            What lies behind a row's length means nothing.
        """
        heard = self._heard(condition)
        if dropped is not None:
            heard = torch.where(dropped[:, None, None], self.no_condition, heard)
        now = self.time(_waves(time.expand(len(x)), self.config.dim))[:, None]
        *_, hidden = self.transformer(self.spectrum(x) + heard + now, condition.lengths)
        out: Tensor = self.out(hidden)
        return out

    def loss(
        self, mel: Tensor, condition: Condition, noise: Tensor, time: Tensor, dropped: Tensor | None = None
    ) -> Tensor:
        """Squared error of velocities, mean over bins, summed over the frames of each row.

        Divide the sum over rows by the frames of the step: ``sum (v - u)^2 / (frames * bins)``.

        Parameters
        ----------
        mel : float [B, T, bins]
            Log mel spectra.
        condition : Condition
        noise : float [B, T, bins]
            Drawn from the standard normal distribution.
        time : float [B]
            Drawn uniformly between 0 and 1.
        dropped : bool [B], optional
            Rows without condition, drawn with probability ``config.drop``.

        Returns
        -------
        float32 [B]
        """
        target = (mel.float() - self.mean) / self.scale
        inside = valid_frames(condition.lengths, mel.shape[1])
        # Behind a row's end may be anything, NaN too.
        target = target.masked_fill(~inside[..., None], 0.0)
        guess = self(point(target, noise, time, self.config.sigma), time, condition, dropped)
        error = (guess.float() - velocity(target, noise, self.config.sigma)).square().mean(2)
        return error.masked_fill(~inside, 0.0).sum(1)

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        *,
        seed: int,
        steps: int = 8,
        method: Method = "midpoint",
        guidance: float = 0.7,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw spectra, the same ones for the same seed; a row is what it would be alone.

        Parameters
        ----------
        condition : Condition
        seed : int
            Of the noise, which a row gets as if it were alone.
        steps, method
            See `integrate`.
        guidance : float
            g in ``(1 + g) v - g v0``, with v0 the velocity without condition (Ho & Salimans 2022, arXiv 2207.12598). 0:
            the conditional model alone, in half the time.
        temperature : float
            Deviation of the noise; 0: a single path, from the middle.

        Returns
        -------
        float32 [B, T, bins]
            Log mel spectra; zeros behind each row's length.

        Raises
        ------
        InputError
            If a number or the condition is unusable.
        """
        if guidance < 0 or temperature < 0:
            raise InputError(f"guidance={guidance} and temperature={temperature} must not be negative")
        batch, frames = condition.units.shape
        noise = torch.zeros(batch, frames, self.config.bins)
        for row, length in zip(noise, condition.lengths.tolist(), strict=True):
            generator = torch.Generator().manual_seed(seed)
            row[:length] = torch.randn(length, self.config.bins, generator=generator)
        start = noise.to(self.mean.device) * temperature
        everything = torch.ones(batch, dtype=torch.bool, device=start.device)

        def field(x: Tensor, time: Tensor) -> Tensor:
            speed: Tensor = self(x, time, condition)
            if guidance:
                speed = (1 + guidance) * speed - guidance * self(x, time, condition, everything)
            return speed

        x = integrate(field, start, steps, method).float() * self.scale + self.mean
        return x.masked_fill(~valid_frames(condition.lengths, frames)[..., None], 0.0)

    def _heard(self, condition: Condition) -> Tensor:
        """The condition of each frame, float [B, T, dim]."""
        units, size = condition.units, self.config.vocab_size
        if units.numel() and not GAP <= int(units.min()) <= int(units.max()) < size:
            raise InputError(f"units from {int(units.min())} to {int(units.max())}: this decoder has {size}")
        embedded = self.units(torch.where(units == GAP, size, units))
        heard: Tensor = self.condition(torch.cat([embedded, condition.places.to(embedded.dtype)], -1))
        speaker = condition.speaker
        if not self.config.speaker_dim:
            if speaker is not None:
                raise InputError("this decoder has one voice; leave the speaker out")
            return heard
        null = self.null_speaker.expand(len(units), -1)
        if speaker is None:
            speaker = null
        elif speaker.shape != null.shape:
            raise InputError(f"speakers {list(null.shape)} are needed, not {list(speaker.shape)}")
        elif self.training and self.config.speaker_dropout:
            hidden = torch.rand(len(units), 1, device=null.device) < self.config.speaker_dropout
            speaker = torch.where(hidden, null, speaker)
        return heard + self.speaker(speaker)[:, None]


def _waves(time: Tensor, dim: int) -> Tensor:
    """Sinusoids of times between 0 and 1, from a quarter of a period to 250 periods: float [B] -> float [B, dim]."""
    rates = torch.logspace(0, 3, dim // 2, device=time.device) * (math.pi / 2)
    angles = time[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
