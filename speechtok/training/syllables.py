"""Train a Sylber encoder from a recipe: read the sound, run both stages, write the encoder."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from speechtok.corpus.engine import Event
from speechtok.devices import usable_device
from speechtok.encoders.pretrained import from_pretrained
from speechtok.encoders.saved import save_encoder
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import InputError
from speechtok.segmenters.energy import EnergySeeds
from speechtok.training.loop import train
from speechtok.training.pretrain import read_sound
from speechtok.training.recipe import Recipe, section
from speechtok.training.sylber import SeededMels, SylberObjective
from speechtok.training.sylber_config import SylberConfig
from speechtok.training.syllable_probe import SyllableProbe

__all__ = ["self_segment"]

KIND = "sylber"


def self_segment(
    recipe: str | Path,
    data: str | os.PathLike[str],
    folder: Path,
    *,
    init: Path | None = None,
    held_out: str | os.PathLike[str] | None = None,
    aligned: Path | None = None,
    noise: str | os.PathLike[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    device: str = "cpu",
    on_event: Callable[[Event], None] = lambda event: None,
) -> Path:
    """Train, or go on with an interrupted run.

    Parameters
    ----------
    recipe : str or Path
        See `Recipe.read`; the second part of the recipe (``[restart]``) is the second stage.
    data : path or glob
        Training sound, as for ``tokenize``.
    folder : Path
        Of the run, see `speechtok.training.loop.train`; gets ``encoder`` at the end.
    init : Path, optional
        Encoder folder: the first teacher, and what the student begins with. None: from scratch.
    aligned : Path, optional
        Aligned folder on which the boundaries of segments are watched; nothing is learned from it.
    held_out, noise, changes, device, on_event
        See `speechtok.training.pretrain.pretrain`.

    Returns
    -------
    Path
        The folder of the encoder.

    Raises
    ------
    InputError
        If recipe, data and encoder do not fit each other.
    OutputError
        If `folder` holds a run of another recipe, or one that began with other sound or weights.
    """
    chosen = Recipe.read(recipe, KIND, changes)
    usable_device(device)  # before hours of reading
    if chosen.noisy != (noise is not None):
        raise InputError(
            "noise_probability (in [perturb] or [restart_perturb]) and noise go together: give both or none"
        )
    if chosen.restart is not None and chosen.restart.step >= chosen.run.steps:
        raise InputError(
            f"[restart] step {chosen.restart.step} is not before the end of the run ({chosen.run.steps} steps): there "
            "would be no second stage; set restart.step too"
        )
    model, config = section(W2vBertConfig, chosen.model, "model"), section(SylberConfig, chosen.objective, "objective")
    given = None if init is None else from_pretrained(init)
    first = None if init is None else from_pretrained(init, config.teacher_layer)
    if not all(one is None or isinstance(one, W2vBertEncoder) for one in (given, first)):
        raise InputError(f"{init} holds an encoder of another kind than the recipe's")
    second = 1.0 if chosen.restart is None else chosen.restart.step / chosen.run.steps
    torch.manual_seed(chosen.run.seed)
    objective = SylberObjective(
        model, config, cast(W2vBertEncoder | None, first), second_stage=second, perturb_config=chosen.perturb
    )
    if given is not None:
        objective.begin_with(cast(W2vBertEncoder, given))
    mels, watched, noises = read_sound(
        folder, data, chosen.data.speeds, held_out=held_out, noise=noise, init=init, on_event=on_event
    )
    if given is None and model.normalization == "stored":
        objective.encoder.feature_mean.copy_(torch.from_numpy(mels.mean))
        objective.encoder.feature_scale.copy_(1.0 / torch.from_numpy(mels.deviation))
    seeds = EnergySeeds()
    seeded = SeededMels.of(mels, seeds)
    objective.measure_targets(seeded, chosen.run.seed)
    probe = None if aligned is None else SyllableProbe.read(aligned, objective.encoder)

    def probed(trained: nn.Module) -> dict[str, float]:
        return {} if probe is None else probe(cast(SylberObjective, trained).encoder)

    train(
        objective, chosen, seeded, folder, noises=noises,
        held_out=None if watched is None else SeededMels.of(watched, seeds),
        probe=probed, device=device, on_event=on_event,
    )  # fmt: skip
    return save_encoder(objective.export(), folder / "encoder")
