"""Pre-train a w2v-BERT encoder from a recipe: read the sound, run the loop, write the encoder."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from speechtok.corpus.engine import Event
from speechtok.devices import usable_device
from speechtok.encoders.pretrained import from_pretrained
from speechtok.encoders.saved import WEIGHTS, save_encoder
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import InputError
from speechtok.training.beginning import same_beginning
from speechtok.training.distributed import one_at_a_time
from speechtok.training.loop import train
from speechtok.training.mels import Mels, identity_of
from speechtok.training.probe import PhoneProbe
from speechtok.training.recipe import Recipe, section
from speechtok.training.w2v_bert import W2vBertObjective
from speechtok.training.w2v_bert_config import W2vBertObjectiveConfig

__all__ = ["pretrain", "read_sound"]

logger = logging.getLogger(__name__)

KIND = "w2v-bert"
PROBED = (100, 500)  # vocabularies of the phone probe


def pretrain(
    recipe: str | Path,
    data: str | os.PathLike[str],
    folder: Path,
    *,
    held_out: str | os.PathLike[str] | None = None,
    aligned: Path | None = None,
    noise: str | os.PathLike[str] | None = None,
    init: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    device: str = "cpu",
    on_event: Callable[[Event], None] = lambda event: None,
) -> Path:
    """Train, or go on with an interrupted run.

    Parameters
    ----------
    recipe : str or Path
        See `Recipe.read`.
    data : path or glob
        Training sound, as for ``tokenize``.
    folder : Path
        Of the run, see `speechtok.training.loop.train`; gets ``encoder`` at the end.
    held_out : path or glob, optional
        Sound on which the loss is watched.
    aligned : Path, optional
        Aligned folder on which the phone information of every layer is watched; nothing is learned from it.
    noise : path or glob, optional
        Sound that the perturbations mix in.
    init : Path, optional
        Encoder folder whose weights the encoder begins with.
    changes : mapping, optional
        See `Recipe.read`.
    device : str
    on_event : callable
        Progress.

    Returns
    -------
    Path
        The folder of the encoder.

    Raises
    ------
    InputError
        If recipe and data do not fit each other.
    OutputError
        If `folder` holds a run of another recipe, or one that began with other sound or weights.
    """
    chosen = Recipe.read(recipe, KIND, changes)
    usable_device(device)  # before hours of reading
    if chosen.noisy != (noise is not None):
        raise InputError(
            "noise_probability (in [perturb] or [restart_perturb]) and noise go together: give both or none"
        )
    mels, watched, noises = read_sound(
        folder, data, chosen.data.speeds, held_out=held_out, noise=noise, init=init, on_event=on_event
    )
    torch.manual_seed(chosen.run.seed)
    objective = W2vBertObjective(
        section(W2vBertConfig, chosen.model, "model"),
        section(W2vBertObjectiveConfig, chosen.objective, "objective"),
        chosen.perturb,
    )
    encoder = objective.encoder
    if encoder.config.normalization == "stored":
        encoder.feature_mean.copy_(torch.from_numpy(mels.mean))
        encoder.feature_scale.copy_(1.0 / torch.from_numpy(mels.deviation))
    if init is not None:
        given = from_pretrained(init)
        if not isinstance(given, W2vBertEncoder):
            raise InputError(f"{init} holds an encoder of another kind than the recipe's")
        objective.begin_with(given)
    probe = None if aligned is None else PhoneProbe.read(aligned, encoder, mels, clusters=PROBED)

    def probed(trained: nn.Module) -> dict[str, float]:
        trained = cast(W2vBertObjective, trained)
        return {} if probe is None else probe(trained.encoder, trained.projections)

    train(
        objective, chosen, mels, folder, noises=noises, held_out=watched, probe=probed, device=device, on_event=on_event
    )
    return save_encoder(objective.export(), folder / "encoder")


def read_sound(
    folder: Path,
    data: str | os.PathLike[str],
    speeds: tuple[float, ...],
    *,
    held_out: str | os.PathLike[str] | None,
    noise: str | os.PathLike[str] | None,
    init: Path | None,
    on_event: Callable[[Event], None],
) -> tuple[Mels, Mels | None, Mels | None]:
    """Filter bank frames of training sound (at several speeds), held-out sound and noise, kept in a run's folder.

    Files that are left out go to the log as warnings; parameters and errors as of `pretrain`.
    """
    cache = folder / "mels"
    with one_at_a_time(cache):
        mels = Mels.build(data, cache / "train", speeds, on_event)
        watched = None if held_out is None else Mels.build(held_out, cache / "held_out", on_event=on_event)
        noises = None if noise is None else Mels.build(noise, cache / "noise", on_event=on_event)
        facts = {
            name: None if frames is None else identity_of(cache / name)
            for name, frames in (("train", mels), ("noise", noises))
        }
        same_beginning(folder, {**facts, "init": _first_weights(init)})
    for what, heard in (("data", mels), ("held_out", watched), ("noise", noises)):
        if heard is not None and heard.failed:
            logger.warning("%s: %d files were left out; the first: %s", what, len(heard.failed), heard.failed[0])
    return mels, watched, noises


def _first_weights(init: Path | None) -> str | None:
    """Identity of the weights that a run begins with."""
    if init is None:
        return None
    if not (init / WEIGHTS).is_file():
        raise InputError(f"{init} holds no {WEIGHTS}; give the folder 'encoder' of a finished run")
    return hashlib.sha256((init / WEIGHTS).read_bytes()).hexdigest()[:16]
