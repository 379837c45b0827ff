"""Which frames are hidden, and from which others the right one must be told: draws for one crop."""

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError

__all__ = ["draw_distractors", "draw_mask"]


def draw_mask(frames: int, probability: float, span: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Spans of hidden frames.

    Every frame begins a span with the given probability; spans may overlap and are cut at the end (w2v-BERT, Chung et
    al. 2021, section 3.2: 0.065 and 10, which hides 49 % of the frames). At least one span is hidden.

    Parameters
    ----------
    frames : int
        T, at least 1.
    probability : float
        In (0, 1].
    span : int
        Frames.

    Returns
    -------
    bool [T]
    """
    if frames < 1 or not 0 < probability <= 1 or span < 1:
        raise InputError(f"a mask needs frames, a probability and a span, not {frames}, {probability} and {span}")
    starts = generator.random(frames) < probability
    if not starts.any():
        starts[generator.integers(max(1, frames - span + 1))] = True
    # A frame is hidden if one of the `span` frames up to it begins a span.
    begun = np.concatenate([np.zeros(span, np.int64), np.cumsum(starts)])
    return begun[span:] > begun[:-span]


def draw_distractors(masked: int, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """For each of `masked` hidden frames, `count` other ones, uniformly and with repetition: int64 [masked, count].

    A frame that is the only hidden one of its crop gets itself; the loss leaves distractors out whose codes equal
    the right ones, so it has none.
    """
    if masked == 1:
        return np.zeros((1, count), np.int64)
    others = generator.integers(0, masked - 1, (masked, count))
    return others + (others >= np.arange(masked)[:, None])
