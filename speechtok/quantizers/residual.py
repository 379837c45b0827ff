"""Units of a residual vector quantizer: several ids per frame, each book naming what the ones before it left over."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from speechtok.errors import FormatError
from speechtok.kernels.nearest import nearest_centroids
from speechtok.kernels.residual import residual_encode
from speechtok.nn.residual_vq import ResidualVQ
from speechtok.quantizers.base import Codes, Quantizer

__all__ = ["ResidualQuantizer"]

_PROJECTIONS = ("in_weight", "in_bias", "out_weight", "out_bias")


class ResidualQuantizer(Quantizer):
    """Frozen codebooks of a residual vector quantizer (EnCodec, and the factorized form of DAC).

    Parameters
    ----------
    codebooks : float32 [K, V, C]
        Without projections C is the size D of a frame, and the nearest code is taken.
    in_weight, in_bias : float32 [K, C, D] and [K, C], optional
        Factorized form: what a book looks up is ``in_weight r + in_bias``, by the direction alone.
    out_weight, out_bias : float32 [K, D, C] and [K, D], optional
        Factorized form: ``out_weight e + out_bias`` of the code e is subtracted, and is what decoding adds up.
    used : int, optional
        Keep the first so many books only.

    Raises
    ------
    FormatError
        If shapes do not fit, values are not finite, only some of the projections are given, or there are not so many
        books as `used` says.
    """

    type = "residual"
    vectors: Tensor
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    gain: Tensor

    def __init__(
        self,
        codebooks: ArrayLike,
        in_weight: ArrayLike | None = None,
        in_bias: ArrayLike | None = None,
        out_weight: ArrayLike | None = None,
        out_bias: ArrayLike | None = None,
        used: int | None = None,
    ) -> None:
        super().__init__()
        projections = dict(zip(_PROJECTIONS, (in_weight, in_bias, out_weight, out_bias), strict=True))
        given = [name for name, value in projections.items() if value is not None]
        if given and len(given) < len(_PROJECTIONS):
            raise FormatError(f"projections go together: give all of {', '.join(_PROJECTIONS)} or none, not {given}")
        vectors = _array("codebooks", codebooks, "[books, codes, dimensions]", 3)
        books, codes, size = vectors.shape
        if used is not None and not 1 <= used <= books:
            raise FormatError(f"used={used}: there are {books} codebooks")
        self.codebooks = books if used is None else used
        self.vocab_size, self.dim, self.factorized = codes, size, bool(given)
        self.register_buffer("vectors", torch.from_numpy(vectors[: self.codebooks].copy()))
        if self.factorized:
            weight = _array("in_weight", in_weight, "[books, code dimensions, dimensions]", 3)
            self.dim = weight.shape[2]
            shapes = ((books, size, self.dim), (books, size), (books, self.dim, size), (books, self.dim))
            for name, shape in zip(_PROJECTIONS, shapes, strict=True):
                array = _array(name, projections[name], str(list(shape)), len(shape))
                if array.shape != shape:
                    raise FormatError(f"{name} has shape {array.shape}, codebooks of this size need {shape}")
                self.register_buffer(name, torch.from_numpy(array[: self.codebooks].copy()))
            # By how much a projection can lengthen a move; derived, so not saved.
            gain = torch.linalg.matrix_norm(self.in_weight.double(), 2).float() * (1 + 1e-6)
            self.register_buffer("gain", gain.clamp_min(torch.finfo(torch.float32).tiny), persistent=False)

    def config_dict(self) -> dict[str, Any]:
        config: dict[str, Any] = {"codebooks": self.codebooks, "codes": self.vocab_size, "dim": self.dim}
        return config | ({"code_dim": self.vectors.shape[2]} if self.factorized else {})

    def extra_repr(self) -> str:
        """Configuration, for ``repr``."""
        return ", ".join(f"{name}={value}" for name, value in self.config_dict().items())

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], **config: Any) -> "ResidualQuantizer":
        """Rebuild from a saved state dict; what is given of `config_dict` must be what the tensors say.

        Raises
        ------
        FormatError
            If tensors are missing or unknown, or do not fit each other or the configuration.
        """
        names = set(tensors)
        if names not in ({"vectors"}, {"vectors", *_PROJECTIONS}):
            raise FormatError(
                f"a file of a residual quantizer holds 'vectors' and optionally {', '.join(_PROJECTIONS)}, "
                f"not {sorted(names)}"
            )
        arrays: dict[str, Any] = {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}
        quantizer = ResidualQuantizer(arrays.pop("vectors"), **arrays)
        found = quantizer.config_dict()
        wrong = {name: value for name, value in config.items() if name not in found or found[name] != value}
        if wrong:
            raise FormatError(f"the configuration says {wrong}, the tensors {found}")
        return quantizer

    @staticmethod
    def freeze(trained: ResidualVQ, used: int | None = None) -> "ResidualQuantizer":
        """Make one of a quantizer as training left it.

        Parameters
        ----------
        trained : ResidualVQ
        used : int, optional
            Keep the first so many books only.

        Raises
        ------
        InputError
            If its codebooks have not been started.
        FormatError
            If there are not so many books.
        """
        quantizer = ResidualQuantizer.from_tensors(trained.frozen_tensors())
        return quantizer if used is None else quantizer.first(used)

    def first(self, count: int) -> "ResidualQuantizer":
        """Give the quantizer of the first `count` codebooks: the same first ids at a lower bitrate.

        Raises
        ------
        FormatError
            If there are not so many.
        """
        arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in self.state_dict().items()}
        return ResidualQuantizer(arrays.pop("vectors"), **arrays, used=count).to(self.vectors.device)

    def forward(self, features: Tensor) -> Codes:
        """Ids of float [B, T, D] frames; see `Codes`.

        Raises
        ------
        FormatError
            If frames are of another size.
        """
        batch, frames, dim = features.shape
        if dim != self.dim:
            raise FormatError(
                f"frames have {dim} dimensions, the codebooks {self.dim}; encoder or layer is another one"
            )
        with torch.autocast(features.device.type, enabled=False):
            rows = features.reshape(-1, dim).float()
            ids, slack = self._factorized(rows) if self.factorized else residual_encode(rows, self.vectors)
            margins = slack / rows.norm(dim=1).clamp_min(1e-12)
        return Codes(ids.view(batch, frames, self.codebooks).transpose(1, 2).contiguous(), margins.view(batch, frames))

    def _factorized(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 [N, K] and slack float32 [N], as `residual_encode` gives them.

        A move of the row moves what a book is given by the same vector, as long as no id before it changes; its
        projection y moves by at most `gain` times that. Where y moves by e, its direction moves by at most
        e / (|y| - e / 2), as for spherical k-means, and less than half the gap changes no id.
        """
        ids, slack = [], torch.full((len(rows),), torch.inf, device=rows.device)
        for book, codes in enumerate(self.vectors):
            small = F.linear(rows, self.in_weight[book], self.in_bias[book])
            length = small.norm(dim=1)
            unit = small / length.clamp_min(torch.finfo(small.dtype).tiny)[:, None]
            found, distances = nearest_centroids(unit, F.normalize(codes, dim=-1))
            gap = distances[:, 1] - distances[:, 0]
            slack = torch.minimum(slack, length / (2 / gap + 1 / 2) / self.gain[book])
            ids.append(found)
            rows = rows - F.linear(codes[found.long()], self.out_weight[book], self.out_bias[book])
        return torch.stack(ids, 1), slack

    def decode(self, ids: Tensor) -> Tensor:
        """Frames that ids stand for: int [B, k, T] -> float32 [B, T, D], the sum of the first k books' codes.

        Raises
        ------
        FormatError
            If there are not so many codebooks or an id is out of range.
        """
        if ids.ndim != 3 or not 1 <= ids.shape[1] <= self.codebooks:
            raise FormatError(
                f"ids have shape {tuple(ids.shape)}; [batch, books, frames] of at most {self.codebooks} books is needed"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise FormatError(f"ids must be from 0 to {self.vocab_size - 1}; they were made by another tokenizer")
        frames = torch.zeros(ids.shape[0], ids.shape[2], self.dim, device=self.vectors.device)
        with torch.autocast(frames.device.type, enabled=False):
            for book in range(ids.shape[1]):
                codes = self.vectors[book][ids[:, book].to(frames.device).long()]
                if self.factorized:
                    codes = F.linear(codes, self.out_weight[book], self.out_bias[book])
                frames += codes
        return frames


def _array(name: str, value: Any, needed: str, ndim: int) -> np.ndarray:
    array = np.asarray(value, np.float32)
    if array.ndim != ndim or 0 in array.shape:
        raise FormatError(f"{name} has shape {array.shape}; {needed} is needed")
    if not np.isfinite(array).all():
        raise FormatError(f"{name} holds NaN or infinite values")
    return array
