"""Residual vector quantizer: every codebook names what the ones before it left over.

Two forms. Codebooks in the frame's own space follow the data as moving averages (EnCodec, Defossez et al. 2022,
arXiv:2210.13438, section 3.2). With `code_dim`, each book looks up a small projection of the frame by its direction and
learns by gradient (DAC, Kumar et al. 2023, arXiv:2306.06546, section 3.2).

Where the first form departs from the published code, and why: codes are subtracted as constants and there is one
straight-through at the end, because with one per book the residual carries no gradient and only the first book's
commitment reaches the encoder. On revival and start see `speechtok.nn.codebooks`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speechtok.errors import InputError
from speechtok.nn.codebooks import AveragedBooks, Books, FactorizedBooks

__all__ = ["CodebookUse", "ResidualVQ", "VQOutput", "codebook_use"]


@dataclass(frozen=True)
class VQOutput:
    """What a forward pass gives.

    Parameters
    ----------
    quantized : float32 [B, T, D]
        Sum of the codes of the books in use; its gradient goes to the frames.
    ids : int32 [B, K, T]
        Of all books, in use or not. All 0, and all else but `quantized` too, until the books have been started.
    commitment : float32 [B]
        Squared distance of what a book was given to its code (a constant here): mean over dimensions, valid frames and
        the books in use. It pulls the frames to the codes.
    codebook : float32 [B]
        The same with the code as the variable: it pulls codes to frames. Zero for moving averages.
    counts : float32 [K, V]
        How often each code was taken, over valid frames and books in use, for `codebook_use`. To be summed over
        batches and processes.
    """

    quantized: Tensor
    ids: Tensor
    commitment: Tensor
    codebook: Tensor
    counts: Tensor


@dataclass(frozen=True)
class CodebookUse:
    """How evenly the codes of each book are used.

    Parameters
    ----------
    perplexity : float32 [K]
        ``exp`` of the entropy: V if all codes are equally frequent, 1 if one code does everything. 0 for a book of
        which nothing was counted.
    entropy : float32 [K]
        As a share of ``log2 V``, the bits that a code is sent with.
    usage : float32 [K]
        Share of the codes that were taken at all.
    """

    perplexity: Tensor
    entropy: Tensor
    usage: Tensor

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Plain figures by name, such as ``book1_perplexity``; books count from 1."""
        return {
            f"{prefix}book{book + 1}_{name}": float(values[book])
            for name, values in vars(self).items()
            for book in range(len(values))
        }


def codebook_use(counts: Tensor) -> CodebookUse:
    """Perplexity, entropy and usage of each book.

    Parameters
    ----------
    counts : float or int [K, V]
        Sums of `VQOutput.counts`.

    Returns
    -------
    CodebookUse
    """
    counts = counts.double()
    total = counts.sum(-1, keepdim=True)
    entropy = torch.special.entr(counts / total.clamp_min(1)).sum(-1)  # nats
    width = math.log(counts.shape[-1]) or 1.0  # a single code needs no bits
    return CodebookUse(
        torch.where(total[:, 0] > 0, entropy.exp(), 0.0).float(),
        (entropy / width).float(),
        (counts > 0).double().mean(-1).float(),
    )


class ResidualVQ(nn.Module):
    """Residual vector quantizer for training.

    Parameters
    ----------
    dim : int
        D, size of a frame.
    codebooks : int
        K.
    codes : int
        V, entries of a codebook.
    code_dim : int, optional
        None: moving averages in the frame's own space. Else the size of a projected code: lookup by the cosine, codes
        learned by gradient.
    decay : float
        Of the moving averages.
    dead : float
        A code is dead if its average count falls below this share of the mean of its book. 0: codes never die.
    min_age : int
        Updates that a code is given before it can be found dead.
    start : int, optional
        Vectors that k-means starts on, at least one for each code; by default ``4 * codes``. Until they are collected,
        frames pass unquantized in training, and evaluation is refused.

    Notes
    -----
    Averages, distances and losses are float32, under autocast too. All processes of a run hold the same books: counts
    and sums are added up over them. Revival and the k-means start draw from torch's global generator, that of the first
    process; a run that seeds it before each step can be resumed exactly.

    Raises
    ------
    InputError
        If a number is out of range.
    """

    def __init__(
        self,
        dim: int,
        codebooks: int,
        codes: int,
        *,
        code_dim: int | None = None,
        decay: float = 0.99,
        dead: float = 0.1,
        min_age: int = 50,
        start: int | None = None,
    ) -> None:
        super().__init__()
        if min(dim, codebooks, codes, 1 if code_dim is None else code_dim) < 1:
            raise InputError(f"{dim=}, {codebooks=}, {codes=}, {code_dim=}: all must be positive")
        if not (0 <= decay < 1 and 0 <= dead < 1 and min_age >= 1):
            raise InputError(f"{decay=}, {dead=}: from 0 to below 1; {min_age=}: at least 1")
        start = 4 * codes if start is None else start
        if start < codes:
            raise InputError(f"{start=}: k-means of {codes} codes needs at least as many vectors, better four times")
        self.dim, self.codebooks, self.codes, self.code_dim = dim, codebooks, codes, code_dim
        self.decay, self.dead, self.min_age, self.start = decay, dead, min_age, start
        self.books: Books = (
            AveragedBooks(dim, codebooks, codes, decay, dead, min_age, start)
            if code_dim is None
            else FactorizedBooks(dim, codebooks, codes, code_dim)
        )

    def config_dict(self) -> dict[str, Any]:
        """Give the arguments of the constructor as plain JSON values."""
        names = ("dim", "codebooks", "codes", "code_dim", "decay", "dead", "min_age", "start")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        return ", ".join(f"{name}={value}" for name, value in self.config_dict().items())

    # -- training ---------------------------------------------------------------------------------------------------

    def draw_use(
        self, batch: int, generator: np.random.Generator, choices: Sequence[int] | None = None, full: float = 0.0
    ) -> Tensor:
        """Draw how many books each row uses (quantizer dropout).

        Parameters
        ----------
        batch : int
            Rows.
        generator : numpy Generator
        choices : sequence of int, optional
            Numbers of books, equally likely; 1 to K by default.
        full : float
            Probability that a row uses all K books whatever was drawn.

        Returns
        -------
        int64 [B]

        Raises
        ------
        InputError
            If a choice is not a number of books that there is, or `full` not a probability.
        """
        chosen = np.asarray(range(1, self.codebooks + 1) if choices is None else choices, np.int64)
        if chosen.size == 0 or chosen.min() < 1 or chosen.max() > self.codebooks or not 0 <= full <= 1:
            raise InputError(f"{choices=}: numbers from 1 to {self.codebooks} are needed; {full=}: a probability")
        use = chosen[generator.integers(len(chosen), size=batch)]
        return torch.from_numpy(np.where(generator.random(batch) < full, self.codebooks, use))

    def forward(self, x: Tensor, valid: Tensor | None = None, use: Tensor | None = None) -> VQOutput:
        """Quantize; in training mode also let the averages follow, start the books, revive dead codes.

        Parameters
        ----------
        x : float [B, T, D]
        valid : bool [B, T], optional
            Frames that count in losses and averages; all where None. Others are quantized as well.
        use : int [B], optional
            Number of books of each row, 1 to K; all where None. Books above it have no part in the row's sum and
            losses, nor the row in their averages.

        Returns
        -------
        VQOutput

        Raises
        ------
        InputError
            If shapes do not fit, `use` is out of range, or the books have not been started in evaluation.
        """
        self._check(x)
        batch, frames, _ = x.shape
        if valid is not None and valid.shape != (batch, frames):
            raise InputError(f"valid has shape {tuple(valid.shape)}, frames are [{batch}, {frames}]")
        if use is not None and (use.shape != (batch,) or bool((use < 1).any() | (use > self.codebooks).any())):
            raise InputError(f"use must hold a number from 1 to {self.codebooks} for each of {batch} rows")
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            valid = torch.ones(batch, frames, dtype=torch.bool, device=x.device) if valid is None else valid.bool()
            if self.training and self.books.missing():
                self.books.collect(x.detach()[valid])
                if self.books.missing():
                    return self.passed(x)
            self._check_ready()
            order = torch.arange(self.codebooks, device=x.device)[:, None]
            uses = order < (self.codebooks if use is None else use.to(x.device))  # [K, B] or [K, 1]
            counted = uses[..., None] & valid  # [K, B, T]
            quantized, ids, commitment, codebook, counts = self.books(x, uses.expand(-1, batch), counted)
            weight = counted / counted.sum((0, 2)).clamp_min(1)[:, None]  # mean over frames and books in use
            return VQOutput(quantized, ids, (commitment * weight).sum((0, 2)), (codebook * weight).sum((0, 2)), counts)

    def passed(self, x: Tensor) -> VQOutput:
        """What a forward pass gives until the books have been started: frames float32 [B, T, D] as they are."""
        batch, frames, _ = x.shape
        ids = torch.zeros(batch, self.codebooks, frames, dtype=torch.int32, device=x.device)
        return VQOutput(x, ids, x.new_zeros(batch), x.new_zeros(batch), x.new_zeros(self.codebooks, self.codes))

    @property
    def started(self) -> bool:
        """Whether there are codes to be named."""
        return not self.books.missing()

    # -- use --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, x: Tensor, codebooks: int | None = None) -> Tensor:
        """Ids of frames float [B, T, D] in the first `codebooks` books (all where None): int32 [B, n, T].

        Raises
        ------
        InputError
            If shapes do not fit, there are not so many books, or they have not been started.
        """
        self._check(x)
        self._check_ready()
        count = self.codebooks if codebooks is None else codebooks
        if not 1 <= count <= self.codebooks:
            raise InputError(f"codebooks={codebooks}: there are {self.codebooks}")
        with torch.autocast(x.device.type, enabled=False):
            return self.books.encode(x.float(), count)

    def decode(self, ids: Tensor) -> Tensor:
        """Sum of the codes of the first n books: int [B, n, T] -> float32 [B, T, D].

        Raises
        ------
        InputError
            If there are not so many books, an id is out of range, or the books have not been started.
        """
        self._check_ready()
        if ids.ndim != 3 or not 1 <= ids.shape[1] <= self.codebooks:
            raise InputError(f"ids have shape {tuple(ids.shape)}; [B, n, T], n from 1 to {self.codebooks}, is needed")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.codes:
            raise InputError(f"ids must be from 0 to {self.codes - 1}")
        with torch.autocast(ids.device.type, enabled=False):
            return self.books.decode(ids)

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Tensors that a `speechtok.quantizers.residual.ResidualQuantizer` is made of, detached copies.

        Raises
        ------
        InputError
            If the books have not been started.
        """
        self._check_ready()
        return {name: tensor.detach().float().clone() for name, tensor in self.books.frozen_tensors().items()}

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise InputError(f"frames have shape {tuple(x.shape)}; [B, T, {self.dim}] is needed")

    def _check_ready(self) -> None:
        if missing := self.books.missing():
            raise InputError(
                f"the codebooks have not been started: {missing} of {self.start} vectors are still to be seen in "
                "training; train further, or start them on fewer"
            )
