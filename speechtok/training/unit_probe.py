"""How steady units are under augmentation, and how many of them are used, while a quantizer learns."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from speechtok.metrics.edit_distance import unit_edit_distance
from speechtok.metrics.phonetic import codebook_use
from speechtok.training.augmented import CLEAN, AugmentedFrames
from speechtok.units import run_lengths

__all__ = ["UED", "steadiness"]

UED = "ued"


def steadiness(
    quantize: Callable[[NDArray[np.float32]], NDArray[np.int32]],
    sound: AugmentedFrames,
    vocab_size: int,
    *,
    items: int = 200,
    seed: int = 0,
) -> dict[str, float]:
    """Unit edit distances and use of the vocabulary on a sample of items.

    Parameters
    ----------
    quantize : callable
        From frames float32 [T, D] to ids int32 [T].
    sound : AugmentedFrames
    vocab_size : int
    items, seed : int
        How many items are taken at most, and how they are drawn.

    Returns
    -------
    dict
        ``ued``: mean over families; ``ued_<family>`` (percent of the runs of the clean sequence, mean over items);
        ``perplexity`` of the clean units; ``runs_per_second``.
    """
    chosen = sorted(np.random.default_rng(seed).permutation(len(sound.lengths))[:items].tolist())
    clean = [quantize(sound.whole(item, 0)) for item in chosen]
    of_family: dict[str, list[float]] = {}
    for version, family in enumerate(sound.versions):
        if family != CLEAN:
            changed = [quantize(sound.whole(item, version)) for item in chosen]
            of_family.setdefault(family, []).append(unit_edit_distance(clean, changed))
    units = np.concatenate(clean)
    runs = sum(len(run_lengths(ids)[0]) for ids in clean)
    figures = {f"{UED}_{family}": float(np.mean(values)) for family, values in of_family.items()}
    return {
        UED: float(np.mean(list(figures.values()))),
        **figures,
        "perplexity": codebook_use(units, vocab_size)["perplexity"],
        "runs_per_second": runs / len(units) * sound.rate,
    }
