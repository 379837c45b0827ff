"""Batched spectral front ends: log-mel, Kaldi filter bank, HuBERT's 39-dimensional MFCC.

All take waves ``[B, N]`` with their lengths and return frames ``[B, T, F]`` with theirs, on the device of the wave.
A row's valid frames depend on nothing but its own samples; frames behind its end are zero. Windows, filter banks and
the cosine transform are computed in float64 once. Kaldi's recipes stay in float64 up to the power spectrum: in bands
that a codec has emptied, 100 dB below the rest, float32 windows and transforms change the logarithm by 0.01. On the
CPU this costs nothing measurable. Devices without float64 (MPS) use float32.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from speechtok.errors import AudioError

__all__ = ["deltas", "kaldi_fbank", "log_mel", "mel_bank", "mfcc39", "normalize_bins", "valid_frames"]

MelScale = Literal["slaney", "htk", "kaldi"]

FRAME, HOP, FFT = 400, 160, 512  # Kaldi's 25 ms, 10 ms and next power of two at 16 kHz
PREEMPHASIS = 0.97
KALDI_FLOOR = 1.1920928955078125e-07  # float32 epsilon, as in Kaldi
CMVN_EPS = 1e-7
CEPSTRA, CEPSTRAL_BINS, LIFTER = 13, 23, 22.0
DELTA_REACH = 2  # win_length 5
_TILE = 64  # frames


def valid_frames(lengths: Tensor, total: int) -> Tensor:
    """Mask of the frames before each row's end.

    Parameters
    ----------
    lengths : int64 [B]
        Valid frames of each row.
    total : int
        Frames of the batch.

    Returns
    -------
    bool [B, total]
    """
    return torch.arange(total, device=lengths.device) < lengths[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# windows and filter banks


def _to_mel(hertz: Tensor, scale: MelScale) -> Tensor:
    if scale == "slaney":  # linear to 1 kHz (3 mel per 200 Hz), then 27 mel per factor 6.4
        log_part = 15.0 + 27.0 * torch.log(hertz.clamp_min(1000.0) / 1000.0) / math.log(6.4)
        return torch.where(hertz < 1000.0, hertz * 3.0 / 200.0, log_part)
    return 1127.0 * torch.log1p(hertz / 700.0)  # Kaldi; HTK's 2595 log10(1 + f / 700) up to a factor


def _to_hertz(mel: Tensor, scale: MelScale) -> Tensor:
    if scale == "slaney":
        log_part = 1000.0 * torch.exp((mel - 15.0) * (math.log(6.4) / 27.0))
        return torch.where(mel < 15.0, mel * 200.0 / 3.0, log_part)
    return 700.0 * torch.expm1(mel / 1127.0)


@lru_cache(maxsize=32)
def mel_bank(
    bins: int,
    n_fft: int,
    sample_rate: int,
    low: float,
    high: float,
    scale: MelScale = "slaney",
    area_norm: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """Triangular mel filters.

    Parameters
    ----------
    bins : int
        Number of filters.
    n_fft : int
        Length of the Fourier transform (samples).
    sample_rate : int
        Rate of the wave (Hz).
    low, high : float
        Lower end of the first and upper end of the last filter (Hz).
    scale : {"slaney", "htk", "kaldi"}
        Mel formula. "slaney" and "htk" draw triangles that are linear in Hz (librosa); "kaldi" uses the formula of
        "htk" with triangles linear in mel.
    area_norm : bool
        Divide each filter by half its width in Hz (librosa's ``norm="slaney"``).
    device : torch.device, optional
        Where the result lives; the CPU where it is None.

    Returns
    -------
    float32 [n_fft // 2 + 1, bins]
        Weights to multiply a spectrum with. The tensor is cached: do not write to it.

    Raises
    ------
    AudioError
        If the band is empty or ends above half the sample rate.
    """
    if not 0 <= low < high <= sample_rate / 2:
        raise AudioError(f"mel filters from {low} to {high} Hz do not fit a sample rate of {sample_rate} Hz")
    # A tensor made in inference mode could never take part in training, and this one outlives the caller.
    with torch.inference_mode(False):
        ends = _to_mel(torch.tensor([low, high], dtype=torch.float64), scale).tolist()
        edges = torch.linspace(ends[0], ends[1], bins + 2, dtype=torch.float64)
        at = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * (sample_rate / n_fft)
        hertz = _to_hertz(edges, scale)
        if scale == "kaldi":
            at = _to_mel(at, scale)
        else:
            edges = hertz
        left, centre, right = edges[:-2], edges[1:-1], edges[2:]
        rise, fall = (at[:, None] - left) / (centre - left), (right - at[:, None]) / (right - centre)
        bank = torch.minimum(rise, fall).clamp_min(0.0)
        if area_norm:
            bank = bank * (2.0 / (hertz[2:] - hertz[:-2]))
        return bank.to(device=device, dtype=torch.float32)


@lru_cache(maxsize=32)
def _window(kind: Literal["hann", "povey"], length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Periodic Hann window, or Kaldi's povey window (symmetric Hann to the power 0.85): `dtype` [length]."""
    with torch.inference_mode(False):
        window = torch.hann_window(length, periodic=kind == "hann", dtype=torch.float64)
        return (window if kind == "hann" else window**0.85).to(device=device, dtype=dtype)


@lru_cache(maxsize=8)
def _cepstral_matrix(device: torch.device) -> Tensor:
    """Orthonormal DCT-II of the mel bins, first 13 rows, liftered: float32 [23, 13]."""
    with torch.inference_mode(False):
        order = torch.arange(CEPSTRA, dtype=torch.float64)
        middle = torch.arange(CEPSTRAL_BINS, dtype=torch.float64)[:, None] + 0.5
        dct = torch.cos(math.pi / CEPSTRAL_BINS * middle * order) * math.sqrt(2.0 / CEPSTRAL_BINS)
        dct[:, 0] = math.sqrt(1.0 / CEPSTRAL_BINS)
        lifter = 1.0 + 0.5 * LIFTER * torch.sin(math.pi * order / LIFTER)
        return (dct * lifter).to(device=device, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# from waves to mel frames


def _checked(wave: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    if wave.ndim != 2 or lengths.shape != wave.shape[:1]:
        raise AudioError(f"wave [B, N] and lengths [B] are needed, not {tuple(wave.shape)} and {tuple(lengths.shape)}")
    return wave.float(), lengths.to(device=wave.device, dtype=torch.int64)


def _frame_lengths(lengths: Tensor, frame: int, hop: int) -> Tensor:
    return ((lengths - frame).div(hop, rounding_mode="floor") + 1).clamp_min(0)


def _cut(wave: Tensor, frame: int, hop: int) -> Tensor:
    """Overlapping frames that fit completely: a view [B, T, frame]."""
    if wave.shape[1] < frame:
        return wave.new_zeros(wave.shape[0], 0, frame)
    return wave.unfold(1, frame, hop)


def _power(frames: Tensor, n_fft: int) -> Tensor:
    """Power spectrum: float32 [B, T, n_fft // 2 + 1]."""
    if frames.numel() == 0:
        return torch.zeros(*frames.shape[:2], n_fft // 2 + 1, device=frames.device)
    spectrum = torch.fft.rfft(frames, n=n_fft)
    return torch.addcmul(spectrum.real.square(), spectrum.imag, spectrum.imag).float()


def _zero_behind(features: Tensor, lengths: Tensor) -> Tensor:
    return features.masked_fill(~valid_frames(lengths, features.shape[1])[..., None], 0.0)


def _pad_rows(wave: Tensor, lengths: Tensor, pad: int, mode: Literal["constant", "reflect"]) -> Tensor:
    """Pad each row before its start and behind its own end, not behind the end of the batch: [B, N + 2 * pad]."""
    at = torch.arange(-pad, wave.shape[1] + pad, device=wave.device).expand(wave.shape[0], -1)
    last = lengths[:, None] - 1
    inside = (at >= 0) & (at <= last)
    if mode == "reflect":
        at = at.abs()
        at = torch.where(at > last, 2 * last - at, at)
        inside = (at >= 0) & (at <= last)
    return wave.gather(1, at.clamp(0, wave.shape[1] - 1)).masked_fill(~inside, 0.0)


def log_mel(
    wave: Tensor,
    lengths: Tensor,
    *,
    sample_rate: int = 16000,
    n_fft: int = 1024,
    win_length: int | None = None,
    hop: int = 256,
    bins: int = 80,
    low: float = 0.0,
    high: float | None = None,
    scale: MelScale = "slaney",
    area_norm: bool = True,
    power: float = 1.0,
    floor: float = 1e-5,
    padding: int | None = None,
    pad_mode: Literal["constant", "reflect"] = "constant",
) -> tuple[Tensor, Tensor]:
    """Natural logarithm of a mel spectrogram.

    Parameters
    ----------
    wave : float [B, N]
        Waves.
    lengths : int64 [B]
        Valid samples of each row; what lies behind is ignored.
    sample_rate : int
        Rate of the wave (Hz).
    n_fft, win_length, hop : int
        Length of the Fourier transform, of the periodic Hann window (`n_fft` where None; centred in the transform)
        and samples from frame to frame.
    bins, low, high, scale, area_norm
        Mel filters, see `mel_bank`; `high` is half the sample rate where None. The defaults are those of
        ``librosa.filters.mel`` (Slaney's formula and area normalisation) and of the HiFi-GAN family.
    power : float
        Exponent of the magnitude: 1 (HiFi-GAN) or 2 (librosa's default).
    floor : float
        Smallest mel value before the logarithm.
    padding : int, optional
        Samples added at both ends of each row: ``n_fft // 2`` where None (librosa's centring);
        ``(n_fft - hop) // 2`` for HiFi-GAN; 0 for frames that fit completely.
    pad_mode : {"constant", "reflect"}
        Zeros, or the row mirrored at its own ends (rows of at most `padding` samples are filled up with zeros).

    Returns
    -------
    features : float32 [B, T, bins]
        Zeros behind the end of each row.
    lengths : int64 [B]
        ``(samples + 2 * padding - n_fft) // hop + 1`` frames of each row; 0 for a row without samples.

    Raises
    ------
    AudioError
        If shapes or settings do not fit.
    """
    wave, lengths = _checked(wave, lengths)
    win_length = n_fft if win_length is None else win_length
    if not 0 < win_length <= n_fft or hop < 1 or floor <= 0:
        raise AudioError(
            f"win_length={win_length}, n_fft={n_fft}, hop={hop}, floor={floor}: "
            "win_length must be in 1 ... n_fft, hop at least 1 and floor positive"
        )
    padding = n_fft // 2 if padding is None else padding
    high = sample_rate / 2 if high is None else high
    bank = mel_bank(bins, n_fft, sample_rate, low, high, scale, area_norm, wave.device)
    side = (n_fft - win_length) // 2
    window = F.pad(_window("hann", win_length, torch.float32, wave.device), (side, n_fft - win_length - side))
    padded = _pad_rows(wave, lengths, padding, pad_mode) if wave.shape[1] else wave
    spectrum = _power(_cut(padded, n_fft, hop) * window, n_fft)
    if power != 2.0:
        # The root has no slope at 0: without a bound far below `floor`, silence would give NaN gradients.
        spectrum = spectrum.clamp_min(1e-20) ** (power / 2.0)
    counts = torch.where(lengths > 0, _frame_lengths(lengths + 2 * padding, n_fft, hop), 0)
    return _zero_behind((spectrum @ bank).clamp_min(floor).log(), counts), counts


def kaldi_fbank(
    wave: Tensor, lengths: Tensor, *, bins: int = 80, low: float = 20.0, high: float = 8000.0, gain: float = 32768.0
) -> tuple[Tensor, Tensor]:
    """Kaldi's log mel filter bank at 16 kHz (``compute-fbank-feats`` without dither and energy).

    Frames of 25 ms every 10 ms that fit completely; per frame the mean is removed, pre-emphasis 0.97 applied (the
    first sample is its own predecessor), then the povey window; power spectrum, triangles linear in mel, logarithm of
    at least the float32 epsilon. The defaults are the input of w2v-BERT 2.0 before `normalize_bins`.

    Parameters
    ----------
    wave : float [B, N]
        Waves at 16 kHz in [-1, 1].
    lengths : int64 [B]
        Valid samples of each row.
    bins : int
        Mel filters.
    low, high : float
        Ends of the band (Hz).
    gain : float
        Factor on the wave: 2^15 as Kaldi reads 16-bit sound, 1 for HuBERT's MFCC.

    Returns
    -------
    features : float32 [B, T, bins]
        ``T = (N - 400) // 160 + 1``; zeros behind the end of each row.
    lengths : int64 [B]
        Valid frames of each row.

    Raises
    ------
    AudioError
        If shapes do not fit.
    """
    wave, lengths = _checked(wave, lengths)
    exact = torch.float32 if wave.device.type == "mps" else torch.float64
    window = _window("povey", FRAME, exact, wave.device)[1:]
    bank = mel_bank(bins, FFT, 16000, low, high, "kaldi", False, wave.device)
    mel = []
    # Tiles stay in the cache: 1.4 times as fast as whole utterances on a CPU, and bounded memory everywhere.
    for frames in _cut(wave.to(exact) * gain, FRAME, HOP).split(_TILE, 1):
        frames = frames - frames.mean(-1, keepdim=True)
        # The povey window begins with 0, so the first sample, its own predecessor in Kaldi, does not matter.
        frames = (frames[..., 1:] - PREEMPHASIS * frames[..., :-1]) * window
        mel.append(_power(frames, FFT) @ bank)
    features = torch.cat(mel, 1).clamp_min(KALDI_FLOOR).log()
    counts = _frame_lengths(lengths, FRAME, HOP)
    return _zero_behind(features, counts), counts


# ---------------------------------------------------------------------------------------------------------------------
# on top of mel frames


def normalize_bins(features: Tensor, lengths: Tensor) -> Tensor:
    """Give every bin of every row mean 0 and variance 1 over the row's own frames (per-utterance CMVN).

    ``(x - mean) / sqrt(var + 1e-7)`` with the unbiased variance (divisor T - 1), as the feature extractor of
    w2v-BERT 2.0. The variance of a single frame is taken as 0, so its features are 0; the published extractor
    returns NaN there.

    Parameters
    ----------
    features : float [B, T, F]
        Frames.
    lengths : int64 [B]
        Valid frames of each row.

    Returns
    -------
    float [B, T, F]
        Zeros behind the end of each row.
    """
    behind = ~valid_frames(lengths, features.shape[1])[..., None]
    count = lengths.clamp_min(1).to(features.dtype)[:, None, None]
    # The second pass takes out the rounding of the first mean: constant bins (silence) come out as 0, not as
    # rounding / sqrt(1e-7).
    for _ in range(2):
        features = features.masked_fill(behind, 0.0)
        features = features - features.sum(1, keepdim=True) / count
    features = features.masked_fill(behind, 0.0)
    variance = features.square().sum(1, keepdim=True) / (count - 1).clamp_min(1.0)
    return features / (variance + CMVN_EPS).sqrt()


def deltas(features: Tensor, lengths: Tensor) -> Tensor:
    """Slopes over five frames: ``sum_n n (x[t + n] - x[t - n]) / 10`` for n = 1, 2 (``compute_deltas`` of torchaudio).

    Parameters
    ----------
    features : float [B, T, F]
        Frames.
    lengths : int64 [B]
        Valid frames of each row; the first and the last of them are repeated beyond the ends.

    Returns
    -------
    float [B, T, F]
        Values behind the end of a row mean nothing.
    """
    at = torch.arange(features.shape[1], device=features.device)
    last = (lengths - 1).clamp_min(0)[:, None]
    total = torch.zeros_like(features)
    for n in range(1, DELTA_REACH + 1):
        after = torch.minimum(at + n, last)[..., None].expand_as(features)
        before = torch.minimum((at - n).clamp_min(0), last)[..., None].expand_as(features)
        total += n * (features.gather(1, after) - features.gather(1, before))
    return total / (2 * sum(n * n for n in range(1, DELTA_REACH + 1)))


def mfcc39(wave: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """MFCC with first and second differences: the features of HuBERT's first iteration, 100 per second.

    Kaldi's defaults (13 cepstra of 23 mel bins, no energy, lifter 22, no mean subtraction, no dither) on the wave as
    it is, not scaled to 16 bits; then `deltas` and `deltas` of these (Hsu et al. 2021, arXiv:2106.07447, section
    IV-B; fairseq's ``simple_kmeans``).

    Parameters
    ----------
    wave : float [B, N]
        Waves at 16 kHz in [-1, 1].
    lengths : int64 [B]
        Valid samples of each row.

    Returns
    -------
    features : float32 [B, T, 39]
        Cepstra, deltas, delta-deltas; ``T = (N - 400) // 160 + 1``; zeros behind the end of each row.
    lengths : int64 [B]
        Valid frames of each row.

    Raises
    ------
    AudioError
        If shapes do not fit.
    """
    mel, counts = kaldi_fbank(wave, lengths, bins=CEPSTRAL_BINS, gain=1.0)
    cepstra = mel @ _cepstral_matrix(mel.device)
    slope = deltas(cepstra, counts)
    return _zero_behind(torch.cat([cepstra, slope, deltas(slope, counts)], dim=-1), counts), counts
