"""w2v-BERT: contrastive learning and masked prediction in one stack (Chung et al. 2021, arXiv:2108.06209).

The first blocks learn to tell the quantized frame that is hidden from others of the same utterance; the last ones
predict its code. `W2vBertObjectiveConfig` holds the form of 2021 (one codebook) and that of w2v-BERT 2.0 (two codebooks
and masked prediction of random-projection codes, Barrault et al. 2023, section 3.1).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.audio.features import valid_frames
from speechtok.audio.perturb import PerturbConfig, draw, fit_noise, perturb
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import InputError
from speechtok.nn.product_quantizer import GumbelQuantizer, RandomProjectionQuantizer, gumbel_noise, perplexity
from speechtok.nn.sigma_reparam import apply_sigma_reparam, attention_entropy, fold_sigma_reparam
from speechtok.training.distributed import sum_over_processes
from speechtok.training.masking import draw_distractors, draw_mask
from speechtok.training.mels import Mels
from speechtok.training.sampler import Crop
from speechtok.training.w2v_bert_config import W2vBertObjectiveConfig

__all__ = ["W2vBertObjective", "perturbed"]

IDLE = 1 / 3  # share of the codes that the perplexity must reach


class W2vBertObjective(nn.Module):
    """Encoder, quantizer and heads; the loss of a batch.

    Parameters
    ----------
    model : W2vBertConfig
        Of the encoder, all of whose blocks are trained.
    config : W2vBertObjectiveConfig
    perturb_config : PerturbConfig, optional
        Perturbation of what the blocks read; the quantizer always reads the unchanged frames.
    """

    def __init__(
        self, model: W2vBertConfig, config: W2vBertObjectiveConfig, perturb_config: PerturbConfig | None = None
    ) -> None:
        super().__init__()
        if not 0 < config.contrastive_blocks <= model.num_hidden_layers:
            raise InputError(
                f"contrastive_blocks {config.contrastive_blocks}: the model has {model.num_hidden_layers} blocks"
            )
        self.config, self.perturb_config = config, perturb_config
        self.encoder = W2vBertEncoder(model)
        for block in self.encoder.blocks:
            block.dropout.p = config.dropout
            if config.identity_init:
                block.begin_as_identity()
        if config.sigma_reparam:
            apply_sigma_reparam(self.encoder)
        dim, target = model.hidden_size, model.feature_projection_input_dim * (1 + 2 * config.target_context)
        if config.mask_fill == "learned":
            self.mask_vector = nn.Parameter(torch.rand(dim))
        self.quantizer = GumbelQuantizer(target, config.groups, config.codes, config.code_dim, config.quantizer_init)
        self.project_context = nn.Linear(dim, config.final_dim)
        self.project_code = nn.Linear(config.code_dim, config.final_dim)
        if config.masked_weight > 0:
            self.predict_code = nn.Linear(dim, config.target_groups * config.codes)
        if config.projection_weight > 0:
            self.projection = RandomProjectionQuantizer(target, config.projection_books, config.projection_codes)
            self.predict_projection = nn.Linear(dim, config.projection_books * config.projection_codes)
        if config.recalibration > 0:
            self.recalibration = nn.Parameter(torch.linspace(config.recalibration, 0.0, model.num_hidden_layers))

    def compiled(self) -> Iterable[nn.Module]:
        """The encoder's blocks."""
        return self.encoder.blocks

    # -- data -----------------------------------------------------------------------------------------------------

    def collate(self, crops: Sequence[Crop], mels: Mels, noises: Mels | None, *, training: bool) -> dict[str, Tensor]:
        """Everything that is read or drawn for a batch; a crop's draws depend on the crop alone.

        Returns
        -------
        dict
            ``clean`` and ``heard`` float32 [B, T', 80], ``lengths`` int64 [B] (filter bank frames), ``mask`` bool
            [B, T], ``where`` int64 [B, M] (hidden frames), ``hidden`` bool [B, M] (which of them are real),
            ``distractors`` int64 [B, M, K], and in training ``noise`` float32 [B, M, G, V].
        """
        config = self.config
        pieces = [mels.cut(crop.item, crop.start, crop.length) for crop in crops]
        width = max(len(piece) for piece in pieces)
        clean = torch.zeros(len(pieces), width, pieces[0].shape[1])
        for row, piece in zip(clean, pieces, strict=True):
            row[: len(piece)] = torch.from_numpy(piece)
        lengths = torch.tensor([len(piece) for piece in pieces])
        generators = [crop.generator() for crop in crops]
        heard = clean
        if training and self.perturb_config is not None:
            heard = perturbed(clean, lengths, generators, self.perturb_config, noises)
        counts = self.encoder.sampled_lengths(lengths)
        total = int(self.encoder.sampled_lengths(torch.tensor([width])))
        masks = [
            draw_mask(int(n), config.mask_probability, config.mask_span, g)
            for n, g in zip(counts.clamp_min(1), generators, strict=True)
        ]
        places = [np.flatnonzero(mask) for mask in masks]
        most = max(len(place) for place in places)
        batch = {
            "clean": clean,
            "heard": heard,
            "lengths": lengths,
            "mask": torch.zeros(len(crops), total, dtype=torch.bool),
            "where": torch.zeros(len(crops), most, dtype=torch.int64),
            "hidden": torch.zeros(len(crops), most, dtype=torch.bool),
            "distractors": torch.zeros(len(crops), most, config.distractors, dtype=torch.int64),
        }
        if training:
            batch["noise"] = torch.zeros(len(crops), most, config.groups, config.codes)
        if config.mask_fill == "noise":
            batch["fill"] = torch.zeros(len(crops), total, self.encoder.dim)
        for row, (place, generator) in enumerate(zip(places, generators, strict=True)):
            n = len(place)
            batch["mask"][row, place] = True
            batch["where"][row, :n] = torch.from_numpy(place)
            batch["hidden"][row, :n] = True
            batch["distractors"][row, :n] = torch.from_numpy(draw_distractors(n, config.distractors, generator))
            seeded = torch.Generator().manual_seed(int(generator.integers(2**62)))
            if config.mask_fill == "noise":
                batch["fill"][row] = torch.randn(total, self.encoder.dim, generator=seeded)
            if training:
                batch["noise"][row, :n] = gumbel_noise((n, config.groups, config.codes), seeded)
        return batch

    def weight_of(self, batch: dict[str, Tensor]) -> int:
        """What the sums of a batch are divided by: its hidden frames."""
        return int(batch["hidden"].sum())

    # -- loss -----------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], weight: float, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch.

        Parameters
        ----------
        batch : dict
            From `collate`.
        weight : float
            Hidden frames of the whole step, over all processes and micro-batches: what sums are divided by.
        progress : float
            Share of the run that is done.

        Returns
        -------
        loss : float
            This batch's share of the loss of the step: the shares add up.
        figures : dict of str to Tensor
            Sums over hidden frames (``contrastive``, ``masked``, ...), counts of right answers, and ``histogram``
            [G, V] of the codes.
        """
        config, encoder = self.config, self.encoder
        features, counts = encoder.inputs(batch["heard"], batch["lengths"])
        clean = features if batch["heard"] is batch["clean"] else encoder.inputs(batch["clean"], batch["lengths"])[0]
        mask, where, hidden = batch["mask"], batch["where"], batch["hidden"]
        fill = batch["fill"] if config.mask_fill == "noise" else self.mask_vector
        with self._attention_entropies() as entropies:
            states = list(encoder.walk(features, counts, self._hide(mask, fill), self._key_bias(mask)))
        context, answers = _pick(states[config.contrastive_blocks], where), _pick(states[-1], where)
        # Losses are computed in float32 whatever the blocks compute in.
        with torch.autocast(features.device.type, enabled=False):
            target = _pick(self._targets(clean), where)
            noise = batch["noise"].flatten(0, 1) if "noise" in batch else None
            vectors, ids, probabilities = self.quantizer(target.flatten(0, 1), noise, config.temperature_at(progress))
            vectors, ids, probabilities = (x.unflatten(0, where.shape) for x in (vectors, ids, probabilities))
            contrastive, right = self._contrast(context.float(), vectors, ids, batch["distractors"])
            sums = {"contrastive": contrastive[hidden].sum(), "diversity": self._diversity(probabilities, hidden)}
            figures = {"hidden": hidden.sum(), "contrastive_right": right[hidden].sum()}
            figures["histogram"] = F.one_hot(ids[hidden], config.codes).sum(0)
            for name, values in entropies.items():
                figures[name] = torch.stack(values).mean() * hidden.sum()
            if config.masked_weight > 0:
                scores = self.predict_code(answers.float()).unflatten(-1, (config.target_groups, config.codes))
                # The codes are targets here: nothing of this loss may reach the quantizer.
                codes = ids[..., : config.target_groups].detach()
                sums["masked"], figures["masked_right"] = _cross_entropy(scores, codes, hidden)
            if config.projection_weight > 0:
                shape = (config.projection_books, config.projection_codes)
                scores = self.predict_projection(answers.float()).unflatten(-1, shape)
                codes = self.projection(target.flatten(0, 1)).unflatten(0, where.shape)
                sums["projection"], figures["projection_right"] = _cross_entropy(scores, codes, hidden)
            if config.singularity_weight > 0:
                visible = valid_frames(counts, mask.shape[1]) & ~mask
                cosine = F.cosine_similarity(states[0].detach()[visible].float(), self.mask_vector, dim=-1)
                sums["singularity"] = F.relu(cosine).square().mean() * hidden.sum()
        weights = {
            "contrastive": config.contrastive_weight,
            "diversity": config.contrastive_weight * config.diversity_weight,
            "masked": config.masked_weight,
            "projection": config.projection_weight,
            "singularity": config.singularity_weight,
        }
        loss = torch.stack([weights[name] * value for name, value in sums.items()]).sum() / weight
        return loss, {name: value.detach() for name, value in {**sums, **figures}.items()}

    @contextmanager
    def _attention_entropies(self) -> Iterator[dict[str, list[Tensor]]]:
        """Give lists that a pass fills with the attention entropy (nats) of every block; nothing while training.

        Falling towards 0 beside spikes of the loss, it tells of collapsing attention (Zhai et al. 2023, section 3).
        """
        entropies: dict[str, list[Tensor]] = {}
        watched = [] if self.training else self.encoder.blocks
        for layer, block in enumerate(watched, 1):
            values = entropies.setdefault(f"attention_entropy_layer{layer}", [])
            block.self_attn.observer = lambda p, into=values: into.append(attention_entropy(p).mean())
        try:
            yield entropies
        finally:
            for block in watched:
                block.self_attn.observer = None

    def _diversity(self, probabilities: Tensor, hidden: Tensor) -> Tensor:
        """Share of the codebook entries that lie idle, from probabilities [B, M, G, V], times the hidden frames."""
        total, entries = sum_over_processes(hidden.sum().float()), self.config.groups * self.config.codes
        mean = sum_over_processes(probabilities[hidden].sum(0)) / total
        return (entries - perplexity(mean).sum()) / entries * hidden.sum()

    def _targets(self, clean: Tensor) -> Tensor:
        """What the quantizer reads: float [B, T, F * (1 + 2 * target_context)]."""
        frames = clean
        if self.encoder.config.normalization == "utterance":
            frames = self.encoder.feature_projection[0](clean)
        reach = self.config.target_context
        padded = F.pad(frames, (0, 0, reach, reach))
        return torch.cat([padded[:, i : i + clean.shape[1]] for i in range(2 * reach + 1)], dim=-1)

    def _hide(self, mask: Tensor, fill: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.where(mask[..., None], fill.to(x.dtype), x)

    def _key_bias(self, mask: Tensor) -> list[Tensor] | None:
        if self.config.recalibration <= 0:
            return None
        return [-amount * mask.float() for amount in self.recalibration]

    def _contrast(self, context: Tensor, vectors: Tensor, ids: Tensor, distractors: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE of each hidden frame, and whether the right one won: float [B, M], bool [B, M]."""
        a = F.normalize(self.project_context(context).float(), dim=-1)
        b = F.normalize(self.project_code(vectors).float(), dim=-1)
        cosines = a @ b.mT / self.config.similarity_temperature  # [B, M, M]
        same = (ids[:, :, None] == ids[:, None]).all(-1)
        negatives = cosines.masked_fill(same, -torch.inf).gather(2, distractors)
        logits = torch.cat([cosines.diagonal(dim1=1, dim2=2)[..., None], negatives], -1)
        return logits.logsumexp(-1) - logits[..., 0], logits[..., 0] > negatives.amax(-1)

    def summary(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Means over hidden frames: the terms of the loss, accuracies, and the use of the codebooks."""
        hidden = float(figures["hidden"])
        counts = figures["histogram"].float()
        shares = counts / counts.sum(-1, keepdim=True)
        means = {
            name.replace("_right", "_accuracy"): float(value) / hidden
            for name, value in figures.items()
            if name not in ("hidden", "histogram")
        }
        # Of the codes of all groups, so that 1 is perfect whatever their number.
        used = (counts * 10 * self.config.codes > counts.sum(-1, keepdim=True)).float().mean()
        return {**means, "code_perplexity": float(perplexity(shares).mean()), "code_usage": float(used)}

    def alarms(self, summary: dict[str, float]) -> list[str]:
        """Signs of a codebook that is not learned or collapses: targets become easy, which looks like success.

        The paper (section 4.3) saw this without its contrastive term. Held-out perplexity of a healthy run is well
        above half of the codes.
        """
        share, accuracy = summary["code_perplexity"] / self.config.codes, summary.get("masked_accuracy", 0.0)
        found = []
        if share < IDLE:
            found.append(f"few codes are in use: perplexity {summary['code_perplexity']:.1f} of {self.config.codes}")
            if accuracy > 0.6:
                found.append(f"masked accuracy {accuracy:.2f} means little: the targets are trivial")
        return found

    @property
    def projections(self) -> dict[int, nn.Module]:
        """The projection in front of the contrastive loss, by the layer whose frames it reads."""
        return {self.config.contrastive_blocks: self.project_context}

    def begin_with(self, given: W2vBertEncoder) -> None:
        """Take over the weights of an encoder that `export` made; InputError if it is of another size."""
        if replace(given.config, projected_layer=0, projection_size=0) != self.encoder.config:
            raise InputError("this encoder is of another size than the recipe's")
        state = given.state_dict()
        head = {name: tensor for name, tensor in state.items() if name.startswith("projection.")}
        self.encoder.load_state_dict({name: tensor for name, tensor in state.items() if name not in head})
        same = (given.config.projected_layer, given.config.projection_size)
        if same == (self.config.contrastive_blocks, self.config.final_dim):
            self.project_context.load_state_dict({name.removeprefix("projection."): head[name] for name in head})

    def export(self) -> W2vBertEncoder:
        """The encoder with the projection of its contrastive module, with plain weights rounded to bfloat16."""
        source = self.encoder
        layer, size = self.config.contrastive_blocks, self.config.final_dim
        encoder = W2vBertEncoder(replace(source.config, projected_layer=layer, projection_size=size))
        if self.config.sigma_reparam:
            apply_sigma_reparam(encoder, skip=("projection",))
        head = {f"projection.{name}": tensor for name, tensor in self.project_context.state_dict().items()}
        encoder.load_state_dict(source.state_dict() | head)
        if self.config.sigma_reparam:
            fold_sigma_reparam(encoder)
        with torch.no_grad():
            for tensor in encoder.state_dict().values():
                tensor.copy_(tensor.bfloat16())
        return encoder.eval()


def _pick(frames: Tensor, where: Tensor) -> Tensor:
    """Frames [B, T, D] at [B, M] -> [B, M, D]."""
    return frames.gather(1, where[..., None].expand(-1, -1, frames.shape[-1]))


def _cross_entropy(scores: Tensor, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over groups, sum over hidden frames: scores [B, M, G, V], ids [B, M, G] -> loss, right answers."""
    loss = F.cross_entropy(scores[hidden].flatten(0, 1), ids[hidden].flatten(), reduction="sum")
    right = (scores[hidden].argmax(-1) == ids[hidden]).float().mean(-1).sum()
    return loss / scores.shape[2], right


def perturbed(
    clean: Tensor,
    lengths: Tensor,
    generators: Sequence[np.random.Generator],
    config: PerturbConfig,
    noises: Mels | None,
) -> Tensor:
    """Perturb each row with draws from its own generator: log mel frames float32 [B, T', 80], lengths int64 [B]."""
    parameters = [draw(generator, config) for generator in generators]
    noise = None
    if noises is not None:
        noise = torch.zeros_like(clean)
        for row, values in zip(noise, parameters, strict=True):
            item = int(values.noise_clip * len(noises.lengths))
            sound = torch.from_numpy(noises.cut(item, 0, int(noises.lengths[item])))
            row.copy_(fit_noise(sound, len(row), values.noise_start))
    return perturb(clean, lengths, parameters, noise)
