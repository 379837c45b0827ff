"""Pre-train a MERT encoder from a recipe: read the sound, ask the teachers, run the loop, write the encoder."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from speechtok.corpus.engine import Event
from speechtok.devices import usable_device
from speechtok.encoders.hubert import HubertConfig
from speechtok.encoders.saved import save_encoder
from speechtok.errors import InputError
from speechtok.hub import load
from speechtok.tokenizer import Tokenizer
from speechtok.training.beginning import same_beginning
from speechtok.training.distributed import one_at_a_time
from speechtok.training.loop import train
from speechtok.training.mert import MertObjective
from speechtok.training.mert_config import MertConfig
from speechtok.training.music_teachers import TaughtWaves, TeacherCodes
from speechtok.training.recipe import Recipe, section
from speechtok.training.waves import Waves, identity_of

__all__ = ["KIND", "pretrain_mert"]

logger = logging.getLogger(__name__)

KIND = "mert"


def pretrain_mert(
    recipe: str | Path,
    data: str | os.PathLike[str],
    folder: Path,
    *,
    teacher: str | os.PathLike[str] | None = None,
    held_out: str | os.PathLike[str] | None = None,
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
        Of the run, see `speechtok.training.loop.train`; gets ``waves`` and ``codes`` before training, and ``encoder``
        at the end.
    teacher : str or Path, optional
        The acoustic teacher: a tokenizer with 75 frames per second, see `speechtok.load`. None where the recipe has
        none (``acoustic_weight = 0``).
    held_out : path or glob, optional
        Sound on which the loss is watched.
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
        If recipe, teacher and data do not fit each other.
    OutputError
        If `folder` holds a run of another recipe, or one that began with other sound or another teacher.
    """
    chosen = Recipe.read(recipe, KIND, changes)
    usable_device(device)  # before hours of reading
    if chosen.perturb is not None or chosen.restart_perturb is not None or chosen.data.speeds != (1.0,):
        raise InputError("[perturb] and [data] speeds are for log mel frames; MERT hears waves: leave them out")
    model, config = section(HubertConfig, chosen.model, "model"), section(MertConfig, chosen.objective, "objective")
    if (config.acoustic_weight > 0) != (teacher is not None):
        raise InputError("[objective] acoustic_weight and a teacher go together: give both or none")
    tokenizer = None if teacher is None else load(str(teacher)).to(device)
    torch.manual_seed(chosen.run.seed)
    books, codes = (0, 0) if tokenizer is None else (tokenizer.quantizer.codebooks, tokenizer.quantizer.vocab_size)
    objective = MertObjective(model, config, books, codes)  # refused now, not after hours of the teacher
    with one_at_a_time(folder):
        sound = _heard("train", data, folder, objective, tokenizer, on_event)
        watched = None if held_out is None else _heard("held_out", held_out, folder, objective, tokenizer, on_event)
        teacher_identity = None if tokenizer is None else tokenizer.fingerprint
        same_beginning(folder, {"train": identity_of(folder / "waves" / "train"), "teacher": teacher_identity})
    del tokenizer
    objective.measure_targets(sound, chosen.run.seed)
    train(objective, chosen, sound, folder, held_out=watched, device=device, on_event=on_event)
    return save_encoder(objective.export(), folder / "encoder")


def _heard(
    name: str,
    source: str | os.PathLike[str],
    folder: Path,
    objective: MertObjective,
    teacher: Tokenizer | None,
    on_event: Callable[[Event], None],
) -> Waves:
    """Sound of a split, with the teacher's codes, kept in the run's folder."""
    grid, place = objective.encoder.grid, folder / "waves" / name
    waves = Waves.build(source, place, on_event, sample_rate=grid.sample_rate, hop=grid.hop)
    if waves.failed:
        logger.warning("%s: %d files were left out; the first: %s", name, len(waves.failed), waves.failed[0])
    if teacher is None:
        return waves
    if not objective.config.cached:
        return TaughtWaves.join(waves, TeacherCodes.in_memory(teacher, waves))
    codes = TeacherCodes.on_disk(teacher, waves, identity_of(place), folder / "codes" / name, on_event)
    return TaughtWaves.join(waves, codes)
