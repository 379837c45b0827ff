"""What w2v-BERT is trained for: the terms of its loss and their settings."""

from dataclasses import dataclass

from speechtok.errors import InputError

__all__ = ["W2vBertObjectiveConfig"]


@dataclass(frozen=True)
class W2vBertObjectiveConfig:
    """Terms of the loss; the defaults are those of 2021.

    Parameters
    ----------
    contrastive_blocks : int
        Blocks of the contrastive module; the others predict codes.
    groups, codes, code_dim : int
        Of the product quantizer, see `GumbelQuantizer`.
    quantizer_init : float
        See `GumbelQuantizer`.
    target_groups : int
        Codebooks whose codes are predicted.
    target_context : int
        Frames on each side that the quantizer reads besides the hidden one.
    final_dim : int
        Size of the vectors that the contrastive loss compares.
    distractors : int
        K.
    similarity_temperature : float
        Divides cosines.
    contrastive_weight, diversity_weight, masked_weight : float
        beta, alpha, gamma: ``beta * (contrastive + alpha * diversity) + gamma * masked``.
    projection_weight : float
        Of the masked prediction of random-projection codes.
    projection_books, projection_codes : int
        See `RandomProjectionQuantizer`.
    temperature : (float, float)
        Of the Gumbel softmax, at the start and from `temperature_steps` of the run on; geometric in between.
    temperature_steps : float
        Share of the run.
    mask_probability : float
        Share of frames that begin a hidden span.
    mask_span : int
        Frames of a span.
    mask_fill : {"learned", "noise"}
        What stands for hidden frames: one learned vector, or normal noise.
    dropout : float
        In the blocks.
    identity_init : bool
        Begin with blocks that pass their input on (last maps of all branches are 0): frames of every layer are as good
        as the input from the first step on, which saves a short run much of its time.
    sigma_reparam : bool
        Bound the spectral norm of all linear maps of the encoder.
    recalibration : float
        Masked-token optimisation: the first block's scores of hidden keys are lowered by this much, a learned amount
        per block that starts at this value and falls to 0 in the last block; 0: off.
    singularity_weight : float
        Masked-token optimisation: weight of ``mean(relu(cos(mask vector, visible frame))^2)``.
    """

    contrastive_blocks: int
    groups: int = 1
    codes: int = 1024
    code_dim: int = 1024
    quantizer_init: float = 1.0
    target_groups: int = 1
    target_context: int = 0
    final_dim: int = 768
    distractors: int = 100
    similarity_temperature: float = 0.1
    contrastive_weight: float = 1.0
    diversity_weight: float = 0.1
    masked_weight: float = 1.0
    projection_weight: float = 0.0
    projection_books: int = 0
    projection_codes: int = 1024
    temperature: tuple[float, float] = (2.0, 0.1)
    temperature_steps: float = 0.7
    mask_probability: float = 0.065
    mask_span: int = 10
    mask_fill: str = "learned"
    dropout: float = 0.0
    identity_init: bool = False
    sigma_reparam: bool = False
    recalibration: float = 0.0
    singularity_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.target_groups <= self.groups or self.code_dim % max(1, self.groups):
            raise InputError(
                f"target_groups {self.target_groups} and code_dim {self.code_dim} do not fit {self.groups} groups"
            )
        if not self.target_groups >= 1 or min(self.codes, self.code_dim, self.final_dim, self.distractors) < 1:
            raise InputError("target_groups, codes, code_dim, final_dim and distractors must be at least 1")
        if not (0 <= self.dropout < 1 and 0 < self.mask_probability <= 1 and self.mask_span >= 1):
            raise InputError("dropout must be in [0, 1), mask_probability in (0, 1] and mask_span at least 1")
        if self.contrastive_weight <= 0 and self.masked_weight <= 0 and self.projection_weight <= 0:
            raise InputError("all weights are 0: nothing would be learned")
        if self.sigma_reparam and self.identity_init:
            raise InputError("sigma_reparam divides by the norm of weights that identity_init sets to 0: choose one")
        if self.singularity_weight > 0 and self.mask_fill == "noise":
            raise InputError("singularity_weight is about the learned mask vector; mask_fill = 'noise' has none")
        if self.mask_fill not in ("learned", "noise"):
            raise InputError(f"mask_fill {self.mask_fill!r}: known are 'learned' and 'noise'")
        if (self.projection_weight > 0) != (self.projection_books > 0):
            raise InputError("projection_weight and projection_books go together: give both or none")
        if min(self.temperature) <= 0 or not 0 < self.temperature_steps <= 1:
            raise InputError("temperatures must be positive and temperature_steps in (0, 1]")

    def temperature_at(self, progress: float) -> float:
        """Gumbel temperature when a share `progress` of the steps is done."""
        start, end = self.temperature
        return start * (end / start) ** min(1.0, progress / self.temperature_steps)
