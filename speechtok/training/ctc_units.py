"""Augmentation-invariant units from pseudo-labels (Gat et al. 2023, arXiv 2209.15483).

A teacher names the units of clean sound, runs of equal ones counted once. A small network on frames of the augmented
sound is to give the same sequence, by CTC: how the two time axes correspond is left free. Neither encoder nor teacher
learns. The next round takes the student as its teacher.

Departure: there is no blank. Targets hold no repeats, so none is needed; without one every frame has a unit and the
network is a quantizer like any other. A blank would leave most frames without a unit: durations would have to be
guessed, and a stream would have to wait for the next unit. It also learned less here (docs/measurements.md).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.audio.perturb import PerturbConfig
from speechtok.errors import InputError
from speechtok.training.augmented import AugmentedFrames
from speechtok.training.sampler import Crop
from speechtok.training.unit_student import UnitStudent, padded_rows
from speechtok.units import run_lengths

__all__ = ["CtcConfig", "CtcObjective", "NamedFrames"]

_NEVER = -1e4  # log probability of the blank: finite, so that gradients are


@dataclass(frozen=True)
class CtcConfig:
    """Settings of `CtcObjective`.

    Parameters
    ----------
    clean_share : float
        Share of the crops that stay clean.
    """

    clean_share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.clean_share < 1:
            raise InputError(f"[objective] clean_share {self.clean_share} must be in [0, 1)")


@dataclass(frozen=True)
class NamedFrames:
    """Frames, and the units that a teacher gives the clean ones.

    Parameters
    ----------
    sound : AugmentedFrames
    teacher : callable
        From the frames of an item, float32 [T, D], to its units, int32 [T]; asked once for each item.
    """

    sound: AugmentedFrames
    teacher: Callable[[NDArray[np.float32]], NDArray[np.int32]]
    _known: dict[int, NDArray[np.int32]] = field(default_factory=dict, init=False, repr=False)

    def units(self, item: int) -> NDArray[np.int32]:
        """Units of the clean item, int32 [T]."""
        if item not in self._known:
            self._known[item] = self.teacher(self.sound.whole(item, 0))
        return self._known[item]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of each clean item."""
        return self.sound.lengths

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.sound.rate


class CtcObjective(nn.Module):
    """Student and its loss.

    Parameters
    ----------
    config : CtcConfig
    student : UnitStudent
    """

    def __init__(self, config: CtcConfig, student: UnitStudent) -> None:
        super().__init__()
        self.config, self.student = config, student
        self.perturb_config: PerturbConfig | None = None

    def compiled(self) -> Iterable[nn.Module]:
        """The student's blocks."""
        return self.student.blocks

    def collate(self, crops: list[Crop], sound: NamedFrames, noises: None, *, training: bool) -> dict[str, Tensor]:
        """Frames of one version of each crop, and the units of the clean one."""
        rows, targets = [], []
        for crop in crops:
            version = self._drawn(crop, len(sound.sound.versions))
            rows.append(sound.sound.cut(crop.item, version, crop.start, crop.length))
            units = sound.units(crop.item)[crop.start : crop.start + crop.length]
            targets.append(torch.from_numpy(run_lengths(units)[0].astype(np.int64)))
        features, lengths = padded_rows(rows)
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
        logits = self.student(batch["features"], batch["lengths"])
        probabilities = F.pad(logits.log_softmax(-1), (0, 1), value=_NEVER)
        losses = F.ctc_loss(
            probabilities.transpose(0, 1), batch["targets"], batch["lengths"], batch["target_lengths"],
            blank=self.student.units, reduction="none", zero_infinity=True,
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
        return self.student.alarms(summary)
