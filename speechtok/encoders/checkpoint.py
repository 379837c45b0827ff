"""Weights in files and state dicts: read them, fold weight norms, hold every key and shape to account.

Pickles are read with ``weights_only=True`` only.
"""

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechtok.errors import CheckpointError

__all__ = [
    "WEIGHT_FILES",
    "as_float",
    "check_weights",
    "flat",
    "fold_weight_norm",
    "load_network",
    "read_file",
    "read_json",
    "read_tensors",
    "some",
]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".ckpt", ".pt", ".bin", ".safetensors")
# What torch.load raises for damaged files and for pickles it refuses.
_UNPICKLING = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint.

    Parameters
    ----------
    path : Path
        A folder with ``model.safetensors`` or ``pytorch_model.bin``, whole or sharded, or one such file.

    Raises
    ------
    CheckpointError
        If files are missing, damaged, or pickles that hold anything but tensors.
    """
    if path.is_dir():
        names = [name for name in WEIGHT_FILES if (path / name).exists()]
        if not names:
            raise CheckpointError(f"{path} has no weights: put model.safetensors or pytorch_model.bin there")
        path = path / names[0]
    if path.suffix == ".json":
        return _read_shards(path)
    return flat(read_file(path), path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map; fetch the checkpoint again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if name != Path(name).name or name in ("", ".."):
            raise CheckpointError(f"{index} points to {name!r}, outside of its folder; it is not a usable checkpoint")
        shard = flat(read_file(index.parent / name), index.parent / name)
        if set(shard) != {key for key, place in places.items() if place == name}:
            raise CheckpointError(f"{index.parent / name} does not hold the keys its index lists; fetch it again")
        tensors |= shard
    return tensors


def read_file(path: Path) -> Any:
    """Content of a file of weights; CheckpointError if it is missing, damaged or no such file."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; fetch the checkpoint again")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(f"{path}: unknown kind of file; known: {', '.join(_SUFFIXES)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNPICKLING as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and is not unpickled ({reason}); "
            "convert it to safetensors where you trust it"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object beside weights; CheckpointError if there is none."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; put it beside the weights") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; fetch it again")
    return content


def flat(content: Any, path: Path) -> dict[str, Tensor]:
    """Check that a file holds nothing but named tensors; CheckpointError if it does not."""
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path} is no state dict: it must map names to tensors; save model.state_dict() instead")
    return dict(content)


def load_network(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put the weights of a whole network into it: its own names and shapes, plain or with weight norm.

    Raises
    ------
    CheckpointError
        If keys are missing, unexpected or wrongly shaped, or weights are not finite.
    """
    found = fold_weight_norm({name: as_float(name, tensor) for name, tensor in weights.items()})
    check_weights({name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}, found)
    network.load_state_dict(found, strict=True)


def check_weights(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], beside: tuple[str, ...] = ()
) -> None:
    """Hold every key and shape to account.

    Parameters
    ----------
    expected : mapping of str to shape
        What must be there (counters of batch norm need not).
    found : mapping of str to Tensor
        Plain weights, see `fold_weight_norm`.
    beside : tuple of str
        Beginnings of names that may be there besides.

    Raises
    ------
    CheckpointError
        If keys are missing, unexpected or wrongly shaped, or weights are not finite.
    """
    missing = [name for name in expected if name not in found and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in found if name not in expected and not name.startswith(beside)]
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {what}: {some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the weights do not fit the configuration; {'; '.join(problems)}. Use the config.json of this checkpoint"
        )
    bad = [name for name in expected if name in found and not bool(torch.isfinite(found[name]).all())]
    if bad:
        raise CheckpointError(f"{len(bad)} tensors hold NaN or infinity: {some(bad)}; fetch the checkpoint again")


def as_float(name: str, tensor: Tensor, integers: tuple[str, ...] = ()) -> Tensor:
    """A weight as float32; CheckpointError if it is of another kind and its name begins with none of `integers`."""
    if tensor.is_floating_point():
        return tensor.float()
    if name.endswith(".num_batches_tracked") or name.startswith(integers):
        return tensor
    raise CheckpointError(f"{name} has type {tensor.dtype}; use the checkpoint with weights in floating point")


def fold_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace each pair of weight norm tensors by ``weight = g * v / |v|``, the norm over the axes where g has size 1.

    Salimans & Kingma 2016 (arXiv 1602.07868), formula 2.
    """
    out = dict(tensors)
    for name in tensors:
        for magnitude, direction in (
            ("weight_g", "weight_v"),
            ("parametrizations.weight.original0", "parametrizations.weight.original1"),
        ):
            stem = name.removesuffix(magnitude)
            if stem == name or stem + direction not in tensors:
                continue
            if stem + "weight" in out:
                raise CheckpointError(f"{stem}weight is there twice, plain and with weight norm; remove one of them")
            g, v = out.pop(name), out.pop(stem + direction)
            if g.ndim != v.ndim or any(a not in (1, b) for a, b in zip(g.shape, v.shape, strict=True)):
                raise CheckpointError(f"{name} {tuple(g.shape)} does not fit {stem}{direction} {tuple(v.shape)}")
            axes = [axis for axis in range(g.ndim) if g.shape[axis] == 1]
            out[stem + "weight"] = g * (v / torch.linalg.vector_norm(v, dim=axes, keepdim=True))
    return out


def some(names: Iterable[str]) -> str:
    """The first ten names of a list, for messages."""
    names = list(names)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
