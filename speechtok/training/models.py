"""All shipped tokenizers as a graph of steps: encoder, layer, quantizers, tables, cards.

Steps of later models are added to `steps`; what they need of others they name, and follow when it changes.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from speechtok.audio.clips import clips_of_split
from speechtok.corpus.engine import Event
from speechtok.encoders.base import Encoder
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.encoders.pretrained import from_pretrained, read_tensors
from speechtok.errors import InputError
from speechtok.evaluation import abx, units
from speechtok.evaluation.log_mel import LogMelEncoder
from speechtok.tokenizer import Tokenizer
from speechtok.training.cards import Figures, Origin, corpora, write_card, write_credits
from speechtok.training.fingerprints import aligned, changes, sounds, text
from speechtok.training.graph import Product, Record, Step, Task, file_hash
from speechtok.training.kmeans import fit
from speechtok.training.layers import best, sweep
from speechtok.training.loop import CONFIG, METRICS
from speechtok.training.pretrain import KIND, pretrain
from speechtok.training.recipe import Recipe

__all__ = ["Choices", "Places", "record", "steps"]

MODEL, ENCODER, LAYER = "w2vbert-mini", "w2vbert-mini-encoder", "w2vbert-mini-layer"
LICENCE = "Apache-2.0"
CURVES = "curves.png"


@dataclass(frozen=True)
class Places:
    """Where things lie.

    Parameters
    ----------
    data : Path
        Holds ``speech/train``, ``speech/dev``, ``speech/eval``, ``noise`` and ``rir``.
    root : Path
        Checkout whose ``assets`` and ``benchmarks/results`` are refreshed.
    runs : Path
        Folder for runs in progress and trained encoders.
    """

    data: Path
    root: Path
    runs: Path


@dataclass(frozen=True)
class Choices:
    """What decides the models besides the data.

    Parameters
    ----------
    recipe : str or Path
        Of the encoder.
    few, many : int
        Vocabularies; the tokenizer that is called like the encoder has `many`.
    standardize : bool
        Of the quantizers on the encoder.
    sample_frames, encoder_sample_frames : int
        Frames that k-means is fitted on, of baselines and of the encoder.
    iterations, restarts, seed : int
        Of k-means.
    sweep_every : int
        See `speechtok.training.layers.sweep`.
    """

    recipe: str | Path
    few: int = 100
    many: int = 500
    standardize: bool = False
    sample_frames: int = 1_000_000
    encoder_sample_frames: int = 500_000
    iterations: int = 50
    restarts: int = 3
    seed: int = 0
    sweep_every: int = 10


@dataclass(frozen=True)
class _Job:
    """What the functions of all steps need."""

    places: Places
    choices: Choices
    recipe: Recipe
    device: str
    command: str
    on_event: Callable[[Event], None]

    def speech(self, split: str) -> Path:
        return self.places.data / "speech" / split

    def bundle(self, name: str) -> Path:
        return self.places.root / "assets" / name

    def table(self, kind: str, name: str) -> Path:
        folder = self.places.root / "benchmarks" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{kind}_{name}.json"


def record(places: Places) -> Record:
    """Open ``assets/models.json``; InputError if there is no checkout at `places.root`."""
    assets = places.root / "assets"
    if not assets.is_dir():
        raise InputError(f"{places.root} has no folder assets; run this in a checkout of speechtok, or name its root")
    return Record(assets / "models.json", places.root, places.runs)


def steps(
    places: Places,
    choices: Choices,
    *,
    encoder: Path | None = None,
    device: str = "cpu",
    command: str = "make models",
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Step]:
    """All steps of the shipped tokenizers.

    Parameters
    ----------
    places : Places
    choices : Choices
    encoder : Path, optional
        Take this trained encoder (the folder ``encoder`` of a run) instead of training one. If the run's
        ``config.json`` is beside it and says what the recipe says, it counts as trained by the recipe: later calls
        leave it. Any other encoder has to be given each time, or the recipe replaces it.
    device : str
    command : str
        What cards name as the way to make the models again.
    on_event : callable
        Progress within a step.

    Raises
    ------
    InputError
        If data, recipe or encoder are missing or unusable.
    """
    job = _Job(places, choices, Recipe.read(choices.recipe, KIND), device, command, on_event)
    if encoder is not None and not (encoder / "encoder.json").is_file():
        raise InputError(f"{encoder} holds no encoder.json; give the folder 'encoder' of a finished run")
    sounds.cache_clear()  # files may have changed since the last call
    few, many = choices.few, choices.many
    baselines = {f"mfcc-k{count}": count for count in (few, many)}
    result = [_fit_step(job, name, count) for name, count in baselines.items()]
    result += [_log_mel_step(job, count) for count in (few, many)]
    result += _measured(job, baselines)
    learned = _learned(few, many)
    result += [_encoder_step(job, encoder), _layer_step(job)]
    result += [_fit_step(job, name, count, on_encoder=True) for name, count in learned.items()]
    return result + _measured(job, learned)


def _measured(job: _Job, names: dict[str, int]) -> list[Step]:
    """Tables and cards of tokenizers."""
    tables = [step for name in names for step in (_units_step(job, name), _abx_step(job, name))]
    return tables + [_card_step(job, name, count) for name, count in names.items()]


def _learned(few: int, many: int) -> dict[str, int]:
    return {MODEL: many, f"{MODEL}-k{few}": few}


# -- encoder ----------------------------------------------------------------------------------------------------------


def _encoder_step(job: _Job, given: Path | None) -> Step:
    config = json.loads(json.dumps(job.recipe.as_dict()))
    settings: dict[str, Any] = {"recipe": config}
    data = {"train": sounds(job.speech("train"))}
    if job.recipe.noisy:
        data["noise"] = changes(job.places.data)["noise"]
    expects = {}
    if given is not None:
        expects = {"encoder.safetensors": file_hash(given / "encoder.safetensors")}
        if _run_facts(given)["config"] != config:
            settings, data = {"given": expects["encoder.safetensors"]}, {}
    build = partial(_encoder, job, given)
    return Step(ENCODER, "encoder", build, settings=settings, data=data, kept=False, expects=expects)


def _encoder(job: _Job, given: Path | None, task: Task) -> Product:
    # Named by all that decides the weights: an interrupted run is found again, and another one is never continued.
    run = job.places.runs / f"{Path(job.choices.recipe).stem}-{task.fingerprint[:8]}"
    folder = run / "encoder"
    if given is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("encoder.json", "encoder.safetensors"):
            _copy(given / name, folder / name)
        for name in (CONFIG, METRICS, CURVES):
            if (source := _beside(given, name)) is not None:
                _copy(source, run / name)
    else:
        pretrain(
            job.choices.recipe, job.speech("train"), run, held_out=job.speech("dev"), aligned=job.speech("dev"),
            noise=_training_noise(job) if job.recipe.noisy else None, device=job.device, on_event=job.on_event,
        )  # fmt: skip
    curves = [path for path in (run / CURVES,) if path.is_file()]
    parameters = sum(tensor.numel() for tensor in read_tensors(folder / "encoder.safetensors").values())
    facts = _run_facts(folder) | {"recipe": Path(job.choices.recipe).stem, "parameters": parameters}
    return Product((folder / "encoder.json", folder / "encoder.safetensors", *curves), facts)


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


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


def _training_noise(job: _Job) -> Path:
    """Write a manifest of the noises of the train split."""
    folder, manifest = (job.places.data / "noise").resolve(), job.places.runs / "training-noise.jsonl"
    clips = clips_of_split(folder, "train")
    if clips is None:
        raise InputError(f"{folder / 'metadata.jsonl'} names no file of split 'train'")
    job.places.runs.mkdir(parents=True, exist_ok=True)
    manifest.write_text("".join(json.dumps({"path": str(folder / path)}) + "\n" for path in clips.paths))
    return manifest


def _layer_step(job: _Job) -> Step:
    choices = job.choices
    settings = {name: getattr(choices, name) for name in ("many", "standardize", "seed", "sweep_every")}
    data = {"train": sounds(job.speech("train")), **aligned(job.speech("dev"))}
    return Step(LAYER, "layer", partial(_layer, job), (ENCODER,), settings, data)


def _layer(job: _Job, task: Task) -> Product:
    choices, encoder = job.choices, task.needs[ENCODER].file("encoder.json").parent
    rows = sweep(
        job.speech("train"), job.speech("dev"), encoder, job.places.runs / f"{LAYER}-{task.fingerprint[:8]}",
        clusters=choices.many, every=choices.sweep_every, standardize=choices.standardize, seed=choices.seed,
        device=job.device, on_event=job.on_event,
    )  # fmt: skip
    return Product((), {"layer": best(rows), "sweep": rows})


# -- quantizers -------------------------------------------------------------------------------------------------------


def _fit_step(job: _Job, name: str, clusters: int, *, on_encoder: bool = False) -> Step:
    choices = job.choices
    settings = {
        "clusters": clusters,
        "standardize": choices.standardize if on_encoder else False,
        "sample_frames": choices.encoder_sample_frames if on_encoder else choices.sample_frames,
        "iterations": choices.iterations,
        "restarts": choices.restarts,
        "seed": choices.seed,
    }
    needs = (ENCODER, LAYER) if on_encoder else ()
    data = {"train": sounds(job.speech("train"))}
    return Step(name, "tokenizer", partial(_bundle, job, name, settings), needs, settings, data)


def _bundle(job: _Job, name: str, settings: dict[str, Any], task: Task) -> Product:
    encoder: Encoder = MfccEncoder()
    origin: dict[str, Any] = {}
    if ENCODER in task.needs:
        layer, trained = task.needs[LAYER].facts["layer"], task.needs[ENCODER]
        # Only the blocks below the layer are loaded, and only they are saved.
        encoder = from_pretrained(trained.file("encoder.json").parent, layer)
        kept = {key: trained.facts[key] for key in ("recipe", "steps", "hours") if key in trained.facts}
        origin = {"encoder": kept | {"layer": layer}}
    tokenizer, report = _fit(job, encoder, name, settings)
    tokenizer.training = report | origin
    folder = job.bundle(name)
    # A bundle never overwrites another one; the old one goes only now that the new one is there.
    for old in ("tokenizer.json", "encoder.safetensors", "quantizer.safetensors", CURVES):
        (folder / old).unlink(missing_ok=True)
    tokenizer.to("cpu").save(folder)
    names = ["tokenizer.json", "encoder.safetensors", "quantizer.safetensors"]
    if name == MODEL and any(path.name == CURVES for path in task.needs[ENCODER].files):
        _copy(task.needs[ENCODER].file(CURVES), folder / CURVES)
        names.append(CURVES)
    return Product(tuple(folder / file for file in names if (folder / file).exists()), report)


def _fit(job: _Job, encoder: Encoder, name: str, settings: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    options = {key: value for key, value in settings.items() if key != "clusters"}
    return fit(
        str(job.speech("train")), encoder, settings["clusters"], name=name, licence=LICENCE, device=job.device,
        on_event=job.on_event, **options,
    )  # fmt: skip


# -- tables -----------------------------------------------------------------------------------------------------------


def _units_step(job: _Job, name: str) -> Step:
    data = aligned(job.speech("eval")) | changes(job.places.data)
    return Step(f"units_{name}", "table", partial(_units, job, name), (name,), data=data)


def _units(job: _Job, name: str, task: Task) -> Product:
    return Product((_units_table(job, Tokenizer.load(job.bundle(name)).to(job.device)),))


def _units_table(job: _Job, tokenizer: Tokenizer) -> Path:
    table = units.evaluate(job.speech("eval"), tokenizer, augment_data=job.places.data, on_event=job.on_event)
    return _write(job.table("units", tokenizer.name), [table])


def _abx_step(job: _Job, name: str) -> Step:
    return Step(f"abx_{name}", "table", partial(_abx, job, name), (name,), data=aligned(job.speech("eval")))


def _abx(job: _Job, name: str, task: Task) -> Product:
    return Product((_abx_table(job, Tokenizer.load(job.bundle(name)).to(job.device)),))


def _abx_table(job: _Job, tokenizer: Tokenizer) -> Path:
    kinds: tuple[abx.Representation, ...] = ("frames", "units")
    tables = [abx.evaluate(job.speech("eval"), tokenizer, representation=x, on_event=job.on_event) for x in kinds]
    return _write(job.table("abx", tokenizer.name), tables)


def _write(path: Path, tables: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(tables, indent=2, ensure_ascii=False) + "\n")  # as the command `evaluate` writes it
    return path


def _log_mel_step(job: _Job, clusters: int) -> Step:
    name = f"logmel-k{clusters}"
    settings = dict(_fit_step(job, name, clusters).settings)
    data = {"train": sounds(job.speech("train"))} | aligned(job.speech("eval")) | changes(job.places.data)
    return Step(name, "table", partial(_log_mel, job, name, settings), settings=settings, data=data)


def _log_mel(job: _Job, name: str, settings: dict[str, Any], task: Task) -> Product:
    """A row of the tables that is not shipped."""
    tokenizer = _fit(job, LogMelEncoder(), name, settings)[0].to(job.device)
    return Product((_units_table(job, tokenizer), _abx_table(job, tokenizer)))


# -- cards ------------------------------------------------------------------------------------------------------------


def _card_step(job: _Job, name: str, clusters: int) -> Step:
    others = [other for other in (f"mfcc-k{clusters}", f"logmel-k{clusters}") if other != name]
    tables = [step for other in (name, *others) for step in _table_steps(other)]
    learned = name in _learned(job.choices.few, job.choices.many)
    needs = (name, *tables, *((MODEL, ENCODER, LAYER) if learned else ()))
    data = {"credits of train": text(job.speech("train"), "metadata.jsonl")}
    if learned and job.recipe.noisy:
        data["credits of noise"] = text(job.places.data / "noise", "metadata.jsonl")
    command = job.command if learned else "make models"
    build = partial(_card, job, name, others, command)
    return Step(f"card_{name}", "card", build, tuple(dict.fromkeys(needs)), {"command": command}, data)


def _table_steps(name: str) -> tuple[str, ...]:
    return (name,) if name.startswith("logmel") else (f"units_{name}", f"abx_{name}")


def _card(job: _Job, name: str, others: list[str], command: str, task: Task) -> Product:
    folder, origin = job.bundle(name), None
    made = [folder / "README.md"]
    (folder / "CREDITS.md").unlink(missing_ok=True)
    if ENCODER in task.needs:
        facts, layers = task.needs[ENCODER].facts, task.needs[LAYER].facts
        curves = ""
        if any(path.name == CURVES for path in task.needs[MODEL].files):
            curves = CURVES if name == MODEL else f"../{MODEL}/{CURVES}"
        origin = Origin(facts["recipe"], facts["config"], facts, layers["layer"], layers["sweep"], curves)
        parts = (facts["config"].get(name) or {} for name in ("perturb", "restart_perturb"))
        if any(part.get("noise_probability", 0) > 0 for part in parts):
            made.append(write_credits(folder, job.places.data / "noise"))
    figures = [Figures.read(job.table("units", x), job.table("abx", x)) for x in (name, *others)]
    write_card(folder, figures[0], figures[1:], corpora(job.speech("train")), command, origin)
    return Product(tuple(made))
