"""Loss balancer: weights are shares of the gradient, whatever the scale of a loss (EnCodec, section 3.4)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from speechtok.errors import InputError
from speechtok.training.distributed import sum_over_processes

__all__ = ["Balancer"]

_SMALLEST = 1e-12


class Balancer(nn.Module):
    """Adds up gradients with respect to the decoded sound so that each has its share.

    With g the gradient of a loss with respect to a row of the decoded sound, and its norm averaged over rows, processes
    and (by `decay`, as an unbiased moving mean) steps, the balanced gradient is the sum over losses of
    ``weight / sum of weights * g / mean norm``: the norm of a row is about 1 at most, and a loss that is scaled changes
    nothing. Losses must depend on the model through the decoded sound only; what does not (the commitment of a
    quantizer, the loss of a discriminator) is added outside. Moving means are buffers, so that a resumed run goes on
    exactly.

    Parameters
    ----------
    weights : mapping of str to float
        Of the losses that may be given; positive.
    decay : float
        Of the moving means; 0: norms of the step alone.

    Raises
    ------
    InputError
        If a weight or `decay` is unusable.
    """

    norms: Tensor
    seen: Tensor

    def __init__(self, weights: Mapping[str, float], decay: float = 0.999) -> None:
        super().__init__()
        if not weights or not all(weight > 0 for weight in weights.values()) or not 0 <= decay < 1:
            raise InputError(f"weights {dict(weights)}, decay {decay}: weights must be positive, decay in 0 ... 1")
        self.weights, self.decay = dict(weights), decay
        self.register_buffer("norms", torch.zeros(len(weights)))
        self.register_buffer("seen", torch.zeros(len(weights)))

    def forward(self, losses: Mapping[str, Tensor], decoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Balanced gradient with respect to `decoded`, which may also be a detached copy that requires a gradient.

        The graph behind the losses is kept: losses of a discriminator may still be differentiated.

        Parameters
        ----------
        losses : mapping of str to float [B]
            Of each row, computed from `decoded`; any of those that have a weight.
        decoded : float32 [B, ...]
            Part of the graph.

        Returns
        -------
        balanced : float32 [B, ...]
            Without a graph.
        figures : dict of str to Tensor
            ``norm_NAME``: sum over rows of the norms of a loss' gradient.

        Raises
        ------
        InputError
            If a loss has no weight, none is given, or norms are not known yet (in evaluation mode they only stand).
        """
        unknown = sorted(set(losses) - set(self.weights))
        if unknown or not losses:
            raise InputError(f"losses {sorted(losses)}: weights are given for {sorted(self.weights)}")
        names = [name for name in self.weights if name in losses]
        gradients = [torch.autograd.grad(losses[name].sum(), decoded, retain_graph=True)[0] for name in names]
        rows = [gradient.flatten(1).norm(dim=1).sum() for gradient in gradients]
        total = sum_over_processes(torch.stack([*rows, torch.tensor(float(len(decoded))).to(rows[0])]))
        places = [list(self.weights).index(name) for name in names]
        if self.training:
            self.norms[places] = self.decay * self.norms[places] + (1.0 - self.decay) * total[:-1] / total[-1]
            self.seen[places] = self.decay * self.seen[places] + (1.0 - self.decay)
        if not bool(self.seen[places].all()):
            raise InputError("the balancer knows no norms yet: call train() on it first")
        means = (self.norms[places] / self.seen[places]).clamp_min(_SMALLEST)
        whole = sum(self.weights[name] for name in names)
        balanced = torch.zeros_like(decoded)
        for name, gradient, mean in zip(names, gradients, means, strict=True):
            balanced.add_(gradient * (self.weights[name] / whole / mean))
        return balanced, {f"norm_{name}": value for name, value in zip(names, rows, strict=True)}
