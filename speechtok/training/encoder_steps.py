"""Steps that train something by a recipe, or take what was trained elsewhere: an encoder, a codec."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from speechtok.audio.clips import clips_of_split
from speechtok.encoders.pretrained import read_tensors
from speechtok.encoders.saved import DESCRIPTION, WEIGHTS
from speechtok.errors import InputError
from speechtok.training.beginning import BEGINNING
from speechtok.training.fingerprints import changes, sounds
from speechtok.training.graph import Product, Step, Task, file_hash
from speechtok.training.jobs import CURVES, Job, copy
from speechtok.training.loop import CONFIG, METRICS
from speechtok.training.recipe import Recipe

__all__ = [
    "Beginning", "Training", "beginning_with", "curves_of", "encoder_step", "mixes_noise", "share_mels", "speech_data",
    "training_noise",
]  # fmt: skip


@dataclass(frozen=True)
class Beginning:
    """What another step made and a training begins with.

    Parameters
    ----------
    step : str
    entry : str
        Of the run's ``beginning.json``, that says with what it began.
    what : str
        It in a word.
    identity : callable
        From the step's product to what the entry must say.
    """

    step: str
    entry: str
    what: str
    identity: Callable[[Product], str]


def beginning_with(encoder: str) -> Beginning:
    """First weights from the encoder of a step."""
    return Beginning(encoder, "init", "encoder", lambda product: file_hash(product.file(WEIGHTS))[:16])


@dataclass(frozen=True)
class Training:
    """How an encoder, or a codec, comes about.

    Parameters
    ----------
    name : str
        Of the step.
    source : str or Path
        Of the recipe.
    recipe : Recipe
    train : callable
        Trains in the folder of a run, or goes on there, and writes its folder `folder`. Told that folder and what the
        step of `beginning` made, None without.
    data : mapping of str to str
        Fingerprints of the training sound.
    beginning : Beginning, optional
    constants : dict
        What decides the training besides the recipe, as plain values.
    folder, description : str
        What a run ends with, and which file of it says what it is.
    weights : tuple of str
        The other files of it.
    ship : callable, optional
        Puts the product of the run in its place in the checkout, given its facts; None: it stays with the run. Files
        of weights keep their names and content.
    """

    name: str
    source: str | Path
    recipe: Recipe
    train: Callable[[Path, Product | None], object]
    data: Mapping[str, str]
    beginning: Beginning | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    folder: str = "encoder"
    description: str = DESCRIPTION
    weights: tuple[str, ...] = (WEIGHTS,)
    ship: Callable[[Product], Product] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The recipe as plain values."""
        config: dict[str, Any] = json.loads(json.dumps(self.recipe.as_dict()))
        return config


def encoder_step(job: Job, training: Training, given: Path | None) -> Step:
    """The step of an encoder, or of a codec.

    Parameters
    ----------
    job : Job
    training : Training
    given : Path, optional
        Take this trained one, see `speechtok.training.models.steps`.

    Raises
    ------
    InputError
        If data are missing, or `given` holds nothing of the kind or damaged files.
    """
    settings: dict[str, Any] = {"recipe": training.config, **training.constants}
    data: Mapping[str, str] = training.data
    expects = {}
    if given is not None:
        for file in (training.description, *training.weights):
            if not (given / file).is_file():
                raise InputError(f"{given} holds no {file}; give the folder '{training.folder}' of a finished run")
        expects = {file: file_hash(given / file) for file in training.weights}
        if not _by_recipe(training, given):
            settings, data = {"given": ", ".join(expects.values())}, {}
    needs = () if training.beginning is None else (training.beginning.step,)
    build = partial(_encoder, job, training, given)
    kept = training.ship is not None
    return Step(training.name, training.folder, build, needs, settings, data, kept=kept, expects=expects)


def _encoder(job: Job, training: Training, given: Path | None, task: Task) -> Product:
    name = Path(training.source).stem
    # Named by all that decides the weights: an interrupted run is found again, and another one is never continued.
    run = job.places.runs / f"{name}-{task.fingerprint[:8]}"
    folder = run / training.folder
    first = None if training.beginning is None else task.needs[training.beginning.step]
    if given is not None:
        if training.beginning is not None:
            _check_beginning(training, given, training.beginning, task.needs[training.beginning.step])
        folder.mkdir(parents=True, exist_ok=True)
        for file in (training.description, *training.weights):
            copy(given / file, folder / file)
        for file in (CONFIG, METRICS, CURVES):
            if (source := _beside(given, file)) is not None:
                copy(source, run / file)
    else:
        training.train(run, first)
    curves = [path for path in (run / CURVES,) if path.is_file()]
    weights = [folder / file for file in training.weights]
    parameters = sum(tensor.numel() for file in weights for tensor in read_tensors(file).values())
    facts = _run_facts(folder) | {"recipe": name, "parameters": parameters}
    product = Product((folder / training.description, *weights, *curves), facts)
    return product if training.ship is None else training.ship(product)


def _by_recipe(training: Training, given: Path) -> bool:
    """Whether this is what a run by the recipe ended with, as far as the files beside it say.

    Raises
    ------
    InputError
        If the run is not at its end: what lies in its folder is not what the recipe makes.
    """
    facts = _run_facts(given)
    if facts["config"] != training.config:
        return False
    if facts.get("steps", training.recipe.run.steps) != training.recipe.run.steps or (
        given.name != training.folder and (given.parent / CONFIG).is_file()
    ):
        raise InputError(
            f"{given} is not the end of a run of {training.recipe.run.steps} steps; finish the run and give its folder "
            f"'{training.folder}'"
        )
    return True


def _beside(folder: Path, name: str) -> Path | None:
    """A file of the run that a trained folder belongs to."""
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


def _check_beginning(training: Training, given: Path, beginning: Beginning, first: Product) -> None:
    """Refuse a run by the recipe that began with something else than what the step made.

    A run without a recipe may have begun with anything: nothing is claimed of it.
    """
    path = _beside(given, BEGINNING)
    if path is None or not _by_recipe(training, given):
        return
    try:
        begun = json.loads(path.read_text())[beginning.entry]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); take the run's files anew") from error
    if begun != beginning.identity(first):
        raise InputError(
            f"{given} was trained from another {beginning.what} than that of step {beginning.step}; train it anew from "
            "that one, or do not give it and have it trained here"
        )


def share_mels(before: Path, run: Path) -> None:
    """Let a run hear what an earlier run has decoded, by links; training decodes what is missing or other sound."""
    known, cache, partial_copy = before / "mels", run / "mels", run / ".mels"
    if not known.is_dir() or cache.exists():
        return
    shutil.rmtree(partial_copy, ignore_errors=True)
    shutil.copytree(known, partial_copy, ignore=shutil.ignore_patterns(".lock"), copy_function=os.link)
    partial_copy.rename(cache)


def curves_of(trained: Product) -> Path | None:
    """Picture of the curves of a run, if there is one."""
    return next((path for path in trained.files if path.name == CURVES), None)


def mixes_noise(config: dict[str, Any]) -> bool:
    """Whether noises were mixed in by this recipe (`Recipe.as_dict`), as far as one is known."""
    parts = (config.get(name) or {} for name in ("perturb", "restart_perturb"))
    return any(part.get("noise_probability", 0) > 0 for part in parts)


def speech_data(job: Job, recipe: Recipe) -> dict[str, str]:
    """Fingerprints of the training speech, and of noises where the recipe mixes them in."""
    noise = {"noise": changes(job.places.data)["noise"]} if recipe.noisy else {}
    return {"train": sounds(job.speech("train"))} | noise


def training_noise(job: Job) -> Path:
    """Write a manifest of the noises of the train split; InputError if there are none."""
    folder, manifest = (job.places.data / "noise").resolve(), job.places.runs / "training-noise.jsonl"
    clips = clips_of_split(folder, "train")
    if clips is None:
        raise InputError(f"{folder / 'metadata.jsonl'} names no file of split 'train'")
    job.places.runs.mkdir(parents=True, exist_ok=True)
    manifest.write_text("".join(json.dumps({"path": str(folder / path)}) + "\n" for path in clips.paths))
    return manifest
