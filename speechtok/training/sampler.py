"""What a training step sees: crops of equal length, drawn as a pure function of seed and step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from speechtok.errors import InputError

__all__ = ["Crop", "Sampler"]

SHORTEST = 10  # frames; shorter items may be too short for a frame of an encoder and are never drawn


@dataclass(frozen=True)
class Crop:
    """A piece of an item.

    Parameters
    ----------
    item : int
        Which item.
    start, length : int
        In frames; an item that is shorter gives fewer.
    seed : tuple of int
        For all random draws that belong to this crop: the same in every process.
    """

    item: int
    start: int
    length: int
    seed: tuple[int, ...]

    def generator(self) -> np.random.Generator:
        """A fresh generator for the draws of this crop."""
        return np.random.default_rng(self.seed)


class Sampler:
    """Duration buckets: an item belongs to the longest crop length that it fills, or to the shortest one.

    A step takes one bucket, with a probability proportional to the sound in it, and as many crops as make up the
    batch; items are drawn with a probability proportional to their length, without repetition within a batch where
    there are enough. There is no state: step n is the same whatever was drawn before, in every process, so a run can
    be resumed at any step.

    Parameters
    ----------
    lengths : int64 [items]
        Frames of the items.
    crops : sequence of int
        Crop lengths (frames), ascending.
    batch : int
        Frames of a batch.
    seed : int
    least : int
        Crops that every batch must hold (processes times accumulated micro-batches); they are dealt out as evenly as
        they go.

    Raises
    ------
    InputError
        If there is nothing to draw from, or a batch holds fewer crops than `least`.
    """

    def __init__(
        self, lengths: NDArray[np.int64], crops: tuple[int, ...], batch: int, seed: int, least: int = 1
    ) -> None:
        if len(lengths) == 0 or not crops or list(crops) != sorted(set(crops)) or crops[0] < 1:
            raise InputError(f"{len(lengths)} items, crop lengths {list(crops)}: give items and ascending lengths")
        self.seed, self.lengths = seed, lengths
        self.crops, self.items, self.counts = [], [], []
        bucket = np.maximum(np.searchsorted(crops, lengths, side="right") - 1, 0)
        bucket = np.where(lengths < min(SHORTEST, crops[0]), -1, bucket)
        if (bucket < 0).all():
            raise InputError(f"all {len(lengths)} items are shorter than {SHORTEST} frames; give longer sounds")
        for index, crop in enumerate(crops):
            items = np.flatnonzero(bucket == index)
            if len(items):
                self.crops.append(crop)
                self.items.append(items)
                self.counts.append(max(1, batch // crop))
        if min(self.counts) < least:
            raise InputError(
                f"a batch of {batch} frames holds {min(self.counts)} crops of {max(self.crops)}, fewer than the "
                f"{least} of processes times micro-batches; make batch_seconds longer"
            )
        shares = np.array([lengths[items].sum() for items in self.items], float)
        self.shares = shares / shares.sum()

    def __call__(self, step: int) -> list[Crop]:
        """Crops of a step, all of one length."""
        generator = np.random.default_rng([self.seed, step])
        bucket = int(generator.choice(len(self.items), p=self.shares))
        items, crop, count = self.items[bucket], self.crops[bucket], self.counts[bucket]
        weights = self.lengths[items] / self.lengths[items].sum()
        # Numbered draws without replacement by exponential races (Efraimidis and Spirakis 2006).
        order = np.argsort(generator.exponential(size=len(items)) / weights, kind="stable")
        chosen = items[order[np.arange(count) % len(items)]]
        starts = generator.integers(0, np.maximum(self.lengths[chosen] - crop, 0) + 1)
        return [
            Crop(int(item), int(start), crop, (self.seed, step, row))
            for row, (item, start) in enumerate(zip(chosen, starts, strict=True))
        ]
