"""Self-segmentation distillation: frames learn the mean of the segment that they lie in (Sylber, arXiv 2410.07168).

Sylber's loss is the squared error between a student's frame, which hears a perturbed sound, and the mean of a frozen
teacher's frames over the segment around it, which hears the clean one; 0 is the target where no segment is. Frames of
one syllable collapse onto one vector, all others onto 0, and the greedy segmenter reads syllables off the frames.

Here frames are *gated* (see `W2vBertConfig`): a direction of length 1 times a gate from 0 to 1. Their squared error is
that of the gate, plus, inside of segments, twice the gate times one minus the cosine of the directions. The two parts
are trained apart: the gate by the cross-entropy of its two values, which rare frames move more than a squared error
does, and directions by ``2 (1 - cosine)``. The loss is 0 for a student that is its teacher, if frames are constant in
segments, 0 elsewhere, and no segments touch.

What is ours: the first frame of a segment has the target 0 too, half of it its neighbours, so that touching syllables
are told apart by the norm (a boundary detector, which Sylber 2.0, arXiv 2601.22306, trains as a head of its own; with 7
hours of speech the directions of neighbouring syllables alone are too alike). The student averages over the errors of
its teacher's boundaries: where they are not predictable from the sound, the gate stays open.

Two stages. In the first, segments are seeds from loudness (`EnergySeeds`) and the teacher is the encoder that the run
begins with, its segment means centred, whitened and scaled to length 1. In the second, the teacher is a frozen copy of
the student at the end of the first, and its own greedy segmentation, with the norm threshold of two running Gaussians,
gives the segments; it may be replaced several times (`SylberConfig.generations`), and directions may stay those of the
first (`SylberConfig.anchored`). Between replacements no teacher moves (Sylber's published decay is 1). Short stages do
best: a student that sees the same seeds for long learns their errors.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.audio.features import KALDI_FLOOR, valid_frames
from speechtok.audio.perturb import PerturbConfig, add_noise
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import STACK, W2vBertConfig
from speechtok.errors import InputError
from speechtok.segmenters.energy import EnergySeeds
from speechtok.segmenters.greedy import greedy_segment
from speechtok.training.mels import Mels
from speechtok.training.norm_threshold import NormThreshold
from speechtok.training.sampler import Crop
from speechtok.training.sylber_config import SylberConfig
from speechtok.training.w2v_bert import perturbed

__all__ = ["SeededMels", "SylberObjective", "gate_targets", "segment_means"]

_ALIKE = 0.9  # mean cosine of directions from which syllables cannot be told apart
_STATISTICS_ITEMS = 400


@dataclass(frozen=True)
class SeededMels(Mels):
    """Filter bank frames of a corpus with the seed segments of its items.

    Parameters
    ----------
    seeds : EnergySeeds
        How they are made. Items are cut when they are first asked for: loudness is judged over a whole item.
    """

    seeds: EnergySeeds = field(kw_only=True, default_factory=EnergySeeds)
    _known: dict[int, NDArray[np.int64]] = field(init=False, repr=False, default_factory=dict)

    @classmethod
    def of(cls, mels: Mels, seeds: EnergySeeds) -> "SeededMels":
        """The same frames, with seeds."""
        return cls(**{entry.name: getattr(mels, entry.name) for entry in fields(Mels)}, seeds=seeds)

    def segments(self, item: int) -> NDArray[np.int64]:
        """Segments of an item in frames of the filter bank, int64 [S, 2]."""
        if item not in self._known:
            self._known[item] = self.seeds(self.cut(item, 0, int(self.lengths[item])))
        return self._known[item]


class SylberObjective(nn.Module):
    """Student, teachers, norm threshold; the loss of a batch.

    Parameters
    ----------
    model : W2vBertConfig
        Of the student: stacked frames (50 per second), stored statistics, a gated projection of its last layer.
    config : SylberConfig
    first : W2vBertEncoder, optional
        The first teacher; None takes the student's input frames.
    second_stage : float
        Share of the run after which the second stage begins; 1: never.
    perturb_config : PerturbConfig, optional
        Perturbation of what the student reads.

    Raises
    ------
    InputError
        If student and teacher do not fit each other.
    """

    centre: Tensor
    transform: Tensor
    stage: Tensor

    def __init__(
        self,
        model: W2vBertConfig,
        config: SylberConfig,
        first: W2vBertEncoder | None = None,
        *,
        second_stage: float = 1.0,
        perturb_config: PerturbConfig | None = None,
    ) -> None:
        super().__init__()
        if not model.gated or model.projected_layer != model.num_hidden_layers or model.subsampling != "stack":
            raise InputError(
                "[model] a Sylber encoder has subsampling 'stack' and a gated projection of its last layer: give "
                "gated = true, projected_layer = num_hidden_layers and projection_size"
            )
        if (first is None) != (config.teacher_layer == 0):
            raise InputError(
                "[objective] teacher_layer: a run from scratch has layer 0 (the input frames), one that begins with an "
                "encoder names one of its layers"
            )
        if first is not None and (first.grid != W2vBertEncoder(replace(model)).grid or first.subsampling is not None):
            raise InputError("the first teacher has other frames than the student; both have 50 per second")
        size = model.feature_projection_input_dim if first is None else first.dim
        if model.projection_size > size:
            raise InputError(
                f"[model] projection_size {model.projection_size} is above the teacher's {size} dimensions"
            )
        self.config, self.perturb_config, self.second_stage = config, perturb_config, second_stage
        self.encoder, self.teacher = W2vBertEncoder(model), W2vBertEncoder(model)
        for block in self.encoder.blocks:
            block.dropout.p = config.dropout
            if config.identity_init:
                block.begin_as_identity()
        self.first = first
        for module in (self.first, self.teacher):
            if module is not None:
                module.requires_grad_(False)
        self.threshold = NormThreshold((0.9, 0.05), (0.1, 0.05), config.threshold_decay, config.threshold_prior)
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("transform", torch.eye(size)[:, : model.projection_size].contiguous())
        self.register_buffer("stage", torch.tensor(1))

    def begin_with(self, given: W2vBertEncoder) -> None:
        """Take over input statistics, projection of the input and the first blocks of an encoder with as many or more.

        Raises
        ------
        InputError
            If it is of another size.
        """
        ours = {name: tensor for name, tensor in self.encoder.state_dict().items() if _shared(name)}
        theirs = given.state_dict()
        wrong = [name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape]
        if wrong:
            raise InputError(f"the encoder to begin with is of another size than the recipe's ({wrong[0]} differs)")
        self.encoder.load_state_dict({**self.encoder.state_dict(), **{name: theirs[name] for name in ours}})

    @torch.no_grad()
    def measure_targets(self, mels: SeededMels, seed: int = 0) -> None:
        """Centre and whiten the first teacher's segment means over a sample of the training items.

        Raises
        ------
        InputError
            If there are fewer segments than dimensions.
        """
        chosen = np.random.default_rng(seed).permutation(len(mels.lengths))[:_STATISTICS_ITEMS]
        rows = []
        for item in sorted(chosen.tolist()):
            mel = torch.from_numpy(mels.cut(item, 0, int(mels.lengths[item])))[None].to(self.centre.device)
            frames = self._first_frames(mel, torch.tensor([mel.shape[1]], device=mel.device))[0]
            rows += [frames[begin:end].mean(0) for begin, end in _halved(mels.segments(item), len(frames))]
        if len(rows) <= len(self.centre):
            raise InputError(f"the training sound has {len(rows)} segments, too few for {len(self.centre)} dimensions")
        means = torch.stack(rows).double()
        self.centre.copy_(means.mean(0))
        variances, axes = torch.linalg.eigh(torch.cov((means - means.mean(0)).T))
        variances, axes = variances.flip(0).clamp_min(1e-9), axes.flip(1)
        size = self.transform.shape[1]
        scales = (variances / variances.mean()) ** (-self.config.whitening / 2)
        self.transform.copy_((axes * scales)[:, :size])

    def compiled(self) -> Iterable[nn.Module]:
        """The encoder's blocks."""
        return self.encoder.blocks

    # -- data -----------------------------------------------------------------------------------------------------

    def collate(self, crops: Sequence[Crop], mels: Mels, noises: Mels | None, *, training: bool) -> dict[str, Tensor]:
        """Everything that is read or drawn for a batch; a crop's draws depend on the crop alone.

        Returns
        -------
        dict
            ``clean`` and ``heard`` float32 [B, T', 80], ``lengths`` int64 [B] (filter bank frames), ``segment`` int64
            [B, T] (number of the seed segment of each frame, -1 for none), ``merge`` float32 [B].
        """
        if not isinstance(mels, SeededMels):
            raise InputError("self-segmentation needs filter bank frames with seeds; see SeededMels.of")
        pieces = [torch.from_numpy(mels.cut(crop.item, crop.start, crop.length)) for crop in crops]
        lengths = torch.tensor([len(piece) for piece in pieces])
        clean = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        generators = [crop.generator() for crop in crops]
        heard = clean
        if training:
            heard = self._mixed(clean, lengths, mels, generators)
            if self.perturb_config is not None:
                heard = perturbed(heard, lengths, generators, self.perturb_config, noises)
        segment = torch.full((len(crops), int(self.encoder.sampled_lengths(lengths.max()))), -1)
        for row, crop in zip(segment, crops, strict=True):
            spans = _halved(mels.segments(crop.item) - crop.start, len(row))
            for number, (begin, end) in enumerate(spans):
                row[begin:end] = number
        low, high = self.config.merge_thresholds
        merge = torch.tensor([low + (high - low) * float(generator.random()) for generator in generators])
        return {"clean": clean, "heard": heard, "lengths": lengths, "segment": segment, "merge": merge}

    def _mixed(self, clean: Tensor, lengths: Tensor, mels: Mels, generators: Sequence[np.random.Generator]) -> Tensor:
        """Mix parts of other utterances faintly into some rows (Sylber, denoising)."""
        config = self.config
        others, ratios = torch.full_like(clean, float(np.log(KALDI_FLOOR))), torch.full((len(clean),), torch.inf)
        for row, generator in enumerate(generators):
            draw, which, start, cut, side, ratio = generator.random(6).tolist()
            if draw >= config.mixture_probability:
                continue
            item, length = int(which * len(mels.lengths)), int(lengths[row])
            other = mels.cut(item, int(start * max(1, int(mels.lengths[item]) - length)), length)
            kept = int(len(other) * (1 - cut * config.mixture_cut))
            begin = 0 if side < 0.5 else length - kept
            others[row, begin : begin + kept] = torch.from_numpy(other[:kept])
            low, high = config.mixture_snr
            ratios[row] = low + (high - low) * ratio
        if bool(torch.isinf(ratios).all()):
            return clean
        return add_noise(clean, lengths, others, ratios)

    def weight_of(self, batch: dict[str, Tensor]) -> int:
        """What the sums of a batch are divided by: its frames."""
        return int(self.encoder.sampled_lengths(batch["lengths"]).sum())

    # -- loss -----------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], weight: float, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch: the mean over frames of the gate's cross-entropy and of the directions' squared error.

        Parameters
        ----------
        batch : dict
            From `collate`.
        weight : float
            Frames of the whole step, over all processes and micro-batches.
        progress : float
            Share of the run that is done; in training mode, the second stage begins with it.

        Returns
        -------
        loss : float
            This batch's share of the loss of the step: the shares add up.
        figures : dict of str to Tensor
            Sums over frames.
        """
        if self.training and (stage := self._stage_at(progress)) > int(self.stage):
            self._begin(stage)
        features, counts = self.encoder.inputs(batch["heard"], batch["lengths"])
        states = self._projected(features, counts)
        valid = valid_frames(counts, states.shape[1])
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            segment, target = self._targets(batch, counts)
            gate = gate_targets(segment, touching_only=int(self.stage) > 1)
        with torch.autocast(features.device.type, enabled=False):  # losses are computed in float32
            content, logit = F.normalize(states[..., :-1].float(), dim=-1), states[..., -1].float()
            error = (content - target).square().sum(-1)
            entropy = F.binary_cross_entropy_with_logits(logit, gate, reduction="none")
        inside = valid & (segment >= 0)
        sums = {"direction": error[inside].sum(), "gate": entropy[valid].sum()}
        loss = (sums["direction"] + self.config.gate_weight * sums["gate"]) / weight
        norms = logit.detach().sigmoid()
        if self.training:
            self.threshold.update(norms[valid & (gate > 0.9)], norms[valid & (gate < 0.1)])
        figures = {
            **{name: value.detach() for name, value in sums.items()},
            "frames": valid.sum(),
            "inside": inside.sum(),
            "gate_right": ((norms > 0.5) == (gate > 0.5))[valid].sum(),
            "gate_mean": norms[valid].sum(),
            "resultant": content.detach()[inside].sum(0),
            "segments": _count(segment, valid),
            **self._spread(content.detach(), segment, inside),
        }
        return loss, figures

    def _projected(self, features: Tensor, counts: Tensor) -> Tensor:
        """The student's projection before the gate: float [B, T, D + 1]."""
        return self.encoder.projected(features, counts)

    def _first_frames(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """Frames of the first teacher, float [B, T, size]."""
        if self.first is None:
            return self.encoder.inputs(mel, lengths)[0]
        return self.first.answers(*self.first.inputs(mel, lengths)).features

    def _targets(self, batch: dict[str, Tensor], counts: Tensor) -> tuple[Tensor, Tensor]:
        """Segment of each frame, int64 [B, T] (-1: none), and the direction of its mean, float32 [B, T, D]."""
        if int(self.stage) == 1:
            segment = batch["segment"].masked_fill(~valid_frames(counts, batch["segment"].shape[1]), -1)
        else:
            frames = self.teacher.answers(*self.teacher.inputs(batch["clean"], batch["lengths"])).features.float()
            segment = self._own_segments(frames, counts, batch["merge"])
        if int(self.stage) == 1 or self.config.anchored:
            first = self._first_frames(batch["clean"], batch["lengths"]).float()
            means = (segment_means(first, segment) - self.centre) @ self.transform
        else:
            means = segment_means(frames, segment)
        return segment, F.normalize(means, dim=-1).masked_fill((segment < 0)[..., None], 0.0)

    def _own_segments(self, frames: Tensor, counts: Tensor, merge: Tensor) -> Tensor:
        """Greedy segments of the teacher's frames, int64 [B, T]."""
        segment = torch.full(frames.shape[:2], -1)
        threshold = self.threshold.value
        for row, x, count, cosine in zip(segment, frames.cpu(), counts.tolist(), merge.tolist(), strict=True):
            for number, (begin, end) in enumerate(greedy_segment(x[:count], threshold, cosine, "reset").tolist()):
                row[begin:end] = number
        return segment.to(frames.device)

    def _stage_at(self, progress: float) -> int:
        """1, and from the second stage on 2 and one more for each further generation."""
        if progress < self.second_stage:
            return 1
        done, parts = (progress - self.second_stage) / max(1e-9, 1 - self.second_stage), self.config.generations
        return 2 + min(int(done * parts + 1e-9), parts - 1)

    def _begin(self, stage: int) -> None:
        """The student as it is becomes the teacher."""
        self.teacher.load_state_dict(self.encoder.state_dict())
        self.stage.fill_(stage)

    @staticmethod
    def _spread(content: Tensor, segment: Tensor, inside: Tensor) -> dict[str, Tensor]:
        """Squared distances to the mean of the segment and to 0, summed over the frames inside of segments."""
        within = (content - segment_means(content, segment)).square().sum(-1)
        return {"within": within[inside].sum(), "total": content.square().sum(-1)[inside].sum()}

    # -- figures --------------------------------------------------------------------------------------------------

    def summary(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Means over frames of the loss and its terms, and what they tell.

        ``cosine`` is that of directions and targets inside of segments; ``flatness`` the variance of directions within
        segments over their total variance; ``alike`` the length of their mean, 1 if all syllables have one direction;
        ``segments_per_second`` and ``threshold`` are those of the targets.
        """
        frames, inside = float(figures["frames"]), max(1.0, float(figures["inside"]))
        alike = float((figures["resultant"] / inside).norm())
        return {
            "loss": float(figures["loss"]) / frames,
            "direction": float(figures["direction"]) / inside,
            "cosine": 1 - float(figures["direction"]) / inside / 2,
            "gate": float(figures["gate"]) / frames,
            "gate_accuracy": float(figures["gate_right"]) / frames,
            "gate_mean": float(figures["gate_mean"]) / frames,
            "flatness": float(figures["within"]) / max(1e-9, float(figures["total"]) - inside * alike**2),
            "alike": alike,
            "segments_per_second": float(figures["segments"]) / frames * self.encoder.grid.rate,
            "stage": float(self.stage),
            "threshold": self.threshold.value,
        }

    def alarms(self, summary: dict[str, float]) -> list[str]:
        """Signs of collapse: one direction for all, or a gate that is always open or shut."""
        found = []
        if summary["alike"] > _ALIKE:
            found.append(f"all syllables look alike: the mean direction has length {summary['alike']:.2f}")
        if not 0.02 < summary["gate_mean"] < 0.98:
            found.append(f"the gate is {'open' if summary['gate_mean'] > 0.5 else 'shut'} nearly everywhere")
        return found

    def export(self) -> W2vBertEncoder:
        """The student on its own, with weights rounded to bfloat16."""
        encoder = W2vBertEncoder(self.encoder.config)
        encoder.load_state_dict(self.encoder.state_dict())
        with torch.no_grad():
            for tensor in encoder.state_dict().values():
                tensor.copy_(tensor.bfloat16())
        return encoder.eval()


def _shared(name: str) -> bool:
    return not name.startswith("projection.")


def _halved(segments: NDArray[np.int64], frames: int) -> list[tuple[int, int]]:
    """Segments of filter bank frames as spans of encoder frames inside of ``[0, frames)``; none is empty."""
    spans = segments // STACK
    inside = np.clip(spans, 0, frames)
    return [(begin, end) for begin, end in inside.tolist() if begin < end]


def segment_means(frames: Tensor, segment: Tensor) -> Tensor:
    """Mean of the frames of each frame's segment.

    Parameters
    ----------
    frames : float [B, T, D]
    segment : int64 [B, T]
        Number of a segment, or -1.

    Returns
    -------
    float [B, T, D]
        0 where there is no segment.
    """
    rows, width = segment.shape
    keys = torch.where(segment >= 0, segment + width * torch.arange(rows, device=segment.device)[:, None], rows * width)
    flat = keys.flatten()
    sums = frames.new_zeros(rows * width + 1, frames.shape[-1]).index_add_(0, flat, frames.flatten(0, 1))
    counts = frames.new_zeros(rows * width + 1).index_add_(0, flat, frames.new_ones(rows * width))
    means = (sums / counts.clamp_min(1)[:, None])[flat].view_as(frames)
    return means.masked_fill((segment < 0)[..., None], 0.0)


def gate_targets(segment: Tensor, *, touching_only: bool = False) -> Tensor:
    """What the gate should be: 1 inside of segments, 0 outside and at the first frame, 0.5 beside it.

    Parameters
    ----------
    segment : int64 [B, T]
        Number of a segment, or -1.
    touching_only : bool
        Leave first frames behind a gap open: segments that a gate has made have lost their first frame already.

    Returns
    -------
    float32 [B, T]
    """
    before = F.pad(segment, (1, 0), value=-1)[:, :-1]
    first = (segment >= 0) & (segment != before)
    if touching_only:
        first &= before >= 0
    marks = first.float()
    beside = 0.5 * torch.maximum(F.pad(marks, (1, 0))[:, :-1], F.pad(marks, (0, 1))[:, 1:])
    return (segment >= 0).float() * (1 - torch.maximum(marks, beside))


def _count(segment: Tensor, valid: Tensor) -> Tensor:
    """Number of segments that begin in valid frames."""
    before = F.pad(segment, (1, 0), value=-1)[:, :-1]
    return ((segment >= 0) & (segment != before) & valid).sum()
