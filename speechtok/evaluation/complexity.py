"""Augmentation complexity of a tokenizer: how well frames and units tell utterances apart after augmentation."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.augment import AugmentResources, augment
from speechtok.errors import InputError
from speechtok.frame_units import frames_of
from speechtok.metrics.augmentation_complexity import augmentation_complexity, gaussian_scores, unigram_scores
from speechtok.tokenizer import Tokenizer

__all__ = ["LEAST", "SECONDS", "VIEWS", "complexity"]

SECONDS = 2.0  # of each utterance: all views are about equally long
VIEWS = (
    8  # of each utterance for the model of the posterior, as many for its temperature, and as many that are measured
)
LEAST = 16  # utterances


def complexity(
    waves: Sequence[NDArray[np.float32]],
    keys: Sequence[str],
    tokenizer: Tokenizer,
    *,
    families: Sequence[str],
    resources: AugmentResources,
    seed: int = 0,
    codebook: int = 0,
    on_utterance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure a tokenizer; see `speechtok.metrics.augmentation_complexity`.

    Parameters
    ----------
    waves : sequence of float32 [n]
        At the tokenizer's rate; of each the middle `SECONDS` are taken.
    keys : sequence of str
        Names of the utterances, which draws depend on.
    tokenizer : Tokenizer
    families : sequence of str
        Views take turns among them.
    resources : AugmentResources
    seed : int
    codebook : int
    on_utterance : callable
        Told when one is done.

    Returns
    -------
    dict
        ``units`` and ``frames``: results of `augmentation_complexity` for bags of units and for means of frames, and
        under ``by_utterances`` the bits of a quarter, of half and of all of the utterances: bits that grow with their
        number say no more than "at least".

    Raises
    ------
    InputError
        If there are fewer than 16 utterances.
    """
    if len(waves) < LEAST:
        raise InputError(f"augmentation complexity of {len(waves)} utterances: at least {LEAST} are needed")
    rate = tokenizer.sample_rate
    units: list[list[NDArray[np.int32]]] = []
    means: list[NDArray[np.float64]] = []
    for wave, key in zip(waves, keys, strict=True):
        begin = max(0, len(wave) - round(SECONDS * rate)) // 2
        piece = wave[begin : begin + round(SECONDS * rate)]
        views = [
            augment(piece, rate, families[view % len(families)], key, seed + 1 + view, resources)
            for view in range(3 * VIEWS)
        ]
        units.append([np.atleast_2d(one.ids)[codebook] for one in tokenizer.encode_batch(views, rate)])
        with torch.inference_mode():
            frames = frames_of(tokenizer, views)
        count = frames.lengths.clamp_min(1)[:, None].cpu().numpy()
        means.append(frames.features.double().sum(1).cpu().numpy() / count)
        on_utterance()
    vectors = np.stack(means)  # [N, V, D]
    vocab = tokenizer.vocab_size
    result: dict[str, Any] = {}
    for name in ("units", "frames"):
        sizes = [len(waves) // 4, len(waves) // 2, len(waves)]
        found = []
        for size in sizes:
            # Every fourth, every second, all: subsets are spread over the folder.
            chosen = np.linspace(0, len(waves) - 1, size).round().astype(int)
            # Views take turns among the families, so a third of them holds each family equally often.
            train, chosen_views, tested = (range(part, 3 * VIEWS, 3) for part in range(3))
            if name == "units":
                model = [[units[i][view] for view in train] for i in chosen]
                sets = [[[units[i][view] for view in which] for i in chosen] for which in (chosen_views, tested)]
                scores = [unigram_scores(model, views, vocab) for views in sets]
            else:
                fitted = vectors[chosen][:, list(train)]
                scores = [gaussian_scores(fitted, vectors[chosen][:, list(which)]) for which in (chosen_views, tested)]
            found.append(augmentation_complexity(scores[0], scores[1], seed=seed))
        result[name] = found[-1] | {"by_utterances": [[one["utterances"], one["bits"]] for one in found]}
    return result
