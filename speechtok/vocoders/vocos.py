"""Vocos on units: a ConvNeXt backbone at the rate of frames and an inverse STFT (Siuzdak 2023, arXiv 2306.00814)."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speechtok.audio.features import valid_frames
from speechtok.encoders.checkpoint import load_network
from speechtok.errors import InputError
from speechtok.nn.convnext import ConvNext, begin_small
from speechtok.nn.edges import ChunkPast, Edges
from speechtok.nn.istft import InverseStft

__all__ = ["Vocos", "VocosConfig"]

_LOUDEST = 100.0  # magnitude of a bin


@dataclass(frozen=True)
class VocosConfig:
    """Shape of a Vocos. The defaults are for 50 units a second at 16 kHz; 24 kHz: ``sample_rate=24000, hop=480``.

    Parameters
    ----------
    vocab_size : int
        Units; 0: the input are frames of `feature_dim` numbers, such as log mel spectra.
    feature_dim : int
        Size of an input frame where there are no units; 0 where there are.
    sample_rate : int
        Of the wave (Hz).
    hop : int
        Samples that a unit stands for.
    repeat : int
        Frames of the backbone for each unit, a divisor of `hop`. Phases are easier to tell with short hops.
    n_fft : int or None
        Samples of the inverse transform; None: four hops of the backbone.
    embedding : int
        Size of a unit's embedding.
    dim, inner, blocks, kernel : int
        Of the backbone, see `ConvNext`.
    causal : bool
        Whether a sample depends on units up to a bounded distance behind it, so that streams are possible.
    look_ahead : int
        That distance in frames of the backbone, besides the half window that the inverse transform needs (causal only).
    speaker_dim : int
        Size of a speaker's embedding; 0: one voice.
    condition : int
        Size of what the norms are told of the speaker.
    speaker_dropout : float
        Share of rows that get the null speaker in training.

    Raises
    ------
    InputError
        If a value is unusable; the message names the field.
    """

    vocab_size: int = 0
    feature_dim: int = 0
    sample_rate: int = 16000
    hop: int = 320
    repeat: int = 1
    n_fft: int | None = None
    embedding: int = 128
    dim: int = 192
    inner: int = 576
    blocks: int = 6
    kernel: int = 7
    causal: bool = False
    look_ahead: int = 0
    speaker_dim: int = 0
    condition: int = 64
    speaker_dropout: float = 0.1

    def __post_init__(self) -> None:
        positive = ("sample_rate", "hop", "repeat", "embedding", "dim", "inner", "blocks", "kernel", "condition")
        for names, least in ((positive, 1), (("vocab_size", "feature_dim", "look_ahead", "speaker_dim"), 0)):
            for name in names:
                value = getattr(self, name)
                self._check(name, type(value) is int and value >= least, f"an integer of at least {least} is needed")
        self._check("feature_dim", (self.vocab_size > 0) != (self.feature_dim > 0), "give it or vocab_size, not both")
        self._check("repeat", self.hop % self.repeat == 0, f"it must divide hop={self.hop}")
        self._check("kernel", self.kernel % 2 == 1, "an odd number is needed")
        self._check("look_ahead", self.causal or not self.look_ahead, "only causal models have one")
        self._check("speaker_dropout", 0 <= self.speaker_dropout < 1, "a share is needed")
        InverseStft(self.transform, self.frame_hop)

    def _check(self, name: str, good: bool, why: str) -> None:
        if not good:
            raise InputError(f"vocoder configuration: {name}={getattr(self, name)!r} is not possible: {why}")

    @property
    def frame_hop(self) -> int:
        """Samples from frame to frame of the backbone."""
        return self.hop // self.repeat

    @property
    def transform(self) -> int:
        """Samples of the inverse transform."""
        return 4 * self.frame_hop if self.n_fft is None else self.n_fft


class IstftHead(nn.Module):
    """Magnitudes and phases out of frames, in float32 whatever the precision of the rest."""

    def __init__(self, dim: int, n_fft: int, hop: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, n_fft + 2)
        begin_small(self.out)
        self.istft = InverseStft(n_fft, hop)

    def forward(self, x: Tensor) -> Tensor:
        """Spectra of frames, float [B, T, D] -> complex64 [B, T, n_fft // 2 + 1], for `istft`."""
        x = self.out(x)
        with torch.autocast(x.device.type, enabled=False):
            magnitude, phase = x.float().chunk(2, -1)
            # Bounded before the exponential: behind it, an overflow would make the gradient NaN.
            magnitude = magnitude.clamp_max(math.log(_LOUDEST)).exp()
            return torch.complex(magnitude * phase.cos(), magnitude * phase.sin())


class Vocos(nn.Module):
    """Units, or other frames, to waves.

    Parameters
    ----------
    config : VocosConfig
    weights : mapping of str to Tensor, optional
        Its state dict; None: random weights.

    Attributes
    ----------
    hop, sample_rate : int
        Samples of a unit; Hz.
    delay : int
        Samples by which the wave of a stream lies behind its units: the look-ahead and half a window.
    block : int
        Units that drivers of streams pass on together.

    Raises
    ------
    CheckpointError
        If the weights do not fit.
    """

    type: ClassVar[str] = "vocos"  # type: ignore[assignment]  # hides nn.Module.type
    block = 8

    def __init__(self, config: VocosConfig, *, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.config, self.hop, self.sample_rate = config, config.hop, config.sample_rate
        self.embedding = nn.Embedding(config.vocab_size, config.embedding) if config.vocab_size else None
        condition = config.condition if config.speaker_dim else 0
        if config.speaker_dim:
            self.null_speaker = nn.Parameter(torch.zeros(config.speaker_dim))
            self.speaker = nn.Sequential(nn.Linear(config.speaker_dim, condition), nn.SiLU())
        self.backbone = ConvNext(
            config.feature_dim or config.embedding, config.dim, config.inner, config.blocks, kernel=config.kernel,
            causal=config.causal, condition=condition,
        )  # fmt: skip
        self.head = IstftHead(config.dim, config.transform, config.frame_hop)
        self.delay = config.look_ahead * config.frame_hop + self.head.istft.cut
        if weights is not None:
            load_network(self, weights)

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self.config)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None, speaker: Tensor | None = None) -> Tensor:
        """Whole sounds.

        Parameters
        ----------
        inputs : int [B, T] or float [B, T, feature_dim]
            Units, or frames where the configuration says so; T at least 1.
        lengths : int64 [B], optional
            Units of each row; what lies behind has no say. None: all.
        speaker : float [B, speaker_dim], optional
            None: the null speaker. In training some rows get it anyway.

        Returns
        -------
        float32 [B, T * hop]
            Zeros behind the end of each row.

        Raises
        ------
        InputError
            If shapes do not fit, a unit is not in the vocabulary, or a speaker is given to a model of one voice.
        """
        repeat, ahead = self.config.repeat, self.config.look_ahead
        frames, counts, edges = inputs.shape[1] * repeat, None, None
        if lengths is not None:
            counts = lengths * repeat
            edges = Edges(counts)
        x = self._frames(inputs, counts)
        # The frames that the last ones wait for.
        x = torch.cat([x, x.new_zeros(len(x), ahead, x.shape[2])], 1) if ahead else x
        x = self.backbone(x, self._condition(speaker, len(x)), edges)[:, ahead:]
        valid = None if counts is None else valid_frames(counts, frames)
        wave: Tensor = self.head.istft(self.head(x), valid)
        return wave if lengths is None else wave * valid_frames(lengths * self.hop, wave.shape[1])

    def stream_state(self, batch: int, speaker: Tensor | None = None) -> ChunkPast:
        """State of `batch` sounds before their first units, of causal models.

        Parameters
        ----------
        batch : int
        speaker : float [B, speaker_dim], optional
            Speakers of all of these sounds; None: the null speaker.

        Raises
        ------
        InputError
            If the model is not causal, or the speaker does not fit.
        """
        if not self.config.causal:
            raise InputError("this vocoder needs whole sounds; streams need one with causal=True")
        begun = torch.zeros(batch, dtype=torch.int64, device=self.device)
        condition = self._condition(speaker, batch)
        told = torch.zeros(batch, 0, device=self.device) if condition is None else condition.detach()
        past = [begun, told, *self.backbone.past(batch), *self.head.istft.past(batch)]
        return ChunkPast(past, begun.clone())

    def advance(self, inputs: Tensor, counts: Tensor, state: ChunkPast) -> tuple[Tensor, ChunkPast]:
        """Take the next units of every sound, as many as there are.

        Parameters
        ----------
        inputs : int [B, n] or float [B, n, feature_dim]
            n at least 1.
        counts : int64 [B]
            Units that there are: all, except where a sound ends, and 0 behind its end.
        state : ChunkPast
            From `stream_state` or the last call.

        Returns
        -------
        wave : float32 [B, n * hop]
            The next samples of the wave that begins `delay` samples late: what comes before means nothing. After the
            last unit further calls with counts of 0 give the rest.
        state : ChunkPast
        """
        edges = Edges(counts * self.config.repeat, state)
        x = self._frames(inputs, edges.lengths)
        begun = edges.remembered()
        edges.kept.append(begun + x.shape[1])
        told = edges.remembered()
        edges.kept.append(told)
        place = begun[:, None] + torch.arange(x.shape[1], device=x.device) - self.config.look_ahead
        valid = (place >= 0) & (place < (state.seen + counts)[:, None] * self.config.repeat)
        x = self.backbone(x, told if told.shape[1] else None, edges)
        return self.head.istft.advance(self.head(x), valid, edges), edges.after(counts)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.head.out.weight.device

    def _frames(self, inputs: Tensor, counts: Tensor | None) -> Tensor:
        """Input of the backbone, float [B, T * repeat, D], zeros from frame ``counts[b]`` of each row on."""
        size, dim = self.config.vocab_size, self.config.feature_dim
        if self.embedding is None:
            if inputs.ndim != 3 or inputs.shape[2] != dim or not inputs.is_floating_point():
                raise InputError(f"frames [B, T, {dim}] are needed, not {inputs.dtype} {tuple(inputs.shape)}")
            x = inputs
        else:
            if inputs.ndim != 2 or inputs.is_floating_point():
                raise InputError(f"units int [B, T] are needed, not {inputs.dtype} {tuple(inputs.shape)}")
            if inputs.numel() and not 0 <= int(inputs.min()) <= int(inputs.max()) < size:
                raise InputError(f"units from {int(inputs.min())} to {int(inputs.max())}: this vocoder has {size}")
            x = self.embedding(inputs)
        if not x.shape[1]:
            raise InputError("no units: a sound has at least one")
        x = x.repeat_interleave(self.config.repeat, 1) if self.config.repeat > 1 else x
        return x if counts is None else x.masked_fill(~valid_frames(counts, x.shape[1])[..., None], 0.0)

    def _condition(self, speaker: Tensor | None, batch: int) -> Tensor | None:
        """What the norms are told, float [B, condition]; None for one voice."""
        size = self.config.speaker_dim
        if not size:
            if speaker is not None:
                raise InputError("this vocoder has one voice; leave the speaker out")
            return None
        null = self.null_speaker.expand(batch, -1)
        if speaker is None:
            speaker = null
        elif speaker.shape != null.shape:
            raise InputError(f"speakers [{batch}, {size}] are needed, not {tuple(speaker.shape)}")
        elif self.training and self.config.speaker_dropout:
            dropped = torch.rand(batch, 1, device=null.device) < self.config.speaker_dropout
            speaker = torch.where(dropped, null, speaker)
        told: Tensor = self.speaker(speaker)
        return told
