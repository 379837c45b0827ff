"""Aligned folders: what is said when, and by whom.

A folder holds sound files, ``metadata.jsonl`` (``path`` and ``speaker`` of each file) and ``alignments.jsonl``: one
object per utterance with ``path``, ``words`` and ``phones``, both lists of ``[name, start, end]`` in seconds. The first
folder of a path is the corpus.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError
from speechtok.frames import FrameGrid
from speechtok.metrics.abx import Items, Slicing, slice_frames

__all__ = [
    "GROUPS",
    "SILENCE",
    "Span",
    "Triphone",
    "Utterance",
    "frame_labels",
    "group_of",
    "items",
    "read",
    "triphones",
]

# Names of silence and of noise that the aligner could not name.
SILENCE = ("SIL", "SPN")
# What figures are reported apart; another corpus is a group of its own.
GROUPS = {"librispeech": "native", "librispeech_lossy": "lossy", "speechocean762": "accented"}

_TICK = 1e-6  # times are compared in whole microseconds: no float decides on which side of a border a frame lies


@dataclass(frozen=True)
class Span:
    """A named stretch of time: `start` to `end` in seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Utterance:
    """One aligned file.

    Parameters
    ----------
    path : str
        Relative to the folder, with forward slashes; its first part is the corpus.
    speaker : str
    words, phones : tuple of Span
        In order of time, not overlapping.
    """

    path: str
    speaker: str
    words: tuple[Span, ...]
    phones: tuple[Span, ...]


@dataclass(frozen=True)
class Triphone:
    """Frames of one phone between two others (all speech): ``frames[start:stop]`` of the utterance."""

    name: str
    phone: str
    previous: str
    following: str
    start: int
    stop: int


def group_of(path: str) -> str:
    """Group that a path is reported in: by its first folder; files without one are a group together."""
    corpus = PurePosixPath(path).parts[0] if len(PurePosixPath(path).parts) > 1 else "files"
    return GROUPS.get(corpus, corpus)


def _objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON lines file, each with its place for messages."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{place}: is no JSON ({error.msg})") from error
        if not isinstance(entry, dict):
            raise InputError(f"{place}: must be an object")
        yield place, entry


def _path(entry: dict[str, Any], place: str) -> str:
    path = entry.get("path")
    if not isinstance(path, str) or not path:
        raise InputError(f"{place}: 'path' must be a file name, not {path!r}")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise InputError(f"{place}: path {path!r} must be relative and must not leave the folder")
    return path


def _spans(entry: dict[str, Any], field: str, place: str) -> tuple[Span, ...]:
    values = entry.get(field)
    if not isinstance(values, list):
        raise InputError(f"{place}: {field!r} must be a list of [name, start, end]")
    spans: list[Span] = []
    for value in values:
        match value:
            case [str(name), int() | float() as start, int() | float() as end] if not (
                isinstance(start, bool) or isinstance(end, bool)
            ):
                spans.append(Span(name, float(start), float(end)))
            case _:
                raise InputError(f"{place}: {field!r} holds {value!r}, not [name, start, end]")
        last = spans[-1]
        if not (math.isfinite(last.end) and 0 <= last.start <= last.end):
            raise InputError(f"{place}: {field!r} holds {value!r}, whose times are not in order")
        if len(spans) > 1 and last.start < spans[-2].end - _TICK:
            raise InputError(f"{place}: {field!r} holds {value!r}, which begins before {spans[-2].name!r} has ended")
    return tuple(spans)


def read(folder: str | os.PathLike[str]) -> list[Utterance]:
    """Read an aligned folder.

    Parameters
    ----------
    folder : path

    Returns
    -------
    list of Utterance
        In the order of ``alignments.jsonl``.

    Raises
    ------
    InputError
        If a file is missing or malformed (with its name and line), a path occurs twice, or a speaker is not known.
    """
    root = Path(folder)
    speakers: dict[str, str] = {}
    for place, entry in _objects(root / "metadata.jsonl"):
        speaker = entry.get("speaker")
        if isinstance(speaker, str) and speaker:
            speakers[_path(entry, place)] = speaker
    utterances: dict[str, Utterance] = {}
    for place, entry in _objects(root / "alignments.jsonl"):
        path = _path(entry, place)
        if path in utterances:
            raise InputError(f"{place}: {path} is aligned twice")
        if path not in speakers:
            raise InputError(f"{place}: {root / 'metadata.jsonl'} names no speaker of {path}")
        words, phones = _spans(entry, "words", place), _spans(entry, "phones", place)
        utterances[path] = Utterance(path, speakers[path], words, phones)
    if not utterances:
        raise InputError(f"{root / 'alignments.jsonl'}: holds no utterance")
    return list(utterances.values())


def frame_labels(phones: Sequence[Span], centres: NDArray[np.float64]) -> NDArray[np.str_]:
    """Name of the phone at each centre.

    Parameters
    ----------
    phones : sequence of Span
        In order of time; a phone holds its start and not its end.
    centres : float64 [T]
        Times (s).

    Returns
    -------
    str [T]
        Empty where no phone is.
    """
    if not phones:
        return np.full(len(centres), "")
    starts, ends = (
        np.round(np.array(times) / _TICK).astype(np.int64)
        for times in ([phone.start for phone in phones], [phone.end for phone in phones])
    )
    ticks = np.round(np.asarray(centres) / _TICK).astype(np.int64)
    which = np.searchsorted(starts, ticks, side="right") - 1
    inside = (which >= 0) & (ticks < ends[which])
    return np.where(inside, np.array([phone.name for phone in phones])[which], "")


def triphones(
    utterance: Utterance, grid: FrameGrid, num_frames: int, *, slicing: Slicing = "inclusive", shift: int = 0
) -> list[Triphone]:
    """Phones of an utterance that stand between two phones, as tokens for ABX.

    Silence is neither a token nor a context. Phones without a frame are left out.

    Parameters
    ----------
    utterance : Utterance
    grid : FrameGrid
        Of the frames.
    num_frames : int
    slicing, shift
        See `speechtok.metrics.abx.slice_frames`.
    """
    found = []
    for index in range(1, len(utterance.phones) - 1):
        previous, phone, following = utterance.phones[index - 1 : index + 2]
        apart = phone.start - previous.end > _TICK or following.start - phone.end > _TICK
        if apart or {previous.name, phone.name, following.name} & set(SILENCE):
            continue
        start, stop = slice_frames(phone.start, phone.end, grid, num_frames, slicing=slicing, shift=shift)
        if start < stop:
            name = f"{utterance.path}:{index}"
            found.append(Triphone(name, phone.name, previous.name, following.name, start, stop))
    return found


def items(tokens: Sequence[tuple[Utterance, Triphone]]) -> Items:
    """Make tokens the `Items` of ABX, for frames that are cut out and joined in this order."""
    lengths = np.array([token.stop - token.start for _, token in tokens], np.int64)
    return Items(
        [token.name for _, token in tokens],
        [token.phone for _, token in tokens],
        [token.previous for _, token in tokens],
        [token.following for _, token in tokens],
        [utterance.speaker for utterance, _ in tokens],
        np.cumsum(lengths) - lengths,
        lengths,
    )
