"""Quantizers that make the targets of pre-training: Gumbel product quantizer and random projections."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GumbelQuantizer", "RandomProjectionQuantizer", "gumbel_noise", "perplexity"]


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise: float32 of the given shape, on the CPU."""
    return -torch.empty(shape).exponential_(generator=generator).log()


def perplexity(probabilities: Tensor) -> Tensor:
    """``exp`` of the entropy of each row (nats): float [G, V] -> float [G]."""
    return (-torch.special.xlogy(probabilities, probabilities).sum(-1)).exp()


class GumbelQuantizer(nn.Module):
    """Product quantizer with a straight-through Gumbel softmax (Baevski et al. 2020, arXiv:2006.11477, section 2).

    Parameters
    ----------
    dim : int
        Size of an input frame.
    groups : int
        G, codebooks.
    codes : int
        V, entries of a codebook.
    code_dim : int
        Size of the result: all groups side by side.
    init : float
        Standard deviation of the weights of the logits. The published 1.0 gives logits so large on layer-normed frames
        that the Gumbel noise hardly moves the choice.
    """

    def __init__(self, dim: int, groups: int, codes: int, code_dim: int, init: float = 1.0) -> None:
        super().__init__()
        self.groups, self.codes = groups, codes
        self.logits = nn.Linear(dim, groups * codes)
        nn.init.normal_(self.logits.weight, std=init)
        nn.init.zeros_(self.logits.bias)
        self.codebooks = nn.Parameter(torch.rand(groups, codes, code_dim // groups))

    def forward(self, x: Tensor, noise: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize.

        Parameters
        ----------
        x : float [M, dim]
            Frames.
        noise : float [M, G, V] or None
            Gumbel noise (training); None: the most likely code.
        temperature : float
            Of the softmax that carries the gradient.

        Returns
        -------
        vectors : float [M, code_dim]
            Rows of the codebooks.
        ids : int64 [M, G]
            The codes that were taken, sampled ones in training.
        probabilities : float [M, G, V]
            Softmax of the logits, without noise and temperature.
        """
        logits = self.logits(x).unflatten(-1, (self.groups, self.codes)).float()
        probabilities = logits.softmax(-1)
        if noise is None:
            ids = logits.argmax(-1)
            chosen = F.one_hot(ids, self.codes).to(probabilities.dtype)
        else:
            soft = ((logits + noise) / temperature).softmax(-1)
            ids = soft.argmax(-1)
            hard = F.one_hot(ids, self.codes).to(soft.dtype)
            chosen = hard + (soft - soft.detach())
        vectors = torch.einsum("mgv,gvd->mgd", chosen, self.codebooks.float())
        return vectors.flatten(1), ids, probabilities


class RandomProjectionQuantizer(nn.Module):
    """Frozen random projections with random codebooks (BEST-RQ, Chiu et al. 2022, arXiv:2202.01855, section 3.1).

    The projected frame and the codebook entries are brought to length 1; the nearest entry is the code. Nothing here
    learns.

    Parameters
    ----------
    dim : int
        Size of an input frame.
    books, codes, code_dim : int
        Codebooks, entries of each, size of an entry.
    seed : int
        Of projections and entries.
    """

    projections: Tensor
    entries: Tensor

    def __init__(self, dim: int, books: int, codes: int, code_dim: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        bound = (6.0 / (dim + code_dim)) ** 0.5
        projections = (2 * torch.rand(books, dim, code_dim, generator=generator) - 1) * bound
        self.register_buffer("projections", projections)
        self.register_buffer("entries", F.normalize(torch.randn(books, codes, code_dim, generator=generator), dim=-1))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Codes of frames float [M, dim]: int64 [M, books]."""
        projected = F.normalize(torch.einsum("md,bdc->mbc", x.float(), self.projections), dim=-1)
        return torch.einsum("mbc,bvc->mbv", projected, self.entries).argmax(-1)
