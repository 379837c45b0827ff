"""Train a codec from a recipe: read the sound, run the loop, write the tokenizer."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from speechtok.corpus.engine import Event
from speechtok.devices import usable_device
from speechtok.nn.seanet import SeanetConfig
from speechtok.tokenizer import Tokenizer
from speechtok.training.beginning import same_beginning
from speechtok.training.codec import CodecObjective
from speechtok.training.codec_config import CodecObjectiveConfig
from speechtok.training.distributed import one_at_a_time
from speechtok.training.loop import train
from speechtok.training.recipe import Recipe, section
from speechtok.training.waves import Waves, identity_of

__all__ = ["KIND", "train_codec"]

logger = logging.getLogger(__name__)

KIND = "codec"


def train_codec(
    recipe: str | Path,
    data: str | os.PathLike[str],
    folder: Path,
    *,
    held_out: str | os.PathLike[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    name: str = "codec",
    device: str = "cpu",
    on_event: Callable[[Event], None] = lambda event: None,
) -> Path:
    """Train, or go on with an interrupted run.

    Parameters
    ----------
    recipe : str or Path
        See `Recipe.read`.
    data : path or glob
        Training sound of any kind, as for ``tokenize``.
    folder : Path
        Of the run, see `speechtok.training.loop.train`; gets ``codec`` at the end.
    held_out : path or glob, optional
        Sound on which the losses and the use of the codebooks are watched.
    changes : mapping, optional
        See `Recipe.read`.
    name : str
        Of the tokenizer.
    device : str
    on_event : callable
        Progress.

    Returns
    -------
    Path
        The folder of the tokenizer.

    Raises
    ------
    InputError
        If recipe and data do not fit each other.
    OutputError
        If `folder` holds a run of another recipe, or one that began with other sound.
    """
    chosen = Recipe.read(recipe, KIND, changes)
    usable_device(device)  # before hours of reading
    model = section(SeanetConfig, chosen.model, "model")
    torch.manual_seed(chosen.run.seed)
    objective = CodecObjective(model, section(CodecObjectiveConfig, chosen.objective, "objective"))
    waves, watched = read_waves(folder, data, model.sample_rate, model.hop, held_out=held_out, on_event=on_event)
    train(objective, chosen, waves, folder, held_out=watched, device=device, on_event=on_event)
    return save_codec(objective.export(name), folder / "codec")


def read_waves(
    folder: Path,
    data: str | os.PathLike[str],
    sample_rate: int,
    hop: int,
    *,
    held_out: str | os.PathLike[str] | None,
    on_event: Callable[[Event], None],
) -> tuple[Waves, Waves | None]:
    """Training sound and held-out sound, kept in a run's folder, which never goes on with other training sound.

    Files that are left out go to the log as warnings; parameters and errors as of `train_codec`.
    """
    cache = folder / "waves"
    with one_at_a_time(cache):
        waves = Waves.build(data, cache / "train", on_event, sample_rate, hop)
        watched = None if held_out is None else Waves.build(held_out, cache / "held_out", on_event, sample_rate, hop)
        same_beginning(folder, {"train": identity_of(cache / "train")})
    for what, heard in (("data", waves), ("held_out", watched)):
        if heard is not None and heard.failed:
            logger.warning("%s: %d files were left out; the first: %s", what, len(heard.failed), heard.failed[0])
    return waves, watched


def save_codec(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write a trained codec in the place of what an earlier end of the same run left."""
    with one_at_a_time(folder.parent):
        for old in ("tokenizer.json", "encoder.safetensors", "quantizer.safetensors", "decoder.safetensors"):
            (folder / old).unlink(missing_ok=True)
        return tokenizer.save(folder)
