"""What a tokenizer's units tell about phones, what they cost, and how steady they are, on an aligned folder."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from speechtok.audio.augment import FAMILIES, AugmentResources, augment
from speechtok.audio.decode import load
from speechtok.corpus.engine import Event
from speechtok.errors import InputError
from speechtok.evaluation.alignments import GROUPS, SILENCE, Utterance, frame_labels, group_of, read
from speechtok.metrics import bitrate, edit_distance, phonetic
from speechtok.metrics.edit_distance import Agg, Norm
from speechtok.tokenizer import Tokenizer

__all__ = ["POOLED", "each_group", "evaluate", "grouped", "spread"]

POOLED = "pooled"
_BATCH = 16  # files that are encoded together

T = TypeVar("T")


@dataclass
class _Encoded:
    """Units of one utterance: int32 [T] or [K, T], clean and by family; labels of its T frames; its length."""

    utterance: Utterance
    ids: NDArray[np.int32]
    labels: NDArray[np.str_]
    seconds: float
    changed: dict[str, NDArray[np.int32]] = field(default_factory=dict)


def spread(some: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of them, evenly spread: every n-th; all without a limit."""
    if limit is None:
        return list(some)
    if limit < 1:
        raise InputError(f"the limit is {limit}; it must be at least 1")
    return list(some[:: max(1, -(-len(some) // limit))])


def grouped(paths: Sequence[str]) -> dict[str, list[int]]:
    """Indices of each group (native, lossy, accented, others by name), and of all as `POOLED` if there are several."""
    names = [group_of(path) for path in paths]
    known = [name for name in GROUPS.values() if name in names]
    groups = {
        name: [i for i, other in enumerate(names) if other == name]
        for name in (*known, *sorted(set(names) - set(known)))
    }
    return groups if len(groups) == 1 else groups | {POOLED: list(range(len(names)))}


def each_group(
    utterances: Sequence[Utterance], score: Callable[[list[int]], dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Score every group of `grouped`; those that cannot be scored are left out.

    Returns
    -------
    groups : dict
        Figures of each group.
    left_out : dict of str to str
        Why others have none.

    Raises
    ------
    InputError
        If no group can be scored.
    """
    groups: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name, members in grouped([utterance.path for utterance in utterances]).items():
        try:
            groups[name] = score(members)
        except InputError as error:
            left_out[name] = str(error)
    if not groups:
        raise InputError("; ".join(dict.fromkeys(left_out.values())))
    return groups, left_out


def evaluate(
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    shift: int = 0,
    codebook: int = 0,
    augment_data: str | os.PathLike[str] | None = None,
    augment_split: str = "test",
    seed: int = 0,
    norm: Norm = "dedup_ref",
    agg: Agg = "mean",
    limit_files: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Measure a tokenizer.

    Parameters
    ----------
    folder : path
        An aligned folder (see `speechtok.evaluation.alignments`).
    tokenizer : Tokenizer
    shift : int
        Frame i takes the label at the centre of frame i + shift.
    codebook : int
        The one that is compared with phones and in edit distances; bitrates count all.
    augment_data : path, optional
        Folder of noises and room responses (see `speechtok.audio.augment`); where it is given, unit edit distances
        under all families are measured, which encodes everything once more for each.
    augment_split : str
        Split of theirs.
    seed : int
        Of the augmentations.
    norm, agg : str
        Of the unit edit distance (see `speechtok.metrics.edit_distance`).
    limit_files : int, optional
        At most this many utterances, evenly spread.
    on_event : callable
        Told the progress in seconds of sound.

    Returns
    -------
    dict
        ``groups``: figures per corpus group and pooled, each ``without_silence`` and ``with_silence`` (see
        `speechtok.metrics.phonetic.evaluate`), ``codebook`` (use by all frames), ``bitrate``, and ``ued`` per family;
        ``left_out``: groups that cannot be measured and why; ``conventions``: all that the figures depend on besides
        the tokenizer and the data.

    Raises
    ------
    InputError
        If the folder or an option is unusable, or the tokenizer's units are segments.
    AudioError
        If one of its files is.
    """
    if tokenizer.segmenter is not None:
        raise InputError(f"{tokenizer.name}: its units are segments, not frames; speechtok evaluate syllables has them")
    utterances = spread(read(folder), limit_files)
    if not 0 <= codebook < tokenizer.quantizer.codebooks:
        raise InputError(f"{tokenizer.name} has {tokenizer.quantizer.codebooks} codebooks; there is none {codebook}")
    resources = None if augment_data is None else AugmentResources.from_folder(augment_data, augment_split)
    families = () if resources is None else FAMILIES
    encoded = list(_encode(Path(folder), utterances, tokenizer, shift, families, resources, seed, on_event))
    groups, left_out = each_group(
        utterances, lambda members: _figures([encoded[i] for i in members], tokenizer, codebook, norm, agg)
    )
    return {
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "codebooks": tokenizer.quantizer.codebooks,
        "rate": tokenizer.rate,
        "data": Path(folder).resolve().name,
        "conventions": {
            "labels": "forced alignment, the phone at the centre of each frame; frames without a phone do not count",
            "shift_frames": shift,
            "silence": list(SILENCE),
            "corpora": GROUPS,
            "codebook": codebook,
            "entropies": "nats in phone figures, bits in bitrates",
            "seconds": "total duration of the files, silence included",
            "files": "all" if limit_files is None else f"at most {limit_files}, evenly spread",
            "ued": {
                "norm": norm,
                "agg": agg,
                "families": list(families),
                "augment_data": Path(augment_data).resolve().name,
                "split": augment_split,
                "seed": seed,
                "sample_rate": tokenizer.sample_rate,
            }
            if augment_data is not None
            else None,
        },
        "groups": groups,
        "left_out": left_out,
    }


def _encode(
    folder: Path,
    utterances: Sequence[Utterance],
    tokenizer: Tokenizer,
    shift: int,
    families: Sequence[str],
    resources: AugmentResources | None,
    seed: int,
    on_event: Callable[[Event], None],
) -> Iterator[_Encoded]:
    rate, hop = tokenizer.sample_rate, tokenizer.encoder.grid.hop_seconds
    # Aligned time stands for the length of files that are not decoded yet; each batch is encoded once for each family.
    lengths = [utterance.phones[-1].end if utterance.phones else 0.0 for utterance in utterances]
    batches = [sum(lengths[begin : begin + _BATCH]) for begin in range(0, len(lengths), _BATCH)]
    progress = list(accumulate(length for length in batches for _ in range(1 + len(families))))
    done = iter(progress)
    for begin in range(0, len(utterances), _BATCH):
        batch = utterances[begin : begin + _BATCH]
        waves = [load(folder / utterance.path, rate) for utterance in batch]
        results = []
        for utterance, wave, units in zip(batch, waves, tokenizer.encode_batch(waves, rate), strict=True):
            centres = (units.starts_seconds + units.ends_seconds) / 2 + shift * hop
            results.append(_Encoded(utterance, units.ids, frame_labels(utterance.phones, centres), len(wave) / rate))
        on_event(Event("run", next(done), progress[-1]))
        for family in families:
            changed = [
                augment(wave, rate, family, utterance.path, seed, resources)
                for utterance, wave in zip(batch, waves, strict=True)
            ]
            for result, units in zip(results, tokenizer.encode_batch(changed, rate), strict=True):
                result.changed[family] = units.ids
            on_event(Event("run", next(done), progress[-1]))
        yield from results


def _figures(encoded: Sequence[_Encoded], tokenizer: Tokenizer, codebook: int, norm: Norm, agg: Agg) -> dict[str, Any]:
    """All figures of one group."""
    rows = [np.atleast_2d(one.ids)[codebook] for one in encoded]
    units = np.concatenate(rows)
    seconds = sum(one.seconds for one in encoded)
    names = np.concatenate([one.labels for one in encoded])
    talkers = np.concatenate([np.full(len(one.labels), one.utterance.speaker) for one in encoded])
    labelled = names != ""
    if not labelled.any():
        raise InputError(f"no frame of {encoded[0].utterance.path} and others has a phone; is the alignment theirs?")
    phones, labels = np.unique(names[labelled], return_inverse=True)
    speakers = np.unique(talkers[labelled], return_inverse=True)[1]
    silent = np.flatnonzero(np.isin(phones, SILENCE)).tolist()
    result: dict[str, Any] = {
        "utterances": len(encoded),
        "seconds": seconds,
        "frames_without_label": int((~labelled).sum()),
    }
    for key, keep in (("without_silence", False), ("with_silence", True)):
        result[key] = phonetic.evaluate(
            labels, units[labelled], vocab_size=tokenizer.vocab_size, silent=silent, keep_silence=keep,
            speakers=speakers if speakers.max() > 0 else None,
        )  # fmt: skip
    result["codebook"] = phonetic.codebook_use(units, tokenizer.vocab_size)
    result["bitrate"] = bitrate.evaluate(
        [one.ids for one in encoded], seconds, rate=tokenizer.encoder.grid.rate, vocab_size=tokenizer.vocab_size
    )
    result["ued"] = {
        family: edit_distance.evaluate(
            rows, [np.atleast_2d(one.changed[family])[codebook] for one in encoded], norm=norm, agg=agg, seconds=seconds
        )
        for family in encoded[0].changed
    } or None
    return result
