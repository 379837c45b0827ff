"""How much the frames of each layer say about phones, while a model trains: k-means units against alignments."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.audio.decode import load
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.errors import InputError
from speechtok.evaluation import alignments
from speechtok.kernels.nearest import nearest_centroids
from speechtok.metrics.phonetic import joint_counts, pnmi
from speechtok.training.mels import Mels

__all__ = ["PhoneProbe"]

_FIT_ITEMS, _BATCH = 400, 16


@dataclass(frozen=True)
class PhoneProbe:
    """Aligned utterances, ready to be encoded again and again.

    Parameters
    ----------
    mels : sequence of float32 [T', 80]
        Log mel frames of each utterance.
    labels : sequence of int [T]
        Phone of each frame of the encoder's grid, -1 for none; silence is kept.
    fit : sequence of float32 [T', 80]
        Log mel frames that k-means is fitted on (training sound).
    clusters : tuple of int
        Vocabularies that are tried.
    """

    mels: list[NDArray[np.float32]]
    labels: list[NDArray[np.int64]]
    fit: list[NDArray[np.float32]]
    clusters: tuple[int, ...] = (100,)

    @classmethod
    def read(
        cls,
        folder: str | os.PathLike[str],
        encoder: W2vBertEncoder,
        training: Mels,
        *,
        utterances: int = 120,
        clusters: tuple[int, ...] = (100,),
        seed: int = 0,
    ) -> "PhoneProbe":
        """Decode a sample of an aligned folder (see `speechtok.evaluation.alignments`).

        Parameters
        ----------
        folder : path
        encoder : W2vBertEncoder
            For its grid.
        training : Mels
            To fit k-means on.
        utterances, clusters, seed
            How many utterances are used at most, which vocabularies are tried, and how they are drawn.
        """
        generator = np.random.default_rng(seed)
        known = alignments.read(folder)
        chosen = sorted(generator.permutation(len(known))[:utterances])
        names: dict[str, int] = {}
        mels, labels = [], []
        for entry in (known[index] for index in chosen):
            wave = load(Path(folder) / entry.path, sample_rate=encoder.sample_rate)
            mel, _ = encoder.filter_bank(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))
            frames = encoder.grid.num_frames(len(wave))
            centres = np.array([encoder.grid.centre_seconds(frame) for frame in range(frames)])
            phones = alignments.frame_labels(entry.phones, centres)
            mels.append(mel[0].numpy())
            labels.append(np.array([names.setdefault(str(p), len(names)) if p else -1 for p in phones], np.int64))
        items = generator.permutation(len(training.lengths))[:_FIT_ITEMS]
        fit = [training.cut(int(item), 0, int(training.lengths[item])) for item in sorted(items)]
        frames = int(encoder.sampled_lengths(torch.tensor([len(mel) for mel in fit])).sum())
        if frames < max(clusters):
            raise InputError(
                f"the training sound gives {frames} frames, fewer than the {max(clusters)} clusters of the phone "
                "probe; give more sound or leave the aligned folder out"
            )
        return cls(mels, labels, fit, clusters)

    @torch.inference_mode()
    def __call__(self, encoder: W2vBertEncoder, projections: Mapping[int, nn.Module] | None = None) -> dict[str, float]:
        """PNMI (Miller-Madow, silence kept) of every layer: ``{"pnmi_k100_layer2": 0.3, ...}``.

        Parameters
        ----------
        encoder : W2vBertEncoder
        projections : mapping of int to Module, optional
            Applied to the frames of a layer, whose figures are then called ``..._layer2_projected``, beside those of
            the layer itself.
        """
        projections = projections or {}
        fit, held = (_frames(encoder, mels, projections) for mels in (self.fit, self.mels))
        labels = np.concatenate(self.labels)
        known = labels >= 0
        result = {}
        for layer, rows in fit.items():
            for count in self.clusters:
                kmeans = faiss.Kmeans(rows.shape[1], count, niter=10, seed=0, max_points_per_centroid=100)
                kmeans.train(rows)
                ids, _ = nearest_centroids(torch.from_numpy(held[layer][known]), torch.from_numpy(kmeans.centroids))
                counts = joint_counts(labels[known], ids.numpy().astype(np.int64))
                result[f"pnmi_k{count}_layer{layer}"] = pnmi(counts, corrected=True)
        return result


def _frames(
    encoder: W2vBertEncoder, mels: list[NDArray[np.float32]], projections: Mapping[int, nn.Module]
) -> dict[str, NDArray[np.float32]]:
    """Frames of all utterances, one behind the other, for every layer: ``{"2": float32 [N, D], ...}``."""
    device = next(encoder.parameters()).device
    order = sorted(range(len(mels)), key=lambda index: len(mels[index]))
    parts: dict[int, dict[str, Tensor]] = {}
    for begin in range(0, len(order), _BATCH):
        rows = order[begin : begin + _BATCH]
        lengths = torch.tensor([len(mels[row]) for row in rows])
        batch = torch.zeros(len(rows), int(lengths.max()), mels[0].shape[1])
        for place, row in enumerate(rows):
            batch[place, : len(mels[row])] = torch.from_numpy(mels[row])
        features, counts = encoder.inputs(batch.to(device), lengths.to(device))
        states = {}
        for layer, state in enumerate(encoder.walk(features, counts)):
            states[f"{layer}"] = state.cpu()
            if layer in projections:
                states[f"{layer}_projected"] = projections[layer](state).cpu()
        for place, row in enumerate(rows):
            parts[row] = {name: state[place, : counts[place]] for name, state in states.items()}
    return {name: torch.cat([parts[row][name] for row in range(len(mels))]).numpy() for name in parts[0]}
