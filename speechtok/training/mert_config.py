"""What MERT is trained for: the terms of its loss, what is hidden, and what keeps the training steady."""

from dataclasses import dataclass

from speechtok.errors import InputError

__all__ = ["MertConfig"]


@dataclass(frozen=True)
class MertConfig:
    """Terms of the loss; the defaults are those of the published MERT-v1-95M unless it says otherwise.

    All terms are means, over hidden frames and over codebooks or bins: neither the number of codebooks nor that of bins
    changes the size of the loss. (The published loss adds the codebooks up: an `acoustic_weight` of 8 here.)

    Parameters
    ----------
    acoustic_weight : float
        Of the cross-entropy of the codes. 0: there is no acoustic teacher.
    books : int
        Codebooks of the teacher that are predicted, the first ones; 0: all.
    final_dim : int
        Size of the vectors that are compared with the label embeddings of a codebook.
    temperature : float
        Divides their cosines.
    cached : bool
        Keep the teacher's codes of the whole training sound on disk; False: compute them when an item is first drawn
        and keep them in memory. The codes are the same, since both are those of whole items.
    cqt_weight : float
        Of the squared error of constant-Q magnitudes. 0: there is no musical teacher. The magnitudes are compressed,
        ``log(1 + x)``, and every bin is standardised over the training sound: raw ones, as published, are dominated by
        loud tonal frames.
    cqt_bins, cqt_bins_per_octave : int
    cqt_fmin : float
        Of the transform (Hz).
    feature_penalty : float
        Of the mean square of the convolutions' features.
    feature_grad_mult : float
        Scales all that the convolutions learn.
    mask_probability : float
        Share of frames that begin a hidden span: published are spans for 0.8 of the frames, 0.8 / 5 per frame.
    mask_span : int
        Frames of a span.
    mixture_probability : float
        Share of crops to which pieces of other crops are added; the targets stay those of the clean crop. (The
        published `mixture_prob` is the share that stays clean.)
    mixture_segments : int
        Most pieces that are added to a crop.
    mixture_seconds : (float, float)
        Shortest and longest piece.
    mixture_gain : float
        By which the pieces are scaled.
    dropout : float
        In the blocks and in front of the first one.
    layerdrop : float
        Share of blocks that are passed over in training.
    attention_relaxation : float
        See `speechtok.nn.transformer.attention_weights`; 1: off. 32 in the published MERT-v1-330M.
    sigma_reparam : bool
        Bound the spectral norm of all linear maps of the encoder.
    identity_init : bool
        Begin with blocks that pass their input on.
    """

    acoustic_weight: float = 1.0
    books: int = 0
    final_dim: int = 64
    temperature: float = 0.1
    cached: bool = True
    cqt_weight: float = 1.0
    cqt_bins: int = 336
    cqt_bins_per_octave: int = 48
    cqt_fmin: float = 32.7
    feature_penalty: float = 10.0
    feature_grad_mult: float = 0.1
    mask_probability: float = 0.16
    mask_span: int = 5
    mixture_probability: float = 0.5
    mixture_segments: int = 3
    mixture_seconds: tuple[float, float] = (0.5, 1.0)
    mixture_gain: float = 1.0
    dropout: float = 0.1
    layerdrop: float = 0.05
    attention_relaxation: float = 1.0
    sigma_reparam: bool = False
    identity_init: bool = False

    def __post_init__(self) -> None:
        weights = (self.acoustic_weight, self.cqt_weight, self.feature_penalty, self.feature_grad_mult)
        if not all(0 <= weight < float("inf") for weight in weights):
            raise InputError(
                "acoustic_weight, cqt_weight, feature_penalty and feature_grad_mult must be finite and at least 0"
            )
        if self.acoustic_weight == self.cqt_weight == 0:
            raise InputError("acoustic_weight and cqt_weight are 0: nothing would be learned")
        if self.books < 0 or self.final_dim < 1 or not 0 < self.temperature < float("inf"):
            raise InputError("books must be at least 0, final_dim at least 1 and temperature positive")
        if min(self.cqt_bins, self.cqt_bins_per_octave) < 1 or not 0 < self.cqt_fmin < float("inf"):
            raise InputError("cqt_bins and cqt_bins_per_octave must be at least 1, cqt_fmin positive")
        if not (0 < self.mask_probability <= 1 and self.mask_span >= 1):
            raise InputError("mask_probability must be in (0, 1] and mask_span at least 1")
        if not (0 <= self.dropout < 1 and 0 <= self.layerdrop < 1 and 0 <= self.mixture_probability <= 1):
            raise InputError("dropout and layerdrop must be in [0, 1), mixture_probability in [0, 1]")
        low, high = self.mixture_seconds
        if not (
            0 < low <= high < float("inf") and self.mixture_segments >= 1 and 0 <= self.mixture_gain < float("inf")
        ):
            raise InputError(
                "mixture_seconds are a shortest and a longest piece; mixture_segments is at least 1, mixture_gain 0"
            )
        if not 1 <= self.attention_relaxation < float("inf"):
            raise InputError(f"attention_relaxation {self.attention_relaxation}: give 1 (off) or more, published is 32")
        if self.sigma_reparam and self.identity_init:
            raise InputError("sigma_reparam divides by the norm of weights that identity_init sets to 0: choose one")
