"""Encoders that were trained here, as a folder: ``encoder.json`` (type, configuration) and ``encoder.safetensors``."""

import json
import os
from pathlib import Path

from speechtok.encoders.base import Encoder
from speechtok.encoders.pretrained import build, load_checkpoint, read_tensors
from speechtok.errors import CheckpointError

__all__ = ["read_encoder", "save_encoder"]

DESCRIPTION, WEIGHTS = "encoder.json", "encoder.safetensors"


def save_encoder(encoder: Encoder, folder: str | os.PathLike[str]) -> Path:
    """Write an encoder with all its layers, for `speechtok.encoders.from_pretrained`.

    Parameters
    ----------
    encoder : Encoder
    folder : path
        Made where it does not exist; what an earlier call left there is replaced.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in encoder.state_dict().items()}, folder / WEIGHTS)
    description = {"type": encoder.type, "config": encoder.config_dict()}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return folder


def read_encoder(folder: str | os.PathLike[str], layer: int | None = None) -> Encoder:
    """Read what `save_encoder` wrote, up to a layer (None: the last).

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or the weights do not fit the configuration.
    InputError
        If there is no such layer.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        encoder = build(description["type"], description["config"], None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give a folder that training wrote") from error
    try:
        return load_checkpoint(type(encoder), encoder.config, layer, read_tensors(folder / WEIGHTS))
    except CheckpointError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {error}") from error
