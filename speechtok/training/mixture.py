"""Sound of other crops as noise: what a masked model hears besides the sound that it is asked about."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, cat

__all__ = ["mix_in_batch"]


def mix_in_batch(
    clean: Tensor,
    lengths: Tensor,
    generators: Sequence[np.random.Generator],
    *,
    probability: float,
    segments: int,
    samples: tuple[int, ...],
    gain: float,
) -> Tensor:
    """Add pieces of the other rows to some rows (MERT's in-batch noise mixture).

    A row that is alone has no other rows and stays as it is. Pieces are taken from the others one behind the other, as
    published, so that a piece may hold the end of one and the beginning of the next. Nothing is clipped.

    Parameters
    ----------
    clean : float32 [B, N]
    lengths : int64 [B]
        Valid samples of each row; what lies behind is neither taken nor changed.
    generators : sequence of numpy Generator
        One for each row.
    probability : float
        Share of rows that something is added to.
    segments : int
        A row gets 1 to this many pieces.
    samples : (int, int)
        Shortest and longest piece.
    gain : float

    Returns
    -------
    float32 [B, N]
        A copy.
    """
    heard, sizes = clean.clone(), lengths.tolist()
    for row, generator in enumerate(generators):
        chosen = generator.random() < probability
        if not chosen or len(sizes) == 1:
            continue
        others = cat([clean[i, :size] for i, size in enumerate(sizes) if i != row])
        for _ in range(int(generator.integers(1, segments + 1))):
            size = min(int(generator.integers(samples[0], samples[1] + 1)), len(others), sizes[row])
            source = int(generator.integers(0, len(others) - size + 1))
            place = int(generator.integers(0, sizes[row] - size + 1))
            heard[row, place : place + size] += gain * others[source : source + size]
    return heard
