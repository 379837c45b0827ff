"""Distil an encoder into an exact-streaming student: compute the teacher's frames, run the loop, write the student."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from speechtok.corpus.engine import Event
from speechtok.devices import usable_device
from speechtok.encoders.base import Encoder
from speechtok.encoders.pretrained import from_pretrained
from speechtok.encoders.saved import save_encoder
from speechtok.encoders.w2v_bert_config import W2vBertConfig
from speechtok.errors import InputError
from speechtok.training.distill import DistillConfig, DistillObjective, make_student
from speechtok.training.distributed import one_at_a_time
from speechtok.training.loop import train
from speechtok.training.mels import Mels
from speechtok.training.pretrain import PROBED
from speechtok.training.probe import PhoneProbe
from speechtok.training.recipe import Recipe, section
from speechtok.training.teacher import TaughtMels, TeacherFrames

__all__ = ["distill"]

KIND = "distill"


def distill(
    recipe: str | Path,
    teacher: str | Path,
    data: str | os.PathLike[str],
    folder: Path,
    *,
    layer: int | None = None,
    held_out: str | os.PathLike[str] | None = None,
    aligned: Path | None = None,
    noise: str | os.PathLike[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    device: str = "cpu",
    on_event: Callable[[Event], None] = lambda event: None,
) -> Path:
    """Train a student, or go on with an interrupted run.

    Parameters
    ----------
    recipe : str or Path
        See `Recipe.read`.
    teacher : str or Path
        Any encoder, see `speechtok.encoders.from_pretrained`.
    data : path or glob
        Training sound, as for ``tokenize``.
    folder : Path
        Of the run, see `speechtok.training.loop.train`; gets ``mels`` and ``teacher`` before training, and
        ``encoder`` at the end.
    layer : int, optional
        Of the teacher; None: its last.
    held_out : path or glob, optional
        Sound on which the loss and R^2 are watched; the teacher reads it too.
    aligned, noise, changes, device, on_event
        See `speechtok.training.pretrain.pretrain`.

    Returns
    -------
    Path
        The folder of the student.

    Raises
    ------
    InputError
        If recipe, teacher and data do not fit each other.
    OutputError
        If the folder holds another run or another teacher's frames.
    """
    chosen = Recipe.read(recipe, KIND, changes)
    if chosen.data.speeds != (1.0,):
        raise InputError("[data] speeds: a teacher's frames are computed at speed 1; leave speeds out")
    usable_device(device)  # before hours of reading
    if chosen.noisy != (noise is not None):
        raise InputError("[perturb] noise_probability and noise go together: give both or none")
    model, config = section(W2vBertConfig, chosen.model, "model"), section(DistillConfig, chosen.objective, "objective")
    make_student(model)  # refused now, not after hours of the teacher
    with one_at_a_time(folder):
        encoder = from_pretrained(teacher, layer)
        mels = _taught(data, encoder, folder, "train", device, on_event)
        watched = None if held_out is None else _taught(held_out, encoder, folder, "held_out", device, on_event)
        del encoder  # a large teacher leaves its memory to the training
        noises = None if noise is None else Mels.build(noise, folder / "mels" / "noise", on_event=on_event)
        centroids = None
        if config.reconstruction_weight > 0:
            centroids = mels.teacher.centroids(config.clusters, seed=chosen.run.seed, on_event=on_event)
    torch.manual_seed(chosen.run.seed)
    objective = DistillObjective(model, config, mels.teacher.mean, mels.teacher.deviation, centroids, chosen.perturb)
    objective.encoder.feature_mean.copy_(torch.from_numpy(mels.mean))
    objective.encoder.feature_scale.copy_(1.0 / torch.from_numpy(mels.deviation))
    probe = None if aligned is None else PhoneProbe.read(aligned, objective.encoder, mels, clusters=PROBED)

    def probed(trained: nn.Module) -> dict[str, float]:
        return {} if probe is None else probe(cast(DistillObjective, trained).encoder)

    train(
        objective, chosen, mels, folder, noises=noises, held_out=watched, probe=probed, device=device, on_event=on_event
    )
    return save_encoder(objective.export(), folder / "encoder")


def _taught(
    source: str | os.PathLike[str],
    teacher: Encoder,
    folder: Path,
    name: str,
    device: str,
    on_event: Callable[[Event], None],
) -> TaughtMels:
    mels = Mels.build(source, folder / "mels" / name, on_event=on_event)
    place = folder / "teacher" / name
    frames = TeacherFrames.build(source, teacher, mels, place, device=device, on_event=on_event)
    return TaughtMels.join(mels, frames)
