"""Processes of a data-parallel run: sums over them, and taking turns."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

__all__ = ["one_at_a_time", "sum_over_processes"]


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum of a tensor over all processes, through which gradients flow; the tensor itself in a single process."""
    return all_reduce(x) if torch.distributed.is_initialized() else x


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let the processes of a run do something in its folder one after the other; the system frees a dead one's lock.

    The first process computes, the others find what it left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
