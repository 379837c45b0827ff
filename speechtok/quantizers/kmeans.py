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


class KMeans(Quantizer):
    """Nearest centroid by Euclidean distance, optionally after per-dimension standardisation.

    Parameters
    ----------
    centroids : float32 [K, D]
        In the standardised space if `mean` and `scale` are given.
    mean, scale : float32 [D], optional
        A frame x is compared as ``(x - mean) / scale`` (AudioLM standardises, HuBERT does not).

    Raises
    ------
    FormatError
        If shapes do not fit or values are not finite.
    """

    type = "kmeans"
    centroids: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, centroids: ArrayLike, mean: ArrayLike | None = None, scale: ArrayLike | None = None):
        super().__init__()
        centroids = np.asarray(centroids, np.float32)
        if centroids.ndim != 2 or 0 in centroids.shape:
            raise FormatError(f"centroids have shape {centroids.shape}; [clusters, dimensions] is needed")
        if (mean is None) != (scale is None):
            raise FormatError("mean and scale of the standardisation go together; give both or neither")
        self.vocab_size, self.dim = centroids.shape
        self.standardized = mean is not None
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

    def config_dict(self) -> dict[str, Any]:
        return {"clusters": self.vocab_size, "dim": self.dim, "standardized": self.standardized}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "KMeans":
        """Rebuild from a saved state dict."""
        unknown = set(tensors) - {"centroids", "mean", "scale"}
        if "centroids" not in tensors or unknown:
            raise FormatError(
                f"a k-means file holds 'centroids' and optionally 'mean' and 'scale', not {sorted(tensors)}"
            )
        arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
        return KMeans(arrays["centroids"], arrays.get("mean"), arrays.get("scale"))

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
        ids, distances = nearest_centroids(rows, self.centroids)
        # By the triangle inequality a move of less than half the gap keeps the nearest centroid nearest.
        margins = (distances[:, 1] - distances[:, 0]) / (2 * size).clamp_min(1e-12)
        return Codes(ids.view(batch, 1, frames), margins.view(batch, frames))
