"""Report how far batched equals single, per encoder, on real files of mixed length.

The shipped tokenizer, and encoders of published size with random weights and 200 of their own frames as centroids.
Batches of 4 and 16 take windows in input order, so that lengths mix. Columns: share of files with identical units, the
largest relative feature difference of a frame (Euclidean norm) against the encoder's stated bound, and the share of
frames that the near-tie rule decided.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speechtok.benchmarks.runner import machine, parser, write

import speechtok
from speechtok.audio.decode import AudioFile
from speechtok.corpus.sources import scan
from speechtok.encoders.base import Encoder
from speechtok.encoders.pretrained import build
from speechtok.evaluation.verify import feature_difference, in_batches
from speechtok.quantizers.kmeans import KMeans
from speechtok.tokenizer import Tokenizer

CENTROIDS = 200
Wave = tuple[np.ndarray, int]


def read(path: Path, files: int) -> list[Wave]:
    """Waves of files that are spread evenly over a folder."""
    found = scan(path).utterances
    waves = []
    for utterance in found[:: max(1, len(found) // files)][:files]:
        with AudioFile(utterance.open(), utterance.path) as file:
            waves.append((np.concatenate(list(file.blocks())), file.sample_rate))
    return waves


def with_own_frames(encoder: Encoder, waves: list[Wave]) -> Tokenizer:
    """Give an encoder frames of its own as centroids."""
    probe = Tokenizer(encoder, KMeans(np.zeros((1, encoder.dim))), name="probe")
    rng = np.random.default_rng(0)
    rows = []
    with torch.inference_mode():
        for wave, rate in waves[:: max(1, len(waves) // 20)]:
            for _, piece in probe.windows(wave, rate):
                frames = encoder(torch.from_numpy(piece)[None]).features[0]
                rows.append(frames[rng.permutation(len(frames))[:40]])
    chosen = torch.cat(rows)
    return Tokenizer(encoder, KMeans(chosen[rng.permutation(len(chosen))[:CENTROIDS]].numpy()), name=encoder.type)


def random(kind: str, layer: int) -> Callable[[list[Wave]], Tokenizer]:
    """Encoder of its published size."""

    def make(waves: list[Wave]) -> Tokenizer:
        torch.manual_seed(0)
        return with_own_frames(build(kind, {}, layer), waves)

    return make


def main() -> None:
    """Run and report."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=Path("../shared/data/speech/eval"))
    chosen = options.parse_args()
    cases: dict[str, tuple[Callable[[list[Wave]], Tokenizer], int]] = {
        "mfcc-k100": (lambda waves: speechtok.load("mfcc-k100"), 200),
        "w2vbert-mini": (lambda waves: speechtok.load("w2vbert-mini"), 200),
        "HuBERT-base, layer 9": (random("hubert", 9), 200),
        "WavLM-base, layer 9": (random("wavlm", 9), 40),
        "w2v-BERT 2.0, layer 17": (random("w2v_bert", 17), 16),
    }
    result: dict[str, Any] = {"machine": machine(), "encoders": {}}
    for name, (make, files) in cases.items():
        waves = read(chosen.data, files)
        tokenizer = make(waves)
        single, ties = in_batches(tokenizer, waves, 1)
        row: dict[str, Any] = {"files": len(waves), "frames": sum(len(units) for units in single)}
        for size in (4, 16):
            batched, _ = in_batches(tokenizer, waves, size)
            same = sum(a == b for a, b in zip(single, batched, strict=True))
            row[f"identical_files_batch_{size}"] = same / len(waves)
        row["near_ties"] = ties
        row["near_tie_share"] = ties / row["frames"]
        row["max_feature_difference"] = feature_difference(tokenizer, waves)
        row["stated_bound"] = tokenizer.encoder.rounding
        result["encoders"][name] = row
        write(chosen.json, result)


if __name__ == "__main__":
    main()
