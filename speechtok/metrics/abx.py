"""ABX error: how often a token is closer to one of another phone than of its own (Schatz et al. 2013; ZeroSpeech).

A triple has A and X of one phone and B of another, all between the same previous and next phone. It scores 1 where
``d(X, A) < d(X, B)``, 0.5 where both are equal; error = 1 - mean score. *Within*: one speaker says all three, X runs
over the A's except A itself. *Across*: A and B are of one speaker, X of another.

Conventions, those of the published figures (libri-light, fastabx):

- A cell holds the triples of one A phone, B phone, context, speaker (and X speaker). Cell errors are averaged, each
  time unweighted, over contexts and X speakers together, then over speakers, then over ordered phone pairs.
- d is the mean frame distance along the best warping path (`speechtok.kernels.dtw`), X along the rows. Within, the
  distance of two items of one phone is computed once.
- At most `items_per_cell` items are kept of each phone, context and speaker, the same ones in all cells, and at most
  `x_speakers` X speakers for each A, B, context and speaker. Which ones is decided by hashes of their names and the
  seed, never by their order.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.errors import InputError
from speechtok.frames import FrameGrid
from speechtok.kernels.dtw import dtw
from speechtok.metrics.frame_distances import Distance, frame_distances, validate_frames

__all__ = ["Cell", "Condition", "Items", "Slicing", "aggregate", "evaluate", "score_cells", "slice_frames", "validate"]

Condition = Literal["within", "across"]
Slicing = Literal["inclusive", "librilight"]

_TILE = 1 << 22  # frame distances in memory at a time (32 MiB in float64)


@dataclass(frozen=True)
class Items:
    """Tokens of phones: stretches of frames.

    Parameters
    ----------
    ids : sequence of str [I]
        Unique names; subsampling hashes them.
    phones, previous, following, speakers : sequence of str [I]
        The phone, its neighbours, who says it.
    starts, lengths : int64 [I]
        First frame and number of frames.
    """

    ids: Sequence[str]
    phones: Sequence[str]
    previous: Sequence[str]
    following: Sequence[str]
    speakers: Sequence[str]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)


class Cell(NamedTuple):
    """Error of one cell; `x_speaker` is `speaker` within."""

    phone: str
    other: str
    speaker: str
    x_speaker: str
    context: tuple[str, str]
    error: float
    triples: int


def slice_frames(
    onset: float, offset: float, grid: FrameGrid, num_frames: int, *, slicing: Slicing = "inclusive", shift: int = 0
) -> tuple[int, int]:
    """Frames of an item, as (start, stop); exact arithmetic on the decimal times.

    Parameters
    ----------
    onset, offset : float
        Times of the item (s).
    grid : FrameGrid
    num_frames : int
        Of the file.
    slicing : {"inclusive", "librilight"}
        ``inclusive``: all frames whose centre lies in [onset, offset]. ``librilight``: frame i is centred at
        ``(i + 0.5) * hop`` whatever the encoder, and the last frame is dropped; published figures of units were
        computed so (the fault is known: fastabx reproduces it on demand).
    shift : int
        Frame i takes the label at the centre of frame i + shift.

    Returns
    -------
    start, stop : int
        ``start >= stop`` where the item has no frame.
    """
    if slicing not in get_args(Slicing):
        raise InputError(f"slicing {slicing!r} is none of {', '.join(get_args(Slicing))}")
    origin = grid.offset if slicing == "inclusive" else 0
    first, last = (
        (Fraction(repr(float(time))) * grid.sample_rate - origin) / grid.hop - Fraction(1, 2)
        for time in (onset, offset)
    )
    stop = math.floor(last) + (1 if slicing == "inclusive" else 0)
    return max(0, math.ceil(first) - shift), min(num_frames, stop - shift)


def validate(frames: NDArray[Any], items: Items, distance: str) -> None:
    """Check frames (as `validate_frames`) and items.

    Raises
    ------
    InputError
        If fields are not equally long, ids repeat, or an item has no frame or leaves the frames.
    """
    validate_frames(frames, distance)
    fields = (items.phones, items.previous, items.following, items.speakers, items.starts, items.lengths)
    if {len(field) for field in fields} != {len(items.ids)}:
        raise InputError(f"the fields of the items have lengths {[len(field) for field in fields]}; they must be equal")
    if len(set(items.ids)) != len(items.ids):
        raise InputError("the ids of the items are not unique; subsampling needs them to be")
    starts, lengths = np.asarray(items.starts), np.asarray(items.lengths)
    wrong = np.flatnonzero((starts < 0) | (lengths < 1) | (starts + lengths > len(frames)))
    if len(wrong):
        raise InputError(f"item {items.ids[wrong[0]]!r} is empty or leaves the {len(frames)} frames")


def _rank(seed: int, *names: str) -> bytes:
    """A draw that depends on names alone."""
    return hashlib.blake2b("\t".join((str(seed), *names)).encode(), digest_size=8).digest()


Group = dict[str, dict[str, list[int]]]  # speaker -> phone -> items


def _groups(items: Items, items_per_cell: int | None, seed: int) -> dict[tuple[str, str], Group]:
    """Kept items of each context, in an order that does not depend on the input's."""
    contexts: dict[tuple[str, str], Group] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for index in sorted(range(len(items)), key=lambda i: _rank(seed, items.ids[i])):
        kept = contexts[items.previous[index], items.following[index]][items.speakers[index]][items.phones[index]]
        if items_per_cell is None or len(kept) < items_per_cell:
            kept.append(index)
    return {
        context: {speaker: dict(sorted(phones.items())) for speaker, phones in sorted(group.items())}
        for context, group in sorted(contexts.items())
    }


Plan = tuple[str, str, str, str, list[int], list[int], list[int]]  # phone, other, speaker, X speaker, items A, B, X


def _within(group: Group) -> Iterator[Plan]:
    for speaker, phones in group.items():
        for phone, a in phones.items():
            for other, b in phones.items():
                if other != phone and len(a) > 1:
                    yield phone, other, speaker, speaker, a, b, a


def _across(group: Group, context: tuple[str, str], x_speakers: int | None, seed: int) -> Iterator[Plan]:
    for speaker, phones in group.items():
        for phone, a in phones.items():
            candidates = [name for name in group if name != speaker and phone in group[name]]
            for other, b in phones.items():
                if other == phone:
                    continue
                chosen = candidates
                if x_speakers is not None and len(candidates) > x_speakers:
                    names = (*context, phone, other, speaker)
                    chosen = sorted(candidates, key=lambda name: _rank(seed, *names, name))[:x_speakers]
                for name in chosen:
                    yield phone, other, speaker, name, a, b, group[name][phone]


def _sequence_distances(
    frames: NDArray[Any],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    needed: NDArray[np.bool_],
    distance: Distance,
    device: str,
) -> NDArray[np.float32]:
    """Distances float32 [n, n] of n items where bool [n, n] says so, NaN elsewhere; a bounded tile at a time."""
    begins = np.concatenate(([0], np.cumsum(lengths)))
    index = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
    local = torch.from_numpy(frames[index]).to(device)
    result = np.full(needed.shape, np.nan, np.float32)
    rows = np.flatnonzero(needed.any(1))
    tile_frames = max(1, _TILE // len(local))
    while len(rows):
        # Neighbouring items share a tile; gaps of items without need are computed along.
        count = max(1, int(np.searchsorted(begins[rows + 1], begins[rows[0]] + tile_frames, side="right")))
        first, last = int(rows[0]), int(rows[count - 1]) + 1
        x, y = np.nonzero(needed[first:last])
        x += first
        top = begins[first]
        spans = torch.from_numpy(np.stack([begins[x] - top, lengths[x], begins[y], lengths[y]], 1)).to(device)
        tile = frame_distances(local[top : begins[last]], local, distance)
        result[x, y] = dtw(tile, spans).cpu().numpy()
        rows = rows[count:]
    return result


def _error(to_a: NDArray[np.float32], to_b: NDArray[np.float32]) -> tuple[float, int]:
    """Error and number of triples from distances [X, A] and [X, B]; NaN in [X, A] marks X = A, which is no triple."""
    near, far = to_a[:, :, None], to_b[:, None, :]
    triples = int((~np.isnan(to_a)).sum()) * to_b.shape[1]
    return 1 - float((near < far).sum() + 0.5 * (near == far).sum()) / triples, triples


def score_cells(
    frames: NDArray[Any],
    items: Items,
    condition: Condition,
    *,
    distance: Distance = "angular",
    items_per_cell: int | None = 10,
    x_speakers: int | None = 5,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Cell]:
    """Errors of all cells of a condition.

    Parameters
    ----------
    frames : float [F, D] (int [F] or [F, K] units for ``identical``)
    items : Items
    condition : {"within", "across"}
    distance : {"angular", "euclidean", "symmetric_kl", "identical"}
        Of frames.
    items_per_cell, x_speakers : int, optional
        Subsampling; None keeps all.
    seed : int
        Of the subsampling.
    device : str
        Torch device.
    on_progress : callable
        Told the contexts done and their number.

    Raises
    ------
    InputError
        As `validate`, or for unusable options.
    """
    validate(frames, items, distance)
    if condition not in get_args(Condition):
        raise InputError(f"condition {condition!r} is none of {', '.join(get_args(Condition))}")
    if items_per_cell is not None and items_per_cell < 2:
        raise InputError(f"items_per_cell is {items_per_cell}; within needs at least 2")
    if x_speakers is not None and x_speakers < 1:
        raise InputError(f"x_speakers is {x_speakers}; it must be at least 1")
    starts, lengths = np.asarray(items.starts, np.int64), np.asarray(items.lengths, np.int64)
    groups = _groups(items, items_per_cell, seed)
    cells: list[Cell] = []
    for done, (context, group) in enumerate(groups.items()):
        on_progress(done, len(groups))
        # Speakers never meet within: their distances are computed apart.
        parts = [{name: group[name]} for name in group] if condition == "within" else [group]
        for part in parts:
            plans = list(_within(part) if condition == "within" else _across(part, context, x_speakers, seed))
            if not plans:
                continue
            members = np.array(sorted({i for *_, a, b, x in plans for i in (*a, *b, *x)}, key=lambda i: items.ids[i]))
            place = {int(item): position for position, item in enumerate(members)}
            needed = np.zeros((len(members), len(members)), bool)
            placed = [tuple(np.array([place[i] for i in role]) for role in plan[4:]) for plan in plans]
            for a, b, x in placed:
                needed[x[:, None], a] = needed[x[:, None], b] = True
            if condition == "within":
                for a, _, x in placed:
                    needed[x[:, None], a] = x[:, None] < a
            table = _sequence_distances(frames, starts[members], lengths[members], needed, distance, device)
            if condition == "within":
                table = np.where(np.isnan(table), table.T, table)
            for plan, (a, b, x) in zip(plans, placed, strict=True):
                error, triples = _error(table[x[:, None], a], table[x[:, None], b])
                cells.append(Cell(*plan[:4], context, error, triples))
    on_progress(len(groups), len(groups))
    return cells


def aggregate(cells: Sequence[Cell]) -> float:
    """ABX error (percent): mean over contexts and X speakers, then speakers, then ordered phone pairs."""
    if not cells:
        raise InputError("no cell: no speaker says two phones in one context often enough")
    errors: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        errors[cell.phone, cell.other][cell.speaker].append(cell.error)
    pairs = [np.mean([np.mean(values) for values in speakers.values()]) for speakers in errors.values()]
    return 100 * float(np.mean(pairs))


def evaluate(
    frames: NDArray[Any],
    items: Items,
    *,
    conditions: Sequence[Condition] = ("within", "across"),
    distance: Distance = "angular",
    items_per_cell: int | None = 10,
    x_speakers: int | None = 5,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """ABX errors with their conventions; parameters as `score_cells`.

    Returns
    -------
    dict
        Per condition ``error`` (percent; None where there is no cell), ``cells``, ``triples``, ``phone_pairs`` and
        ``speakers``; besides ``items`` and the conventions.
    """
    result: dict[str, Any] = {}
    for condition in conditions:
        cells = score_cells(
            frames, items, condition, distance=distance, items_per_cell=items_per_cell, x_speakers=x_speakers,
            seed=seed, device=device, on_progress=on_progress,
        )  # fmt: skip
        result[condition] = {
            "error": aggregate(cells) if cells else None,
            "cells": len(cells),
            "triples": sum(cell.triples for cell in cells),
            "phone_pairs": len({(cell.phone, cell.other) for cell in cells}),
            "speakers": len({cell.speaker for cell in cells}),
        }
    return result | {
        "items": len(items),
        "distance": distance,
        "items_per_cell": items_per_cell,
        "x_speakers": x_speakers,
        "seed": seed,
        "sequence_distance": "DTW, mean over the path; diagonal, then left, then up on ties; X along rows",
        "aggregation": "contexts and X speakers, then speakers, then ordered phone pairs; unweighted",
    }
