"""MERT: masked prediction of an acoustic teacher's codes and of a constant-Q spectrum.

Li et al. 2023 (arXiv 2306.00107): HuBERT's masked prediction on waves at 24 kHz. At hidden frames the encoder predicts
all codebooks of a residual quantizer (the acoustic teacher) and the magnitudes of a constant-Q transform (the musical
teacher). It hears the sound with pieces of other crops mixed in, and is told what the clean sound has.

Time: codes belong to the frame whose span holds the middle of the encoder's frame (frame t of a codec spans the samples
``[320 t, 320 t + 320)``, the middle of the encoder's is ``320 t + 200``); magnitudes are centred on that middle, with
the real sound around the crop as far as the item has it: low filters are longer than the frames.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.audio.cqt import CQT
from speechtok.audio.features import valid_frames
from speechtok.audio.perturb import PerturbConfig
from speechtok.encoders.hubert import HubertConfig, HubertEncoder
from speechtok.errors import InputError
from speechtok.nn.cqt_features import centred_cqt
from speechtok.nn.product_quantizer import perplexity
from speechtok.nn.sigma_reparam import apply_sigma_reparam, attention_entropy, fold_sigma_reparam
from speechtok.training.masking import draw_mask
from speechtok.training.mert_config import MertConfig
from speechtok.training.mixture import mix_in_batch
from speechtok.training.music_teachers import TaughtWaves
from speechtok.training.sampler import Crop
from speechtok.training.waves import Waves

__all__ = ["MertObjective", "scale_gradient"]

_STATISTICS_SECONDS = 1200.0
_FLAT = 0.1  # least deviation of a bin, as a share of the mean deviation: empty bins are not blown up


class MertObjective(nn.Module):
    """Encoder and heads; the loss of a batch.

    Parameters
    ----------
    model : HubertConfig
        Of the encoder, all of whose blocks are trained.
    config : MertConfig
    books, codes : int
        Codebooks of the acoustic teacher and codes in each; 0 without one.

    Raises
    ------
    InputError
        If model, configuration and teacher do not fit each other.
    """

    cqt_mean: Tensor
    cqt_deviation: Tensor

    def __init__(self, model: HubertConfig, config: MertConfig, books: int = 0, codes: int = 0) -> None:
        super().__init__()
        if (config.acoustic_weight > 0) != (books > 0 and codes > 0):
            raise InputError("acoustic_weight and an acoustic teacher go together: give both or none")
        if config.acoustic_weight > 0 and config.books > books:
            raise InputError(f"[objective] books is {config.books}, but the teacher has {books} codebooks")
        self.config, self.books, self.codes = config, min(books, config.books or books), codes
        self.perturb_config: PerturbConfig | None = None
        self.encoder = HubertEncoder(model)
        _prepare(self.encoder, config)
        # The published start, up to 1, is large beside projected frames: a short run takes long to see past it.
        self.mask_vector = nn.Parameter(0.1 * torch.rand(model.hidden_size))
        if config.acoustic_weight > 0:
            self.project = nn.Linear(model.hidden_size, self.books * config.final_dim)
            self.labels = nn.Parameter(torch.rand(self.books, codes, config.final_dim))
        if config.cqt_weight > 0:
            self.transform = CQT(
                model.sample_rate, hop=self.encoder.hop, fmin=config.cqt_fmin, bins=config.cqt_bins,
                bins_per_octave=config.cqt_bins_per_octave,
            )  # fmt: skip
            self.predict_cqt = nn.Linear(model.hidden_size, config.cqt_bins)
            self.register_buffer("cqt_mean", torch.zeros(config.cqt_bins))
            self.register_buffer("cqt_deviation", torch.ones(config.cqt_bins))

    def compiled(self) -> Iterable[nn.Module]:
        """The encoder's blocks."""
        return self.encoder.encoder.blocks

    @property
    def reach(self) -> int:
        """Hops on each side of a crop that the longest filter of the constant-Q transform reads."""
        return math.ceil(max(self.transform.reach) / self.encoder.hop) + 1  # frames lie between two hops

    @torch.no_grad()
    def measure_targets(self, sound: Waves, seed: int = 0) -> None:
        """Take mean and deviation of every bin over a sample of the items; does nothing without a musical teacher."""
        if self.config.cqt_weight == 0:
            return
        left, count = _STATISTICS_SECONDS * sound.rate, 0
        first, second = (torch.zeros(self.config.cqt_bins, dtype=torch.float64) for _ in range(2))
        for item in np.random.default_rng(seed).permutation(len(sound.lengths)).tolist():
            wave = torch.from_numpy(sound.cut(item, 0, int(sound.lengths[item])))[None]
            frames = self.encoder.grid.num_frames(wave.shape[1])
            if frames > 0:
                rows = centred_cqt(self.transform, wave, self.encoder.grid, frames)[0].double()
                first, second, count = first + rows.sum(0), second + rows.square().sum(0), count + frames
            left -= frames
            if left <= 0:
                break
        mean = first / max(1, count)
        deviation = (second / max(1, count) - mean.square()).clamp_min(0).sqrt()
        if not bool(deviation.any()):
            raise InputError("the training sound has a flat spectrum: nothing can be learned from its constant-Q bins")
        self.cqt_mean.copy_(mean)
        self.cqt_deviation.copy_(deviation.clamp_min(_FLAT * float(deviation.mean())))

    # -- data -----------------------------------------------------------------------------------------------------

    def collate(self, crops: Sequence[Crop], sound: Waves, noises: Any, *, training: bool) -> dict[str, Tensor]:
        """Everything that is read or drawn for a batch.

        A crop's draws depend on the crop alone, but the pieces that are mixed in come from the batch: they are other
        ones in several processes or micro-batches than in one.

        Returns
        -------
        dict
            ``heard`` float32 [B, N], ``lengths`` int64 [B] (samples), ``mask`` bool [B, T] (what the encoder does not
            see), ``asked`` bool [B, T] (hidden frames for which there are all targets), ``codes`` int64 [B, T, K],
            ``around`` float32 [B, N'] (the clean crop with `reach` hops on both sides, zeros where the item has none),
            and in training with layerdrop ``skip`` bool [B, L].
        """
        config, grid = self.config, self.encoder.grid
        pieces = [torch.from_numpy(sound.cut(crop.item, crop.start, crop.length)) for crop in crops]
        lengths = torch.tensor([len(piece) for piece in pieces])
        clean = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        counts, total = [grid.num_frames(len(piece)) for piece in pieces], grid.num_frames(clean.shape[1])
        generators = [crop.generator() for crop in crops]
        mask = torch.zeros(len(crops), total, dtype=torch.bool)
        for row, count, generator in zip(mask, counts, generators, strict=True):
            row[:count] = torch.from_numpy(
                draw_mask(max(1, count), config.mask_probability, config.mask_span, generator)[:count]
            )
        batch = {"heard": clean, "lengths": lengths, "mask": mask, "asked": mask}
        if config.acoustic_weight > 0:
            batch["codes"], known = self._codes(crops, sound, counts, total)
            batch["asked"] = mask & known
        if config.cqt_weight > 0:
            batch["around"] = self._around(crops, sound, clean.shape[1])
        # Drawn first: a crop that is alone has nothing to draw for the mixture.
        if training and config.layerdrop > 0:
            draws = [generator.random(self.encoder.layer) < config.layerdrop for generator in generators]
            batch["skip"] = torch.from_numpy(np.stack(draws))
        if training:
            batch["heard"] = mix_in_batch(
                clean, lengths, generators, probability=config.mixture_probability, segments=config.mixture_segments,
                samples=tuple(round(x * sound.sample_rate) for x in config.mixture_seconds), gain=config.mixture_gain,
            )  # fmt: skip
        return batch

    def _codes(self, crops: Sequence[Crop], sound: Waves, counts: Sequence[int], total: int) -> tuple[Tensor, Tensor]:
        """The teacher's codes int64 [B, T, K] and where there are some, bool [B, T]."""
        if not isinstance(sound, TaughtWaves):
            raise InputError("masked prediction of codes needs a teacher's codes of this sound; see TaughtWaves.join")
        codes, known = torch.zeros(len(crops), total, self.books, dtype=torch.int64), torch.zeros(len(crops), total)
        for row, (crop, count) in enumerate(zip(crops, counts, strict=True)):
            found, there = sound.teacher.on_grid(self.encoder.grid, crop.item, crop.start, count)
            codes[row, :count] = torch.from_numpy(found[:, : self.books])
            known[row, :count] = torch.from_numpy(there)
        return codes, known > 0

    def _around(self, crops: Sequence[Crop], sound: Waves, samples: int) -> Tensor:
        """Each crop with what lies around it: float32 [B, N + 2 * reach * hop]."""
        hop, reach = sound.hop, self.reach
        around = torch.zeros(len(crops), samples + 2 * reach * hop)
        for row, crop in zip(around, crops, strict=True):
            begin = max(0, crop.start - reach)
            piece = sound.cut(crop.item, begin, crop.start + samples // hop + reach - begin)
            place = (begin - crop.start + reach) * hop
            row[place : place + len(piece)] = torch.from_numpy(piece)
        return around

    def weight_of(self, batch: dict[str, Tensor]) -> int:
        """What the sums of a batch are divided by: its hidden frames."""
        return int(batch["asked"].sum())

    # -- loss -----------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], weight: float, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch: the weighted sum of three means.

        Over hidden frames: the mean of the books' cross-entropies, and the mean over bins of the squared error. Over
        all frames of a crop: the mean square of the convolutions' features; a crop counts as often as it has hidden
        frames, so that shares of a step add up.

        Parameters
        ----------
        batch : dict
            From `collate`.
        weight : float
            Hidden frames of the whole step, over all processes and micro-batches.
        progress : float
            Not used.

        Returns
        -------
        loss : float
            This batch's share of the loss of the step: the shares add up.
        figures : dict of str to Tensor
            Sums over hidden frames: ``acoustic``, ``cqt``, ``penalty``; counts ``asked`` and ``right`` [K];
            ``histogram`` and ``guesses`` [K, V] of codes and predictions; ``cqt_first`` and ``cqt_second`` [bins] of
            the targets. In evaluation mode also the attention entropy of every block.
        """
        config, lengths, asked = self.config, batch["lengths"], batch["asked"]
        features, magnitudes = self.encoder.inputs(batch["heard"], lengths)
        features = scale_gradient(features, config.feature_grad_mult)
        with self._attention_entropies() as entropies:
            # Only the last state is kept.
            for state in self.encoder.walk(features, magnitudes, lengths, self._hide(batch["mask"]), batch.get("skip")):
                answers = state
        # Losses are computed in float32 whatever the blocks compute in.
        with torch.autocast(features.device.type, enabled=False):
            answers = answers.float()[asked]  # [M, D]
            sums = {"penalty": self._penalty(features.float(), lengths, asked)}
            figures = {"asked": asked.sum()}
            if config.acoustic_weight > 0:
                codes = batch["codes"][asked]  # [M, K]
                logits = self.logits(answers)
                entropy = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum")
                guesses = logits.detach().argmax(-1)
                sums["acoustic"] = entropy / self.books
                figures["right"] = (guesses == codes).sum(0)
                for name, ids in (("histogram", codes), ("guesses", guesses)):
                    figures[name] = _counts(ids, self.codes)
            if config.cqt_weight > 0:
                target = self.cqt_targets(batch["around"], asked)
                sums["cqt"] = (self.predict_cqt(answers) - target).square().mean(-1).sum()
                figures["cqt_first"], figures["cqt_second"] = target.sum(0), target.square().sum(0)
        for name, values in entropies.items():
            figures[name] = torch.stack(values).mean() * asked.sum()
        weights = {
            "acoustic": config.acoustic_weight, "cqt": config.cqt_weight, "penalty": config.feature_penalty,
        }  # fmt: skip
        loss = torch.stack([weights[name] * value for name, value in sums.items()]).sum() / weight
        return loss, {name: value.detach() for name, value in {**sums, **figures}.items()}

    def logits(self, answers: Tensor) -> Tensor:
        """Cosines over the temperature of frames [M, D] with the label embeddings of every codebook: [M, K, V]."""
        queries = F.normalize(self.project(answers).unflatten(-1, (self.books, self.config.final_dim)), dim=-1)
        return torch.einsum("mkd,kvd->mkv", queries, F.normalize(self.labels, dim=-1)) / self.config.temperature

    @torch.no_grad()
    def cqt_targets(self, around: Tensor, asked: Tensor) -> Tensor:
        """Standardised magnitudes at the hidden frames: float32 [M, bins]."""
        rows = centred_cqt(self.transform, around, self.encoder.grid, asked.shape[1], before=self.reach)
        return (rows[asked] - self.cqt_mean) / self.cqt_deviation

    def _hide(self, mask: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.where(mask[..., None], self.mask_vector.to(x.dtype), x)

    def _penalty(self, features: Tensor, lengths: Tensor, asked: Tensor) -> Tensor:
        """Mean square of each row's features, times its hidden frames, summed."""
        counts = self.encoder.frame_lengths(lengths)
        valid = valid_frames(counts, features.shape[1])
        means = (features.square().mean(-1) * valid).sum(1) / counts.clamp_min(1)
        return (means * asked.sum(1)).sum()

    @contextmanager
    def _attention_entropies(self) -> Iterator[dict[str, list[Tensor]]]:
        """Give lists that a pass fills with the attention entropy (nats) of every block; nothing while training."""
        entropies: dict[str, list[Tensor]] = {}
        watched = [] if self.training else self.encoder.encoder.blocks
        for layer, block in enumerate(watched, 1):
            values = entropies.setdefault(f"attention_entropy_layer{layer}", [])
            block.attention.observer = lambda p, into=values: into.append(attention_entropy(p).mean())
        try:
            yield entropies
        finally:
            for block in watched:
                block.attention.observer = None

    # -- figures --------------------------------------------------------------------------------------------------

    def summary(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Means over hidden frames of the loss and its terms, and what they tell.

        ``accuracy`` is the mean over codebooks of ``accuracy_book1``, ...: the share of hidden frames whose code is
        guessed; ``majority`` what the most frequent codes would reach; ``code_perplexity`` and ``guess_perplexity`` how
        many codes are asked for and guessed (mean over codebooks). ``cqt_r2`` is the share of the targets' variance
        that is explained.
        """
        asked = max(1.0, float(figures["asked"]))
        names = ("loss", "acoustic", "cqt", "penalty")
        means = {name: float(figures[name]) / asked for name in names if name in figures}
        means |= {name: float(value) / asked for name, value in figures.items() if name.startswith("attention_entropy")}
        if "right" in figures:
            accuracies = (figures["right"] / asked).tolist()
            means["accuracy"] = sum(accuracies) / len(accuracies)
            means |= {f"accuracy_book{number}": value for number, value in enumerate(accuracies, 1)}
            means["majority"] = float(figures["histogram"].amax(-1).float().mean()) / asked
            for name, counts in (("code", figures["histogram"]), ("guess", figures["guesses"])):
                means[f"{name}_perplexity"] = float(perplexity(counts.float() / asked).mean())
        if "cqt_first" in figures:
            first, second = figures["cqt_first"].double() / asked, figures["cqt_second"].double() / asked
            variance = float((second - first.square()).mean())
            means["cqt_r2"] = 1.0 - means["cqt"] / variance if variance > 0 else 0.0
        return means

    def alarms(self, summary: dict[str, float]) -> list[str]:
        """Signs of a model that has learned nothing yet, or that says the same everywhere."""
        found = []
        if summary.get("accuracy", 1.0) <= summary.get("majority", 0.0):
            found.append(
                f"accuracy is {summary['accuracy']:.3f}: no better than the most frequent codes "
                f"({summary['majority']:.3f})"
            )
        if summary.get("guess_perplexity", 2.0) < 1.5:
            found.append(f"one code is guessed everywhere: perplexity of guesses {summary['guess_perplexity']:.2f}")
        if summary.get("cqt_r2", 1.0) <= 0:
            found.append(f"constant-Q R^2 is {summary['cqt_r2']:.3f}: no better than the mean spectrum")
        return found

    def export(self) -> HubertEncoder:
        """The encoder on its own, with plain weights rounded to bfloat16."""
        encoder = HubertEncoder(self.encoder.config)
        if self.config.sigma_reparam:
            apply_sigma_reparam(encoder)
        encoder.load_state_dict(self.encoder.state_dict())
        if self.config.sigma_reparam:
            fold_sigma_reparam(encoder)
        with torch.no_grad():
            for tensor in encoder.state_dict().values():
                tensor.copy_(tensor.bfloat16())
        return encoder.eval()


class _ScaleGradient(torch.autograd.Function):
    """The identity, through which gradients flow multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x itself, through which gradients flow multiplied by a factor."""
    return x if factor == 1.0 else _ScaleGradient.apply(x, factor)


def _prepare(encoder: HubertEncoder, config: MertConfig) -> None:
    """Put weights to where training begins, and switch on what only training has."""
    for module in encoder.feature_extractor.modules():
        if isinstance(module, nn.Conv1d):
            # As published. With group norm, most layers have no norm: torch's own start would fade the sound.
            nn.init.kaiming_normal_(module.weight)
    encoder.encoder.dropout.p = config.dropout
    for block in encoder.encoder.blocks:
        block.set_dropout(config.dropout)
        block.attention.relaxation = config.attention_relaxation
        if config.identity_init:
            block.begin_as_identity()
    if config.sigma_reparam:
        apply_sigma_reparam(encoder)


def _counts(ids: Tensor, codes: int) -> Tensor:
    """How often each code occurs: int64 [M, K] -> [K, V]."""
    books = ids.shape[1]
    flat = ids + torch.arange(books, device=ids.device) * codes
    return torch.bincount(flat.flatten(), minlength=books * codes).view(books, codes)
