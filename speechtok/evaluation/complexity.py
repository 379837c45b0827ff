"""Augmentation complexity of a tokenizer: how well frames and units tell utterances apart after augmentation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.augment import AugmentResources, augment
from speechtok.audio.clips import Wave
from speechtok.errors import InputError
from speechtok.frame_units import frames_of
from speechtok.metrics.augmentation_complexity import augmentation_complexity, gaussian_scores, unigram_scores
from speechtok.tokenizer import Tokenizer

__all__ = ["LEAST", "SECONDS", "VIEWS", "Seen", "complexity", "see", "views_of"]

SECONDS = 2.0  # of each utterance: all views are about equally long
# Views of each utterance: so many for the model of the posterior, for its temperature, and that are measured.
VIEWS = 8
LEAST = 16  # utterances


@dataclass(frozen=True)
class Seen:
    """What a tokenizer makes of the views of one utterance.

    Parameters
    ----------
    units : list of int32 [T]
        Of one codebook, of each view.
    means : float64 [V, D]
        Means of the frames of each view.
    """

    units: list[NDArray[np.int32]]
    means: NDArray[np.float64]


def views_of(
    wave: Wave, sample_rate: int, key: str, *, families: Sequence[str], resources: AugmentResources, seed: int = 0
) -> list[Wave]:
    """Views of an utterance: the middle `SECONDS` of it, augmented ``3 * VIEWS`` times.

    Parameters
    ----------
    wave : float32 [n]
    sample_rate : int
        In Hz.
    key : str
        Name of the utterance, which draws depend on.
    families : sequence of str
        Views take turns among them.
    resources : AugmentResources
    seed : int

    Raises
    ------
    AudioError, InputError
        See `speechtok.audio.augment.augment`.
    """
    length = round(SECONDS * sample_rate)
    piece = wave[max(0, len(wave) - length) // 2 :][:length]
    return [
        augment(piece, sample_rate, families[view % len(families)], key, seed + 1 + view, resources)
        for view in range(3 * VIEWS)
    ]


def see(views: Sequence[Wave], tokenizer: Tokenizer, codebook: int = 0) -> Seen:
    """Encode views, float32 [n] each at the tokenizer's rate."""
    units = tokenizer.encode_batch(views, tokenizer.sample_rate)
    with torch.inference_mode():
        frames = frames_of(tokenizer, views)
    count = frames.lengths.clamp_min(1)[:, None].cpu().numpy()
    means = frames.features.double().sum(1).cpu().numpy() / count
    return Seen([np.atleast_2d(one.ids)[codebook] for one in units], means)


def complexity(seen: Sequence[Seen], vocab_size: int, *, seed: int = 0) -> dict[str, Any]:
    """Measure a tokenizer; see `speechtok.metrics.augmentation_complexity`.

    Parameters
    ----------
    seen : sequence of Seen
        Of utterances, by the tokenizer.
    vocab_size : int
        Its.
    seed : int
        Of the bootstrap.

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
    if len(seen) < LEAST:
        raise InputError(f"augmentation complexity of {len(seen)} utterances: at least {LEAST} are needed")
    # Views take turns among the families, so a third of them holds each family equally often.
    train, chosen, measured = (slice(part, None, 3) for part in range(3))
    found: dict[str, list[dict[str, Any]]] = {"units": [], "frames": []}
    for size in (len(seen) // 4, len(seen) // 2, len(seen)):
        # Every fourth, every second, all: subsets are spread over the folder.
        some = [seen[place] for place in np.linspace(0, len(seen) - 1, size).round().astype(int)]
        means = np.stack([one.means for one in some])  # [N, V, D]
        model = [one.units[train] for one in some]
        for name, scores in (
            (
                "units",
                [unigram_scores(model, [one.units[part] for one in some], vocab_size) for part in (chosen, measured)],
            ),
            ("frames", [gaussian_scores(means[:, train], means[:, part]) for part in (chosen, measured)]),
        ):
            found[name].append(augmentation_complexity(*scores, seed=seed))
    return {
        name: sizes[-1] | {"by_utterances": [[one["utterances"], one["bits"]] for one in sizes]}
        for name, sizes in found.items()
    }
