"""Constant-Q transform in torch: batched, differentiable, any hop, any device.

The value of bin k at frame t is the inner product of the sound with a wavelet that is centred at sample ``t * hop``: a
complex tone of the bin's frequency under a Hann window that holds the same number Q of periods in every bin. The
wavelets are those of ``librosa.filters.wavelet``, or those of nnAudio, which made the targets of the published MERT.

``direct`` computes these products as they stand, at the full rate; the wavelets of low bins are seconds long.
``multirate`` takes each bin at the lowest rate that its wavelet fits in: sound and wavelets go through the same chain
of decimations by 2, and the products of what comes out are the products of what went in, up to the ripple and the
stopband of the decimation filter and to what the wavelet has above the new band.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.errors import InputError

__all__ = ["C1", "CQT", "cqt", "frequencies"]

C1 = 32.70319566257483  # Hz, the lowest C of a piano

Wavelets = Literal["librosa", "nnaudio"]
Method = Literal["multirate", "direct"]
Output = Literal["magnitude", "complex"]

HANN_BANDWIDTH = 1.50018310546875  # equivalent noise bandwidth in bins, librosa's figure
# A wavelet is decimated while this many side lobes of its spectrum, and 3 times its frequency, fit under the new rate.
SIDE_LOBES = 64
LEAST_RATE = 3.0
HALF_BAND_PAIRS = 18  # non-zero taps on either side of the centre of the decimation filter
KAISER_BETA = 14.0
NOTHING = 1e-8  # of a kernel's largest value
_BLOCK = 16  # samples that one row of the decimation matrix gives
_CHUNK = 2**22  # samples of all rows that are worked on at a time
_TILE = 2**24  # samples of overlapping frames that are laid out for a matrix product at a time
_SMALLEST_GROUP = 12  # bins


class _Group(NamedTuple):
    """Neighbouring bins that are computed in one product."""

    level: int  # decimations by 2 before the product
    first: int  # bin
    bins: int
    begin: int  # first sample of the kernel, from the frame's centre, at the decimated rate
    size: int  # samples of the kernel


def frequencies(bins: int, bins_per_octave: int, fmin: float = C1) -> Tensor:
    """Centre frequencies ``fmin * 2 ** (k / bins_per_octave)`` in Hz: float64 [bins]."""
    return fmin * 2.0 ** (torch.arange(bins, dtype=torch.float64) / bins_per_octave)


def _half_band() -> Tensor:
    """Decimation filter by 2, unit gain at 0 Hz: float64 [4 * HALF_BAND_PAIRS - 1], centred, every other tap 0."""
    reach = 2 * HALF_BAND_PAIRS - 1
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    taps = torch.sinc(at / 2) * torch.kaiser_window(2 * reach + 1, periodic=False, beta=KAISER_BETA, dtype=at.dtype)
    return taps / taps.sum()


def _decimation_matrix() -> Tensor:
    """The filter at _BLOCK successive places: float64 [_BLOCK, 1, 2 * (_BLOCK - 1) + taps]."""
    taps = _half_band()
    rows = torch.zeros(_BLOCK, 1, 2 * (_BLOCK - 1) + len(taps), dtype=torch.float64)
    for row in range(_BLOCK):
        rows[row, 0, 2 * row : 2 * row + len(taps)] = taps
    return rows


_REACH = 2 * HALF_BAND_PAIRS - 1  # samples on either side of its centre that the filter reads


def _products(signal: Tensor, kernel: Tensor, hop: int) -> Tensor:
    """Inner products of frames with the rows of a kernel: [B, N], [R, 1, L] -> [B, R, (N - L) // hop + 1]."""
    if signal.device.type == "cpu" and signal.dtype == torch.float32:
        return F.conv1d(signal[:, None], kernel, stride=hop)
    # cuDNN would round to TF32 and has no good algorithm for kernels of 50,000 taps.
    frames = signal.unfold(1, kernel.shape[2], hop)
    tile = max(1, _TILE // (signal.shape[0] * kernel.shape[2]))
    return torch.cat([part @ kernel[:, 0].mT for part in frames.split(tile, 1)], 1).mT


def _decimate(signal: Tensor, matrix: Tensor) -> Tensor:
    """Every second sample of the filtered signal, where the filter fits: [B, N] -> [B, (N - 2 * _REACH + 1) // 2]."""
    count = (signal.shape[1] - 2 * _REACH + 1) // 2
    blocks = -(-count // _BLOCK)
    signal = F.pad(signal, (0, (blocks - 1) * 2 * _BLOCK + matrix.shape[2] - signal.shape[1]))
    return _products(signal, matrix, 2 * _BLOCK).mT.flatten(1)[:, :count]


class CQT(nn.Module):
    """Constant-Q transform. Holds filters, which are neither trained nor saved.

    Parameters
    ----------
    sample_rate : int
        Rate of the wave (Hz).
    hop : int
        Samples from frame to frame. ``multirate`` decimates as often as the hop can be halved: an odd hop is computed
        at the full rate, which is right and slow.
    fmin : float
        Frequency of the lowest bin (Hz); the lowest C of a piano by default.
    bins, bins_per_octave : int
        Number of bins, and of bins from a frequency to its double.
    filter_scale : float
        Factor on the length of all filters; below 1 time is resolved better and frequency worse.
    norm : float or None
        Wavelets have this norm (1: sum of absolute values, 2, ``math.inf``) equal to 1; None: the bare windowed tone.
    scale : bool
        Multiply by the square root of the filter's length, as librosa does; otherwise by the length itself (its
        ``scale=False``).
    method : {"multirate", "direct"}
        See the module. ``multirate`` differs from ``direct`` by at most 1e-6 of what a tone of the same loudness gives
        in its own bin, whatever the tone's frequency (3e-6 of the root mean square in white noise).
        Of the maximum of a frame, where there is sound all around, this is below 1e-5; it is more in the faint frames
        whose wavelets only touch the sound with their ends. float32 adds up to 1e-5 in either method.
    wavelets : {"librosa", "nnaudio"}
        How long they are, with r the ratio of neighbouring frequencies: librosa's ``filter_scale * sample_rate / f *
        (r ** 2 + 1) / (r ** 2 - 1)``, or nnAudio's ``ceil(filter_scale * sample_rate / f / (r - 1))``, which is 0.7 %
        shorter at 48 bins per octave.
    output : {"magnitude", "complex"}
        What comes out. The phase is that of a cosine at the frame's centre.
    dtype : torch.dtype
        float32 or float64: of filters, arithmetic and result. Autocast is left outside; where matrix products on a GPU
        are allowed TF32 (`torch.set_float32_matmul_precision`), they are here too, at 1e-3.

    Raises
    ------
    InputError
        If a setting is out of range or the top bin does not fit under half the sample rate.
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        hop: int = 512,
        fmin: float = C1,
        bins: int = 84,
        bins_per_octave: int = 12,
        filter_scale: float = 1.0,
        norm: float | None = 1.0,
        scale: bool = True,
        method: Method = "multirate",
        wavelets: Wavelets = "librosa",
        output: Output = "magnitude",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        named = {"sample_rate": sample_rate, "hop": hop, "fmin": fmin, "bins": bins}
        named |= {"bins_per_octave": bins_per_octave, "filter_scale": filter_scale}
        for name, value in named.items():
            if not 0 < value < math.inf:
                raise InputError(f"{name}={value}: the constant-Q transform needs a positive {name}")
        for name, value in (("hop", hop), ("bins", bins), ("bins_per_octave", bins_per_octave)):
            if value != int(value):
                raise InputError(f"{name}={value}: {name} is a whole number")
        if norm is not None and not norm > 0:
            raise InputError(f"norm={norm}: use 1, 2, math.inf or None")
        for name, choice, known in (
            ("method", method, ("multirate", "direct")),
            ("wavelets", wavelets, ("librosa", "nnaudio")),
            ("output", output, ("magnitude", "complex")),
            ("dtype", dtype, (torch.float32, torch.float64)),
        ):
            if choice not in known:
                raise InputError(f"{name}={choice!r}: use one of {', '.join(map(str, known))}")
        self.sample_rate, self.hop, self.bins = sample_rate, int(hop), int(bins)
        self.output: Output = output
        width = 2.0 ** (1.0 / bins_per_octave)
        alpha = (width**2 - 1) / (width**2 + 1) if wavelets == "librosa" else width - 1
        periods = filter_scale / alpha
        centres = frequencies(int(bins), bins_per_octave, fmin)
        top = float(centres[-1]) * (1 + 0.5 * HANN_BANDWIDTH / periods)
        if top > sample_rate / 2:
            raise InputError(
                f"the top bin of {float(centres[-1]):.0f} Hz reaches {top:.0f} Hz, above half the sample rate "
                f"{sample_rate}; take fewer bins, a lower fmin or a higher sample rate"
            )
        span = periods * sample_rate / centres
        self._span = (span if wavelets == "librosa" else span.ceil()).tolist()
        self._frequency = (centres / sample_rate).tolist()
        # A tensor made in inference mode could never take part in training.
        with torch.inference_mode(False), torch.no_grad():
            self._groups: list[_Group] = []
            self.register_buffer("_matrix", _decimation_matrix().to(dtype), persistent=False)
            for level, first, end in self._split(periods if method == "multirate" else None):
                begin, kernel = self._kernel(level, first, end, norm, scale)
                self._groups.append(_Group(level, first, end - first, begin, kernel.shape[2]))
                self.register_buffer(f"_kernel_{first}", kernel.to(dtype), persistent=False)
        self._bounds = self._reach()

    def _split(self, periods: float | None) -> Iterator[tuple[int, int, int]]:
        """Level, first bin and end of every group, from low to high; without `periods` all is at level 0."""
        deepest = (self.hop & -self.hop).bit_length() - 1 if periods else 0
        rate = max(LEAST_RATE, 2 * (1 + SIDE_LOBES / periods)) if periods else 1.0
        levels = [min(deepest, max(0, math.floor(-math.log2(rate * f)))) for f in self._frequency]
        first = 0
        for end in range(1, self.bins + 1):
            # Wavelets of a group are as long as its longest with zeros, so much shorter ones go into another group.
            if (
                end == self.bins
                or levels[end] != levels[first]
                or (end - first >= _SMALLEST_GROUP and self._span[end] < 0.75 * self._span[first])
            ):
                yield levels[first], first, end
                first = end

    def _wavelet(self, bin_: int, norm: float | None) -> tuple[int, Tensor]:
        """Offset of the first sample from the frame's centre, and the wavelet at the full rate, complex128 [M]."""
        begin, end = math.floor(-self._span[bin_] / 2), math.floor(self._span[bin_] / 2)
        size = max(1, end - begin)
        at = torch.arange(begin, begin + size, dtype=torch.float64)
        wavelet = torch.polar(torch.hann_window(size, dtype=torch.float64), 2 * math.pi * self._frequency[bin_] * at)
        if norm is not None:
            wavelet = wavelet / torch.linalg.vector_norm(wavelet, norm)
        return begin, wavelet

    def _kernel(self, level: int, first: int, end: int, norm: float | None, scale: bool) -> tuple[int, Tensor]:
        """Place and kernel of a group: real parts of its bins, then negated imaginary parts, float64 [2 * n, 1, L]."""
        found = [self._wavelet(bin_, norm) for bin_ in range(first, end)]
        # All samples that the decimated wavelet touches, on the grid of the decimated rate.
        step, margin = 2**level, _REACH * (2**level - 1)
        low = math.floor(min(begin - margin for begin, _ in found) / step)
        high = math.ceil(max(begin + len(wavelet) + margin for begin, wavelet in found) / step)
        size, start = high - low, low * step - margin
        rows = torch.zeros(2 * (end - first), (size - 1) * step + 2 * margin + 1, dtype=torch.float64)
        for row, (begin, wavelet) in enumerate(found):
            gain = step * (math.sqrt(self._span[first + row]) if scale else self._span[first + row])
            place = slice(begin - start, begin - start + len(wavelet))
            rows[row, place] = gain * wavelet.real
            rows[row + end - first, place] = -gain * wavelet.imag
        matrix = _decimation_matrix()
        for _ in range(level):
            rows = _decimate(rows, matrix)
        if level:
            # The filter's tails make kernels longer by 50 samples, most of which are nothing.
            large = (rows.abs() > NOTHING * rows.abs().amax(1, keepdim=True)).any(0).nonzero()
            rows = rows[:, int(large[0]) : int(large[-1]) + 1]
            low += int(large[0])
        return low, rows[:, None]

    def _reach(self) -> list[tuple[int, int]]:
        """Samples ``[low, high)`` around a frame's centre that are needed at each level."""
        deepest = max(group.level for group in self._groups)
        bounds = [(0, 1)] * (deepest + 1)
        for level in range(deepest, -1, -1):
            inside = [(group.begin, group.begin + group.size) for group in self._groups if group.level == level]
            if level < deepest:
                low, high = bounds[level + 1]
                inside.append((2 * low - _REACH, 2 * high - 1 + _REACH))
            bounds[level] = min(low for low, _ in inside), max(high for _, high in inside)
        return bounds

    @property
    def reach(self) -> tuple[int, int]:
        """Samples before and behind its centre that a frame depends on."""
        low, high = self._bounds[0]
        return -low, high - 1

    def num_frames(self, samples: int) -> int:
        """Frames of a sound: ``1 + samples // hop``, one also without samples."""
        return 1 + samples // self.hop

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """Frames of each row for int64 [B] lengths in samples."""
        return 1 + lengths.div(self.hop, rounding_mode="floor")

    def forward(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Transform a batch. Before the first and behind the last sample of a row there are zeros.

        Long sounds go through in chunks, which the result does not depend on (beyond rounding); beside the result, the
        memory needed does not grow with their length.

        Parameters
        ----------
        wave : float [B, N]
            Waves.
        lengths : int64 [B], optional
            Valid samples of each row; all N where it is None. What lies behind is ignored.

        Returns
        -------
        float or complex [B, bins, T]
            ``T = num_frames(N)``; zeros behind the ``frame_lengths`` of each row.

        Raises
        ------
        InputError
            If shapes do not fit, or the module was cast to half precision.
        """
        if wave.ndim != 2 or not wave.is_floating_point():
            raise InputError(f"a wave is float [batch, samples], not {wave.dtype} {tuple(wave.shape)}")
        matrix = self.get_buffer("_matrix")
        if matrix.dtype not in (torch.float32, torch.float64):
            raise InputError(f"the filters of the constant-Q transform were cast to {matrix.dtype}; keep them float32")
        total = self.num_frames(wave.shape[1])
        if lengths is not None:
            lengths = lengths.to(wave.device)
            if lengths.shape != wave.shape[:1]:
                raise InputError(f"lengths {tuple(lengths.shape)} do not fit a wave {tuple(wave.shape)}")
            wave = wave.masked_fill(torch.arange(wave.shape[1], device=wave.device) >= lengths[:, None], 0.0)
        if wave.shape[0] == 0:
            dtype = matrix.dtype.to_complex() if self.output == "complex" else matrix.dtype
            return wave.new_zeros(0, self.bins, total, dtype=dtype)
        # Neighbouring chunks share samples of the reach, so much shorter ones would mostly compute these.
        chunk = 1 + max(_CHUNK // wave.shape[0], 2 * sum(self.reach)) // self.hop
        with torch.autocast(wave.device.type, enabled=False):
            wave = wave.to(matrix.dtype)
            parts = [self._frames(wave, first, min(total, first + chunk)) for first in range(0, total, chunk)]
            result = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        if lengths is not None:
            behind = torch.arange(total, device=wave.device) >= self.frame_lengths(lengths)[:, None]
            result = result.masked_fill(behind[:, None], 0.0)
        return result

    def _frames(self, wave: Tensor, first: int, end: int) -> Tensor:
        """Frames ``[first, end)`` of a batch: [B, bins, end - first]."""
        low, high = self._bounds[0]
        begin, stop = first * self.hop + low, (end - 1) * self.hop + high
        signal = wave[:, max(0, begin) : max(0, stop)]
        signal = F.pad(signal, (max(0, -begin), stop - max(0, begin) - signal.shape[1]))
        matrix = self.get_buffer("_matrix")
        found: dict[int, Tensor] = {}
        for level, (low, _) in enumerate(self._bounds):
            hop = self.hop >> level
            if level:
                before = self._bounds[level - 1][0]
                signal = _decimate(signal[:, 2 * low - _REACH - before :], matrix)
            for group in self._groups:
                if group.level != level:
                    continue
                kernel = self.get_buffer(f"_kernel_{group.first}")
                place = group.begin - low
                parts = _products(signal[:, place : place + (end - first - 1) * hop + group.size], kernel, hop)
                # The norm has no slope at 0; complex abs takes 0 for it there.
                both = torch.complex(parts[:, : group.bins], parts[:, group.bins :])
                found[group.first] = both if self.output == "complex" else both.abs()
        return torch.cat([found[group.first] for group in self._groups], 1)


@lru_cache(maxsize=8)
def _shared(device: torch.device, sample_rate: int, settings: tuple[tuple[str, Any], ...]) -> CQT:
    return CQT(sample_rate, **dict(settings)).to(device)


def cqt(wave: Tensor, sample_rate: int, *, lengths: Tensor | None = None, **settings: Any) -> Tensor:
    """Constant-Q transform with filters that are built once per settings, dtype and device.

    Parameters
    ----------
    wave : float [B, N] or [N]
        Waves; computed in float64 where they are float64, otherwise in float32.
    sample_rate : int
        Rate of the wave (Hz).
    lengths : int64 [B], optional
        Valid samples of each row of a batch.
    **settings
        Of `CQT`, without `dtype`.

    Returns
    -------
    float or complex [B, bins, T] or [bins, T]

    Raises
    ------
    InputError
        If settings or shapes do not fit.
    """
    if "dtype" in settings:
        raise InputError("the dtype is that of the wave: give a float64 wave for float64, or take CQT")
    if wave.ndim == 1 and lengths is not None:
        raise InputError("lengths are of the rows of a batch; cut a single wave")
    dtype = torch.float64 if wave.dtype == torch.float64 else torch.float32
    transform = _shared(wave.device, sample_rate, tuple(sorted({**settings, "dtype": dtype}.items())))
    return transform(wave[None])[0] if wave.ndim == 1 else transform(wave, lengths)
