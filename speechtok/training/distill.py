"""Distillation of a large encoder into a small one that streams exactly: align what is visible, guess what is hidden.

Hybrid-architecture distillation (HAD, arXiv:2505.20836) trains a small DNA model on a masked sequence with
``L = L_align + lambda * L_rec``. Known of the published method (from a summary of it, not from its code): L_align is
the mean squared error between projected student features and features of a frozen teacher's last layer, at visible
tokens only; L_rec is the cross-entropy of the hidden tokens, from a cross-attention decoder whose queries are mask
tokens with positions and whose keys and values are the student's visible features; masks are drawn in the teacher's
tokens, so that no visible token belongs to a hidden one.

Our choices, where the method is not known or where speech asks for them: the teacher reads the full, unmasked and
unperturbed sound; any of its layers may be taken; its dimensions are standardised, since a few of them would decide the
error otherwise; the head is one linear map from the student's last block (whose closing layer norm it can undo); half
of the frames are hidden, in spans of 300 ms; what stood there is told by k-means units of the teacher's standardised
frames; lambda is 1; every crop counts alike.

Time: a student's frame is compared with the teacher's frame of the same moment (`TeacherFrames.on_grid`). The teacher
has heard all that follows, which a causal student cannot have. Its `look_ahead` delays its answers, not its frames:
frame t is answered when `look_ahead` later frames have been read (`W2vBertEncoder.walk`), so the targets come that much
later in the student's own time; frames at the start of a chunk have heard the rest of it besides. What the teacher took
from still later sound, the student can only expect: more look-ahead raises the R^2 that it can reach.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.audio.features import HOP, valid_frames
from speechtok.audio.perturb import PerturbConfig
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import InputError
from speechtok.kernels.nearest import nearest_centroids
from speechtok.nn.cross_attention import HiddenFrameDecoder
from speechtok.nn.product_quantizer import perplexity
from speechtok.training.masking import draw_mask
from speechtok.training.mels import Mels
from speechtok.training.sampler import Crop
from speechtok.training.teacher import TaughtMels
from speechtok.training.w2v_bert import perturbed

__all__ = ["DistillConfig", "DistillObjective", "make_student"]


@dataclass(frozen=True)
class DistillConfig:
    """Terms of the loss.

    Parameters
    ----------
    reconstruction_weight : float
        lambda. With 0 nothing is hidden and there is no decoder: plain distillation.
    clusters : int
        Vocabulary K of the teacher's units.
    mask_probability : float
        Share of frames that begin a hidden span; 0.045 and 15 hide half of them.
    mask_span : int
        Student frames of a span.
    decoder_dim, decoder_heads, decoder_blocks : int
        Of the decoder, see `HiddenFrameDecoder`.
    dropout : float
        In the student's blocks.
    identity_init : bool
        Begin with blocks that pass their input on.
    """

    reconstruction_weight: float = 1.0
    clusters: int = 500
    mask_probability: float = 0.045
    mask_span: int = 15
    decoder_dim: int = 256
    decoder_heads: int = 4
    decoder_blocks: int = 2
    dropout: float = 0.0
    identity_init: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.reconstruction_weight < float("inf"):
            raise InputError(f"reconstruction_weight {self.reconstruction_weight}: give a finite weight of at least 0")
        if self.clusters < 2 or self.decoder_blocks < 1 or self.mask_span < 1 or not 0 < self.mask_probability <= 1:
            raise InputError(
                "clusters must be at least 2, decoder_blocks and mask_span at least 1 and mask_probability in (0, 1], "
                f"not {self.clusters}, {self.decoder_blocks}, {self.mask_span} and {self.mask_probability}"
            )
        if self.decoder_heads < 1 or self.decoder_dim % (2 * self.decoder_heads):
            raise InputError(
                f"decoder_dim {self.decoder_dim} must be a multiple of twice decoder_heads {self.decoder_heads}"
            )


class DistillObjective(nn.Module):
    """Student, head and decoder; the loss of a batch.

    Parameters
    ----------
    model : W2vBertConfig
        Of the student: stacked frames (50 per second), attention in chunks, stored statistics.
    config : DistillConfig
    mean, deviation : float32 [D]
        Of the teacher's frames, see `TeacherFrames`.
    centroids : float32 [K, D], optional
        Of the teacher's standardised frames; not needed for plain distillation.
    perturb_config : PerturbConfig, optional
        Perturbation of what the student reads; the teacher always read the unchanged sound.

    Raises
    ------
    InputError
        If the student would not stream exactly or has another frame rate, or centroids do not fit.
    """

    mean: Tensor
    deviation: Tensor
    centroids: Tensor

    def __init__(
        self,
        model: W2vBertConfig,
        config: DistillConfig,
        mean: NDArray[np.float32],
        deviation: NDArray[np.float32],
        centroids: NDArray[np.float32] | None = None,
        perturb_config: PerturbConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.perturb_config = config, perturb_config
        self.encoder = make_student(model)
        for block in self.encoder.blocks:
            block.dropout.p = config.dropout
            if config.identity_init:
                block.begin_as_identity()
        self.align = nn.Linear(model.hidden_size, len(mean))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("deviation", torch.tensor(deviation, dtype=torch.float32))
        if config.reconstruction_weight > 0:
            if centroids is None or centroids.shape != (config.clusters, len(mean)):
                shape = None if centroids is None else centroids.shape
                raise InputError(f"centroids {shape} are not the {config.clusters} clusters of {len(mean)} dimensions")
            self.mask_vector = nn.Parameter(torch.rand(model.hidden_size))
            self.register_buffer("centroids", torch.tensor(centroids, dtype=torch.float32))
            self.decoder = HiddenFrameDecoder(
                model.hidden_size, config.decoder_dim, config.decoder_heads, config.decoder_blocks, config.clusters
            )

    def compiled(self) -> Iterable[nn.Module]:
        """The encoder's blocks."""
        return self.encoder.blocks

    # -- data -----------------------------------------------------------------------------------------------------

    def collate(self, crops: Sequence[Crop], mels: Mels, noises: Mels | None, *, training: bool) -> dict[str, Tensor]:
        """Everything that is read or drawn for a batch; a crop's draws depend on the crop alone.

        A crop begins at a frame of the student's offline grid: an odd start is moved one filter bank frame back, so
        that the student's frames lie at the same distance from the teacher's in every crop.

        Returns
        -------
        dict
            ``heard`` float32 [B, T', 80], ``lengths`` int64 [B] (filter bank frames), ``target`` float32 [B, T, D]
            (teacher's frames), ``known`` bool [B, T] (where there is one), ``mask`` bool [B, T], ``where`` int64
            [B, M] (hidden frames that have a target), ``hidden`` bool [B, M] (which of them are real).
        """
        if not isinstance(mels, TaughtMels):
            raise InputError("distillation needs a teacher's frames of this sound; see TaughtMels.join")
        stack = self.encoder.hop // HOP
        starts = [crop.start - crop.start % stack for crop in crops]
        pieces = [mels.cut(crop.item, start, crop.length) for crop, start in zip(crops, starts, strict=True)]
        width = max(len(piece) for piece in pieces)
        heard = torch.zeros(len(pieces), width, pieces[0].shape[1])
        for row, piece in zip(heard, pieces, strict=True):
            row[: len(piece)] = torch.from_numpy(piece)
        lengths = torch.tensor([len(piece) for piece in pieces])
        generators = [crop.generator() for crop in crops]
        if training and self.perturb_config is not None:
            heard = perturbed(heard, lengths, generators, self.perturb_config, noises)
        counts = self.encoder.sampled_lengths(lengths).tolist()
        total = width // stack
        target = torch.zeros(len(crops), total, len(self.mean))
        known, mask = (torch.zeros(len(crops), total, dtype=torch.bool) for _ in range(2))
        for row, (crop, start, count, generator) in enumerate(zip(crops, starts, counts, generators, strict=True)):
            frames, groups, there = mels.teacher.on_grid(self.encoder.grid, crop.item, start // stack, count)
            target[row, :count], known[row, :count] = torch.from_numpy(frames), torch.from_numpy(there)
            if count and self.config.reconstruction_weight > 0:
                mask[row, :count] = torch.from_numpy(self._draw(groups, generator))
        asked = mask & known
        most = max(1, int(asked.sum(1).max()))
        # Hidden frames first, in order: a stable sort keeps it.
        where = (~asked).int().argsort(dim=1, stable=True)[:, :most]
        hidden = asked.gather(1, where)
        return {
            "heard": heard, "lengths": lengths, "target": target, "known": known, "mask": mask,
            "where": where.where(hidden, 0), "hidden": hidden,
        }  # fmt: skip

    def _draw(self, groups: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.bool_]:
        """Spans of hidden frames; a group with one hidden frame is hidden whole."""
        mask = draw_mask(len(groups), self.config.mask_probability, self.config.mask_span, generator)
        return np.isin(groups, groups[mask])

    def weight_of(self, batch: dict[str, Tensor]) -> int:
        """What the sums of a batch are divided by: its crops."""
        return len(batch["lengths"])

    # -- loss -----------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], weight: float, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch: the mean over crops of ``L_align + lambda * L_rec``.

        L_align of a crop is the mean squared error over its visible frames and all dimensions, L_rec the mean
        cross-entropy over its hidden frames; a crop without such frames adds 0. Frames without a teacher's frame
        count as neither.

        Parameters
        ----------
        batch : dict
            From `collate`.
        weight : float
            Crops of the whole step, over all processes and micro-batches.
        progress : float
            Not used.

        Returns
        -------
        loss : float
            This batch's share of the loss of the step: the shares add up.
        figures : dict of str to Tensor
            Sums: over crops of ``alignment`` and ``reconstruction``; over visible frames of ``error`` (squared, mean
            over dimensions), the targets ``first`` [D] and their squares ``second`` [D]; counts ``visible``,
            ``hidden``, ``unit_right`` and the ``histogram`` [K] of the units asked for. In evaluation mode also
            ``clean_error``, ``clean_first``, ``clean_second`` and ``clean_visible`` with nothing hidden.
        """
        mask, known = batch["mask"], batch["known"]
        features, counts = self.encoder.inputs(batch["heard"], batch["lengths"])
        states = self._student(features, counts, mask if self.config.reconstruction_weight > 0 else None)
        readable = valid_frames(counts, mask.shape[1]) & ~mask
        target = (batch["target"] - self.mean) / self.deviation
        error, figures = self._error(states, target, readable & known)
        sums = {"alignment": _row_means(error, readable & known)}
        loss = sums["alignment"]
        if self.config.reconstruction_weight > 0:
            where, hidden = batch["where"], batch["hidden"]
            scores = self.decoder(states, readable, where).float()
            rows = target.gather(1, where[..., None].expand(-1, -1, target.shape[-1]))
            ids = nearest_centroids(rows.flatten(0, 1), self.centroids)[0].long().view(where.shape)
            entropy = F.cross_entropy(scores.flatten(0, 1), ids.flatten(), reduction="none").view(where.shape)
            sums["reconstruction"] = _row_means(entropy, hidden)
            loss = loss + self.config.reconstruction_weight * sums["reconstruction"]
            figures["hidden"], figures["unit_right"] = hidden.sum(), (scores.argmax(-1) == ids)[hidden].sum()
            figures["histogram"] = torch.bincount(ids[hidden], minlength=self.config.clusters)
            if not self.training:
                everything = valid_frames(counts, mask.shape[1]) & known
                _, clean = self._error(self._student(features, counts, None), target, everything)
                figures |= {f"clean_{name}": value for name, value in clean.items()}
        figures["crops"] = torch.tensor(len(mask), device=mask.device)
        return loss / weight, {name: value.detach() for name, value in {**sums, **figures}.items()}

    def _student(self, features: Tensor, counts: Tensor, mask: Tensor | None) -> Tensor:
        """Frames of the student's last block: float [B, T, dim]."""
        replace = None
        if mask is not None:
            replace = lambda x: torch.where(mask[..., None], self.mask_vector.to(x.dtype), x)  # noqa: E731
        return deque(self.encoder.walk(features, counts, replace), maxlen=1).pop()

    def _error(self, states: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of every frame, mean over dimensions, float [B, T]; and sums over the counted frames."""
        # Computed in float32 whatever the blocks compute in.
        with torch.autocast(states.device.type, enabled=False):
            error = (self.align(states.float()) - target).square().mean(-1)
        rows = target[counted]
        sums = {"error": error[counted].sum(), "first": rows.sum(0), "second": rows.square().sum(0)}
        return error, {**sums, "visible": counted.sum()}

    # -- figures --------------------------------------------------------------------------------------------------

    def summary(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Means over crops of the loss and its terms, and what they tell.

        ``alignment_r2`` is 1 minus the squared error over the variance of the standardised targets, at visible frames;
        ``clean_r2`` (held-out sound only) the same at all frames with nothing hidden, as the student will be used.
        ``masked_accuracy`` is the share of hidden frames whose unit is guessed; ``unit_share`` what the guess of the
        most frequent unit would reach; ``unit_perplexity`` how many units are asked for.
        """
        crops = float(figures["crops"])
        names = ("loss", "alignment", "reconstruction")
        means = {name: float(figures[name]) / crops for name in names if name in figures}
        means["alignment_r2"] = _r2(figures, "")
        if "hidden" in figures:
            hidden, counts = max(1.0, float(figures["hidden"])), figures["histogram"].float()
            means["masked_accuracy"] = float(figures["unit_right"]) / hidden
            means["unit_share"] = float(counts.max()) / hidden
            means["unit_perplexity"] = float(perplexity(counts / hidden))
        if "clean_error" in figures:
            means["clean_r2"] = _r2(figures, "clean_")
        return means

    def alarms(self, summary: dict[str, float]) -> list[str]:
        """Signs of a student that has learned nothing yet of what is asked."""
        found = []
        if summary["alignment_r2"] <= 0:
            found.append(f"alignment R^2 is {summary['alignment_r2']:.3f}: no better than the teacher's mean frame")
        accuracy, share = summary.get("masked_accuracy", 1.0), summary.get("unit_share", 0.0)
        if accuracy <= share:
            found.append(f"masked accuracy is {accuracy:.3f}: no better than the most frequent unit ({share:.3f})")
        return found

    def export(self) -> W2vBertEncoder:
        """The student on its own, without head and decoder, with weights rounded to bfloat16."""
        encoder = W2vBertEncoder(self.encoder.config)
        encoder.load_state_dict(self.encoder.state_dict())
        with torch.no_grad():
            for tensor in encoder.state_dict().values():
                tensor.copy_(tensor.bfloat16())
        return encoder.eval()


def make_student(model: W2vBertConfig) -> W2vBertEncoder:
    """Make the encoder of a student; InputError if it would not stream exactly or not give 50 frames per second."""
    if model.subsampling != "stack" or model.num_hidden_layers < 1:
        raise InputError("[model] a student has 50 frames per second and blocks: use subsampling 'stack' and blocks")
    encoder = W2vBertEncoder(model)
    if encoder.context is None:
        raise InputError("[model] a student streams exactly: give attention_chunk, and normalization = 'stored'")
    return encoder


def _row_means(values: Tensor, counted: Tensor) -> Tensor:
    """Sum over rows of the mean over counted entries; float [B, T], bool [B, T]."""
    sums = torch.where(counted, values, 0.0).sum(1)
    return (sums / counted.sum(1).clamp_min(1)).sum()


def _r2(figures: dict[str, Tensor], prefix: str) -> float:
    """Share of the variance, summed over dimensions, that is explained; 0 where nothing varies."""
    error, first, second, count = (figures[prefix + name].double() for name in ("error", "first", "second", "visible"))
    variance = (second - first.square() / count.clamp_min(1)).mean()
    return float(1.0 - error / variance) if variance > 0 else 0.0
