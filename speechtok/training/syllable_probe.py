"""How well the greedy segments of a gated encoder meet syllables, while it trains: against alignments of dev speech."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.decode import load
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.errors import InputError
from speechtok.evaluation import alignments
from speechtok.evaluation.syllables import syllables
from speechtok.metrics.boundaries import best_shift, evaluate
from speechtok.segmenters.greedy import greedy_segment

__all__ = ["SyllableProbe"]

THRESHOLDS = (0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class SyllableProbe:
    """Aligned utterances, ready to be encoded again and again.

    Parameters
    ----------
    mels : list of float32 [T', 80]
        Log mel frames of each utterance.
    references : list of float64 [S, 2]
        Its syllables (s).
    """

    mels: list[NDArray[np.float32]]
    references: list[NDArray[np.float64]]

    @classmethod
    def read(
        cls, folder: str | os.PathLike[str], encoder: W2vBertEncoder, *, utterances: int = 120, seed: int = 0
    ) -> "SyllableProbe":
        """Decode a sample of an aligned folder (see `speechtok.evaluation.alignments`), `utterances` at most."""
        known = alignments.read(folder)
        chosen = sorted(np.random.default_rng(seed).permutation(len(known))[:utterances])
        mels, references = [], []
        for entry in (known[index] for index in chosen):
            wave = load(Path(folder) / entry.path, sample_rate=encoder.sample_rate)
            mel, _ = encoder.filter_bank(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))
            mels.append(mel[0].numpy())
            spans = [[one.start, one.end] for one in syllables(entry)]
            references.append(np.array(spans, np.float64).reshape(-1, 2))
        return cls(mels, references)

    @torch.inference_mode()
    def __call__(self, encoder: W2vBertEncoder) -> dict[str, float]:
        """Boundaries within 50 ms (protocol ``sdhubert``, best constant shift) at each norm threshold of `THRESHOLDS`.

        Returns
        -------
        dict of str to float
            ``f1_0.5``, ``r_value_0.5``, ``rate_0.5`` (segments per second) and so on for each threshold; F1 and R are 0
            where no boundary is met.
        """
        grid, device = encoder.grid, next(encoder.parameters()).device
        frames = []
        for mel in self.mels:
            features = encoder.inputs(torch.from_numpy(mel)[None].to(device), torch.tensor([len(mel)], device=device))
            frames.append(encoder.answers(*features).features[0].float().cpu())
        seconds = sum(map(len, frames)) * grid.hop_seconds
        result = {}
        for threshold in THRESHOLDS:
            cuts = [greedy_segment(x, threshold, -1.0, "reset").astype(np.float64) for x in frames]
            spans = [cut * grid.hop_seconds + grid.offset_seconds for cut in cuts]
            try:
                shift = best_shift(self.references, spans, protocol="sdhubert")
            except InputError:  # no boundary is met at any shift: a young model, and no reason to end its training
                shift = 0.0
            found = evaluate(self.references, spans, protocol="sdhubert", shift=shift)
            result[f"f1_{threshold}"] = found["f1"]
            result[f"r_value_{threshold}"] = found["r_value"] or 0.0
            result[f"rate_{threshold}"] = sum(map(len, spans)) / seconds
        return result
