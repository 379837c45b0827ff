"""Units from a small network on single frames: the frozen form of augmentation-invariant quantizers."""

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechtok.errors import FormatError
from speechtok.quantizers.base import Codes, Quantizer

__all__ = ["MlpQuantizer", "UnitMlp"]


class UnitMlp(nn.Module):
    """Linear maps with ReLU between them, on standardised frames (Gat et al. 2023, arXiv 2209.15483, E_1).

    Parameters
    ----------
    dim : int
        D, size of a frame.
    hidden : sequence of int
        Sizes of the layers in between.
    units : int
        K, size of the result.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, hidden: tuple[int, ...], units: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise((dim, *hidden, units)))

    def forward(self, frames: Tensor) -> Tensor:
        """Logits of frames, float [..., D] -> [..., K]; in float64 where the frames are."""
        kind = frames.dtype
        x = (frames - self.mean.to(kind)) / self.scale.to(kind)
        for index, layer in enumerate(self.maps):
            x = F.linear(F.relu(x) if index else x, layer.weight.to(kind), layer.bias.to(kind))
        return x

    @property
    def maps(self) -> list[nn.Linear]:
        """The linear maps in order."""
        return cast(list[nn.Linear], list(self.layers))


class MlpQuantizer(Quantizer):
    """The most likely unit of each frame, by a `UnitMlp`.

    Logits are computed in float64, so that rounding inside of the network is nothing beside that of the frames. Near
    ties are bounded by the network's Lipschitz constant: a frame that moves by e moves the difference of two logits by
    at most e times the product of the matrices' spectral norms (of the last one: the norm of the difference of two
    rows), divided by the smallest scale.

    Parameters
    ----------
    mlp : UnitMlp
        Trained; its weights are taken as they are.

    Raises
    ------
    FormatError
        If weights are not finite or a scale is not positive.
    """

    type = "mlp"
    invertible = False
    reach: Tensor

    def __init__(self, mlp: UnitMlp) -> None:
        super().__init__()
        self.mlp = mlp
        last = mlp.maps[-1].weight
        self.vocab_size, self.dim = last.shape[0], len(mlp.mean)
        if not all(bool(torch.isfinite(value).all()) for value in mlp.state_dict().values()):
            raise FormatError("the quantizer's weights hold NaN or infinite values")
        if not bool((mlp.scale > 0).all()):
            raise FormatError("the scale of the standardisation must be positive in every dimension")
        with torch.no_grad():
            gain = 1 / mlp.scale.double().min()
            for layer in mlp.maps[:-1]:
                gain = gain * torch.linalg.matrix_norm(layer.weight.double(), 2)
            rows = last.double()
            # Derived, so not saved: by how much a frame must move at least for each unit of difference [K, K].
            reach = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") * gain * (1 + 1e-9)
            self.register_buffer("reach", reach.clamp_min(torch.finfo(torch.float64).tiny), persistent=False)

    def config_dict(self) -> dict[str, Any]:
        hidden = [layer.out_features for layer in self.mlp.maps[:-1]]
        return {"units": self.vocab_size, "dim": self.dim, "hidden": hidden}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], **config: Any) -> "MlpQuantizer":
        """Rebuild from a saved state dict; what is given of `config_dict` must be what the tensors say.

        Raises
        ------
        FormatError
            If tensors are missing or unknown, or do not fit each other or the configuration.
        """
        state = {name.removeprefix("mlp."): tensor for name, tensor in tensors.items()}
        matrices = [state.get(f"layers.{index}.weight", torch.empty(0)) for index in range((len(state) - 2) // 2)]
        if not matrices or any(matrix.ndim != 2 or 0 in matrix.shape for matrix in matrices):
            raise FormatError(
                "a file of an mlp quantizer holds 'mlp.mean', 'mlp.scale' and matrices 'mlp.layers.0.weight', ..., "
                f"not {sorted(tensors)}"
            )
        mlp = UnitMlp(matrices[0].shape[1], tuple(len(matrix) for matrix in matrices[:-1]), len(matrices[-1]))
        try:
            mlp.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise FormatError(f"tensors of an mlp quantizer do not fit each other: {error}") from error
        quantizer = MlpQuantizer(mlp)
        found = quantizer.config_dict()
        wrong = {name: value for name, value in config.items() if name not in found or found[name] != value}
        if wrong:
            raise FormatError(f"the configuration says {wrong}, the tensors {found}")
        return quantizer

    def forward(self, features: Tensor) -> Codes:
        """Quantize float [B, T, D] frames; see `Codes`."""
        if features.shape[-1] != self.dim:
            raise FormatError(
                f"frames have {features.shape[-1]} dimensions, the quantizer expects {self.dim}; encoder or layer is "
                "another one"
            )
        logits = self.mlp(features.double())
        best, ids = logits.max(-1)
        if self.vocab_size == 1:
            margins = torch.full(best.shape, torch.inf, device=best.device)
        else:
            moves = (best[..., None] - logits) / self.reach[ids]
            moves.scatter_(-1, ids[..., None], torch.inf)
            # NaN frames give NaN margins: `min` hands them on.
            margins = moves.min(-1).values / features.double().norm(dim=-1).clamp_min(1e-12)
        return Codes(ids[:, None].int(), margins.float())

    def decode(self, ids: Tensor) -> Tensor:
        """Refuse: many frames have a unit, and none of them stands for it.

        Raises
        ------
        FormatError
        """
        raise FormatError("units of an mlp quantizer do not tell frames; a vocoder for them is trained on the units")
