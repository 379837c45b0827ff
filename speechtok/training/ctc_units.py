"""Augmentation-invariant units from pseudo-labels (Gat et al. 2023, arXiv 2209.15483).

A teacher names the units of clean sound, runs of equal ones counted once. A small network on single frames of the
augmented sound is to give the same sequence, by CTC: how the two time axes correspond is left free. Neither encoder nor
teacher learns. The next round takes the student as its teacher.

Departure: there is no blank. Targets hold no repeats, so none is needed; without one every frame has a unit and the
network is a quantizer like any other. A blank would leave most frames without a unit: durations would have to be
guessed, and a stream would have to wait for the next unit. It also learned less here (docs/measurements.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.audio.perturb import PerturbConfig
from speechtok.errors import InputError
from speechtok.quantizers.base import Quantizer
from speechtok.quantizers.mlp import UnitMlp
from speechtok.training.augmented import AugmentedFrames
from speechtok.training.sampler import Crop
from speechtok.units import run_lengths

__all__ = ["CtcConfig", "CtcObjective"]

_NEVER = -1e4  # log probability of the blank: finite, so that gradients are


@dataclass(frozen=True)
class CtcConfig:
    """Settings of `CtcObjective`.

    Parameters
    ----------
    hidden : tuple of int
        Sizes of the network's layers in between.
    clean_share : float
        Share of the crops that stay clean.
    """

    hidden: tuple[int, ...] = (256, 256)
    clean_share: float = 0.2

    def __post_init__(self) -> None:
        if min(self.hidden, default=1) < 1 or not 0 <= self.clean_share < 1:
            raise InputError("[objective] sizes of hidden layers must be positive and clean_share in [0, 1)")


class CtcObjective(nn.Module):
    """Student network and its loss.

    Parameters
    ----------
    config : CtcConfig
    teacher : Quantizer
        Names the units of clean frames.
    dim : int
        D, size of the encoder's frames.
    neighbours : int
        Frames on each side that the student sees beside its own, see `AugmentedFrames.cut`.

    Raises
    ------
    InputError
        If the teacher has several codebooks, or frames of another size.
    """

    def __init__(self, config: CtcConfig, teacher: Quantizer, dim: int, neighbours: int = 0) -> None:
        super().__init__()
        if teacher.codebooks != 1:
            raise InputError(f"the teacher has {teacher.codebooks} codebooks; units of one codebook can be taught")
        if teacher.dim % dim or teacher.dim // dim % 2 == 0:
            raise InputError(f"the teacher takes frames of {teacher.dim} values, the encoder gives {dim}")
        self.config, self.units, self.neighbours = config, teacher.vocab_size, neighbours
        self.perturb_config: PerturbConfig | None = None
        self.mlp = UnitMlp(dim * (2 * neighbours + 1), config.hidden, teacher.vocab_size)
        self._teacher_neighbours = teacher.dim // dim // 2
        # Not a part of the model: it is neither trained nor saved with it.
        self._teacher = [teacher]

    def compiled(self) -> Iterable[nn.Module]:
        """Nothing: the network is small."""
        return ()

    def standardize(self, mean: NDArray[np.float32], deviation: NDArray[np.float32]) -> None:
        """Take statistics of the frames, float32 [D] each."""
        self.mlp.mean.copy_(torch.from_numpy(mean))
        self.mlp.scale.copy_(torch.from_numpy(deviation))

    @torch.no_grad()
    def collate(self, crops: list[Crop], sound: AugmentedFrames, noises: None, *, training: bool) -> dict[str, Tensor]:
        """Frames of one version of each crop, and the units of the clean one."""
        versions = np.array([self._drawn(crop, len(sound.versions)) for crop in crops])
        clean, heard = (
            [
                sound.cut(crop.item, version, crop.start, crop.length, neighbours)
                for crop, version in zip(crops, which, strict=True)
            ]
            for which, neighbours in ((np.zeros_like(versions), self._teacher_neighbours), (versions, self.neighbours))
        )
        targets = []
        for row, ids in zip(clean, self._teacher[0](padded_rows(clean)[0]).ids[:, 0].numpy(), strict=True):
            targets.append(torch.from_numpy(run_lengths(ids[: len(row)])[0].astype(np.int64)))
        features, lengths = padded_rows(heard)
        return {
            "features": features,
            "lengths": lengths,
            "targets": nn.utils.rnn.pad_sequence(targets, batch_first=True),
            "target_lengths": torch.tensor([len(target) for target in targets]),
        }

    def _drawn(self, crop: Crop, count: int) -> int:
        generator = crop.generator()
        return 0 if generator.random() < self.config.clean_share else int(generator.integers(1, count))

    def weight_of(self, batch: dict[str, Tensor]) -> int:
        """Units of the clean sound."""
        return int(batch["target_lengths"].sum())

    def forward(self, batch: dict[str, Tensor], weight: float, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (nats per unit of clean sound) and sums of figures."""
        probabilities = F.pad(self.mlp(batch["features"]).float().log_softmax(-1), (0, 1), value=_NEVER)
        losses = F.ctc_loss(
            probabilities.transpose(0, 1), batch["targets"], batch["lengths"], batch["target_lengths"],
            blank=self.units, reduction="none", zero_infinity=True,
        )  # fmt: skip
        # A crop that has more units than its stretched version has frames.
        impossible = (batch["target_lengths"] > batch["lengths"]).sum()
        return losses.sum() / weight, {"impossible": impossible, "units": batch["target_lengths"].sum()}

    def summary(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Means over units."""
        count = max(1.0, float(figures["units"]))
        return {"loss": float(figures["loss"]) / count, "impossible": float(figures["impossible"])}

    def alarms(self, summary: dict[str, Any]) -> list[str]:
        """Units that collapse."""
        perplexity = summary.get("perplexity")
        if perplexity is not None and perplexity < self.units / 4:
            return [f"unit perplexity is {perplexity:.1f}: three quarters of the vocabulary are not used"]
        return []


def padded_rows(rows: list[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """One batch of rows [t, D]: float32 [B, T, D] and lengths int64 [B]."""
    padded = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
    return padded, torch.tensor([len(row) for row in rows])
