"""How steady the units of tokenizers are under augmentation: unit edit distances, their curves, and what guards them.

A tokenizer that says always the same is perfectly steady. So three figures stand beside every distance: how much of the
vocabulary is used, how many units there are in a second, and *chance*, the distance between clean units of different
utterances. A good tokenizer is far below its chance; one that has collapsed has both at 0.

The floor is what harmless changes cost: one frame of silence appended, and a delay of 5 ms.

All tokenizers are measured on the same files: one that cannot be used in any version, or at the rate of any tokenizer,
counts nowhere.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from speechtok.audio.augment import FAMILIES, STRENGTHS, AugmentResources, augment, parts_of
from speechtok.audio.clips import Wave
from speechtok.audio.decode import load
from speechtok.audio.rooms import SimulatedRooms
from speechtok.corpus.engine import Event
from speechtok.corpus.sources import Utterance, scan
from speechtok.errors import InputError, SpeechtokError
from speechtok.evaluation.complexity import LEAST, SECONDS, VIEWS, Seen, complexity, see, views_of
from speechtok.evaluation.units import POOLED, grouped, spread
from speechtok.metrics import edit_distance, phonetic
from speechtok.metrics.edit_distance import Agg, Norm
from speechtok.tokenizer import Tokenizer
from speechtok.units import run_lengths

__all__ = ["CURVES", "evaluate"]

CURVES: dict[str, tuple[float, ...]] = {
    "noise": (0.0, 5.0, 10.0, 15.0, 20.0, 30.0),
    "stretch": (0.7, 0.8, 0.9, 1.1, 1.2, 1.3),
    "reverb": (0.1, 0.2, 0.4, 0.7, 1.0),
    "pitch": (-6.0, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0, 6.0),
}
CLEAN = "clean"
FLOORS = ("pad", "delay")
_DELAY_SECONDS = 0.005
_BATCH = 16  # files that are encoded together
_COLLAPSED = 0.5  # share of log2(vocabulary) that the entropy of units has at least in a tokenizer at work

Ids = NDArray[np.int32]
Change = Callable[[Wave, Tokenizer, str], Wave]  # of the sound of an utterance, given by its key
T = TypeVar("T")


@dataclass
class _Heard:
    """One utterance, its clean sound at the rate that is at work, and what tokenizers make of it, by their names."""

    utterance: Utterance
    wave: Wave = field(default_factory=lambda: np.zeros(0, np.float32))
    seconds: float = 0.0
    ids: dict[tuple[str, str], Ids] = field(default_factory=dict)  # of every tokenizer and version
    seen: dict[str, Seen] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plan:
    """What is done to utterances before tokenizers hear them.

    Parameters
    ----------
    versions : dict
        How each version is made.
    curves : dict
        Likewise of versions that are made of few utterances only.
    curve_keys, view_keys : frozenset of str
        Those utterances; utterances of which there are views for augmentation complexity.
    views : callable
        Makes them.
    """

    versions: dict[str, Change]
    curves: dict[str, Change]
    curve_keys: frozenset[str]
    view_keys: frozenset[str]
    views: Callable[[Wave, int, str], list[Wave]]


def evaluate(
    folder: str | os.PathLike[str],
    tokenizers: Sequence[Tokenizer],
    *,
    families: Sequence[str] = FAMILIES,
    resources: AugmentResources | None = None,
    seed: int = 0,
    norm: Norm = "dedup_ref",
    agg: Agg = "mean",
    codebook: int = 0,
    limit_files: int | None = None,
    groups: bool = False,
    curve_files: int = 40,
    complexity_files: int = 0,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Measure tokenizers on the same sounds with the same draws.

    Parameters
    ----------
    folder : path or glob
        Sound, as for ``tokenize``; labels are not needed.
    tokenizers : sequence of Tokenizer
        Of frames or segments.
    families : sequence of str
        See `speechtok.audio.augment`.
    resources : AugmentResources, optional
        Noises and rooms; by default those that need no data folder.
    seed : int
        Of all draws.
    norm, agg : str
        See `speechtok.metrics.edit_distance`.
    codebook : int
        Which one is compared.
    limit_files : int, optional
        At most this many files, evenly spread.
    groups : bool
        Whether each corpus (the first folder of the keys) is measured apart, too.
    curve_files : int
        At most so many files, evenly spread, for distances against strength (`CURVES`); 0: none. Curves of
        reverberation are of simulated rooms.
    complexity_files : int
        At most so many files, evenly spread, for augmentation complexity, see `speechtok.evaluation.complexity`; 0:
        none.
    on_event : callable
        Progress in files times versions times tokenizers.

    Returns
    -------
    dict
        ``tokenizers``: by name, ``ued``, ``ued_ci`` (95 %, bootstrap over utterances), ``edits_per_second`` and
        ``run_ratio`` by family, ``chance``, ``floor``, ``units_per_second``, ``runs_per_second``, ``vocab_used``,
        ``vocab_size``, ``perplexity``, ``collapsed``, ``groups`` (all of these by corpus), ``curves``, ``complexity``;
        ``files``: how many were measured; ``failed``: files that could not be, and why; ``conventions``.

    Raises
    ------
    InputError
        If an option or the folder is unusable, no file can be measured, or so many cannot that fewer than 16 are left
        for augmentation complexity.
    """
    names = [tokenizer.name for tokenizer in tokenizers]
    if not tokenizers or len(set(names)) < len(names):
        raise InputError(f"tokenizers {', '.join(names) or '(none)'}: give at least one, and none of a name twice")
    for tokenizer in tokenizers:
        if not 0 <= codebook < tokenizer.quantizer.codebooks:
            raise InputError(
                f"{tokenizer.name} has {tokenizer.quantizer.codebooks} codebooks; there is none {codebook}"
            )
    if not families or min(curve_files, complexity_files) < 0:
        raise InputError("give at least one family, and numbers of files that are not negative")
    for family in families:
        parts_of(family)  # refuses unknown ones before anything is decoded
    edit_distance.validate([np.zeros(1, int)], [np.zeros(1, int)], norm, agg)
    listing = scan(str(folder))
    failed = {bad.path: bad.reason for bad in listing.rejected}
    chosen = spread(listing.utterances, limit_files)
    resources = resources or AugmentResources.default()
    curve_resources = AugmentResources(resources.noises, SimulatedRooms(), resources.legacy_half_snr)
    curved = {
        f"{family} {strength:g}": _augmented(family, curve_resources, seed, strength)
        for family in families
        for strength in CURVES.get(family, ())
    }
    plan = _Plan(
        {CLEAN: lambda wave, tokenizer, key: wave, "floor pad": _padded, "floor delay": _delayed}
        | {family: _augmented(family, resources, seed) for family in families},
        curved,
        frozenset(one.key for one in spread(chosen, curve_files)) if curve_files and curved else frozenset(),
        frozenset(one.key for one in spread(chosen, complexity_files)) if complexity_files else frozenset(),
        partial(views_of, families=families, resources=resources, seed=seed),
    )
    if complexity_files and len(plan.view_keys) < LEAST:  # now, not after everything else
        raise InputError(f"augmentation complexity of {len(plan.view_keys)} files: at least {LEAST} are needed")
    each = len(chosen) * len(plan.versions) + len(plan.curve_keys) * len(curved) + len(plan.view_keys)
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        on_event(Event("run", done, each * len(tokenizers)))

    heard = list(_hear(chosen, tokenizers, codebook, plan, failed, tell))
    if not heard:
        reason = next(iter(failed.values()), "it holds no sound")
        raise InputError(f"{folder}: nothing could be measured; the first reason: {reason}")
    bent = [one for one in heard if one.utterance.key in plan.curve_keys]
    viewed = [one for one in heard if one.utterance.key in plan.view_keys]
    members = grouped([one.utterance.key for one in heard]) if groups else {}
    # Measured rooms have the reverberation that they have.
    ranged = [one for one in families if one != "reverb" or isinstance(resources.rooms, SimulatedRooms)]
    result: dict[str, Any] = {}
    for tokenizer in tokenizers:
        figures = _figures(heard, tokenizer, families, norm, agg)
        if groups:
            figures["groups"] = {
                name: _figures([heard[place] for place in places], tokenizer, families, norm, agg)
                for name, places in members.items()
                if name != POOLED
            }
        figures["curves"] = {
            family: _curve(bent, tokenizer.name, family, norm, agg) for family in families if bent and family in CURVES
        }
        if plan.view_keys:
            seen = [one.seen[tokenizer.name] for one in viewed]
            figures["complexity"] = complexity(seen, tokenizer.vocab_size, seed=seed)
        result[tokenizer.name] = figures
    return {
        "data": Path(folder).resolve().name,
        "files": len(heard),
        "tokenizers": result,
        "failed": failed,
        "conventions": {
            "norm": norm, "agg": agg, "seed": seed, "codebook": codebook, "families": list(families),
            "noise": str(resources.noises), "rir": str(resources.rooms),
            "ranges": {family: vars(STRENGTHS[family]) for family in ranged if family in STRENGTHS},
            "interval": "95 %, bootstrap over utterances, 1000 resamples",
            "snr": "half of the nominal one (legacy)" if resources.legacy_half_snr else "exact",
            "curve_files": len(bent), "curve_rooms": "simulated",
            "floor": {"pad": "one frame of silence behind", "delay": f"{1000 * _DELAY_SECONDS:g} ms in front"},
            "complexity": f"middle {SECONDS:g} s of {len(viewed)} files, {VIEWS} measured views of each",
            "chance": "clean units of each utterance against those of another one",
        },
    }  # fmt: skip


def _padded(wave: Wave, tokenizer: Tokenizer, key: str) -> Wave:
    return np.pad(wave, (0, tokenizer.encoder.hop))


def _delayed(wave: Wave, tokenizer: Tokenizer, key: str) -> Wave:
    return np.pad(wave, (round(_DELAY_SECONDS * tokenizer.sample_rate), 0))


def _augmented(family: str, resources: AugmentResources, seed: int, strength: float | None = None) -> Change:
    return lambda wave, tokenizer, key: augment(wave, tokenizer.sample_rate, family, key, seed, resources, strength)


def _hear(
    utterances: Sequence[Utterance],
    tokenizers: Sequence[Tokenizer],
    codebook: int,
    plan: _Plan,
    failed: dict[str, str],
    tell: Callable[[int], None],
) -> Iterator[_Heard]:
    """All utterances as all tokenizers hear them; what cannot be used is noted in `failed`."""
    alike: dict[tuple[int, int], list[Tokenizer]] = {}  # tokenizers that are given the very same sounds
    for tokenizer in tokenizers:
        alike.setdefault((tokenizer.sample_rate, tokenizer.encoder.hop), []).append(tokenizer)
    for begin in range(0, len(utterances), _BATCH):
        rows = [_Heard(utterance) for utterance in utterances[begin : begin + _BATCH]]
        for (rate, _), some in alike.items():
            for row, wave in _made(rows, partial(_load, rate), failed):
                row.wave, row.seconds = wave, len(wave) / rate
            # One version of a batch at a time is kept in memory.
            for name, change in (plan.versions | plan.curves).items():
                asked = [row for row in rows if name in plan.versions or row.utterance.key in plan.curve_keys]
                pairs = _made(asked, partial(_changed, change, some[0]), failed)
                for tokenizer in some if pairs else ():
                    encoded = tokenizer.encode_batch([wave for _, wave in pairs], rate)
                    for (row, _), units in zip(pairs, encoded, strict=True):
                        row.ids[tokenizer.name, name] = np.atleast_2d(units.ids)[codebook]
                tell(len(asked) * len(some))
            asked = [row for row in rows if row.utterance.key in plan.view_keys]
            for row in asked:
                for _, views in _made([row], partial(_viewed, plan.views, rate), failed):
                    row.seen = row.seen | {tokenizer.name: see(views, tokenizer, codebook) for tokenizer in some}
                tell(len(some))
        for row in rows:
            if row.utterance.path not in failed:
                row.wave = np.zeros(0, np.float32)
                yield row


def _load(rate: int, row: _Heard) -> Wave:
    return load(row.utterance.open(), rate, row.utterance.path)


def _changed(change: Change, tokenizer: Tokenizer, row: _Heard) -> Wave:
    return change(row.wave, tokenizer, row.utterance.key)


def _viewed(views: Callable[[Wave, int, str], list[Wave]], rate: int, row: _Heard) -> list[Wave]:
    return views(row.wave, rate, row.utterance.key)


def _made(rows: Sequence[_Heard], make: Callable[[_Heard], T], failed: dict[str, str]) -> list[tuple[_Heard, T]]:
    """What can be made of the rows that are still good; `failed` is told of the others."""
    made = []
    for row in rows:
        if row.utterance.path not in failed:
            try:
                made.append((row, make(row)))
            except InputError:  # an option is wrong, not the file
                raise
            except (SpeechtokError, OSError) as error:
                failed[row.utterance.path] = str(error)
    return made


def _ids(heard: Sequence[_Heard], tokenizer: str, version: str) -> list[Ids]:
    return [one.ids[tokenizer, version] for one in heard]


def _figures(
    heard: Sequence[_Heard], tokenizer: Tokenizer, families: Sequence[str], norm: Norm, agg: Agg
) -> dict[str, Any]:
    clean = _ids(heard, tokenizer.name, CLEAN)
    units, seconds = np.concatenate(clean), sum(one.seconds for one in heard)
    result: dict[str, Any] = {
        "fingerprint": tokenizer.fingerprint, "utterances": len(heard), "seconds": seconds,
        "ued": {}, "ued_ci": {}, "edits_per_second": {}, "run_ratio": {},
    }  # fmt: skip
    for family in families:
        changed = _ids(heard, tokenizer.name, family)
        found = edit_distance.evaluate(clean, changed, norm=norm, agg=agg, seconds=seconds)
        result["ued"][family] = found["ued"]
        result["ued_ci"][family] = list(edit_distance.interval(*edit_distance.distances(clean, changed, norm), agg))
        result["edits_per_second"][family], result["run_ratio"][family] = found["edits_per_second"], found["run_ratio"]
    result["floor"] = {
        name: edit_distance.unit_edit_distance(clean, _ids(heard, tokenizer.name, f"floor {name}"), norm=norm, agg=agg)
        for name in FLOORS
    }
    result["chance"] = (
        edit_distance.unit_edit_distance(clean, clean[1:] + clean[:1], norm=norm, agg=agg) if len(clean) > 1 else None
    )
    runs = sum(len(run_lengths(one)[0]) for one in clean)
    result |= {"units_per_second": len(units) / seconds, "runs_per_second": runs / seconds}
    result["vocab_size"] = tokenizer.vocab_size
    if len(units):
        use = phonetic.codebook_use(units, tokenizer.vocab_size)
        possible = min(tokenizer.vocab_size, len(units))
        collapsed = np.log(use["perplexity"]) < _COLLAPSED * np.log(possible)
        result |= {"vocab_used": use["units_used"], "perplexity": use["perplexity"], "collapsed": bool(collapsed)}
    else:
        result |= {"vocab_used": 0, "perplexity": 0.0, "collapsed": True}
    return result


def _curve(heard: Sequence[_Heard], name: str, family: str, norm: Norm, agg: Agg) -> dict[str, Any]:
    """Distances of a tokenizer against the strengths of a family, with intervals."""
    clean = _ids(heard, name, CLEAN)
    curve: dict[str, Any] = {"strength": list(CURVES[family]), "ued": [], "ued_ci": [], "files": len(heard)}
    for strength in CURVES[family]:
        pairs = edit_distance.distances(clean, _ids(heard, name, f"{family} {strength:g}"), norm)
        curve["ued"].append(edit_distance.aggregate(*pairs, agg))
        curve["ued_ci"].append(list(edit_distance.interval(*pairs, agg)))
    return curve
