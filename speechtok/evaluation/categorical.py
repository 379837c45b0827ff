"""Categorical perception of tokenizers and encoders, on the continua of `speechtok.evaluation.continua`."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.decode import resampled
from speechtok.corpus.engine import Event
from speechtok.encoders.base import Encoder
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.errors import InputError
from speechtok.evaluation import continua
from speechtok.evaluation.alignments import read
from speechtok.evaluation.cutters import open_source
from speechtok.evaluation.log_mel import LogMelEncoder
from speechtok.evaluation.units import spread
from speechtok.tokenizer import Tokenizer

__all__ = ["PUBLISHED", "Embedding", "compare"]

Wave = NDArray[np.float32]
Floats = NDArray[np.float64]

# Discriminability index in Cho et al. 2025 (arXiv 2410.07168). Its formula is not known in full, and its continua are
# others: orderings may be compared, values may not.
PUBLISHED = {"Sylber": 0.112, "SD-HuBERT": 0.131, "WavLM-Large": 0.140, "HuBERT": 0.141, "mel spectrogram": 0.196}


class Embedding:
    """One vector of a whole wave: the mean of its frames.

    Of a tokenizer with a segmenter only frames inside of segments count: the voiced stretch, pooled as if it were one
    segment, as the sounds of a continuum are one syllable each. The quantizer has no say. Where the segmenter finds
    nothing, all frames count, and `unvoiced` is one more.

    Parameters
    ----------
    source : Tokenizer or Encoder
    device : str, optional
        A torch device for an encoder; a tokenizer knows its own.

    Attributes
    ----------
    unvoiced : int
        Waves so far in which there was no segment.
    """

    def __init__(self, source: Tokenizer | Encoder, device: str = "cpu") -> None:
        self.encoder = source.encoder if isinstance(source, Tokenizer) else source.to(device).eval()
        self.segmenter = source.segmenter if isinstance(source, Tokenizer) else None
        self.device = source.device if isinstance(source, Tokenizer) else torch.device(device)
        self.unvoiced = 0

    @torch.inference_mode()
    def __call__(self, wave: Wave) -> Floats:
        """Vector float64 [D] of a wave float32 [N] at the continua's rate; InputError if it is shorter than a frame."""
        sound = np.concatenate(
            [np.zeros(0, np.float32), *resampled(iter([wave]), continua.SAMPLE_RATE, self.encoder.sample_rate)]
        )
        features = self.encoder(torch.from_numpy(sound)[None].to(self.device)).features[0].float().cpu().numpy()
        if not len(features):
            raise InputError(
                f"a sound of {len(wave) / continua.SAMPLE_RATE:.3f} s is shorter than a frame; give longer ones"
            )
        counted = np.ones(len(features), bool)
        if self.segmenter is not None:
            spans, _ = self.segmenter.segment(features)
            self.unvoiced += len(spans) == 0
            if len(spans):
                counted[:] = False
                for begin, end in spans.tolist():
                    counted[begin:end] = True
        vector: Floats = features[counted].mean(0, dtype=np.float64)
        return vector


def compare(
    names: Sequence[str],
    *,
    words: str | os.PathLike[str] | None = None,
    baselines: bool = True,
    limit: int | None = None,
    device: str = "cpu",
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[dict[str, Any]]:
    """Index of tokenizers and encoders, and of the baselines log mel and MFCC, on the same continua.

    Parameters
    ----------
    names : sequence of str
        Each a tokenizer, or an encoder (see `speechtok.evaluation.cutters.open_source`).
    words : path, optional
        An aligned folder: also morphs between words of its speakers (see `speechtok.evaluation.continua.word_pairs`).
    baselines : bool
        Whether baselines are measured too.
    limit : int, optional
        At most so many continua of a kind, evenly spread.
    device : str
        A torch device.
    on_event : callable
        Told the progress in seconds of sound, for all rows together.

    Returns
    -------
    list of dict
        For each row: ``tokenizer`` (its name), ``vector`` (which frames), by kind of continua (``synthetic``,
        ``morphed``; None without folder) the figures of `speechtok.evaluation.continua.evaluate`, and ``unvoiced``:
        waves without any segment, of which all frames counted; 0 without a segmenter.

    Raises
    ------
    UnknownNameError
        If a name stands for nothing.
    InputError
        If an option or the folder is unusable, or there is nothing to measure.
    AudioError, CheckpointError
        If sound or weights are unusable.
    """
    rows: list[tuple[str, Embedding]] = []
    for name in names:
        source = open_source(name, device)
        rows.append((source.name if isinstance(source, Tokenizer) else name, Embedding(source, device)))
    if baselines:
        rows += [("log mel", Embedding(LogMelEncoder())), ("MFCC", Embedding(MfccEncoder()))]
    if not rows:
        raise InputError("nothing is to be measured; name a tokenizer or keep the baselines")
    synthetic = [(contrast, vowel) for contrast in continua.CONTRASTS for vowel in continua.RIMES]
    kinds = {"synthetic": [continua.synthesize(*pair) for pair in spread(synthetic, limit)]}
    if words is not None:
        pairs = spread(continua.word_pairs(read(words)), limit)
        if not pairs:
            raise InputError(f"{words}: no speaker says two words of one syllable that differ in one consonant")
        kinds["morphed"] = list(continua.morphed(words, pairs))
    seconds = {
        kind: sum(len(wave) for some in every for wave in some) / continua.SAMPLE_RATE for kind, every in kinds.items()
    }
    total, done, results = len(rows) * sum(seconds.values()), 0.0, []
    for name, embed in rows:
        result: dict[str, Any] = {
            "tokenizer": name,
            "vector": "mean of the frames inside of segments" if embed.segmenter else "mean of all frames",
            "synthetic": None,
            "morphed": None,
        }
        for kind, some in kinds.items():
            result[kind] = continua.evaluate(embed, some)
            done += seconds[kind]
            on_event(Event("run", min(done, total), total))
        results.append(result | {"unvoiced": embed.unvoiced})
    return results
