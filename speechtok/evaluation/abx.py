"""ABX error of a tokenizer's units or of its encoder's frames, on an aligned folder."""

import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.decode import load
from speechtok.corpus.engine import Event
from speechtok.encoders.base import Encoder
from speechtok.errors import InputError
from speechtok.evaluation.alignments import GROUPS, SILENCE, Triphone, Utterance, items, read, triphones
from speechtok.evaluation.units import each_group, spread
from speechtok.metrics import abx
from speechtok.metrics.abx import Condition, Slicing
from speechtok.metrics.frame_distances import Distance
from speechtok.quantizers.kmeans import KMeans
from speechtok.tokenizer import Tokenizer

__all__ = ["Representation", "check", "evaluate"]

Representation = Literal["frames", "units"]


def check(source: Tokenizer, representation: Representation) -> None:
    """Refuse what has no frames: InputError for the units of a tokenizer with a segmenter."""
    if representation == "units" and source.segmenter is not None:
        raise InputError(f"{source.name}: its units are segments, not frames; compare its frames alone (-r frames)")


def evaluate(
    folder: str | os.PathLike[str],
    source: Tokenizer | Encoder,
    *,
    representation: Representation = "frames",
    conditions: Sequence[Condition] = ("within", "across"),
    distance: Distance | None = None,
    slicing: Slicing = "inclusive",
    shift: int = 0,
    items_per_cell: int | None = 10,
    x_speakers: int | None = 5,
    seed: int = 0,
    limit_files: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Measure a tokenizer, or the frames of an encoder.

    Parameters
    ----------
    folder : path
        An aligned folder (see `speechtok.evaluation.alignments`).
    source : Tokenizer or Encoder
        An encoder has frames only.
    representation : {"frames", "units"}
        The encoder's frames, or the units, one per frame.
    conditions : sequence of {"within", "across"}
    distance : str, optional
        Of frames; default ``angular``, for units ``identical`` (see `speechtok.metrics.frame_distances`).
    slicing, shift
        Which frames belong to a phone (see `speechtok.metrics.abx.slice_frames`).
    items_per_cell, x_speakers, seed
        Subsampling (see `speechtok.metrics.abx.score_cells`).
    limit_files : int, optional
        At most this many utterances, evenly spread.
    on_event : callable
        Told the progress of encoding in seconds of sound.

    Returns
    -------
    dict
        ``groups``: per corpus group and pooled the figures of each condition; ``left_out``: groups that cannot be
        measured and why; ``conventions``: all that they depend on besides the source and the data.

    Raises
    ------
    InputError
        If the folder or an option is unusable.
    AudioError
        If one of its files is.
    """
    if representation not in get_args(Representation):
        raise InputError(f"representation {representation!r} is none of {', '.join(get_args(Representation))}")
    if isinstance(source, Encoder):
        if representation == "units":
            raise InputError("an encoder has no units; give a tokenizer, or representation='frames'")
        source = Tokenizer(source, KMeans(np.zeros((1, source.dim), np.float32)), name=source.type)
    check(source, representation)
    chosen: Distance = distance or ("identical" if representation == "units" else "angular")
    utterances = spread(read(folder), limit_files)
    tokens: list[list[tuple[Utterance, Triphone]]] = []
    pieces: list[list[NDArray[Any]]] = []
    # Aligned time stands for the length of files that are not decoded yet.
    ends = list(accumulate(utterance.phones[-1].end if utterance.phones else 0.0 for utterance in utterances))
    for utterance, end in zip(utterances, ends, strict=True):
        frames = _frames(Path(folder) / utterance.path, source, representation)
        found = triphones(utterance, source.encoder.grid, len(frames), slicing=slicing, shift=shift)
        tokens.append([(utterance, token) for token in found])
        # Copies: the rest of the file's frames need not stay in memory.
        pieces.append([frames[token.start : token.stop].copy() for token in found])
        on_event(Event("run", end, ends[-1]))
    conventions: dict[str, Any] = {}

    def score(members: list[int]) -> dict[str, Any]:
        stretches = [piece for i in members for piece in pieces[i]]
        if not stretches:
            raise InputError("no phone stands between two others and lasts a frame")
        result = abx.evaluate(
            np.concatenate(stretches), items([token for i in members for token in tokens[i]]),
            conditions=conditions, distance=chosen, items_per_cell=items_per_cell, x_speakers=x_speakers,
            seed=seed, device=str(source.device),
        )  # fmt: skip
        figures = ("items", *conditions)
        conventions.update((key, value) for key, value in result.items() if key not in figures)
        return {"utterances": len(members)} | {key: result[key] for key in figures}

    groups, left_out = each_group(utterances, score)
    return {
        "tokenizer": source.name,
        "fingerprint": source.fingerprint,
        "representation": representation,
        "rate": source.encoder.grid.rate,
        "data": Path(folder).resolve().name,
        "conventions": conventions
        | {
            "items": "phones between two phones of the same context; silence is neither token nor context",
            "silence": list(SILENCE),
            "corpora": GROUPS,
            "slicing": slicing,
            "shift_frames": shift,
            "files": "all" if limit_files is None else f"at most {limit_files}, evenly spread",
        },
        "groups": groups,
        "left_out": left_out,
    }


@torch.inference_mode()
def _frames(path: Path, tokenizer: Tokenizer, representation: Representation) -> NDArray[Any]:
    """Frames of one file: float32 [T, D], or units int32 [T] or [T, K]."""
    wave = load(path, tokenizer.sample_rate)
    if representation == "units":
        return tokenizer.encode(wave, tokenizer.sample_rate).ids.T
    parts = [np.zeros((0, tokenizer.encoder.dim), np.float32)]
    for window, samples in tokenizer.windows(wave, tokenizer.sample_rate):
        features = tokenizer.encoder(torch.from_numpy(samples)[None].to(tokenizer.device)).features[0]
        parts.append(features[window.skip : window.skip + window.count].float().cpu().numpy())
    return np.concatenate(parts)
