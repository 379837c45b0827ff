"""What all segmenters ask of their input."""

import math
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechtok.errors import InputError
from speechtok.kernels.segment import CountMode

__all__ = ["check_greedy", "finite", "frames_array", "frames_tensor"]


def frames_tensor(frames: Any) -> Tensor:
    """Frames as a tensor float32 [T, d]; arrays are not copied where they can be shared.

    Raises
    ------
    InputError
        If they are of another kind, type or shape.
    """
    if isinstance(frames, np.ndarray) and frames.dtype == np.float32:
        frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
    if not isinstance(frames, Tensor) or frames.dtype != torch.float32:
        kind = getattr(frames, "dtype", type(frames).__name__)
        raise InputError(f"frames are {kind}; give a float32 array or tensor [T, d]")
    if frames.ndim != 2 or frames.shape[1] == 0:
        raise InputError(f"frames have shape {tuple(frames.shape)}; give [T, d], one utterance at a time")
    return frames.detach()


def frames_array(frames: Any) -> NDArray[np.float32]:
    """Frames as a contiguous array float32 [T, d]; raises as `frames_tensor`."""
    array: NDArray[np.float32] = frames_tensor(frames).cpu().contiguous().numpy()
    return array


def check_greedy(norm_threshold: float, merge_threshold: float, count_mode: CountMode) -> None:
    """Check the parameters of `greedy_segment`: InputError if a threshold is NaN or the mode unknown."""
    for name, value in (("norm_threshold", norm_threshold), ("merge_threshold", merge_threshold)):
        if math.isnan(value):
            raise InputError(f"{name} is NaN")
    if count_mode not in get_args(CountMode):
        raise InputError(f"count_mode is {count_mode!r}; choose from {', '.join(get_args(CountMode))}")


def finite(**values: float) -> dict[str, float]:
    """Options as plain floats, so that 1 and 1.0 are one configuration: InputError if one is not a finite number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{name} is {value!r}; give a finite number")
    return {name: float(value) for name, value in values.items()}
