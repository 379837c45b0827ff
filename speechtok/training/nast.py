"""Noise-aware speech tokenization (NAST, Messica and Adi 2024, arXiv 2406.11037), on any frozen encoder.

Three parts learn together. The predictor gives each frame a distribution over units; Gumbel-softmax samples pass it on.
The residual path sums an utterance up in one vector: who speaks, and where. The decoder is to tell the clean frames
from both. What an augmentation changes for a whole utterance need not go through the units then, and what it changes
from frame to frame must not: units of the augmented sound are to be those of the clean one.

Departures from the published code, each with its reason: the predictor is a `UnitStudent`, so that units
stay exact in streams; clean units are targets without gradient, or the pair could agree by moving both; augmented
logits are interpolated linearly, as the paper says (the code's default is nearest).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.audio.features import valid_frames
from speechtok.audio.perturb import PerturbConfig
from speechtok.errors import InputError
from speechtok.nn.conformer import ConformerBlock
from speechtok.nn.product_quantizer import gumbel_noise, perplexity
from speechtok.training.augmented import AugmentedFrames
from speechtok.training.sampler import Crop
from speechtok.training.unit_student import UnitStudent, padded_rows

__all__ = ["NastConfig", "NastObjective"]


@dataclass(frozen=True)
class NastConfig:
    """Settings of `NastObjective`.

    Parameters
    ----------
    units : int
        K.
    temperature : float
        Of the Gumbel softmax.
    residual_dim : int
        Size of the utterance's vector; 0: no residual path.
    width, heads, inner, kernel, residual_blocks, decoder_blocks : int
        Of the conformers behind the units.
    reconstruction_weight, diversity_weight, robustness_weight : float
        Of the three losses.
    robust_from : float
        Share of the run after which the robustness loss joins in (the second of two epochs in the published recipe).
    """

    units: int = 100
    temperature: float = 0.8
    residual_dim: int = 64
    width: int = 128
    heads: int = 4
    inner: int = 256
    kernel: int = 3
    residual_blocks: int = 1
    decoder_blocks: int = 2
    reconstruction_weight: float = 2.0
    diversity_weight: float = 1.0
    robustness_weight: float = 1.0
    robust_from: float = 0.3

    def __post_init__(self) -> None:
        sizes = (self.units, self.width, self.heads, self.inner, self.kernel, self.decoder_blocks)
        if min(sizes) < 1 or min(self.residual_dim, self.residual_blocks) < 0 or not self.temperature > 0:
            raise InputError("[objective] sizes and temperature must be positive, the residual path may be 0")
        if self.width % self.heads:
            raise InputError(f"[objective] width {self.width} must be a multiple of heads {self.heads}")
        weights = (self.reconstruction_weight, self.diversity_weight, self.robustness_weight)
        if min(weights) < 0 or not 0 <= self.robust_from <= 1:
            raise InputError("[objective] weights must not be negative and robust_from is a share of the run")


class NastObjective(nn.Module):
    """Predictor, residual path and decoder; the loss of a batch.

    Parameters
    ----------
    config : NastConfig
    student : UnitStudent
        The predictor.
    mean, deviation : float32 [D]
        Of the encoder's frames: what is rebuilt are standardised ones.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, config: NastConfig, student: UnitStudent, mean: NDArray[np.float32], deviation: NDArray[np.float32]
    ) -> None:
        super().__init__()
        self.config, self.student = config, student
        self.perturb_config: PerturbConfig | None = None
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("deviation", torch.from_numpy(deviation))
        if config.residual_dim:
            self.residual_in = nn.Linear(len(mean), config.width)
            self.residual = _blocks(config, config.residual_blocks)
            self.residual_out = nn.Linear(config.width, config.residual_dim)
        self.decoder_in = nn.Linear(student.units + config.residual_dim, config.width)
        self.decoder = _blocks(config, config.decoder_blocks)
        self.decoder_out = nn.Linear(config.width, len(mean))

    def compiled(self) -> Iterable[nn.Module]:
        """Conformer blocks."""
        return [block for part in (self.student.blocks, self.decoder, getattr(self, "residual", ())) for block in part]

    def collate(self, crops: list[Crop], sound: AugmentedFrames, noises: None, *, training: bool) -> dict[str, Tensor]:
        """Clean frames of each crop, those of one augmented version, and Gumbel noise for the clean ones."""
        versions = [int(crop.generator().integers(1, len(sound.versions))) for crop in crops]
        (clean, lengths), (heard, heard_lengths) = (
            padded_rows(
                [sound.cut(crop.item, v, crop.start, crop.length) for v, crop in zip(which, crops, strict=True)]
            )
            for which in ([0] * len(crops), versions)
        )
        batch = {"clean": clean, "lengths": lengths, "heard": heard, "heard_lengths": heard_lengths}
        if training:
            seed = int(np.random.SeedSequence((*crops[0].seed, 1)).generate_state(1)[0])
            shape = (*clean.shape[:2], self.student.units)
            batch["noise"] = gumbel_noise(shape, torch.Generator().manual_seed(seed))
        return batch

    def weight_of(self, batch: dict[str, Tensor]) -> int:
        """Clean frames."""
        return int(batch["lengths"].sum())

    def forward(self, batch: dict[str, Tensor], weight: float, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (per frame) and sums of figures."""
        config, clean, lengths = self.config, batch["clean"], batch["lengths"]
        valid = valid_frames(lengths, clean.shape[1])
        logits = self.student(clean, lengths)
        noisy = logits + batch["noise"] if "noise" in batch else logits
        soft = (noisy / config.temperature).softmax(-1)  # [B, T, K]
        frames = (clean - self.mean) / self.deviation
        rebuilt = self._decode(soft, frames, valid, lengths)
        reconstruction = ((rebuilt.float() - frames).abs().mean(-1) * valid).sum()
        # Share of each unit in each crop: few units in one crop are cheap as long as crops differ.
        shares = (soft * valid[..., None]).sum(1) / lengths[:, None]
        diversity = (torch.special.xlogy(shares, shares).sum(-1) * lengths).sum() / np.log(self.student.units)
        target = (logits.detach() / config.temperature).softmax(-1)
        heard = self.student(batch["heard"], batch["heard_lengths"])
        heard = resized(heard, batch["heard_lengths"], lengths, clean.shape[1])
        robustness = -((target * heard.log_softmax(-1)).sum(-1) * valid).sum()
        robust = config.robustness_weight * (progress >= config.robust_from)
        loss = config.reconstruction_weight * reconstruction + config.diversity_weight * diversity + robust * robustness
        agreed = ((logits.argmax(-1) == heard.argmax(-1)) & valid).sum()
        figures = {
            "reconstruction": reconstruction.detach(), "diversity": diversity.detach(),
            "robustness": robustness.detach(), "agreed": agreed, "frames": valid.sum(),
            "shares": (soft.detach() * valid[..., None]).sum((0, 1)),
        }  # fmt: skip
        return loss / weight, figures

    def _decode(self, soft: Tensor, frames: Tensor, valid: Tensor, lengths: Tensor) -> Tensor:
        """Standardised frames from units [B, T, K] and the utterances' own vectors: [B, T, D]."""
        x = soft
        if self.config.residual_dim:
            y = self.residual_in(frames)
            for block in self.residual:
                y = block(y, valid)
            summed = (self.residual_out(y) * valid[..., None]).sum(1) / lengths[:, None]
            x = torch.cat([soft, summed[:, None].expand(-1, soft.shape[1], -1)], -1)
        x = self.decoder_in(x)
        for block in self.decoder:
            x = block(x, valid)
        return self.decoder_out(x)

    def summary(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Means over frames; perplexity of the soft units."""
        count = max(1.0, float(figures["frames"]))
        means = {name: float(figures[name]) / count for name in ("loss", "reconstruction", "diversity", "robustness")}
        means["agreement"] = float(figures["agreed"]) / count
        return means | {"soft_perplexity": float(perplexity(figures["shares"][None] / count)[0])}

    def alarms(self, summary: dict[str, Any]) -> list[str]:
        """Units that collapse."""
        return self.student.alarms(summary)


def _blocks(config: NastConfig, count: int) -> nn.ModuleList:
    return nn.ModuleList(ConformerBlock(config.width, config.heads, config.inner, config.kernel) for _ in range(count))


def resized(rows: Tensor, lengths: Tensor, wanted: Tensor, frames: int) -> Tensor:
    """Stretch the first `lengths` frames of each row to `wanted` frames, linearly between the centres of frames.

    Parameters
    ----------
    rows : float [B, S, K]
    lengths, wanted : int64 [B]
    frames : int
        T, at least the largest of `wanted`.

    Returns
    -------
    float [B, T, K]
        What stands behind the wanted frames means nothing.
    """
    ratio = (lengths / wanted)[:, None]
    place = (torch.arange(frames, device=rows.device) + 0.5) * ratio - 0.5
    place = place.clamp_min(0).minimum(lengths[:, None] - 1)
    low = place.floor().long()
    high = (low + 1).minimum(lengths[:, None] - 1)
    share = (place - low)[..., None]
    index = [which[..., None].expand(-1, -1, rows.shape[2]) for which in (low, high)]
    return (1 - share) * rows.gather(1, index[0]) + share * rows.gather(1, index[1])
