"""How steady the units of tokenizers are under augmentation: unit edit distances, their curves, and what guards them.

A tokenizer that says always the same is perfectly steady. So three figures stand beside every distance: how much of the
vocabulary is used, how many units there are in a second, and *chance*, the distance between clean units of different
utterances. A good tokenizer is far below its chance; one that has collapsed has both at 0.

The floor is what harmless changes cost: one frame of silence appended, and a delay of 5 ms.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechtok.audio.augment import FAMILIES, STRENGTHS, AugmentResources, augment
from speechtok.audio.decode import load
from speechtok.audio.rooms import SimulatedRooms
from speechtok.corpus.engine import Event
from speechtok.corpus.sources import Utterance, scan
from speechtok.errors import InputError, SpeechtokError
from speechtok.evaluation.complexity import LEAST, SECONDS, VIEWS, complexity
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
_DELAY_SECONDS = 0.005
_BATCH = 16  # files that are encoded together
_COLLAPSED = 0.5  # share of log2(vocabulary) that the entropy of units has at least in a tokenizer at work

Ids = NDArray[np.int32]


@dataclass
class _Heard:
    """Units of one utterance: clean, and by the name of what was done to it."""

    key: str
    seconds: float
    clean: Ids
    changed: dict[str, Ids] = field(default_factory=dict)


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
    curve_files : int
        So many files, evenly spread, for distances against strength (`CURVES`); 0: none. Curves of reverberation are
        of simulated rooms.
    complexity_files : int
        So many files, evenly spread, for augmentation complexity, see `speechtok.evaluation.complexity`; 0: none.
    on_event : callable
        Progress in files times versions.

    Returns
    -------
    dict
        ``tokenizers``: by name, ``ued``, ``ued_ci`` (95 %, bootstrap over utterances), ``edits_per_second`` and
        ``run_ratio`` by family, ``chance``, ``floor``, ``units_per_second``, ``runs_per_second``, ``vocab_used``,
        ``vocab_size``, ``perplexity``, ``collapsed``, ``curves``, ``complexity``; ``failed``: files that could not be
        measured, and why; ``conventions``.

    Raises
    ------
    InputError
        If an option or the folder is unusable, or no file can be measured.
    """
    names = [tokenizer.name for tokenizer in tokenizers]
    if not tokenizers or len(set(names)) < len(names):
        raise InputError(f"tokenizers {', '.join(names) or '(none)'}: give at least one, and none of a name twice")
    for tokenizer in tokenizers:
        if not 0 <= codebook < tokenizer.quantizer.codebooks:
            raise InputError(
                f"{tokenizer.name} has {tokenizer.quantizer.codebooks} codebooks; there is none {codebook}"
            )
    if not families or min(curve_files, complexity_files) < 0 or (limit_files is not None and limit_files < 1):
        raise InputError("give at least one family, and numbers of files that are not negative")
    edit_distance.validate([np.zeros(1, int)], [np.zeros(1, int)], norm, agg)
    listing = scan(str(folder))
    failed = {bad.path: bad.reason for bad in listing.rejected}
    chosen = _spread(listing.utterances, limit_files)
    resources = resources or AugmentResources.default()
    plain: dict[str, tuple[str, float | None]] = {family: (family, None) for family in families}
    curved: dict[str, tuple[str, float | None]] = {
        f"{family} {strength:g}": (family, strength)
        for family in families if curve_files
        for strength in CURVES.get(family, ())
    }  # fmt: skip
    curve_resources = AugmentResources(resources.noises, SimulatedRooms(), resources.legacy_half_snr)
    curve_chosen = _spread(chosen, curve_files) if curved else []
    told_apart = _spread(chosen, complexity_files)
    if complexity_files and len(told_apart) < LEAST:  # now, not after everything else
        raise InputError(f"augmentation complexity of {len(told_apart)} files: at least {LEAST} are needed")
    total = len(tokenizers) * (len(chosen) * (3 + len(plain)) + len(curve_chosen) * len(curved) + len(told_apart))
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        on_event(Event("run", done, total))

    result: dict[str, Any] = {}
    for tokenizer in tokenizers:
        heard = list(_hear(chosen, tokenizer, codebook, plain, resources, seed, failed, tell, floor=True))
        if not heard:
            reason = next(iter(failed.values()), "it holds no sound")
            raise InputError(f"{folder}: nothing could be measured; the first reason: {reason}")
        figures = _figures(heard, tokenizer, families, norm, agg)
        bent = list(_hear(curve_chosen, tokenizer, codebook, curved, curve_resources, seed, failed, tell, floor=False))
        figures["curves"] = {
            family: _curve(bent, family, norm, agg) for family in families if bent and family in CURVES
        }
        if told_apart:
            figures["complexity"] = _complexity(
                told_apart, tokenizer, codebook, families, resources, seed, failed, tell
            )
        result[tokenizer.name] = figures
    return {
        "data": Path(folder).resolve().name,
        "files": len(chosen),
        "tokenizers": result,
        "failed": failed,
        "conventions": {
            "norm": norm, "agg": agg, "seed": seed, "codebook": codebook, "families": list(families),
            "ranges": {family: vars(STRENGTHS[family]) for family in families if family in STRENGTHS},
            "interval": "95 %, bootstrap over utterances, 1000 resamples",
            "snr": "half of the nominal one (legacy)" if resources.legacy_half_snr else "exact",
            "curve_files": len(curve_chosen), "curve_rooms": "simulated",
            "floor": {"pad": "one frame of silence behind", "delay": f"{1000 * _DELAY_SECONDS:g} ms in front"},
            "complexity": f"middle {SECONDS:g} s of {len(told_apart)} files, {VIEWS} measured views of each",
            "chance": "clean units of each utterance against those of another one",
        },
    }  # fmt: skip


def _spread(utterances: Sequence[Utterance], limit: int | None) -> list[Utterance]:
    """At most `limit` of them, evenly spread."""
    if limit is None or limit >= len(utterances):
        return list(utterances)
    return [utterances[int(place)] for place in (np.arange(limit) + 0.5) * len(utterances) / limit]


def _hear(
    utterances: Sequence[Utterance],
    tokenizer: Tokenizer,
    codebook: int,
    versions: dict[str, tuple[str, float | None]],
    resources: AugmentResources,
    seed: int,
    failed: dict[str, str],
    tell: Callable[[int], None],
    *,
    floor: bool,
) -> Iterator[_Heard]:
    """Units of all versions of every utterance; what cannot be used is noted in `failed`."""
    rate = tokenizer.sample_rate

    def ids(waves: list[NDArray[np.float32]]) -> list[Ids]:
        return [np.atleast_2d(units.ids)[codebook] for units in tokenizer.encode_batch(waves, rate)]

    for begin in range(0, len(utterances), _BATCH):
        batch, waves = [], list[NDArray[np.float32]]()
        changed: dict[str, list[NDArray[np.float32]]] = {name: [] for name in versions}
        for utterance in utterances[begin : begin + _BATCH]:
            if utterance.path in failed:
                continue
            try:
                wave = load(utterance.open(), rate, utterance.path)
                # All of them before any counts: a file that fails in one version counts in none.
                made = {
                    name: augment(wave, rate, family, utterance.key, seed, resources, strength)
                    for name, (family, strength) in versions.items()
                }
            except (SpeechtokError, OSError) as error:
                if isinstance(error, InputError):
                    raise
                failed[utterance.path] = str(error)
                continue
            batch.append(utterance)
            waves.append(wave)
            for name, one in made.items():
                changed[name].append(one)
        if not batch:
            continue
        if floor:
            changed["floor pad"] = [np.pad(wave, (0, tokenizer.encoder.hop)) for wave in waves]
            changed["floor delay"] = [np.pad(wave, (round(_DELAY_SECONDS * rate), 0)) for wave in waves]
        clean = ids(waves)
        tell(len(batch) if floor else 0)
        heard = [
            _Heard(utterance.key, len(wave) / rate, units)
            for utterance, wave, units in zip(batch, waves, clean, strict=True)
        ]
        for name, sounds in changed.items():
            for row, units in zip(heard, ids(sounds), strict=True):
                row.changed[name] = units
            tell(len(batch))
        yield from heard


def _complexity(
    utterances: Sequence[Utterance],
    tokenizer: Tokenizer,
    codebook: int,
    families: Sequence[str],
    resources: AugmentResources,
    seed: int,
    failed: dict[str, str],
    tell: Callable[[int], None],
) -> dict[str, Any]:
    heard = [utterance for utterance in utterances if utterance.path not in failed]
    waves = [load(utterance.open(), tokenizer.sample_rate, utterance.path) for utterance in heard]
    return complexity(
        waves, [utterance.key for utterance in heard], tokenizer, families=families, resources=resources, seed=seed,
        codebook=codebook, on_utterance=lambda: tell(1),
    )  # fmt: skip


def _figures(
    heard: Sequence[_Heard], tokenizer: Tokenizer, families: Sequence[str], norm: Norm, agg: Agg
) -> dict[str, Any]:
    clean = [one.clean for one in heard]
    units, seconds = np.concatenate(clean), sum(one.seconds for one in heard)
    result: dict[str, Any] = {
        "fingerprint": tokenizer.fingerprint, "utterances": len(heard), "seconds": seconds,
        "ued": {}, "ued_ci": {}, "edits_per_second": {}, "run_ratio": {},
    }  # fmt: skip
    for family in families:
        changed = [one.changed[family] for one in heard]
        found = edit_distance.evaluate(clean, changed, norm=norm, agg=agg, seconds=seconds)
        result["ued"][family] = found["ued"]
        result["ued_ci"][family] = list(edit_distance.interval(*edit_distance.distances(clean, changed, norm), agg))
        result["edits_per_second"][family], result["run_ratio"][family] = found["edits_per_second"], found["run_ratio"]
    result["floor"] = {
        name: edit_distance.unit_edit_distance(
            clean, [one.changed[f"floor {name}"] for one in heard], norm=norm, agg=agg
        )
        for name in ("pad", "delay")
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


def _curve(heard: Sequence[_Heard], family: str, norm: Norm, agg: Agg) -> dict[str, Any]:
    """Distances against the strengths of a family, with intervals."""
    clean = [one.clean for one in heard]
    curve: dict[str, Any] = {"strength": list(CURVES[family]), "ued": [], "ued_ci": [], "files": len(heard)}
    for strength in CURVES[family]:
        pairs = edit_distance.distances(clean, [one.changed[f"{family} {strength:g}"] for one in heard], norm)
        curve["ued"].append(edit_distance.aggregate(*pairs, agg))
        curve["ued_ci"].append(list(edit_distance.interval(*pairs, agg)))
    return curve
