"""Cutters to compare: tokenizers of segments, encoders with a segmenter, and baselines.

What a name means (`compare`):

- ``NAME``: a tokenizer with a segmenter, as it is.
- ``NAME+greedy``, ``NAME+min-cut``, ``NAME+norm-peaks``: the frames of an encoder, cut by that segmenter. NAME is a
  tokenizer, of which the encoder is taken, or an encoder (see `open_source`). The thresholds are chosen on other speech
  over the grids of this module.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok import hub
from speechtok.corpus.engine import Event
from speechtok.encoders.base import Encoder
from speechtok.encoders.pretrained import from_pretrained
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.errors import InputError, UnknownNameError
from speechtok.evaluation.baselines import energy, energy_onsets, uniform_grid
from speechtok.evaluation.boundaries import Cutter, Family, Wave, evaluate
from speechtok.frames import FrameGrid
from speechtok.metrics.boundaries import SHIFTED, TOLERANCE, Protocol
from speechtok.quantizers.kmeans import KMeans
from speechtok.registry import PUBLISHED as PUBLISHED_TOKENIZERS
from speechtok.registry import shipped
from speechtok.segmenters.base import build
from speechtok.tokenizer import Tokenizer

__all__ = [
    "GATED_GREEDY",
    "GRIDS",
    "PUBLISHED",
    "PUBLISHED_SOURCE",
    "EncoderFrames",
    "compare",
    "grid_for",
    "of_encoder",
    "of_tokenizer",
    "open_source",
]

Spans = NDArray[np.float64]

# What is tried for each segmenter, see `grid_for`. Thresholds of norms are quantiles of the norms of all frames.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "greedy": {
        "norm_quantile": (0.0, 0.1, 0.2, 0.3, 0.4),
        "merge_threshold": (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99),
    },
    "min-cut": {
        # The cost grows with the square of a run of voiced frames: there is no setting in which all are voiced.
        "norm_quantile": (0.1, 0.2, 0.3),
        "seconds": (0.15, 0.2),
        "merge_threshold": (0.5, 0.7, 0.8, 0.9, 1.1),  # 1.1 merges nothing
    },
    "norm-peaks": {
        "half_window_seconds": (0.0, 0.02, 0.04, 0.06),
        "prominence": (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3),
    },
}
# Of "greedy" on gated encoders (see `W2vBertConfig`): norms lie between 0 and 1 and mean the same everywhere.
GATED_GREEDY: dict[str, tuple[float, ...]] = {
    "norm_threshold": (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
    "merge_threshold": (-1.0, 0.0, 0.2, 0.3, 0.4, 0.5, 0.6),  # -1 never cuts a run of voiced frames
}

# Cho et al., ICLR 2025 (arXiv 2410.07168): 50 ms, shift of the best R on validation speech, in %.
PUBLISHED_SOURCE = (
    "Cho et al. 2025, arXiv 2410.07168: other data (LibriSpeech test; models of 960 h; 4096 clusters, SylBoost 8192)"
)
PUBLISHED: dict[str, dict[str, float]] = {
    "HuBERT, min-cut": {
        "precision": 47.9, "recall": 75.9, "f1": 58.7, "r_value": 39.1, "syllable_purity": 61.8,
        "cluster_purity": 33.9, "snmi": 80.9,
    },
    "SD-HuBERT, min-cut": {
        "precision": 64.3, "recall": 71.0, "f1": 67.5, "r_value": 70.7, "syllable_purity": 54.1,
        "cluster_purity": 46.2, "snmi": 73.4,
    },
    "Sylber, greedy": {
        "tokens_per_second": 3.76, "precision": 76.6, "recall": 68.3, "f1": 72.2, "r_value": 75.9,
        "syllable_purity": 64.0, "cluster_purity": 43.9, "snmi": 81.4,
    },
    "SylBoost 6.25 Hz": {
        "precision": 64.1, "recall": 88.7, "f1": 74.4, "r_value": 62.4, "syllable_purity": 76.6,
        "cluster_purity": 33.9, "snmi": 90.2,
    },
}  # fmt: skip


def compare(
    folder: str | os.PathLike[str],
    names: Sequence[str],
    *,
    dev: str | os.PathLike[str] | None = None,
    shift: float | None = None,
    tolerance: float = TOLERANCE,
    silence_starts: bool = False,
    baselines: bool = True,
    limit_files: int | None = None,
    device: str = "cpu",
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[dict[str, Any]]:
    """Measure what names stand for, and baselines: a grid at the segment rate of the first row, and loudness.

    Parameters
    ----------
    folder, dev, tolerance, silence_starts, limit_files, on_event
        As `speechtok.evaluation.boundaries.evaluate`.
    names : sequence of str
        See the head of this module.
    shift : float, optional
        Added to the reference (s), which is the same as taken from the predictions, in all protocols. Default: the
        best on `dev`, 0 without it.
    baselines : bool
        Whether baselines are measured too.
    device : str
        A torch device for encoders.

    Returns
    -------
    list of dict
        Of `speechtok.evaluation.boundaries.evaluate`: the names in order, a tokenizer's own name where it is one; then
        the baselines.

    Raises
    ------
    UnknownNameError
        If a name stands for nothing.
    InputError
        If a folder, a name or an option is unusable, or there is nothing to measure.
    AudioError, CheckpointError
        If sound or weights are unusable.
    """
    rows: list[Cutter | Family] = []
    opened: dict[str, tuple[str, EncoderFrames]] = {}
    for name in names:
        source, kind = _parse(name)
        if kind is None:
            rows.append(of_tokenizer(hub.load(name, device=device)))
            continue
        if dev is None:
            raise InputError(f"{name}: its thresholds are chosen on other speech; give an aligned folder of it (--dev)")
        if source not in opened:
            found = open_source(source)
            opened[source] = (
                (found.name, EncoderFrames(found.encoder, device))
                if isinstance(found, Tokenizer)
                else (source, EncoderFrames(found, device))
            )
        called, frames = opened[source]
        rows.append(of_encoder(frames, kind, name=f"{called}+{kind}"))
    if baselines:
        rows += [energy(), energy_onsets()]
    if not rows:
        raise InputError("nothing is to be measured; name a tokenizer or keep the baselines")

    shifts: dict[Protocol, float] | None = None
    if shift is not None:
        shifts = {protocol: shift if to == "reference" else -shift for protocol, to in SHIFTED.items()}

    def measure(some: Sequence[Cutter | Family]) -> list[dict[str, Any]]:
        return evaluate(
            folder, some, dev=dev, shift=shifts, tolerance=tolerance, silence_starts=silence_starts,
            limit_files=limit_files, on_event=on_event,
        )  # fmt: skip

    results = measure(rows)
    if baselines:
        *_, pooled = results[0]["groups"].values()
        if pooled["segments"]:
            results[len(names) : len(names)] = measure([uniform_grid(round(pooled["segments_per_second"], 2))])
    return results


def _parse(name: str) -> tuple[str, str | None]:
    """Name of the tokenizer or encoder, and the segmenter (None: the tokenizer's own)."""
    found = re.fullmatch(rf"(.+)\+({'|'.join(GRIDS)})", name)
    if found:
        return found[1], found[2]
    if "+" in name and not Path(name).exists():
        raise InputError(f"{name}: write NAME+SEGMENTER with one of {', '.join(GRIDS)}")
    return name, None


def open_source(name: str, device: str = "cpu") -> Tokenizer | Encoder:
    """A tokenizer, or an encoder.

    Parameters
    ----------
    name : str
        A tokenizer's folder or name, or what `speechtok.encoders.from_pretrained` takes; ``:LAYER`` behind the latter
        chooses another layer than the last.
    device : str
        A torch device for tokenizers.

    Raises
    ------
    UnknownNameError
        If it is neither.
    InputError
        If a tokenizer is given a layer, or the encoder has no such layer.
    CheckpointError
        If weights are unusable.
    """
    found = re.fullmatch(r"(.+):(\d+)", name)
    name, layer = (found[1], int(found[2])) if found else (name, None)
    if name in shipped() or name in PUBLISHED_TOKENIZERS or (Path(name) / "tokenizer.json").exists():
        if layer is not None:
            raise InputError(f"{name} is a tokenizer, whose encoder ends at its own layer; leave :{layer} out")
        return hub.load(name, device=device)
    try:
        return from_pretrained(name, layer)
    except UnknownNameError as error:
        known = ", ".join([*shipped(), *PUBLISHED_TOKENIZERS])
        raise UnknownNameError(f"{error}; tokenizers are: {known}") from error


def of_tokenizer(tokenizer: Tokenizer) -> Cutter:
    """A tokenizer's segments and units.

    Raises
    ------
    InputError
        If its units are frames.
    """
    if tokenizer.segmenter is None:
        raise InputError(
            f"{tokenizer.name} has no segmenter, its units are frames; to cut its encoder's frames write "
            f"{' or '.join(f'{tokenizer.name}+{kind}' for kind in GRIDS)}"
        )

    def cut(wave: Wave) -> tuple[Spans, NDArray[np.int32]]:
        units = tokenizer.encode(wave, tokenizer.sample_rate)
        return np.stack([units.starts_seconds, units.ends_seconds], 1), units.ids

    facts = {
        "fingerprint": tokenizer.fingerprint,
        "segmenter": tokenizer.segmenter.type,
        "setting": tokenizer.segmenter.config_dict(),
        "silence_gap": tokenizer.silence_gap,
    }
    silence = None if tokenizer.silence_gap is None else tokenizer.quantizer.vocab_size
    return Cutter(tokenizer.name, cut, tokenizer.sample_rate, tokenizer.vocab_size, silence, facts)


class EncoderFrames:
    """Frames of waves by an encoder. Those of the last wave are kept, so that several segmenters share one pass.

    Parameters
    ----------
    encoder : Encoder
    device : str
        A torch device.
    """

    def __init__(self, encoder: Encoder, device: str = "cpu") -> None:
        # A tokenizer knows how to cut long files into windows; its units are not used.
        units = KMeans(np.zeros((1, encoder.dim), np.float32))
        self._source = Tokenizer(encoder, units, name=encoder.type).to(device)
        self._wave: Wave | None = None
        self._frames = np.zeros((0, encoder.dim), np.float32)

    @property
    def encoder(self) -> Encoder:
        """Whose frames they are."""
        return self._source.encoder

    @torch.inference_mode()
    def __call__(self, wave: Wave) -> NDArray[np.float32]:
        """Frames float32 [T, D] of a wave float32 [N] at the encoder's sample rate."""
        if wave is not self._wave:
            parts = [np.zeros((0, self.encoder.dim), np.float32)]
            for window, samples in self._source.windows(wave, self.encoder.sample_rate):
                features = self.encoder(torch.from_numpy(samples)[None].to(self._source.device)).features[0]
                parts.append(features[window.skip : window.skip + window.count].float().cpu().numpy())
            self._frames, self._wave = np.concatenate(parts), wave
        return self._frames


def grid_for(encoder: Encoder, kind: str) -> dict[str, tuple[float, ...]]:
    """What `of_encoder` tries for a segmenter (one of `GRIDS`) on an encoder."""
    gates = isinstance(encoder, W2vBertEncoder) and encoder.gates
    return GATED_GREEDY if kind == "greedy" and gates else GRIDS[kind]


def of_encoder(frames: EncoderFrames, kind: str, *, name: str | None = None) -> Family:
    """An encoder's frames, cut by a segmenter at each setting of its grid (see `grid_for`).

    Parameters
    ----------
    frames : EncoderFrames
    kind : str
        One of `GRIDS`.
    name : str, optional
        For tables; default the encoder's type and the segmenter.
    """
    encoder, type_ = frames.encoder, kind.replace("-", "_")
    grid = grid_for(encoder, kind)

    def settings(every: Sequence[NDArray[np.float32]]) -> list[Mapping[str, Any]]:
        configs = []
        norms = np.concatenate([np.linalg.norm(one, axis=1) for one in every])
        if not len(norms):
            raise InputError(f"{name or kind}: no sound is as long as a frame")
        quantiles = np.quantile(norms, grid.get("norm_quantile", (0.0,))).tolist()
        if kind == "norm-peaks":
            windows = dict.fromkeys(2 * round(half * encoder.grid.rate) + 1 for half in grid["half_window_seconds"])
            configs = [{"window": window, "prominence": one} for window in windows for one in grid["prominence"]]
        elif kind == "greedy":
            configs = [
                {"norm_threshold": norm, "merge_threshold": merge}
                for norm in grid.get("norm_threshold", quantiles)
                for merge in grid["merge_threshold"]
            ]
        else:
            configs = [
                {"norm_threshold": norm, "seconds": long, "merge_threshold": merge, "frame_rate": encoder.grid.rate}
                for norm in quantiles
                for long in grid["seconds"]
                for merge in grid["merge_threshold"]
            ]
        return [build(type_, config).config_dict() for config in configs]

    def cut(one: NDArray[np.float32], setting: Mapping[str, Any]) -> Spans:
        return _seconds(build(type_, setting).segment(one)[0], encoder.grid)

    facts = {
        "encoder": encoder.type,
        "layer": encoder.layer,
        "segmenter": type_,
        "grid": {field: list(values) for field, values in grid.items()},
    }
    return Family(name or f"{encoder.type}+{kind}", frames, settings, cut, encoder.sample_rate, facts=facts)


def _seconds(spans: NDArray[np.int64], grid: FrameGrid) -> Spans:
    """Times of segments of frames: where the first frame's span begins and the last one's ends."""
    times: Spans = (grid.offset + spans * grid.hop) / grid.sample_rate
    return times
