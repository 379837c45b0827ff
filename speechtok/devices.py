"""Devices: whether this machine and this build of torch have one."""

import torch

from speechtok.errors import InputError

__all__ = ["usable_device"]


def usable_device(name: str | torch.device) -> torch.device:
    """Check a device by putting something on it; InputError if it cannot be used here."""
    try:
        probe = torch.zeros(1, device=name)
        probe.tolist()  # "meta" takes values and gives none back
        return probe.device
    # RuntimeError: unknown, or no kernels; AssertionError: torch was built without it; ImportError: no package for it.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"device {str(name)!r} cannot be used here ({reason}); the CPU is device 'cpu'") from error
