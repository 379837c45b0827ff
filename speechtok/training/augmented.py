"""Frames of a frozen encoder over a corpus as it is and augmented: computed once, read at random from then on.

One flat float16 array and an index. At 50 frames per second an hour takes 360 kB for each dimension and version.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.augment import AugmentResources, augment, parts_of
from speechtok.corpus.engine import Event
from speechtok.devices import usable_device
from speechtok.encoders.base import Encoder
from speechtok.errors import InputError
from speechtok.training.items import Items, identity_of, store
from speechtok.training.teacher import describe_encoder

__all__ = ["CLEAN", "AugmentedFrames", "identity_of"]

CLEAN = "clean"


@dataclass(frozen=True)
class AugmentedFrames(Items):
    """Items of a corpus: pieces of files of at most a minute, each in several versions, the first of which is clean.

    Parameters
    ----------
    frames : float16 [N, D]
        Frames of all items, one version behind the other; a memory map.
    starts, lengths : int64 [items]
        Of the clean versions.
    places : int64 [items, V, 2]
        Where each version begins and how many frames it has.
    versions : tuple of str
        V names: `CLEAN`, then the families, some of them several times.
    hops_per_second : float
    failed : tuple of str
        Why files were left out.
    """

    places: NDArray[np.int64]
    versions: tuple[str, ...]
    hops_per_second: float
    failed: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.hops_per_second

    def whole(self, item: int, version: int) -> NDArray[np.float32]:
        """All frames of a version of an item, see `cut`."""
        return self.cut(item, version, 0, int(self.lengths[item]))

    def cut(self, item: int, version: int, first: int, count: int) -> NDArray[np.float32]:
        """Frames of a version that stand for clean frames ``[first, first + count)``: float32 [n, D].

        In a stretched version that is the same share of the item.
        """
        begin, total = self.places[item, version].tolist()
        low, high = (round(place * total / int(self.lengths[item])) for place in (first, first + count))
        return self.frames[begin + low : begin + min(total, high)].astype(np.float32)

    @classmethod
    def build(
        cls,
        source: str | os.PathLike[str],
        encoder: Encoder,
        folder: Path,
        *,
        families: Sequence[str],
        resources: AugmentResources,
        copies: int = 1,
        seed: int = 0,
        device: str = "cpu",
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> "AugmentedFrames":
        """Compute the frames, or read what an earlier call with the same arguments left in `folder`.

        Parameters
        ----------
        source : path or glob
            As for ``tokenize``; files that cannot be used are counted and left out.
        encoder : Encoder
            At its layer.
        folder : Path
            Where the frames are kept.
        families : sequence of str
            See `speechtok.audio.augment`; each item is drawn for by its key.
        resources : AugmentResources
        copies : int
            Draws of each family.
        seed : int
            Of the draws; that of the first copy.
        device : str
            Of the encoder.
        on_event : callable
            Progress.

        Raises
        ------
        InputError
            If nothing in the corpus can be used, or there is no family or copy, or an unknown family.
        """
        if not families or copies < 1:
            raise InputError(f"families {list(families)}, copies {copies}: give at least one of each")
        for family in families:
            parts_of(family)  # refuses unknown ones before anything is decoded
        place, rate = usable_device(device), encoder.sample_rate
        encoder = encoder.to(place).eval()
        drawn = [(family, seed + copy) for copy in range(copies) for family in families]

        @torch.inference_mode()
        def convert(wave: NDArray[np.float32], name: str) -> list[NDArray[np.float16]]:
            waves = [wave, *(augment(wave, rate, family, name, draw, resources) for family, draw in drawn)]
            batch = torch.zeros(len(waves), max(len(one) for one in waves))
            for row, one in enumerate(waves):
                batch[row, : len(one)] = torch.from_numpy(one)
            found = encoder(batch.to(place), torch.tensor([len(one) for one in waves]))
            counts = found.lengths.tolist()
            if not all(counts):
                return []
            limit = torch.finfo(torch.float16).max
            features = found.features.clamp(-limit, limit).half().cpu().numpy()
            return [features[row, :count] for row, count in enumerate(counts)]

        settings = {
            "encoder": describe_encoder(encoder), "drawn": [list(one) for one in drawn],
            "resources": resources.identity,
        }  # fmt: skip
        frames, starts, lengths, known = store(
            source, folder, "frames.f16", settings, grid=encoder.grid, dtype=np.float16, dim=encoder.dim,
            convert=convert, on_event=on_event,
        )  # fmt: skip
        places = np.stack([starts, lengths], 1).reshape(-1, 1 + len(drawn), 2)
        return cls(
            frames, places[:, 0, 0], places[:, 0, 1], places, (CLEAN, *(family for family, _ in drawn)),
            encoder.grid.rate, tuple(known["failed"]),
        )  # fmt: skip
