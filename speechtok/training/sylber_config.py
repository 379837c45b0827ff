"""Settings of self-segmentation distillation."""

from dataclasses import dataclass

from speechtok.errors import InputError

__all__ = ["SylberConfig"]


@dataclass(frozen=True)
class SylberConfig:
    """Terms of the loss, and how segments are found.

    Parameters
    ----------
    teacher_layer : int
        Layer of the first teacher, the encoder that the run begins with. 0 takes its input frames, and is what a run
        from scratch has to take.
    whitening : float
        0 to 1: how far the spread of the teacher's segment means is made equal in all directions. 0 leaves most of the
        angles between them to a few directions, 1 gives their noise the same weight as the rest.
    gate_weight : float
        Of the cross-entropy of the gate against that of the directions.
    merge_thresholds : (float, float)
        In the second stage, the cosine from which frames belong together is drawn from this range for each crop.
    generations : int
        Equal parts of the second stage; each begins with a new teacher, the student as it is.
    anchored : bool
        In the second stage, too, directions are those of the first teacher's means, over the new teacher's segments.
        Without it a direction is that of the new teacher's own mean, as published; from generation to generation these
        become more alike.
    threshold_decay, threshold_prior : float
        See `NormThreshold`.
    mixture_probability : float
        Share of crops into which a part of another utterance is mixed.
    mixture_snr : (float, float)
        Of it (dB): 14 to 26 are Sylber's amplitudes of 0.05 to 0.2.
    mixture_cut : float
        At most this share of the crop, at its start or its end, stays without the other utterance.
    dropout : float
        In the blocks.
    identity_init : bool
        Begin with blocks that pass their input on (from scratch).

    Raises
    ------
    InputError
        If a value is out of bounds.
    """

    teacher_layer: int = 0
    whitening: float = 0.5
    gate_weight: float = 1.0
    merge_thresholds: tuple[float, float] = (0.8, 0.9)
    generations: int = 1
    anchored: bool = False
    threshold_decay: float = 0.99
    threshold_prior: float = 1.0
    mixture_probability: float = 0.05
    mixture_snr: tuple[float, float] = (14.0, 26.0)
    mixture_cut: float = 0.7
    dropout: float = 0.0
    identity_init: bool = False

    def __post_init__(self) -> None:
        for name in ("whitening", "mixture_probability", "mixture_cut", "threshold_decay", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"[objective] {name} is {getattr(self, name)}; give a share from 0 to 1")
        for name in ("merge_thresholds", "mixture_snr"):
            low, high = getattr(self, name)
            if not low <= high < float("inf"):
                raise InputError(f"[objective] {name} is {low, high}; give the lower end first")
        if self.generations < 1:
            raise InputError("[objective] generations must be at least 1")
        if self.teacher_layer < 0 or min(self.gate_weight, self.threshold_prior) <= 0:
            raise InputError(
                "[objective] teacher_layer must not be negative, gate_weight and threshold_prior must be positive"
            )
