"""Segments against reference syllables, on an aligned folder: boundaries, units and cost.

A `Cutter` is any function from a wave to segments in seconds. A `Family` is a kind of cutter whose setting is chosen
on other speech. `speechtok.evaluation.cutters` makes both.

Silence units are not segments of speech: they are left out of boundaries, intervals, and of what units say about
syllables, and they count in cost and where silence is asked for (``overlap_with_silence``). The published figures of
Sylber count the starts of syllable segments only.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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

__all__ = ["RATES", "Cutter", "Family", "Segments", "Wave", "choose", "evaluate"]

Wave = NDArray[np.float32]
Integers = NDArray[np.integer[Any]]
Spans = NDArray[np.float64]
# Start and end of each segment in seconds, float64 [S, 2] in order of time; or these and their units, int [S].
Segments = Spans | tuple[Spans, Integers]

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
# Segments per second of sound, silence included, that a setting of a family must give to be chosen.
RATES = 3.0, 6.0
_RATIOS = ("precision", "recall", "f1", "r_value")  # of what `choose` tells


@dataclass(frozen=True)
class Cutter:
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
    silence : int, optional
        The unit that stands for silence; see the head of this module.
    facts : mapping
        What else the reader of a result should know: plain JSON values.
    """

    name: str
    cut: Callable[[Wave], Segments]
    sample_rate: int = 16000
    vocab_size: int | None = None
    silence: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Cutters of one kind. That one is measured which has the best R-value on other speech.

    Parameters
    ----------
    name : str
        For tables.
    prepare : callable
        From a wave to what all settings share, for instance frames. It is computed once per file, and held in memory
        for all files of the other speech.
    settings : callable
        From a list of what `prepare` gave to the settings to try: dicts of plain JSON values.
    cut : callable
        From what `prepare` gave and a setting to float64 [S, 2] seconds.
    sample_rate : int
        Hz.
    default : mapping, optional
        The setting where there is no other speech; None: other speech is needed.
    facts : mapping
        As of `Cutter`; the grid of the settings among them.
    """

    name: str
    prepare: Callable[[Wave], Any]
    settings: Callable[[Sequence[Any]], Sequence[Mapping[str, Any]]]
    cut: Callable[[Any, Mapping[str, Any]], Spans]
    sample_rate: int = 16000
    default: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def at(self, setting: Mapping[str, Any], **found: Any) -> Cutter:
        """The cutter of a setting; `found` says how it was chosen and goes into its facts."""
        facts = {**self.facts, "setting": dict(setting), **found}
        return Cutter(self.name, lambda wave: self.cut(self.prepare(wave), setting), self.sample_rate, facts=facts)


@dataclass
class _Folder:
    """Utterances of an aligned folder, their reference syllables, and the lengths (s) of the files that were read."""

    root: Path
    utterances: list[Utterance]
    references: list[Spans]
    labels: list[list[str]]
    seconds: list[float] = field(default_factory=list)

    @staticmethod
    def read(root: str | os.PathLike[str], limit: int | None) -> "_Folder":
        utterances = spread(read(root), limit)
        found = [syllables(one) for one in utterances]
        spans = [np.array([[one.start, one.end] for one in row], np.float64).reshape(-1, 2) for row in found]
        return _Folder(Path(root), utterances, spans, [[one.name for one in row] for row in found])

    @property
    def name(self) -> str:
        """Of the folder, whatever the way to it."""
        return self.root.resolve().name

    @property
    def aligned_seconds(self) -> float:
        """Stands for the length of files that are not decoded yet."""
        return sum(one.phones[-1].end for one in self.utterances if one.phones)

    def apply(self, rows: Mapping[str, tuple[int, Callable[[Wave], Any]]], tell: "_Progress") -> dict[str, list[Any]]:
        """What functions of a wave at a sample rate give for every file, by the name of the row they belong to."""
        results: dict[str, list[Any]] = {name: [] for name in rows}
        self.seconds = []
        for utterance in self.utterances:
            path = self.root / utterance.path
            # One array per rate: encoders know by it that they have seen the wave.
            waves = {rate: load(path, rate) for rate in {rate for rate, _ in rows.values()}}
            for name, (rate, function) in rows.items():
                try:
                    results[name].append(function(waves[rate]))
                except InputError as error:
                    raise InputError(f"{name} on {path}: {error}") from error
            self.seconds.append(max(len(wave) / rate for rate, wave in waves.items()))
            tell(utterance.phones[-1].end if utterance.phones else 0.0)
        return results


class _Progress:
    """Adds up seconds of sound."""

    def __init__(self, total: float, on_event: Callable[[Event], None]):
        self.done, self.total, self.on_event = 0.0, total, on_event

    def __call__(self, seconds: float) -> None:
        self.done += seconds
        self.on_event(Event("run", min(self.done, self.total), self.total))


def evaluate(
    folder: str | os.PathLike[str],
    cutters: Sequence[Cutter | Family],
    *,
    dev: str | os.PathLike[str] | None = None,
    shift: float | Mapping[Protocol, float] | None = None,
    tolerance: float = TOLERANCE,
    silence_starts: bool = False,
    step: float = 0.02,
    limit_files: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[dict[str, Any]]:
    """Measure cutters.

    Parameters
    ----------
    folder : path
        An aligned folder (see `speechtok.evaluation.alignments`).
    cutters : sequence of Cutter or Family
        Names must differ.
    dev : path, optional
        Another aligned folder, of other speakers. The setting of each family is chosen there: the best R of the
        ``sdhubert`` protocol among those that give `RATES` segments per second of sound. So is the shift of each
        cutter and protocol that gives the best R (see `speechtok.metrics.boundaries.best_shift`), 0 where no boundary
        is matched at any shift.
    shift : float or dict of protocol to float, optional
        The shift (s), which is then not chosen; default 0 without `dev`.
    tolerance : float
        Of boundaries (s).
    silence_starts : bool
        Whether silence units count as segments in boundaries and intervals.
    step : float
        Unit of time in which bitrates count durations and gaps (s).
    limit_files : int, optional
        At most this many utterances of each folder, evenly spread.
    on_event : callable
        Told the progress in seconds of sound.

    Returns
    -------
    list of dict
        One for each cutter, whose name is ``tokenizer``. ``groups``: figures per corpus group and pooled:
        ``utterances``, ``seconds``, ``syllables``, ``segments`` and both per second of sound, ``silence_units``, the
        boundaries by protocol (see `speechtok.metrics.boundaries.evaluate`), ``intervals`` (with the shift of
        ``sdhubert``), and ``units`` (None without): by matching ``iou``, ``overlap`` and ``overlap_with_silence`` (see
        `speechtok.metrics.syllabic.evaluate`), and ``cost``. ``left_out``: groups that cannot be measured and why;
        ``facts``: of the cutter, with the chosen setting; ``conventions``: all that the figures depend on besides
        cutter and data.

    Raises
    ------
    InputError
        If a folder or an option is unusable, a family needs `dev` or none of its settings gives a rate in `RATES`, or a
        cutter gives no segments in order (with its name and the file).
    AudioError
        If a file is unusable.
    """
    if len({cutter.name for cutter in cutters}) != len(cutters) or not cutters:
        raise InputError("give one or more cutters, each with a name of its own")
    given = dict(shift) if isinstance(shift, Mapping) else dict.fromkeys(PROTOCOLS, shift)
    if set(given) != set(PROTOCOLS):
        raise InputError(f"shifts are given for {', '.join(given) or 'nothing'}; name {', '.join(PROTOCOLS)}")
    measured = _Folder.read(folder, limit_files)
    other = None if dev is None else _Folder.read(dev, limit_files)
    tell = _Progress(sum(one.aligned_seconds for one in (measured, other) if one is not None), on_event)
    chosen, shifts = _choose(cutters, other, given, tolerance, silence_starts, tell)
    found = measured.apply({one.name: (one.sample_rate, partial(_cut, one)) for one in chosen}, tell)
    results = []
    for cutter in chosen:
        groups, left_out = each_group(
            measured.utterances,
            lambda members, cutter=cutter: _figures(  # type: ignore[misc]
                measured, members, found[cutter.name], cutter, shifts[cutter.name], tolerance, silence_starts, step
            ),
        )
        results.append(
            {
                "tokenizer": cutter.name,
                "vocab_size": cutter.vocab_size,
                "data": measured.name,
                "facts": dict(cutter.facts),
                "conventions": {
                    "syllables": RULES,
                    "silence": list(SILENCE),
                    "silence_units": "segments" if silence_starts else "left out of boundaries and intervals",
                    "corpora": GROUPS,
                    "sample_rate": cutter.sample_rate,
                    "tolerance": tolerance,
                    "shift": shifts[cutter.name],
                    "shift_is_added_to": boundaries.SHIFTED,
                    "shift_from": "given"
                    if shift is not None
                    else f"best R on {other.name}"
                    if other
                    else "not chosen",
                    "seconds": "total duration of the files, silence included",
                    "timing_step": step,
                    "files": "all" if limit_files is None else f"at most {limit_files}, evenly spread",
                },
                "groups": groups,
                "left_out": left_out,
            }
        )
    return results


def _choose(
    cutters: Sequence[Cutter | Family],
    dev: _Folder | None,
    given: Mapping[Protocol, float | None],
    tolerance: float,
    silence_starts: bool,
    tell: _Progress,
) -> tuple[list[Cutter], dict[str, dict[Protocol, float]]]:
    """Cutters, those of families at their settings, and the shifts of each by protocol."""
    unset = [one for one in cutters if dev is None and isinstance(one, Family) and one.default is None]
    if unset:
        raise InputError(
            f"{unset[0].name}: its thresholds are chosen on other speech; name an aligned folder of it (dev)"
        )
    plain: dict[Protocol, float] = {protocol: float(given[protocol] or 0.0) for protocol in PROTOCOLS}
    if dev is None:
        chosen = [one.at(one.default or {}, chosen_on=None) if isinstance(one, Family) else one for one in cutters]
        return chosen, {one.name: plain for one in cutters}
    fixed = given["sdhubert"] is not None
    jobs = {
        one.name: (one.sample_rate, one.prepare if isinstance(one, Family) else partial(_cut, one))
        for one in cutters
        if isinstance(one, Family) or not fixed
    }
    found = dev.apply(jobs, tell) if jobs else {}
    chosen, shifts = [], {}
    for one in cutters:
        if isinstance(one, Family):
            setting, report = _best_setting(one, found[one.name], dev, given["sdhubert"], tolerance)
            spans = [one.cut(prepared, setting) for prepared in found[one.name]]
            chosen.append(one.at(setting, chosen_on=dev.name, **report))
        else:
            spans = [] if fixed else [_segments(pair, one, silence_starts) for pair in found[one.name]]
            chosen.append(one)
        shifts[one.name] = {
            protocol: plain[protocol] if fixed else _best_shift(dev, spans, protocol, tolerance)
            for protocol in PROTOCOLS
        }
    return chosen, shifts


def _best_shift(dev: _Folder, spans: Sequence[Spans], protocol: Protocol, tolerance: float) -> float:
    try:
        return best_shift(dev.references, spans, protocol=protocol, tolerance=tolerance)
    except InputError:  # one hopeless row, whose figures say so, should not cost all the others
        return 0.0


def choose(
    family: Family,
    dev: str | os.PathLike[str],
    *,
    tolerance: float = TOLERANCE,
    limit_files: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """The setting of a family that `evaluate` would choose on an aligned folder, and what all settings gave.

    Parameters
    ----------
    family : Family
    dev, tolerance, limit_files, on_event
        As of `evaluate`.

    Returns
    -------
    setting : mapping
        The chosen one.
    tried : list of dict
        Of each setting ``setting``, ``segments_per_second`` of sound and, None where that is out of `RATES`, ``shift``
        (s) and ``precision``, ``recall``, ``f1``, ``r_value`` of the ``sdhubert`` protocol.

    Raises
    ------
    InputError
        If the folder or an option is unusable, or no setting gives a rate in `RATES`.
    AudioError
        If a file is unusable.
    """
    folder = _Folder.read(dev, limit_files)
    prepared = folder.apply(
        {family.name: (family.sample_rate, family.prepare)}, _Progress(folder.aligned_seconds, on_event)
    )[family.name]
    tried = _tried(family, prepared, folder, None, tolerance)
    return _best(family, tried, folder)["setting"], tried


def _best_setting(
    family: Family, prepared: Sequence[Any], dev: _Folder, shift: float | None, tolerance: float
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The setting with the best R, and how it was found."""
    tried = _tried(family, prepared, dev, shift, tolerance)
    best = _best(family, tried, dev)
    return best["setting"], {
        "chosen_by": f"best R (sdhubert) among {RATES[0]:g} to {RATES[1]:g} segments per second of sound",
        "settings_tried": len(tried),
        "settings_in_range": sum(one["r_value"] is not None for one in tried),
        "dev_r_value": best["r_value"],
        "dev_segments_per_second": best["segments_per_second"],
    }


def _tried(
    family: Family, prepared: Sequence[Any], dev: _Folder, shift: float | None, tolerance: float
) -> list[dict[str, Any]]:
    """What each setting gives, see `choose`."""
    rows: list[dict[str, Any]] = []
    for setting in family.settings(prepared):
        spans = [family.cut(one, setting) for one in prepared]
        rate = sum(map(len, spans)) / sum(dev.seconds)
        row: dict[str, Any] = {"setting": dict(setting), "segments_per_second": rate}
        row |= dict.fromkeys(("shift", *_RATIOS))
        if RATES[0] <= rate <= RATES[1]:
            best = _best_shift(dev, spans, "sdhubert", tolerance) if shift is None else shift
            score = boundaries.evaluate(dev.references, spans, protocol="sdhubert", tolerance=tolerance, shift=best)
            row |= {"shift": best} | {name: score[name] for name in _RATIOS}
        rows.append(row)
    return rows


def _best(family: Family, tried: Sequence[dict[str, Any]], dev: _Folder) -> dict[str, Any]:
    """The row with the best R, the first of equals."""
    scored = [one for one in tried if one["r_value"] is not None]
    if not scored:
        rates = [one["segments_per_second"] for one in tried]
        raise InputError(
            f"{family.name}: its {len(tried)} settings give {min(rates):.2f} to {max(rates):.2f} segments per "
            f"second of {dev.root}, none with a hit between {RATES[0]:g} and {RATES[1]:g}; try another layer"
        )
    return max(scored, key=lambda one: one["r_value"])


def _cut(cutter: Cutter, wave: Wave) -> tuple[Spans, Integers]:
    """Checked segments and units; units of cutters that have none are an empty array."""
    segments = cutter.cut(wave)
    if isinstance(segments, tuple) != (cutter.vocab_size is not None):
        raise InputError("gives units without a vocabulary, or a vocabulary without units; give both or neither")
    spans, ids = segments if isinstance(segments, tuple) else (segments, np.zeros(0, np.int64))
    boundaries.validate(spans)
    if isinstance(segments, tuple):
        syllabic.validate([spans], [ids])
    return spans, ids


def _speech(found: tuple[Spans, Integers], cutter: Cutter) -> NDArray[np.bool_]:
    """Which segments are no silence units, bool [S]."""
    spans, ids = found
    mask: NDArray[np.bool_] = np.ones(len(spans), bool) if cutter.silence is None else ids != cutter.silence
    return mask


def _segments(found: tuple[Spans, Integers], cutter: Cutter, silence_starts: bool) -> Spans:
    """Those that boundaries are measured of."""
    return found[0] if silence_starts else found[0][_speech(found, cutter)]


def _figures(
    folder: _Folder,
    members: list[int],
    found: Sequence[tuple[Spans, Integers]],
    cutter: Cutter,
    shifts: Mapping[Protocol, float],
    tolerance: float,
    silence_starts: bool,
    step: float,
) -> dict[str, Any]:
    """All figures of one group and cutter."""
    references = [folder.references[i] for i in members]
    speech = [_speech(found[i], cutter) for i in members]
    spans = [found[i][0][mask] for i, mask in zip(members, speech, strict=True)]
    seconds = sum(folder.seconds[i] for i in members)
    counts = {"syllables": sum(map(len, references)), "segments": sum(map(len, spans))}
    result: dict[str, Any] = {"utterances": len(members), "seconds": seconds, **counts}
    result |= {f"{name}_per_second": number / seconds for name, number in counts.items()}
    result["silence_units"] = sum(int((~mask).sum()) for mask in speech)
    guessed = [_segments(found[i], cutter, silence_starts) for i in members]
    for protocol, shift in shifts.items():
        result[protocol] = boundaries.evaluate(references, guessed, protocol=protocol, tolerance=tolerance, shift=shift)
    result["intervals"] = boundaries.evaluate_intervals(
        references, guessed, tolerance=tolerance, shift=shifts["sdhubert"]
    )
    result["units"] = None
    if cutter.vocab_size is not None:
        labels, size = [folder.labels[i] for i in members], cutter.vocab_size
        every, all_ids = [found[i][0] for i in members], [found[i][1] for i in members]
        ids = [row[mask] for row, mask in zip(all_ids, speech, strict=True)]
        result["units"] = {
            "iou": syllabic.evaluate(references, labels, spans, ids, vocab_size=size),
            "overlap": syllabic.evaluate(references, labels, spans, ids, vocab_size=size, matching="overlap"),
            "overlap_with_silence": syllabic.evaluate(
                references, labels, every, all_ids, vocab_size=size, matching="overlap", keep_silence=True
            ),
            "cost": syllabic.cost(every, all_ids, seconds=seconds, vocab_size=size, step=step),
        }
    return result
