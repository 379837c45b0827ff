"""k-means units: the id of the nearest centroid (HuBERT, Hsu et al. 2021, section III-B)."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from speechtok.errors import FormatError
from speechtok.kernels.nearest import nearest_centroids
from speechtok.quantizers.base import Codes, Quantizer

__all__ = ["KMeans"]

_LENGTH_ERROR = 1e-4  # of centroids that are said to have length 1


class KMeans(Quantizer):
    """Nearest centroid by Euclidean distance, optionally after per-dimension standardisation or scaling to length 1.

    Parameters
    ----------
    centroids : float32 [K, D]
        In the standardised space if `mean` and `scale` are given.
    mean, scale : float32 [D], optional
        A frame x is compared as ``(x - mean) / scale`` (AudioLM standardises, HuBERT does not).
    spherical : bool
        Frames (standardised, if so asked) are scaled to length 1 first, so that the angle to the centroids decides.
        Centroids have length 1. Of frames that are zero the first centroid is the nearest.

    Raises
    ------
    FormatError
        If shapes do not fit, values are not finite, or spherical centroids are not of length 1.
    """

    type = "kmeans"
    centroids: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        centroids: ArrayLike,
        mean: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        spherical: bool = False,
    ):
        super().__init__()
        centroids = np.asarray(centroids, np.float32)
        if centroids.ndim != 2 or 0 in centroids.shape:
            raise FormatError(f"centroids have shape {centroids.shape}; [clusters, dimensions] is needed")
        if (mean is None) != (scale is None):
            raise FormatError("mean and scale of the standardisation go together; give both or neither")
        self.vocab_size, self.dim = centroids.shape
        self.standardized, self.spherical = mean is not None, spherical
        self.invertible = not spherical  # a direction is all that is left of a frame then
        self.register_buffer("centroids", torch.from_numpy(centroids.copy()))
        if mean is not None and scale is not None:
            for name, value in (("mean", mean), ("scale", scale)):
                array = np.array(value, np.float32)
                if array.shape != (self.dim,):
                    raise FormatError(f"{name} has shape {array.shape}, but frames have {self.dim} dimensions")
                self.register_buffer(name, torch.from_numpy(array))
            if not bool((self.scale > 0).all()):
                raise FormatError("the scale of the standardisation must be positive in every dimension")
        if not all(bool(torch.isfinite(value).all()) for value in self.buffers()):
            raise FormatError("centroids or their standardisation hold NaN or infinite values")
        if spherical and bool(((self.centroids.norm(dim=1) - 1).abs() > _LENGTH_ERROR).any()):
            raise FormatError("centroids of spherical k-means must have length 1; divide each by its length")

    def config_dict(self) -> dict[str, Any]:
        config = {"clusters": self.vocab_size, "dim": self.dim, "standardized": self.standardized}
        # Absent where it is False: tokenizers from before it was there keep their fingerprints.
        return config | ({"spherical": True} if self.spherical else {})

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], spherical: bool = False) -> "KMeans":
        """Rebuild from a saved state dict and, of the configuration, what tensors do not tell."""
        unknown = set(tensors) - {"centroids", "mean", "scale"}
        if "centroids" not in tensors or unknown:
            raise FormatError(
                f"a k-means file holds 'centroids' and optionally 'mean' and 'scale', not {sorted(tensors)}"
            )
        arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
        return KMeans(arrays["centroids"], arrays.get("mean"), arrays.get("scale"), spherical)

    def forward(self, features: Tensor) -> Codes:
        """Assign float [B, T, D] frames; see `Codes`."""
        batch, frames, dim = features.shape
        if dim != self.dim:
            raise FormatError(
                f"frames have {dim} dimensions, the centroids {self.dim}; encoder or layer is another one"
            )
        rows = features.reshape(-1, dim).float()
        size = rows.norm(dim=1)
        if self.standardized:
            rows = (rows - self.mean) / self.scale
            size = size / self.scale.min()  # a change of the frame grows by at most this when it is scaled
        if self.spherical:
            length = rows.norm(dim=1)
            rows = rows / length.clamp_min(torch.finfo(rows.dtype).tiny)[:, None]
        ids, distances = nearest_centroids(rows, self.centroids)
        # By the triangle inequality a move of less than half the gap keeps the nearest centroid nearest.
        gap = distances[:, 1] - distances[:, 0]
        if self.spherical:
            # Where y moves by e, y / |y| moves by at most 2 e / (|y| + |y'|) <= e / (|y| - e / 2).
            gap = length / (1 / gap + 1 / 4)
        margins = gap / (2 * size).clamp_min(1e-12)
        return Codes(ids.view(batch, 1, frames), margins.view(batch, frames))

    def decode(self, ids: Tensor) -> Tensor:
        """Centroids in the place of frames: int [B, 1, T] -> float32 [B, T, D].

        Raises
        ------
        FormatError
            If an id is out of range, or the centroids are directions only (spherical).
        """
        if self.spherical:
            raise FormatError("spherical centroids tell the direction of a frame only; its length is lost")
        if ids.ndim != 3 or ids.shape[1] != 1:
            raise FormatError(f"ids have shape {tuple(ids.shape)}; [batch, 1, frames] is needed")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise FormatError(f"ids must be from 0 to {self.vocab_size - 1}; they were made by another tokenizer")
        frames = self.centroids[ids[:, 0].to(self.centroids.device).long()]
        return frames * self.scale + self.mean if self.standardized else frames
