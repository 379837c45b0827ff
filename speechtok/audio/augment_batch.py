"""Noise, reverberation and gain for batches of waves on any device: augmentation on the fly.

Draws are those of `speechtok.audio.augment`; waves agree with it within 1e-5 of full scale. The other families gain
nothing from a device: the phase vocoder runs along time, codecs are programs, and the rest is cheap.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from speechtok.audio.augment import draws_of
from speechtok.audio.clips import Report
from speechtok.audio.families import Draw, draw_gain, draw_noise, draw_room
from speechtok.audio.features import valid_frames
from speechtok.audio.mixing import direct_path, fft_size
from speechtok.audio.resources import AugmentResources
from speechtok.errors import AudioError, InputError

__all__ = ["BATCHED", "augment_batch", "mix_at_snr", "reverberate"]


def augment_batch(
    waves: Tensor,
    lengths: Tensor,
    sample_rate: int,
    family: str,
    keys: Sequence[str],
    seed: int = 0,
    resources: AugmentResources | None = None,
    strength: float | None = None,
) -> tuple[Tensor, list[Report]]:
    """Augment each row by its own draws.

    Parameters
    ----------
    waves : float32 [B, N]
        Sounds on any device.
    lengths : int64 [B]
        Valid samples of each row, 1 ... N.
    sample_rate : int
        In Hz.
    family : str
        ``noise``, ``reverb`` or ``gain``, or some of them joined by ``+``.
    keys : sequence of B str
        Names of the utterances. A name that holds the epoch or step gives other draws in each.
    seed, resources, strength
        See `speechtok.audio.augment.augment_with_report`.

    Returns
    -------
    waves : float32 [B, N]
        On the same device; zeros behind the end of each row. A silent row stays silent, where `augment` refuses it to
        add noise: a batch does not end for one crop.
    reports : list of B dict
        See `speechtok.audio.augment.augment_with_report`.

    Raises
    ------
    AudioError
        If shapes do not fit, or as `speechtok.audio.augment.augment_with_report`.
    InputError
        If a family is unknown or not batched, or a strength does not fit it.
    """
    if waves.ndim != 2 or lengths.shape != waves.shape[:1] or len(keys) != len(waves) or not keys:
        raise AudioError(
            f"waves [B, N] with B lengths and keys, B at least 1, are needed, not {tuple(waves.shape)}, "
            f"{tuple(lengths.shape)} and {len(keys)} keys"
        )
    counts = lengths.tolist()
    if not all(1 <= count <= waves.shape[1] for count in counts):
        raise AudioError(f"lengths from 1 to {waves.shape[1]} are needed, not {counts[:10]}")
    rows = [draws_of(family, sample_rate, key, seed, resources, strength) for key in keys]
    names = family.split("+")
    for name in names:
        if name not in BATCHED:
            raise InputError(f"family={family!r}: {', '.join(BATCHED)} are batched; take augment for the others")
    lengths = lengths.to(waves.device)
    waves = waves.float().masked_fill(~valid_frames(lengths, waves.shape[1]), 0.0)
    reports: list[Report] = [{} for _ in keys]
    for name in names:
        waves, facts = BATCHED[name](waves, lengths, counts, [row[name] for row in rows])
        for report, found in zip(reports, facts, strict=True):
            report |= found if len(names) == 1 else {f"{name}.{entry}": value for entry, value in found.items()}
    return waves, reports


def mix_at_snr(waves: Tensor, lengths: Tensor, noises: Tensor, snr_db: Tensor, legacy_half_snr: bool = False) -> Tensor:
    """Add noise to each row at a signal-to-noise ratio, as `speechtok.audio.mixing.mix_at_snr` defines it.

    Parameters
    ----------
    waves, noises : float32 [B, N]
        With zeros behind the end of each row.
    lengths : int64 [B]
    snr_db : float32 [B]
        In dB.
    legacy_half_snr : bool
        Halve the ratio.

    Returns
    -------
    float32 [B, N]
        A row stays as it is if it or its noise is silent.
    """
    levels, noise_levels = _rms(waves, lengths), _rms(noises, lengths)
    factor = levels / noise_levels * 10.0 ** (-snr_db / (40 if legacy_half_snr else 20))
    return waves + noises * factor.masked_fill(noise_levels == 0, 0.0)[:, None]


def reverberate(waves: Tensor, lengths: Tensor, responses: Tensor, delays: Tensor) -> Tensor:
    """Put each row into a room, as `speechtok.audio.mixing.reverberate` does: direct sound in place, level kept.

    Parameters
    ----------
    waves : float32 [B, N]
        With zeros behind the end of each row.
    lengths : int64 [B]
    responses : float32 [B, M]
        Room responses, filled up with zeros.
    delays : int64 [B]
        Where the direct sound is in each (`speechtok.audio.mixing.direct_path`).

    Returns
    -------
    float32 [B, N]
    """
    count = waves.shape[1]
    size = fft_size(count + responses.shape[1] - 1)
    wet = torch.fft.irfft(torch.fft.rfft(waves, size) * torch.fft.rfft(responses, size), size)
    # The transform is at least N + M - 1 long and delays are below M: no index leaves it.
    wet = wet.gather(1, delays[:, None] + torch.arange(count, device=waves.device))
    wet = wet.masked_fill(~valid_frames(lengths, count), 0.0)
    level = _rms(wet, lengths)
    return wet * (_rms(waves, lengths) / level).masked_fill(level == 0, 1.0)[:, None]


Draws = Sequence[Draw]
Batched = Callable[[Tensor, Tensor, list[int], Draws], tuple[Tensor, list[Report]]]


def _noise(waves: Tensor, lengths: Tensor, counts: list[int], draws: Draws) -> tuple[Tensor, list[Report]]:
    pieces, snr_db, reports = zip(
        *(draw_noise(draw, count) for draw, count in zip(draws, counts, strict=True)), strict=True
    )
    noises = _stacked(pieces, waves.shape[1], waves.device)
    legacy = draws[0].resources.legacy_half_snr
    return mix_at_snr(waves, lengths, noises, torch.tensor(snr_db).to(waves.device), legacy), list(reports)


def _reverb(waves: Tensor, lengths: Tensor, counts: list[int], draws: Draws) -> tuple[Tensor, list[Report]]:
    responses, reports = zip(*map(draw_room, draws), strict=True)
    delays = [direct_path(response, draw.sample_rate) for response, draw in zip(responses, draws, strict=True)]
    stacked = _stacked(responses, max(map(len, responses)), waves.device)
    return reverberate(waves, lengths, stacked, torch.tensor(delays).to(waves.device)), list(reports)


def _gain(waves: Tensor, lengths: Tensor, counts: list[int], draws: Draws) -> tuple[Tensor, list[Report]]:
    gains, reports = zip(*map(draw_gain, draws), strict=True)
    return waves * (10.0 ** (torch.tensor(gains) / 20)).to(waves.device)[:, None], list(reports)


BATCHED: dict[str, Batched] = {"noise": _noise, "reverb": _reverb, "gain": _gain}


def _stacked(rows: Sequence[np.ndarray], length: int, device: torch.device) -> Tensor:
    out = np.zeros((len(rows), length), np.float32)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(out).to(device)


def _rms(waves: Tensor, lengths: Tensor) -> Tensor:
    return (waves.square().sum(1) / lengths).sqrt()
