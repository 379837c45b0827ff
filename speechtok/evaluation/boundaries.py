"""Segments of a segmenter against reference syllables, on an aligned folder: boundaries, units and cost.

A `Segmenter` is any function from a wave to segments in seconds. Two that know nothing of syllables give the rows that
all others are read against: `uniform_grid`, and `energy_seed` at the dips of loudness.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from speechtok.audio.decode import load
from speechtok.corpus.engine import Event
from speechtok.errors import InputError
from speechtok.evaluation.alignments import GROUPS, SILENCE, Utterance, read
from speechtok.evaluation.syllables import RULES, syllables
from speechtok.evaluation.units import each_group, spread
from speechtok.metrics import boundaries, syllabic
from speechtok.metrics.boundaries import TOLERANCE, Protocol, best_shift

__all__ = ["Segmenter", "Segments", "energy_seed", "evaluate", "uniform_grid"]

Wave = NDArray[np.float32]
Spans = NDArray[np.float64]
# Start and end of each segment in seconds, float64 [S, 2] in order of time; or these and their units, int [S].
Segments = Spans | tuple[Spans, NDArray[np.integer[Any]]]

_HOP, _WINDOW = 0.01, 0.025  # seconds, of the envelope
_BAND = 300.0, 3000.0  # Hz: vowels and sonorants, neither hum nor hiss


@dataclass(frozen=True)
class Segmenter:
    """A named function that cuts waves.

    Parameters
    ----------
    name : str
        For tables.
    cut : callable
        Takes float32 [N] at `sample_rate`; gives float64 [S, 2] starts and ends in seconds, in order of time, or a pair
        of these and int [S] units.
    sample_rate : int
        Hz.
    vocab_size : int, optional
        Of the units; None: `cut` gives none.
    """

    name: str
    cut: Callable[[Wave], Segments]
    sample_rate: int = 16000
    vocab_size: int | None = None


@dataclass
class _Folder:
    """Utterances, their reference syllables and lengths in seconds, and what each segmenter made of them."""

    utterances: list[Utterance]
    references: list[Spans] = field(default_factory=list)
    labels: list[list[str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    spans: list[list[Spans]] = field(default_factory=list)  # by segmenter
    ids: list[list[NDArray[np.integer[Any]]]] = field(default_factory=list)


def evaluate(
    folder: str | os.PathLike[str],
    segmenters: Sequence[Segmenter],
    *,
    dev: str | os.PathLike[str] | None = None,
    shift: float | Mapping[Protocol, float] | None = None,
    tolerance: float = TOLERANCE,
    step: float = 0.02,
    limit_files: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[dict[str, Any]]:
    """Measure segmenters.

    Parameters
    ----------
    folder : path
        An aligned folder (see `speechtok.evaluation.alignments`).
    segmenters : sequence of Segmenter
        Names must differ.
    dev : path, optional
        Another aligned folder, of other speakers: there the shift of each segmenter and protocol is chosen that gives
        the best R (see `speechtok.metrics.boundaries.best_shift`), over all its files together.
    shift : float or dict of protocol to float, optional
        The shift (s) where `dev` is not given; default 0.
    tolerance : float
        Of boundaries (s).
    step : float
        Unit of time in which bitrates count durations and gaps (s).
    limit_files : int, optional
        At most this many utterances of each folder, evenly spread.
    on_event : callable
        Told the progress in seconds of sound.

    Returns
    -------
    list of dict
        One for each segmenter. ``groups``: figures per corpus group and pooled: ``utterances``, ``seconds``,
        ``syllables``, ``segments`` and both per second of sound, the boundaries by protocol (see
        `speechtok.metrics.boundaries.evaluate`), and ``units`` (None without): by matching ``iou``, ``overlap`` and
        ``overlap_with_silence`` (see `speechtok.metrics.syllabic.evaluate`), and ``cost``. ``left_out``: groups that
        cannot be measured and why; ``conventions``: all that the figures depend on besides segmenter and data.

    Raises
    ------
    InputError
        If a folder or an option is unusable, or a segmenter gives no segments in order (with its name and the file).
    AudioError
        If a file is unusable.
    """
    if len({segmenter.name for segmenter in segmenters}) != len(segmenters) or not segmenters:
        raise InputError("give one or more segmenters, each with a name of its own")
    if dev is not None and shift is not None:
        raise InputError("give either a shift or a folder on which to choose it")
    given = dict(shift) if isinstance(shift, Mapping) else dict.fromkeys(get_args(Protocol), shift)
    if set(given) != set(get_args(Protocol)):
        raise InputError(
            f"shifts are given for {', '.join(given) or 'nothing'}; name {' and '.join(get_args(Protocol))}"
        )
    roots = [Path(folder)] if dev is None else [Path(folder), Path(dev)]
    lists = [spread(read(root), limit_files) for root in roots]
    # Aligned time stands for the length of files that are not decoded yet.
    total = sum(one.phones[-1].end for utterances in lists for one in utterances if one.phones)
    done = [0.0]

    def advance(seconds: float) -> None:
        done[0] += seconds
        on_event(Event("run", min(done[0], total), total))

    measured, *chosen = (
        _cut(root, utterances, segmenters, advance) for root, utterances in zip(roots, lists, strict=True)
    )
    results = []
    for index, segmenter in enumerate(segmenters):
        shifts: dict[Protocol, float] = {
            protocol: best_shift(chosen[0].references, chosen[0].spans[index], protocol=protocol, tolerance=tolerance)
            if chosen
            else float(given[protocol] or 0.0)
            for protocol in get_args(Protocol)
        }
        groups, left_out = each_group(
            measured.utterances,
            lambda members, index=index, shifts=shifts: _figures(  # type: ignore[misc]
                measured, members, index, segmenters[index].vocab_size, shifts, tolerance, step
            ),
        )
        results.append(
            {
                "segmenter": segmenter.name,
                "vocab_size": segmenter.vocab_size,
                "data": Path(folder).resolve().name,
                "conventions": {
                    "syllables": RULES,
                    "silence": list(SILENCE),
                    "corpora": GROUPS,
                    "sample_rate": segmenter.sample_rate,
                    "tolerance": tolerance,
                    "shift": shifts,
                    "shift_is_added_to": boundaries.SHIFTED,
                    "shift_from": "given" if dev is None else f"best R on {Path(dev).resolve().name}",
                    "seconds": "total duration of the files, silence included",
                    "timing_step": step,
                    "files": "all" if limit_files is None else f"at most {limit_files}, evenly spread",
                },
                "groups": groups,
                "left_out": left_out,
            }
        )
    return results


def _cut(
    root: Path, utterances: list[Utterance], segmenters: Sequence[Segmenter], advance: Callable[[float], None]
) -> _Folder:
    found = _Folder(utterances, spans=[[] for _ in segmenters], ids=[[] for _ in segmenters])
    for utterance in utterances:
        reference = syllables(utterance)
        found.references.append(np.array([[one.start, one.end] for one in reference], np.float64).reshape(-1, 2))
        found.labels.append([one.name for one in reference])
        waves = {rate: load(root / utterance.path, rate) for rate in {one.sample_rate for one in segmenters}}
        for index, segmenter in enumerate(segmenters):
            wave = waves[segmenter.sample_rate]
            try:
                spans, ids = _checked(segmenter.cut(wave), segmenter)
            except InputError as error:
                raise InputError(f"{segmenter.name} on {root / utterance.path}: {error}") from error
            found.spans[index].append(spans)
            found.ids[index].append(ids)
        found.seconds.append(len(wave) / segmenter.sample_rate)
        advance(utterance.phones[-1].end if utterance.phones else 0.0)
    return found


def _checked(segments: Segments, segmenter: Segmenter) -> tuple[Spans, NDArray[np.integer[Any]]]:
    """Segments and units; units of segmenters that have none are an empty array."""
    if isinstance(segments, tuple) != (segmenter.vocab_size is not None):
        raise InputError("gives units without a vocabulary, or a vocabulary without units; give both or neither")
    spans, ids = segments if isinstance(segments, tuple) else (segments, np.zeros(0, np.int64))
    boundaries.validate(spans)
    if isinstance(segments, tuple):
        syllabic.validate([spans], [ids])
    return spans, ids


def _figures(
    folder: _Folder,
    members: list[int],
    index: int,
    vocab_size: int | None,
    shifts: Mapping[Protocol, float],
    tolerance: float,
    step: float,
) -> dict[str, Any]:
    """All figures of one group and segmenter."""
    references = [folder.references[i] for i in members]
    spans = [folder.spans[index][i] for i in members]
    seconds = sum(folder.seconds[i] for i in members)
    counts = {"syllables": sum(map(len, references)), "segments": sum(map(len, spans))}
    result: dict[str, Any] = {"utterances": len(members), "seconds": seconds, **counts}
    result |= {f"{name}_per_second": number / seconds for name, number in counts.items()}
    for protocol, shift in shifts.items():
        result[protocol] = boundaries.evaluate(references, spans, protocol=protocol, tolerance=tolerance, shift=shift)
    result["units"] = None
    if vocab_size is not None:
        labels, ids = [folder.labels[i] for i in members], [folder.ids[index][i] for i in members]
        result["units"] = {
            name: syllabic.evaluate(
                references, labels, spans, ids, vocab_size=vocab_size,
                matching="iou" if name == "iou" else "overlap", keep_silence=name == "overlap_with_silence",
            )
            for name in ("iou", "overlap", "overlap_with_silence")
        }  # fmt: skip
        result["units"]["cost"] = syllabic.cost(spans, ids, seconds=seconds, vocab_size=vocab_size, step=step)
    return result


def uniform_grid(rate: float, *, sample_rate: int = 16000) -> Segmenter:
    """Equal segments from the start to the end of the sound, `rate` per second; the last may be shorter."""
    if not (np.isfinite(rate) and rate > 0):
        raise InputError(f"the rate is {rate} per second; it must be positive")

    def cut(wave: Wave) -> Spans:
        seconds = len(wave) / sample_rate
        starts = np.arange(np.ceil(seconds * rate)) / rate
        return np.stack([starts, np.append(starts[1:], seconds)[: len(starts)]], 1)

    return Segmenter(f"uniform-{rate:g}", cut, sample_rate)


def energy_seed(
    *, smoothing: float = 0.025, min_distance: float = 0.1, floor: float = 0.02, sample_rate: int = 16000
) -> Segmenter:
    """Segments between the dips of the envelope of 300 to 3000 Hz.

    The envelope is the root of the energy of that band in windows of 25 ms every 10 ms, smoothed by a Gaussian. Each
    of its peaks is a segment; neighbours meet at the lowest point between them. Where the envelope is below the floor
    there is no segment.

    Parameters
    ----------
    smoothing : float
        Standard deviation of the Gaussian (s); larger gives fewer segments.
    min_distance : float
        Of two peaks (s); of nearer ones the lower is dropped.
    floor : float
        Silence, relative to the 95th percentile of the envelope of the file.
    sample_rate : int
        Hz, at least 8000.
    """
    if min(smoothing, min_distance, floor) < 0 or sample_rate < 8000:
        raise InputError("smoothing, distance and floor must not be negative, and the band needs 8000 Hz or more")

    def cut(wave: Wave) -> Spans:
        envelope = _smooth(_envelope(wave, sample_rate), smoothing / _HOP)
        if len(envelope) == 0 or envelope.max() <= 0:
            return np.zeros((0, 2))
        loud = envelope > floor * np.quantile(envelope, 0.95)
        peaks = _peaks(np.where(loud, envelope, 0), min_distance / _HOP)
        dips = [a + int(np.argmin(envelope[a:b])) for a, b in pairwise(peaks)]
        borders = [0, *dips, len(envelope)]
        spans = []
        for peak, begin, end in zip(peaks, borders[:-1], borders[1:], strict=True):
            # The stretch around the peak that is above the floor.
            before, after = np.flatnonzero(~loud[begin:peak]), np.flatnonzero(~loud[peak:end])
            spans.append((begin + before[-1] + 1 if len(before) else begin, peak + after[0] if len(after) else end))
        return np.minimum(np.array(spans, np.float64).reshape(-1, 2) * _HOP, len(wave) / sample_rate)

    return Segmenter(f"energy-{smoothing * 1000:g}ms", cut, sample_rate)


def _envelope(wave: Wave, sample_rate: int) -> NDArray[np.float64]:
    """Amplitude of the band, float64 [T]: entry i belongs to the time ``i * _HOP``."""
    hop, window = round(_HOP * sample_rate), round(_WINDOW * sample_rate)
    padded = np.pad(wave, window // 2)
    if len(padded) < window:
        return np.zeros(0)
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    spectra = np.fft.rfft(frames * np.hanning(window), axis=1)
    frequencies = np.fft.rfftfreq(window, 1 / sample_rate)
    band = (frequencies >= _BAND[0]) & (frequencies <= _BAND[1])
    return np.asarray(np.sqrt((np.abs(spectra[:, band]) ** 2).sum(1)))


def _smooth(values: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Gaussian of `sigma` entries; the sum of its weights inside of the array is 1 everywhere."""
    if sigma <= 0 or len(values) == 0:
        return values
    kernel = np.exp(-0.5 * (np.arange(-int(4 * sigma), int(4 * sigma) + 1) / sigma) ** 2)
    reach = len(kernel) // 2
    total, weight = (np.convolve(x, kernel)[reach : reach + len(values)] for x in (values, np.ones(len(values))))
    return np.asarray(total / weight)


def _peaks(values: NDArray[np.float64], distance: float) -> list[int]:
    """Local maxima above 0, the highest first and none within `distance` entries of one taken; in order of time."""
    padded = np.concatenate(([0], values, [0]))
    rising = np.flatnonzero((values > padded[:-2]) & (values >= padded[2:]))
    taken: list[int] = []
    for peak in sorted(rising.tolist(), key=lambda i: -values[i]):
        if all(abs(peak - other) >= distance for other in taken):
            taken.append(peak)
    return sorted(taken)
