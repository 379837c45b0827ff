"""A neural codec: encoder, residual quantizer and decoder in one (EnCodec, Défossez et al. 2022, arXiv 2210.13438).

The loss that the loop differentiates is a surrogate: its gradient with respect to the decoded sound is the balanced one
of all reconstruction losses, and that with respect to the discriminator is the discriminator's own. So codec and
discriminator are trained by one optimizer, each by its own loss.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from speechtok.audio.features import valid_frames
from speechtok.codecs.seanet import SeanetWaves
from speechtok.encoders.seanet import SeanetFrames, check_streamable
from speechtok.errors import CheckpointError, InputError
from speechtok.nn.cosine_start import begin_as_cosine_transform
from speechtok.nn.discriminators import MultiScaleStft, feature_distance, generator_loss, hinge_loss
from speechtok.nn.residual_vq import ResidualVQ, codebook_use
from speechtok.nn.seanet import SeanetConfig, SeanetDecoder, SeanetEncoder
from speechtok.quantizers.residual import ResidualQuantizer
from speechtok.tokenizer import Tokenizer
from speechtok.training.balancer import Balancer
from speechtok.training.codec_config import CodecObjectiveConfig
from speechtok.training.sampler import Crop
from speechtok.training.spectral import MultiScaleMel
from speechtok.training.waves import Waves

__all__ = ["CodecObjective"]

_JUDGED = ("judging", "adversarial", "feature", "norm_adversarial", "norm_feature")  # figures of the discriminator
LOW_ENTROPY = 0.5  # of a codebook, as a share of log2 of its size: below, it collapses


class CodecObjective(nn.Module):
    """Codec and discriminator; the loss of a batch.

    Parameters
    ----------
    model : SeanetConfig
        One channel, without norms over time.
    config : CodecObjectiveConfig

    Raises
    ------
    InputError
        If the model cannot be trained this way.
    """

    perturb_config = None  # waves are not perturbed but for their level
    partial = True  # the discriminator comes late, and encoder and codebooks may stop early

    def __init__(self, model: SeanetConfig, config: CodecObjectiveConfig) -> None:
        super().__init__()
        try:
            check_streamable(model)
        except CheckpointError as error:
            raise InputError(f"[model] {error}") from error
        self.model, self.config = model, config
        self.encoder, self.decoder = SeanetEncoder(model), SeanetDecoder(model)
        if config.cosine_start:
            if model.num_lstm_layers:
                raise InputError("[objective] cosine_start needs [model] num_lstm_layers = 0")
            begin_as_cosine_transform(self.encoder, self.decoder)
        self.quantizer = ResidualVQ(
            model.hidden_size, config.codebooks, config.codes, code_dim=config.code_dim, decay=config.decay,
            dead=config.dead,
        )  # fmt: skip
        self.mel = MultiScaleMel(model.sample_rate, config.mel_windows)
        weights = {"wave": config.wave_weight, "mel": config.mel_weight}
        if config.adversarial_from < 1:
            weights |= {"adversarial": config.adversarial_weight, "feature": config.feature_weight}
            self.discriminator = MultiScaleStft(config.discriminator_windows, config.discriminator_filters)
        used = {name: weight for name, weight in weights.items() if weight > 0}
        self.balancer = Balancer(used, config.balancer_decay)

    def compiled(self) -> Iterable[nn.Module]:
        """Parts that are worth compiling."""
        return (self.encoder, self.decoder)

    # -- data -----------------------------------------------------------------------------------------------------

    def collate(
        self, crops: Sequence[Crop], waves: Waves, noises: Waves | None, *, training: bool
    ) -> dict[str, Tensor]:
        """Everything that is read or drawn for a batch; a crop's draws depend on the crop alone.

        Returns
        -------
        dict
            ``wave`` float32 [B, N], zeros behind a short item, ``frames`` int64 [B] (those that are sound), and ``use``
            int64 [B] (codebooks).

        Raises
        ------
        InputError
            If the waves are not counted in the model's hops, or a crop is too short for the discriminator.
        """
        model, config = self.model, self.config
        if (waves.sample_rate, waves.hop) != (model.sample_rate, model.hop):
            raise InputError(
                f"the waves have {waves.sample_rate} Hz and hops of {waves.hop} samples, the model "
                f"{model.sample_rate} Hz and {model.hop}; build them for the model"
            )
        longest = max(config.discriminator_windows) if config.adversarial_from < 1 else 0
        if training and crops[0].length * model.hop < longest:
            raise InputError(
                f"a crop of {crops[0].length * model.hop} samples is shorter than a window of the discriminator "
                f"({longest}); give longer [data] crop_seconds"
            )
        pieces = [waves.cut(crop.item, crop.start, crop.length) for crop in crops]
        batch = {
            "wave": torch.zeros(len(crops), crops[0].length * model.hop),
            "frames": torch.tensor([len(piece) // model.hop for piece in pieces]),
            "use": torch.full((len(crops),), config.codebooks),
        }
        for row, (piece, crop) in enumerate(zip(pieces, crops, strict=True)):
            generator, gain = crop.generator(), 1.0
            if training:
                peak = max(float(np.abs(piece).max()), 1e-4)
                gain = min(10.0 ** (generator.uniform(-config.gain_db, config.gain_db) / 20.0), max(1.0, 1.0 / peak))
                batch["use"][row] = self.quantizer.draw_use(1, generator, full=config.full)[0]
            batch["wave"][row, : len(piece)] = torch.from_numpy(piece * np.float32(gain))
        return batch

    def weight_of(self, batch: dict[str, Tensor]) -> int:
        """What the sums of a batch are divided by: its rows."""
        return len(batch["wave"])

    # -- loss -----------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], weight: float, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch.

        Parameters
        ----------
        batch : dict
            From `collate`.
        weight : float
            Rows of the whole step, over all processes and micro-batches.
        progress : float
            Share of the run that is done.

        Returns
        -------
        loss : float
            This batch's share of the loss of the step. Its value is that of the mel loss and the quantizer's losses,
            its gradient the balanced one.
        figures : dict of str to Tensor
            Sums over rows (``mel``, ``wave``, ``commitment``, ...), and ``counts`` [K, V] of the codes.
        """
        config, wave = self.config, batch["wave"]
        # Parts that take no part have no gradient, and the optimizer leaves them alone.
        learning = self.training and progress < config.decoder_from
        self.quantizer.train(learning)
        with torch.set_grad_enabled(learning):
            frames = self.encoder(wave[:, None]).float().transpose(1, 2)
            if self.training or self.quantizer.started:
                coded = self.quantizer(frames, valid_frames(batch["frames"], frames.shape[1]), batch["use"])
            else:  # an evaluation in the first steps: of encoder and decoder alone
                coded = self.quantizer.passed(frames)
        decoded = self._decode(coded.quantized)
        figures = {"rows": torch.tensor(float(len(wave)), device=wave.device), "counts": coded.counts}
        quantizer_loss = config.commitment_weight * (coded.commitment + coded.codebook)
        figures["commitment"] = coded.commitment.sum()
        if not self.training:
            losses = self._reconstruction(decoded, wave)
            figures |= {name: value.sum() for name, value in losses.items()}
            figures["si_sdr"] = _si_sdr(wave, decoded).sum()
            for books in self._watched() if self.quantizer.started else ():
                fewer = self._decode(self.quantizer.decode(coded.ids[:, :books]))
                figures[f"mel_books{books}"] = self.mel(fewer, wave).sum()
            return (losses["mel"] + quantizer_loss).sum() / weight, figures
        # A leaf: gradients of the verdict on it stop there, those of the discriminator's own loss go past it.
        leaf = decoded.detach().requires_grad_()
        losses = self._reconstruction(leaf, wave)
        judging, outside = torch.zeros((), device=wave.device), quantizer_loss.sum()
        if config.adversarial_from <= progress < 1:
            real, real_features = self.discriminator(wave)
            logits, features = self.discriminator(leaf)
            losses["adversarial"] = generator_loss(logits)
            losses["feature"] = feature_distance(real_features, features)
            judging = hinge_loss(real, logits).sum()
            figures |= {"judging": judging.detach(), "judged_rows": figures["rows"]}
        weighed = {name: value for name, value in losses.items() if name in self.balancer.weights}
        balanced, norms = self.balancer(weighed, leaf)
        surrogate = (decoded * balanced).sum()
        figures |= {name: value.detach().sum() for name, value in losses.items()} | norms
        # The surrogate and the discriminator's loss are gradients only: the value is what is watched.
        gradient_only = surrogate + judging
        value = losses["mel"].detach().sum() + gradient_only - gradient_only.detach()
        return (value + outside) / weight, {name: value.detach() for name, value in figures.items()}

    def _decode(self, frames: Tensor) -> Tensor:
        """Waves float32 [B, N] of frames [B, T, D]."""
        wave: Tensor = self.decoder(frames.transpose(1, 2))
        return wave[:, 0].float()

    def _reconstruction(self, decoded: Tensor, wave: Tensor) -> dict[str, Tensor]:
        return {"wave": (decoded - wave).abs().mean(1), "mel": self.mel(decoded, wave)}

    def _watched(self) -> list[int]:
        """Numbers of codebooks whose held-out loss is watched: powers of two."""
        return [1 << power for power in range(self.config.codebooks.bit_length()) if 1 << power < self.config.codebooks]

    def summary(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Means over rows, and perplexity, entropy and usage of every codebook once there are codes.

        Figures of the discriminator are means over the rows that it has judged.
        """
        rows, counts = float(figures["rows"]), figures["counts"]
        judged = float(figures.get("judged_rows", 0))
        means = {
            name: float(value) / (judged if name in _JUDGED else rows)
            for name, value in figures.items()
            if name not in ("rows", "counts", "judged_rows")
        }
        return means | (codebook_use(counts).as_dict() if bool(counts.any()) else {})

    def alarms(self, summary: dict[str, float]) -> list[str]:
        """Codebooks that collapse."""
        names = [f"book{book + 1}_entropy" for book in range(self.config.codebooks)]
        return [
            f"codebook {name.removesuffix('_entropy').removeprefix('book')} collapses: its entropy is "
            f"{summary[name]:.0%} of the bits of a code"
            for name in names
            if summary.get(name, 1.0) < LOW_ENTROPY
        ]

    def export(self, name: str) -> Tokenizer:
        """The codec as a tokenizer, with all weights rounded to bfloat16."""
        parts = (self.encoder.state_dict(), self.quantizer.frozen_tensors(), self.decoder.state_dict())
        encoder, books, decoder = ({key: value.bfloat16().float() for key, value in part.items()} for part in parts)
        quantizer = ResidualQuantizer.from_tensors(books)
        frames, waves = SeanetFrames(self.model, weights=encoder), SeanetWaves(self.model, weights=decoder)
        return Tokenizer(frames, quantizer, decoder=waves, name=name)


def _si_sdr(wave: Tensor, decoded: Tensor) -> Tensor:
    """As `speechtok.metrics.signal.si_sdr`, of every row and between -40 and 40 dB: silent crops have no ratio."""
    wave, decoded = wave - wave.mean(1, keepdim=True), decoded - decoded.mean(1, keepdim=True)
    power = wave.square().sum(1, keepdim=True).clamp_min(1e-8)
    target = (decoded * wave).sum(1, keepdim=True) / power * wave
    ratio = target.square().sum(1).clamp_min(1e-8) / (decoded - target).square().sum(1).clamp_min(1e-8)
    return (10.0 * ratio.log10()).clamp(-40.0, 40.0)
