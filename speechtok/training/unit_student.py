"""The network that learns augmentation-invariant units, on top of a frozen encoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.audio.features import valid_frames
from speechtok.nn.conformer import ConformerBlock
from speechtok.quantizers.mlp import UnitMlp

__all__ = ["UnitStudent", "padded_rows"]


class UnitStudent(nn.Module):
    """Conformer blocks, a mean over some frames, and a `UnitMlp`.

    Without blocks and with smoothing 1 it sees single frames, as the published quantizer does (Gat et al. 2023). Blocks
    see what stands around a frame: they are of the encoder's own kind, and become a part of it when they have learned.

    Parameters
    ----------
    dim : int
        D, size of the encoder's frames.
    hidden : tuple of int
        Sizes of the layers inside of the `UnitMlp`.
    units : int
        K.
    blocks : sequence of ConformerBlock
        Of D values.
    smoothing : int
        Frames around each one that the blocks' output is averaged over, odd.
    """

    def __init__(
        self, dim: int, hidden: tuple[int, ...], units: int, blocks: Sequence[ConformerBlock] = (), smoothing: int = 1
    ) -> None:
        super().__init__()
        self.units, self.smoothing = units, smoothing
        self.blocks = nn.ModuleList(blocks)
        self.mlp = UnitMlp(dim, hidden, units)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Logits of padded rows: float [B, T, D], int64 [B] -> float32 [B, T, K]."""
        valid = valid_frames(lengths, frames.shape[1])
        for block in self.blocks:
            frames = block(frames, valid)
        if self.smoothing > 1:
            kept = valid[..., None].to(frames.dtype)
            frames = _sums(frames * kept, self.smoothing) / _sums(kept, self.smoothing).clamp_min(1)
        logits: Tensor = self.mlp(frames)
        return logits.float()

    @torch.inference_mode()
    def name(self, frames: NDArray[np.float32]) -> NDArray[np.int32]:
        """Units of the frames [T, D] of one sound: int32 [T]."""
        rows = torch.from_numpy(frames)[None].to(self.mlp.mean.device)
        return self(rows, torch.tensor([len(frames)], device=rows.device))[0].argmax(-1).int().cpu().numpy()

    @torch.no_grad()
    def standardize(self, mean: NDArray[np.float32], deviation: NDArray[np.float32]) -> None:
        """Take statistics of the encoder's frames, float32 [D] each; blocks have their own norms and ignore them."""
        if not self.blocks:
            self.mlp.mean.copy_(torch.from_numpy(mean))
            self.mlp.scale.copy_(torch.from_numpy(deviation))

    @torch.no_grad()
    def round_weights(self) -> None:
        """Round weights to bfloat16, which bundles store in half the space."""
        for weight in self.parameters():
            weight.copy_(weight.bfloat16())

    def alarms(self, summary: Mapping[str, Any]) -> list[str]:
        """Whether held-out figures (`perplexity`) say that units collapse."""
        perplexity = summary.get("perplexity")
        if perplexity is not None and perplexity < self.units / 4:
            return [f"unit perplexity is {perplexity:.1f}: three quarters of the vocabulary are not used"]
        return []


def _sums(rows: Tensor, count: int) -> Tensor:
    """Sums over `count` frames around each one, zeros beyond the ends: [B, T, D] -> [B, T, D]."""
    padded = F.pad(rows, (0, 0, count // 2, count // 2))
    return padded.unfold(1, count, 1).sum(-1)


def padded_rows(rows: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """One batch of rows [t, D]: float32 [B, T, D] and lengths int64 [B]."""
    padded = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
    return padded, torch.tensor([len(row) for row in rows])
