"""What decides the training of a codec."""

from dataclasses import dataclass

from speechtok.errors import InputError

__all__ = ["CodecObjectiveConfig"]


@dataclass(frozen=True)
class CodecObjectiveConfig:
    """Quantizer, losses and their weights (section ``[objective]`` of a recipe).

    Parameters
    ----------
    codebooks, codes : int
        Of the residual quantizer.
    code_dim : int or None
        See `ResidualVQ`: None for moving averages, 8 for the factorized form of DAC.
    decay, dead : float
        See `ResidualVQ`.
    full : float
        Probability that a crop uses all codebooks; else a number from 1 to all, equally likely (quantizer dropout).
    cosine_start : bool
        Begin as a cosine transform (`speechtok.nn.cosine_start`).
    gain_db : float
        Crops are made louder or softer by up to so much, and never clipped.
    wave_weight, mel_weight, adversarial_weight, feature_weight : float
        Shares of the balanced gradient: L1 of the wave, multi-scale mel loss, and from `adversarial_from` on the
        discriminator's verdict and the distance of its features (EnCodec, section 3.4). 0: without.
    commitment_weight : float
        Of the quantizer's losses, which are not balanced.
    balancer_decay : float
        See `Balancer`.
    mel_windows : tuple of int
        See `MultiScaleMel`.
    adversarial_from : float
        Share of the run after which a discriminator takes part; 1: never.
    decoder_from : float
        Share of the run after which encoder and codebooks stay as they are and only the decoder learns: units made
        from then on stay valid.
    discriminator_windows : tuple of int
    discriminator_filters : int
        See `MultiScaleStft`.

    Raises
    ------
    InputError
        If a value is out of range.
    """

    codebooks: int = 8
    codes: int = 1024
    code_dim: int | None = None
    decay: float = 0.99
    dead: float = 0.1
    full: float = 0.5
    cosine_start: bool = True
    gain_db: float = 6.0
    wave_weight: float = 0.1
    mel_weight: float = 2.0
    adversarial_weight: float = 4.0
    feature_weight: float = 4.0
    commitment_weight: float = 1.0
    balancer_decay: float = 0.99
    mel_windows: tuple[int, ...] = (64, 128, 256, 512, 1024)
    adversarial_from: float = 1.0
    decoder_from: float = 1.0
    discriminator_windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    discriminator_filters: int = 32

    def __post_init__(self) -> None:
        weights = (self.wave_weight, self.adversarial_weight, self.feature_weight, self.commitment_weight)
        if not self.mel_weight > 0 or min(weights) < 0:
            raise InputError("[objective] mel_weight must be positive, the other weights at least 0")
        if any(not 0 <= share <= 1 for share in (self.full, self.adversarial_from, self.decoder_from)):
            raise InputError("[objective] full, adversarial_from and decoder_from are shares of 1")
        if self.gain_db < 0:
            raise InputError("[objective] gain_db is at least 0")
        if self.adversarial_from < 1 and self.adversarial_weight + self.feature_weight == 0:
            raise InputError("[objective] adversarial_from needs adversarial_weight or feature_weight")
        if self.discriminator_filters < 1:
            raise InputError("[objective] discriminator_filters is at least 1")
