"""Segmenters: frames -> spans of syllable-like length."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speechtok.segmenters.base import Segmenter, SegmentStream, build
    from speechtok.segmenters.greedy import Greedy, greedy_segment, greedy_segment_batch
    from speechtok.segmenters.min_cut import MinCut, min_cut_segment
    from speechtok.segmenters.norm_peaks import NormPeaks, norm_peak_segment
    from speechtok.segmenters.stream import GreedyStream

__all__ = [
    "Greedy",
    "GreedyStream",
    "MinCut",
    "NormPeaks",
    "SegmentStream",
    "Segmenter",
    "build",
    "greedy_segment",
    "greedy_segment_batch",
    "min_cut_segment",
    "norm_peak_segment",
]

_HOMES = {
    "Greedy": "greedy",
    "GreedyStream": "stream",
    "MinCut": "min_cut",
    "NormPeaks": "norm_peaks",
    "SegmentStream": "base",
    "Segmenter": "base",
    "build": "base",
    "greedy_segment": "greedy",
    "greedy_segment_batch": "greedy",
    "min_cut_segment": "min_cut",
    "norm_peak_segment": "norm_peaks",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"speechtok.segmenters.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
