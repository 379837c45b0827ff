"""Steps that train an encoder by a recipe, or take one that was trained elsewhere."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from speechtok.audio.clips import clips_of_split
from speechtok.encoders.pretrained import read_tensors
from speechtok.encoders.saved import DESCRIPTION, WEIGHTS
from speechtok.errors import InputError
from speechtok.training.fingerprints import changes, sounds
from speechtok.training.graph import Product, Step, Task, file_hash
from speechtok.training.jobs import CURVES, Job, copy
from speechtok.training.loop import CONFIG, METRICS
from speechtok.training.recipe import Recipe

__all__ = ["Training", "curves_of", "encoder_step", "mixes_noise", "training_noise"]

_BEGINNING = "beginning.json"  # see `speechtok.training.pretrain.same_beginning`


@dataclass(frozen=True)
class Training:
    """How an encoder comes about.

    Parameters
    ----------
    name : str
        Of the step.
    source : str or Path
        Of the recipe.
    recipe : Recipe
    train : callable
        Trains in the folder of a run, or goes on there, and writes its folder ``encoder``. Told that folder and the
        folder of the encoder to begin with, None without `init`.
    init : str, optional
        Step of the encoder to begin with.
    constants : dict
        What decides the training besides the recipe, as plain values.
    """

    name: str
    source: str | Path
    recipe: Recipe
    train: Callable[[Path, Path | None], object]
    init: str | None = None
    constants: dict[str, Any] = field(default_factory=dict)


def encoder_step(job: Job, training: Training, given: Path | None) -> Step:
    """The step of an encoder.

    Parameters
    ----------
    job : Job
    training : Training
    given : Path, optional
        Take this trained encoder, see `speechtok.training.models.steps`.

    Raises
    ------
    InputError
        If data are missing, or `given` holds no encoder or damaged files.
    """
    if given is not None and not (given / DESCRIPTION).is_file():
        raise InputError(f"{given} holds no {DESCRIPTION}; give the folder 'encoder' of a finished run")
    config = json.loads(json.dumps(training.recipe.as_dict()))
    settings: dict[str, Any] = {"recipe": config, **training.constants}
    data = {"train": sounds(job.speech("train"))}
    if training.recipe.noisy:
        data["noise"] = changes(job.places.data)["noise"]
    expects = {}
    if given is not None:
        expects = {WEIGHTS: file_hash(given / WEIGHTS)}
        if _run_facts(given)["config"] != config:
            settings, data = {"given": expects[WEIGHTS]}, {}
    needs = () if training.init is None else (training.init,)
    build = partial(_encoder, job, training, given)
    return Step(training.name, "encoder", build, needs, settings, data, kept=False, expects=expects)


def _encoder(job: Job, training: Training, given: Path | None, task: Task) -> Product:
    name = Path(training.source).stem
    # Named by all that decides the weights: an interrupted run is found again, and another one is never continued.
    run = job.places.runs / f"{name}-{task.fingerprint[:8]}"
    folder = run / "encoder"
    first = None if training.init is None else task.needs[training.init].file(DESCRIPTION).parent
    if given is not None:
        if first is not None:
            _check_beginning(training, given, first)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (DESCRIPTION, WEIGHTS):
            copy(given / file, folder / file)
        for file in (CONFIG, METRICS, CURVES):
            if (source := _beside(given, file)) is not None:
                copy(source, run / file)
    else:
        if first is not None:
            _share_mels(first.parent, run)
        training.train(run, first)
    curves = [path for path in (run / CURVES,) if path.is_file()]
    parameters = sum(tensor.numel() for tensor in read_tensors(folder / WEIGHTS).values())
    facts = _run_facts(folder) | {"recipe": name, "parameters": parameters}
    return Product((folder / DESCRIPTION, folder / WEIGHTS, *curves), facts)


def _beside(folder: Path, name: str) -> Path | None:
    """A file of the run that an encoder folder belongs to."""
    return next((path for path in (folder.parent / name, folder / name) if path.is_file()), None)


def _run_facts(folder: Path) -> dict[str, Any]:
    """What the run of an encoder says: ``config``, and of its last step ``steps``, ``hours``, ``held_out``."""
    config, metrics = _beside(folder, CONFIG), _beside(folder, METRICS)
    try:
        facts: dict[str, Any] = {"config": {} if config is None else json.loads(config.read_text())}
        lines = [] if metrics is None else [json.loads(line) for line in metrics.read_text().splitlines()]
        if lines:
            held_out = [line for line in lines if line["split"] != "train"]
            facts |= {"steps": lines[-1]["step"], "hours": lines[-1]["hours"], "held_out": held_out[-1:]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{config} or {metrics} is damaged ({error!r}); take the run's files anew") from error
    return facts


def _check_beginning(training: Training, given: Path, first: Path) -> None:
    """Refuse a run by the recipe that began with another encoder than that of the step `init`.

    A run without a recipe may have begun with anything: nothing is claimed of it.
    """
    path = _beside(given, _BEGINNING)
    if path is None or _run_facts(given)["config"] != json.loads(json.dumps(training.recipe.as_dict())):
        return
    try:
        begun = json.loads(path.read_text())["init"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); take the run's files anew") from error
    if begun is None or not file_hash(first / WEIGHTS).startswith(begun):
        raise InputError(
            f"{given} was trained from another encoder than that of step {training.init}; train it anew from "
            f"{first}, or do not give it and have it trained here"
        )


def _share_mels(before: Path, run: Path) -> None:
    """Let a run hear what an earlier run has decoded, by links; training decodes what is missing or other sound."""
    known, cache, partial_copy = before / "mels", run / "mels", run / ".mels"
    if not known.is_dir() or cache.exists():
        return
    shutil.rmtree(partial_copy, ignore_errors=True)
    shutil.copytree(known, partial_copy, ignore=shutil.ignore_patterns(".lock"), copy_function=os.link)
    partial_copy.rename(cache)


def curves_of(trained: Product) -> Path | None:
    """Picture of the curves of an encoder's run, if there is one."""
    return next((path for path in trained.files if path.name == CURVES), None)


def mixes_noise(config: dict[str, Any]) -> bool:
    """Whether noises were mixed in by this recipe (`Recipe.as_dict`), as far as one is known."""
    parts = (config.get(name) or {} for name in ("perturb", "restart_perturb"))
    return any(part.get("noise_probability", 0) > 0 for part in parts)


def training_noise(job: Job) -> Path:
    """Write a manifest of the noises of the train split; InputError if there are none."""
    folder, manifest = (job.places.data / "noise").resolve(), job.places.runs / "training-noise.jsonl"
    clips = clips_of_split(folder, "train")
    if clips is None:
        raise InputError(f"{folder / 'metadata.jsonl'} names no file of split 'train'")
    job.places.runs.mkdir(parents=True, exist_ok=True)
    manifest.write_text("".join(json.dumps({"path": str(folder / path)}) + "\n" for path in clips.paths))
    return manifest
