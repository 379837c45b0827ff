"""How long units last: a duration predictor for deduplicated units (Lee et al. 2021, arXiv 2107.05604).

The published vocoders learn durations on crops of half a second, in which long runs hardly occur, so that predicted
durations are short. Durations are cheap to learn on whole sequences, where every run is complete.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.audio.features import valid_frames
from speechtok.encoders.checkpoint import load_network
from speechtok.errors import InputError
from speechtok.units import run_lengths

__all__ = ["DurationConfig", "DurationNetwork", "DurationPredictor", "duration_loss", "frames_of", "interior_runs"]


def interior_runs(ids: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Runs of a crop that are known to be whole: all but the first and the last where there are more than two.

    Parameters
    ----------
    ids : int32 [T]
        One unit for each frame. Of whole sequences, `speechtok.units.run_lengths` gives all runs.

    Returns
    -------
    units, durations : int32 [R]
        Durations in frames. [5, 5, 7, 7, 7, 2, 9] gives [7, 2] and [3, 1].
    """
    units, durations = run_lengths(ids)
    inside = slice(1, -1) if len(units) > 2 else slice(None)
    return units[inside], durations[inside]


class DurationNetwork(nn.Module):
    """Twice convolution, ReLU, layer norm and dropout; then a linear map. Parameter names are the published ones.

    Parameters
    ----------
    dim, inner : int
        Size of an input and of a hidden frame.
    kernel : int
        Of the convolutions, odd.
    dropout : float
    outputs : int
        Numbers for each frame.
    """

    def __init__(self, dim: int, inner: int, kernel: int, dropout: float, outputs: int = 1) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv1 = nn.Sequential(nn.Conv1d(dim, inner, kernel, padding=padding), nn.ReLU())
        self.ln1 = nn.LayerNorm(inner)
        self.conv2 = nn.Sequential(nn.Conv1d(inner, inner, kernel, padding=padding), nn.ReLU())
        self.ln2 = nn.LayerNorm(inner)
        self.proj = nn.Linear(inner, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map x [B, R, dim] to [B, R, outputs]; what lies behind a row's length has no say."""
        inside = None if lengths is None else valid_frames(lengths, x.shape[1])[..., None]
        for conv, norm in ((self.conv1, self.ln1), (self.conv2, self.ln2)):
            x = x if inside is None else x * inside
            x = self.dropout(norm(conv(x.transpose(1, 2)).transpose(1, 2)))
        out: Tensor = self.proj(x)
        return out


@dataclass(frozen=True)
class DurationConfig:
    """Shape of a duration predictor.

    Parameters
    ----------
    vocab_size : int
        Units.
    classes : int
        0: one number is predicted, the logarithm of duration + 1. Otherwise probabilities of 1 ... `classes` frames;
        the last class stands for all that is longer.
    dim : int
        Size of a unit's embedding and of hidden frames.
    kernel : int
        Of the convolutions, odd.
    dropout : float
    speaker_dim : int
        Size of a speaker's embedding; 0: one voice.

    Raises
    ------
    InputError
        If a value is unusable; the message names the field.
    """

    vocab_size: int
    classes: int = 0
    dim: int = 128
    kernel: int = 3
    dropout: float = 0.5
    speaker_dim: int = 0

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 1), ("classes", 0), ("dim", 1), ("kernel", 1), ("speaker_dim", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least or (name == "kernel" and value % 2 == 0):
                odd = "odd " if name == "kernel" else ""
                raise InputError(
                    f"duration configuration: {name}={value!r}: {odd}integers from {least} on are possible"
                )
        if not 0 <= self.dropout < 1:
            raise InputError(f"duration configuration: dropout={self.dropout!r} is no share")


class DurationPredictor(nn.Module):
    """Durations of deduplicated units.

    Parameters
    ----------
    config : DurationConfig
    weights : mapping of str to Tensor, optional
        Its state dict; None: random weights.

    Raises
    ------
    CheckpointError
        If the weights do not fit.
    """

    def __init__(self, config: DurationConfig, *, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.speaker = nn.Linear(config.speaker_dim, config.dim, bias=False) if config.speaker_dim else None
        self.network = DurationNetwork(config.dim, config.dim, config.kernel, config.dropout, config.classes or 1)
        if weights is not None:
            load_network(self, weights)

    def config_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self.config)

    def forward(self, units: Tensor, lengths: Tensor | None = None, speaker: Tensor | None = None) -> Tensor:
        """Predict, for `duration_loss` and `frames_of`.

        Parameters
        ----------
        units : int [B, R]
            Deduplicated.
        lengths : int64 [B], optional
            Units of each row; None: all.
        speaker : float [B, speaker_dim], optional
            None: no speaker is added.

        Returns
        -------
        float [B, R] or [B, R, classes]
            Logarithms of duration + 1, or logits.

        Raises
        ------
        InputError
            If a unit is not in the vocabulary, or a speaker is given to a model of one voice.
        """
        if units.numel() and not 0 <= int(units.min()) <= int(units.max()) < self.config.vocab_size:
            raise InputError(f"units must be below {self.config.vocab_size}, and there is one of {int(units.max())}")
        x = self.embedding(units)
        if speaker is not None:
            if self.speaker is None:
                raise InputError("this duration predictor has one voice; leave the speaker out")
            x = x + self.speaker(speaker)[:, None]
        x = self.network(x, lengths)
        return x if self.config.classes else x[..., 0]


def duration_loss(predicted: Tensor, durations: Tensor, lengths: Tensor) -> Tensor:
    """Squared error of ``log(duration + 1)``, or cross-entropy of the duration's class, summed over the runs of a row.

    Divide the sum over rows by the number of runs of the step.

    Parameters
    ----------
    predicted : float [B, R] or [B, R, classes]
        Of `DurationPredictor`.
    durations : int [B, R]
        Frames, at least 1 up to each row's length.
    lengths : int64 [B]
        Runs of each row.

    Returns
    -------
    float32 [B]
    """
    predicted = predicted.float()
    if predicted.ndim == 3:
        wanted = durations.long().clamp(1, predicted.shape[2]) - 1
        runs = F.cross_entropy(predicted.transpose(1, 2), wanted, reduction="none")
    else:
        runs = (predicted - (durations + 1).float().log()).square()
    return runs.masked_fill(~valid_frames(lengths, predicted.shape[1]), 0.0).sum(1)


def frames_of(predicted: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Durations in frames, at least 1.

    Parameters
    ----------
    predicted : float [B, R] or [B, R, classes]
        Of `DurationPredictor`, in evaluation mode.
    generator : torch.Generator, optional
        Draw durations from their probabilities (classes only); None: ``round(exp(predicted) - 1)``, or the most
        probable class.

    Returns
    -------
    int64 [B, R]

    Raises
    ------
    InputError
        If there is a generator, but there are no probabilities.
    """
    if predicted.ndim == 3:
        if generator is None:
            return predicted.argmax(-1) + 1
        drawn = torch.multinomial(predicted.float().softmax(-1).flatten(0, 1), 1, generator=generator)
        return drawn.view(predicted.shape[:2]) + 1
    if generator is not None:
        raise InputError("durations can be drawn from classes only; this predictor gives one number for each unit")
    return (predicted.float().exp() - 1).round().long().clamp_min(1)
