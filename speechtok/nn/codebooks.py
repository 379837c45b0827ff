"""The codebooks inside `speechtok.nn.residual_vq.ResidualVQ`: moving averages, or codes that learn by gradient.

Where moving averages depart from the published code, and why:

- a dead code that is revived gets new sums, too: else the next update puts the old row back;
- a code is dead below a share of the mean count, not below an absolute count, which the codes of a large book never
  reach, and not before it had `min_age` updates;
- k-means starts on vectors of several batches, several for each code, and each book on what those before it left over.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from speechtok.kernels.nearest import nearest_centroids
from speechtok.kernels.residual import residual_encode

__all__ = ["AveragedBooks", "Books", "FactorizedBooks", "Walk", "kmeans"]

_SMOOTHING = 1e-5  # of cluster sizes, as published
_LLOYD = 10  # iterations of k-means

# quantized [B, T, D] with the gradient that it is to have, ids int32 [B, K, T], squared errors of commitment and of the
# codebook [K, B, T] (means over dimensions), counts [K, V]
Walk = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Books(nn.Module, ABC):
    """K codebooks; frames and ids are those of `ResidualVQ`, which checks them."""

    def missing(self) -> int:
        """Vectors that must still be seen in training before the books can be used."""
        return 0

    def collect(self, rows: Tensor) -> None:
        """Take vectors float32 [N, D] to start on."""

    @abstractmethod
    def forward(self, x: Tensor, uses: Tensor, counted: Tensor) -> Walk:
        """Quantize float32 [B, T, D]; bool `uses` [K, B]: what is summed up, `counted` [K, B, T]: what is counted."""

    @abstractmethod
    def encode(self, x: Tensor, count: int) -> Tensor:
        """Ids int32 [B, count, T] of float32 [B, T, D]."""

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """Sum of codes float32 [B, T, D] of int [B, n, T]."""

    @abstractmethod
    def frozen_tensors(self) -> dict[str, Tensor]:
        """What a frozen quantizer needs."""


# ---------------------------------------------------------------------------------------------------------------------
# moving averages


class AveragedBooks(Books):
    """Codebooks that are means of what they were given.

    Attributes
    ----------
    codebook : float32 [K, V, D]
    cluster_size : float32 [K, V]
        Average count of a batch.
    embed_avg : float32 [K, V, D]
        Average sum of a batch.
    age : int64 [K, V]
        Updates since a code was started or revived.
    start_rows : float32 [start, D]
        What k-means will start on; the first `collected` are there.
    """

    codebook: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    age: Tensor
    start_rows: Tensor
    collected: Tensor

    def __init__(
        self, dim: int, codebooks: int, codes: int, decay: float, dead: float, min_age: int, start: int
    ) -> None:
        super().__init__()
        self.decay, self.dead, self.min_age = decay, dead, min_age
        self.register_buffer("codebook", torch.zeros(codebooks, codes, dim))
        self.register_buffer("cluster_size", torch.zeros(codebooks, codes))
        self.register_buffer("embed_avg", torch.zeros(codebooks, codes, dim))
        self.register_buffer("age", torch.zeros(codebooks, codes, dtype=torch.int64))
        self.register_buffer("start_rows", torch.zeros(start, dim))
        self.register_buffer("collected", torch.zeros((), dtype=torch.int64))

    def missing(self) -> int:
        return len(self.start_rows) - int(self.collected)

    @torch.no_grad()
    def collect(self, rows: Tensor) -> None:
        """Take vectors, those of all processes, until there are enough; then start the books."""
        begin, total = int(self.collected), len(self.start_rows)
        new = _draw_rows(rows, total - begin)
        self.start_rows[begin : begin + len(new)] = new
        self.collected += len(new)
        if not self.missing():
            batch = float(_sum_over_processes(torch.tensor(float(len(rows)), device=rows.device)))
            residual = self.start_rows
            for book in range(len(self.codebook)):
                centres, ids = kmeans(residual, self.codebook.shape[1])
                counts = torch.bincount(ids, minlength=len(centres)) * (batch / total)
                self._restart(book, slice(None), centres, counts.clamp_min(self._floor(counts) + _SMOOTHING))
                residual = residual - centres[ids]

    def encode(self, x: Tensor, count: int) -> Tensor:
        ids, _ = residual_encode(x.flatten(0, 1), self.codebook[:count])
        return ids.view(*x.shape[:2], count).transpose(1, 2).contiguous()

    def decode(self, ids: Tensor) -> Tensor:
        return torch.stack([self.codebook[book][ids[:, book].long()] for book in range(ids.shape[1])]).sum(0)

    def forward(self, x: Tensor, uses: Tensor, counted: Tensor) -> Walk:
        ids = self.encode(x.detach(), len(self.codebook))
        residual, quantized, given, errors = x, torch.zeros_like(x), [], []
        for book, entries in enumerate(self.codebook):
            codes = entries[ids[:, book].long()]
            given.append(residual.detach())
            residual = residual - codes
            errors.append(residual.square().mean(-1))
            quantized = quantized + codes * uses[book][:, None, None]
        counts, sums = self._tally(torch.stack(given), ids, counted)
        if self.training:
            self._update(counts, sums, given, counted)
        commitment = torch.stack(errors)
        return x + (quantized - x).detach(), ids, commitment, torch.zeros_like(commitment), counts

    @torch.no_grad()
    def _tally(self, given: Tensor, ids: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """How often each code was taken [K, V], and the sum of the vectors it was taken for [K, V, D]."""
        books, codes, dim = self.codebook.shape
        place = (ids.transpose(0, 1) + codes * torch.arange(books, device=ids.device)[:, None, None]).flatten()
        weight = counted.flatten().float()
        counts = weight.new_zeros(books * codes).index_add_(0, place, weight)
        sums = weight.new_zeros(books * codes, dim).index_add_(0, place, given.reshape(-1, dim) * weight[:, None])
        return counts.view(books, codes), sums.view(books, codes, dim)

    @torch.no_grad()
    def _update(self, counts: Tensor, sums: Tensor, given: list[Tensor], counted: Tensor) -> None:
        total = _sum_over_processes(torch.cat((counts[..., None], sums), -1))
        counts, sums = total[..., 0], total[..., 1:]
        # A book that no row used has learned nothing: its averages stay.
        used = counts.sum(1, keepdim=True) > 0  # [K, 1]
        keep = torch.where(used, self.decay, 1.0)
        self.cluster_size.copy_(keep * self.cluster_size + (1 - keep) * counts)
        self.embed_avg.copy_(keep[..., None] * self.embed_avg + (1 - keep[..., None]) * sums)
        self.age += used
        size = self.cluster_size.sum(1, keepdim=True)
        smoothed = (self.cluster_size + _SMOOTHING) / (size + counts.shape[1] * _SMOOTHING) * size
        self.codebook.copy_(torch.where(used[..., None], self.embed_avg / smoothed[..., None], self.codebook))
        floor = self._floor(self.cluster_size)
        dead = (self.cluster_size < floor) & (self.age >= self.min_age) & used
        for book in dead.any(1).nonzero()[:, 0].tolist():
            rows = _draw_rows(given[book][counted[book]], int(dead[book].sum()))
            where = dead[book].nonzero()[: len(rows), 0]
            self._restart(book, where, rows, floor[book].expand(len(rows)))

    def _floor(self, counts: Tensor) -> Tensor:
        """Average count below which a code is dead: float32 [..., 1] of counts [..., V]."""
        return self.dead * counts.float().mean(-1, keepdim=True)

    def _restart(self, book: int, where: Any, rows: Tensor, size: Tensor) -> None:
        """Put vectors in place of codes, and into the averages, which would else bring the old codes back."""
        self.codebook[book, where] = rows
        self.cluster_size[book, where] = size
        self.embed_avg[book, where] = rows * size[:, None]
        self.age[book, where] = 0

    def frozen_tensors(self) -> dict[str, Tensor]:
        return {"vectors": self.codebook}


def kmeans(rows: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """k-means with k-means++ seeds drawn from torch's global generator; the same in all processes.

    Parameters
    ----------
    rows : float32 [N, D]
        At least as many as codes, the same in all processes.
    codes : int

    Returns
    -------
    centres : float32 [codes, D]
    ids : int64 [N]
        Nearest centre of each row.
    """
    places = []
    centred = rows - rows.mean(0)
    squares = centred.square().sum(1)
    far = torch.ones_like(squares)  # squared distance to the nearest seed; of the first one all rows are as good
    for code, chance in enumerate(torch.rand(codes, dtype=torch.float64).tolist()):
        weights = far.double().cumsum(0)
        place = torch.searchsorted(weights, weights[-1:] * chance, right=True).clamp_max(len(rows) - 1)[0]
        places.append(place)
        distances = (squares + squares[place] - 2 * (centred @ centred[place])).clamp_min(0)
        far = torch.minimum(far, distances) if code else distances
    centres = rows[torch.stack(places)]
    for _ in range(_LLOYD):
        ids = nearest_centroids(rows, centres)[0].long()
        counts = torch.bincount(ids, minlength=codes)
        means = torch.zeros_like(centres).index_add_(0, ids, rows) / counts.clamp_min(1)[:, None]
        centres = torch.where(counts[:, None] > 0, means, centres)
    centres = _from_first(centres)
    return centres, nearest_centroids(rows, centres)[0].long()


# ---------------------------------------------------------------------------------------------------------------------
# codes by gradient


class FactorizedBooks(Books):
    """Codebooks of small codes, looked up by direction.

    Attributes
    ----------
    codebook : float32 [K, V, C]
    project_in, project_out : of each book Linear D -> C and C -> D, weight-normed
    """

    def __init__(self, dim: int, codebooks: int, codes: int, code_dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codebooks, codes, code_dim))
        self.project_in = nn.ModuleList(weight_norm(nn.Linear(dim, code_dim)) for _ in range(codebooks))
        self.project_out = nn.ModuleList(weight_norm(nn.Linear(code_dim, dim)) for _ in range(codebooks))

    def _lookup(self, book: int, small: Tensor) -> Tensor:
        """Ids int32 [B, T] of the codes whose direction is nearest to that of small [B, T, C]."""
        rows = F.normalize(small.detach().flatten(0, 1), dim=-1)
        return nearest_centroids(rows, F.normalize(self.codebook[book].detach(), dim=-1))[0].view(small.shape[:2])

    def encode(self, x: Tensor, count: int) -> Tensor:
        ids = []
        for book in range(count):
            ids.append(self._lookup(book, self.project_in[book](x)))
            x = x - self.project_out[book](self.codebook[book][ids[-1].long()])
        return torch.stack(ids, 1)

    def decode(self, ids: Tensor) -> Tensor:
        books = range(ids.shape[1])
        return torch.stack([self.project_out[i](self.codebook[i][ids[:, i].long()]) for i in books]).sum(0)

    def forward(self, x: Tensor, uses: Tensor, counted: Tensor) -> Walk:
        residual, quantized, ids, commitment, codebook = x, torch.zeros_like(x), [], [], []
        counts = x.new_zeros(self.codebook.shape[:2])
        for book, entries in enumerate(self.codebook):
            small = self.project_in[book](residual)
            ids.append(self._lookup(book, small))
            codes = entries[ids[-1].long()]  # the row as it is: only the lookup is by direction
            commitment.append((small - codes.detach()).square().mean(-1))
            codebook.append((small.detach() - codes).square().mean(-1))
            large = self.project_out[book](small + (codes - small).detach())
            residual = residual - large
            quantized = quantized + large * uses[book][:, None, None]
            counts[book].index_add_(0, ids[-1].flatten(), counted[book].flatten().float())
        return quantized, torch.stack(ids, 1), torch.stack(commitment), torch.stack(codebook), counts

    def frozen_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {"vectors": self.codebook}
        for side, maps in (("in", self.project_in), ("out", self.project_out)):
            for name in ("weight", "bias"):
                tensors[f"{side}_{name}"] = torch.stack([getattr(linear, name) for linear in maps])
        return tensors


# ---------------------------------------------------------------------------------------------------------------------
# processes


def _sum_over_processes(x: Tensor) -> Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def _from_first(x: Tensor) -> Tensor:
    """The first process's tensor, in all of them."""
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(x, 0)
    return x


def _gather_rows(rows: Tensor) -> Tensor:
    """Rows [n, D] of all processes, one process after the other; n may differ."""
    if not torch.distributed.is_initialized():
        return rows
    world = torch.distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    torch.distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = max(int(count) for count in counts)
    padded = F.pad(rows, (0, 0, 0, longest - len(rows)))
    parts = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def _draw_rows(rows: Tensor, count: int) -> Tensor:
    """At most `count` different rows of all processes, at random, the same in all of them."""
    some = rows[torch.randperm(len(rows))[:count].to(rows.device)]
    pool = _gather_rows(some)
    order = _from_first(torch.randperm(len(pool)).to(rows.device))
    return pool[order[:count]]
