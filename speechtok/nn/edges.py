"""What stands before and behind a sound in convolutions over time.

A whole sound alone is padded by `pad`. Where the rows of a batch are sounds of different lengths, or chunks of streams,
`Edges` puts around each row what would stand there if it were alone and whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ChunkPast", "Edges", "pad"]


def pad(x: Tensor, left: int, right: int, mode: str) -> Tensor:
    """Put `left` and `right` values around the last axis of x, mirrored (``reflect``) or zero (``constant``).

    A sound that is too short to be mirrored is continued by zeros for it, as published.
    """
    if mode != "reflect" or left == right == 0:
        return F.pad(x, (left, right))
    missing = max(0, max(left, right) - x.shape[-1] + 1)
    mirrored = F.pad(F.pad(x, (0, missing)), (left, right), "reflect")
    return mirrored[..., : mirrored.shape[-1] - missing]


@dataclass
class ChunkPast:
    """What a causal network remembers of a batch of streams; row b belongs to stream b.

    Parameters
    ----------
    layers : list of float [B, ...]
        Of every layer with a memory, in the order in which the layers are called: the last inputs of a convolution, the
        state of a recurrent layer.
    seen : int64 [B]
        Frames that were computed.
    """

    layers: list[Tensor]
    seen: Tensor

    def rows(self) -> Iterator["ChunkPast"]:
        """The pasts of the single streams; copies, so that none keeps the memory of its batch mates alive."""
        for i in range(len(self.seen)):
            row = slice(i, i + 1)
            yield ChunkPast([layer[row].clone() for layer in self.layers], self.seen[row].clone())

    def to(self, device: torch.device) -> "ChunkPast":
        """The same past on a device."""
        return ChunkPast([layer.to(device) for layer in self.layers], self.seen.to(device))

    @staticmethod
    def join(pasts: Sequence["ChunkPast"]) -> "ChunkPast":
        """One batch of single streams."""
        layers = [torch.cat(same) for same in zip(*(past.layers for past in pasts), strict=True)]
        return ChunkPast(layers, torch.cat([past.seen for past in pasts]))


@dataclass
class Edges:
    """The edges of the rows of a batch on their way through the layers of a network.

    Parameters
    ----------
    lengths : int64 [B]
        Columns of each row that count; the rest of the row lies behind the end of its sound. Layers that change the
        rate change these lengths, too.
    past : ChunkPast, optional
        Of streams: what came before this chunk. None: every row is a whole sound.
    kept : list of Tensor
        What the layers remember after this chunk, see `after`.
    """

    lengths: Tensor
    past: ChunkPast | None = None
    kept: list[Tensor] = field(default_factory=list)

    def around(self, x: Tensor, left: int, right: int, stride: int, mode: str) -> Tensor:
        """Input of a convolution with its padding: x [B, C, N] -> [B, C, left + N + right + fill].

        `fill` makes the last window whole: N and each row's length are rounded up to a multiple of `stride`. Behind a
        row's end stands what `pad` would put there if the row were alone, before its start as well; before a chunk that
        is not the first of its stream stand the columns before it.
        """
        fill = -x.shape[-1] % stride
        if mode == "reflect" or right or stride > 1:
            x = self._ended(x)
        before = pad(x, left, 0, mode)[..., :left] if left else x[..., :0]
        if self.past is not None and left:
            begins = (self.past.seen == 0)[:, None, None]
            before = torch.where(begins, before, self.remembered())
        x = torch.cat([before, x], dim=-1)
        if self.past is not None and left:
            self.kept.append(x[..., -left:])
        if right + fill or (mode == "reflect" and stride > 1):
            x = F.pad(x, (0, right + fill))
            if mode == "reflect":
                x = self._mirrored(x, left, right, stride)
        self.lengths = -(-self.lengths // stride)
        return x

    def _ended(self, x: Tensor) -> Tensor:
        """Zeros behind the end of each row."""
        columns = torch.arange(x.shape[-1], device=x.device)
        behind = columns >= self.lengths[:, None]
        return x.masked_fill(behind[:, None], 0.0) if bool(behind.any()) else x

    def _mirrored(self, x: Tensor, left: int, right: int, stride: int) -> Tensor:
        """Mirror the end of each row of x [B, C, left + N + ...], which zeros follow."""
        x = x.clone()
        seen = [0] * len(x) if self.past is None else self.past.seen.tolist()
        for row, length, before in zip(x, self.lengths.tolist(), seen, strict=True):
            behind = right + -length % stride
            # Only a sound that begins here may be too short; see `pad`.
            missing = 0 if before else max(0, max(left, behind) - length + 1)
            for i in range(missing, behind):
                row[:, left + length + i] = row[:, left + length + 2 * missing - 2 - i]
        return x

    def remembered(self) -> Tensor:
        """What the layer that is called now remembers of the chunk before."""
        assert self.past is not None  # noqa: S101 - callers checked
        return self.past.layers[len(self.kept)]

    def after(self, frames: Tensor) -> ChunkPast:
        """The past of the next chunk, after int64 [B] more frames."""
        assert self.past is not None  # noqa: S101 - callers checked
        return ChunkPast([layer.clone() for layer in self.kept], self.past.seen + frames)
