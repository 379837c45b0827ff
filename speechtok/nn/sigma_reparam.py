"""sigmaReparam: linear maps whose largest gain is one learned number, against collapsing attention.

Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (arXiv 2303.06296). A
weight W acts as ``gamma / sigma(W) * W`` with its spectral norm sigma and a learned scalar gamma. The spectral norm
comes from one step of power iteration per training forward, started from the exact singular vectors. It lags while
another direction becomes the largest one: by up to some per cent in violent training, by less than 1e-3 otherwise.

    apply_sigma_reparam(model, skip=("head",))
    no_decay = gammas(model)             # weight decay on gamma would pull the function itself to zero
    ...
    fold_sigma_reparam(model)            # plain weights again, for export

The parametrization runs wherever ``.weight`` is read. A second forward of the same step must see the same weights:
gradient checkpointing takes ``context_fn=lambda: (nullcontext(), frozen_sigma())``. Teachers that are moving averages
of a model copy its buffers. ``nn.MultiheadAttention`` keeps its input projections outside of any ``Linear``; they are
not found. The released code gives q and k one joint matrix and one gamma; here each map has its own, and only the
product of the two gammas acts on the attention.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from speechtok.errors import InputError

__all__ = [
    "SigmaReparam",
    "apply_sigma_reparam",
    "attention_entropy",
    "entropy_bound",
    "fold_sigma_reparam",
    "frozen_sigma",
    "gammas",
]

# How many `frozen_sigma` are open. Of the process, not of the thread: autograd recomputes on threads of its own.
_frozen = 0


@contextmanager
def frozen_sigma() -> Iterator[None]:
    """Keep all singular vectors as the last training forward left them: no iteration, neither stored nor local."""
    global _frozen
    _frozen += 1
    try:
        yield
    finally:
        _frozen -= 1


class SigmaReparam(nn.Module):
    """Parametrization ``W -> gamma / sigma(W) * W``.

    Parameters
    ----------
    weight : float [out, in] or [out, in, 1]
        Initial weight, not zero.
    gamma : {"sigma", "one"}
        Initial gamma: the spectral norm of the weight, so that the map begins as it was (the released vision code), or
        1 (the paper).

    Attributes
    ----------
    gamma : parameter, scalar
        Of the type of the weight, but float32 for half precision, until the module is converted.
    u, v : float32 or float64 buffers [in], [out]
        Right and left singular vector, of the weight of the last training forward.

    Raises
    ------
    InputError
        If the weight is zero or not finite, or gamma is none of its names.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, gamma: Literal["sigma", "one"] = "sigma") -> None:
        super().__init__()
        if gamma not in ("sigma", "one"):
            raise InputError(f"gamma={gamma!r}: 'sigma' or 'one' is needed")
        matrix = _matrix(weight.detach())
        if not bool(matrix.isfinite().all()) or not bool(matrix.any()):
            raise InputError("a weight that is zero or not finite has no direction to scale; skip this layer")
        # A random start would underestimate sigma for the first 20 steps.
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        self.gamma = nn.Parameter(sizes[0].clone() if gamma == "sigma" else torch.ones_like(sizes[0]))
        self.register_buffer("u", right[0].clone())
        self.register_buffer("v", left[:, 0].clone())

    def forward(self, weight: Tensor) -> Tensor:
        """Scale float [out, in] or [out, in, 1]; the spectral norm is taken in float32 at least."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = _matrix(weight)
            u, v = self._vectors(matrix.detach())
            sigma = torch.dot(v, matrix @ u)
            return (weight * (self.gamma / sigma)).to(weight.dtype)

    @torch.no_grad()
    def _vectors(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Right and left singular vector; copies, for the buffers may change before the backward pass."""
        u, v = self.u.to(matrix.dtype, copy=True), self.v.to(matrix.dtype, copy=True)
        if _frozen:
            return u, v
        v = F.normalize(matrix @ u, dim=0)
        u = F.normalize(matrix.T @ v, dim=0)
        if self.training:
            self.u.copy_(u)
            self.v.copy_(v)
        return u, v

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SigmaReparam":
        """Move or convert; the vectors stay in float32 where the weights go to half precision."""
        super()._apply(fn, recurse)
        for name in ("u", "v"):
            vector = getattr(self, name)
            if vector.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, F.normalize(vector.float(), dim=0))
        return self


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv1d]:
    """Whether a module is a linear map of frames: Linear, or a convolution of width 1 in one group."""
    if isinstance(module, nn.Conv1d):
        return module.kernel_size == (1,) and module.groups == 1
    return isinstance(module, nn.Linear)


def apply_sigma_reparam(
    module: nn.Module, skip: Sequence[str] = (), gamma: Literal["sigma", "one"] = "sigma"
) -> list[str]:
    """Reparametrize every linear map below a module (and the module, if it is one), in place.

    Parameters
    ----------
    module : Module
        Its ``Linear`` and its ``Conv1d`` of width 1 and one group are taken.
    skip : sequence of str
        Names of modules to leave alone, as in ``named_modules``, with ``*`` and ``?`` as wildcards. What lies below
        a named module is left alone too.
    gamma : {"sigma", "one"}
        See `SigmaReparam`.

    Returns
    -------
    list of str
        Names of the maps that were taken.

    Raises
    ------
    InputError
        If a pattern fits no module, a weight is zero or parametrized already, or there is nothing to take.
    """
    names = [name for name, _ in module.named_modules()]
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"skip={pattern!r} fits no module")
    left = {name for name in names if any(fnmatchcase(name, pattern) for pattern in skip)}
    taken = []
    for name, child in list(module.named_modules()):
        parts = name.split(".")
        above = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
        if not _is_linear(child) or above & left:
            continue
        if parametrize.is_parametrized(child, "weight"):
            raise InputError(f"{name}: the weight is parametrized already")
        try:
            scale = SigmaReparam(child.weight, gamma)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        scale.train(child.training)
        parametrize.register_parametrization(child, "weight", scale)
        taken.append(name)
    if not taken:
        raise InputError("there is no linear map to reparametrize")
    return taken


def _wrapped(module: nn.Module) -> Iterator[tuple[nn.Module, SigmaReparam]]:
    for child in module.modules():
        if parametrize.is_parametrized(child, "weight"):
            scale = child.parametrizations["weight"][0]  # type: ignore[index]
            if isinstance(scale, SigmaReparam):
                yield child, scale


def fold_sigma_reparam(module: nn.Module) -> nn.Module:
    """Put the effective weights in place of the reparametrized ones, in place; gamma, u and v are gone.

    Parameters
    ----------
    module : Module

    Returns
    -------
    Module
        The same one; it gives what it gave in eval mode before.
    """
    for child, scale in list(_wrapped(module)):
        scale.eval()  # the weights of the eval mode, whatever the mode
        parametrize.remove_parametrizations(child, "weight", leave_parametrized=True)
    return module


def gammas(module: nn.Module) -> list[nn.Parameter]:
    """Give all gammas below a module: the parameters that weight decay must leave alone.

    Decay of the other parameters of a reparametrized map does not change its function, only its effective step size.
    """
    return [scale.gamma for _, scale in _wrapped(module)]


# ---------------------------------------------------------------------------------------------------------------------
# diagnostics


def attention_entropy(probabilities: Tensor, valid: Tensor | None = None) -> Tensor:
    """Entropy of attention, ``-sum_j A_ij ln A_ij``, averaged over queries and batch.

    Uniform attention over T keys has ln T; collapse shows as a fall towards 0 beside spikes of the loss. The mean
    over the last axis of the result is that of a layer.

    Parameters
    ----------
    probabilities : float [..., B, H, T, S]
        Attention of T queries to S keys, rows that sum to 1 and are 0 at masked keys; for instance with a layer axis
        in front.
    valid : bool [B, T], optional
        Queries that count; all where None.

    Returns
    -------
    float32 [..., H]
        In nats; NaN where no query is valid.

    Raises
    ------
    InputError
        If shapes do not fit.
    """
    if probabilities.ndim < 4 or (
        valid is not None and valid.shape != (probabilities.shape[-4], probabilities.shape[-2])
    ):
        raise InputError(
            f"probabilities [..., B, H, T, S] and valid [B, T] are needed, not {tuple(probabilities.shape)} and "
            f"{None if valid is None else tuple(valid.shape)}"
        )
    entropy = torch.special.entr(probabilities.detach().float()).sum(-1)  # [..., B, H, T]
    if valid is None:
        return entropy.mean((-3, -1))
    counts = valid.to(entropy.device)[:, None]
    return entropy.masked_fill(~counts, 0.0).sum((-3, -1)) / counts.sum()


def entropy_bound(scale: float, keys: int) -> float:
    """Smallest entropy that a softmax over T keys can have, given the length of its logits.

    ``ln(1 + (T - 1) b) + s sqrt(T (T - 1)) b / (1 + (T - 1) b)`` with ``b = exp(-s sqrt(T / (T - 1)))`` (Zhai et al.
    2023, their lower bound on attention entropy), attained by one high and T - 1 equal low logits.

    Parameters
    ----------
    scale : float
        Bound s on the L2 norm of the logits of a query.
    keys : int
        Number T of keys.

    Returns
    -------
    float
        In nats; 0 for a single key.

    Raises
    ------
    InputError
        If the scale is negative or there is no key.
    """
    if scale < 0 or keys < 1:
        raise InputError(f"scale={scale}, keys={keys}: a scale of at least 0 and at least one key are needed")
    if keys == 1:
        return 0.0
    b = math.exp(-scale * math.sqrt(keys / (keys - 1)))
    total = 1 + (keys - 1) * b
    return math.log(total) + scale * math.sqrt(keys * (keys - 1)) * b / total
