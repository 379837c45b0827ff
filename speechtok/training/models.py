"""All shipped tokenizers as a graph of steps: encoder, layer, quantizers, tables, cards.

Steps of later models are added to `steps` (`speechtok.training.invariant_models`,
`syllable_models`, `codec_models`, `music_models`); what
they need of others they name, and follow when it changes.
"""

from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path
from time import process_time
from typing import Any

from speechtok.corpus.engine import Event
from speechtok.encoders.base import Encoder
from speechtok.encoders.lipcot import LipcotEncoder
from speechtok.encoders.mfcc import MfccEncoder
from speechtok.encoders.pretrained import from_pretrained
from speechtok.errors import InputError
from speechtok.evaluation import abx, units
from speechtok.evaluation.log_mel import LogMelEncoder
from speechtok.tokenizer import Tokenizer
from speechtok.training import codec_models, invariant_models, music_models, syllable_models
from speechtok.training.cards import Figures, Origin, corpora, write_card, write_credits
from speechtok.training.compression import KIND as CODEC_KIND
from speechtok.training.encoder_steps import Training, curves_of, encoder_step, mixes_noise, speech_data, training_noise
from speechtok.training.fingerprints import aligned, changes, sounds, text
from speechtok.training.graph import Product, Record, Step, Task
from speechtok.training.invariant import KIND as INVARIANT_KIND
from speechtok.training.jobs import CURVES, LICENCE, Choices, Job, Places, save_bundle, write_table
from speechtok.training.kmeans import fit
from speechtok.training.layers import best, sweep
from speechtok.training.music import KIND as MERT_KIND
from speechtok.training.pretrain import KIND, pretrain
from speechtok.training.recipe import Recipe
from speechtok.training.syllables import KIND as SYLLABLE_KIND

__all__ = ["Choices", "Places", "record", "steps"]

MODEL, ENCODER, LAYER = "w2vbert-mini", "w2vbert-mini-encoder", "w2vbert-mini-layer"


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
    syllable_encoder: Path | None = None,
    codec: Path | None = None,
    mert_encoder: Path | None = None,
    device: str = "cpu",
    command: str = "make models",
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Step]:
    """All steps of the shipped tokenizers.

    Parameters
    ----------
    places : Places
    choices : Choices
    encoder, syllable_encoder, codec, mert_encoder : Path, optional
        Take this trained encoder (the folder ``encoder`` of a run; of a codec, ``codec``) instead of training one. If
        the run's ``config.json`` is beside it and says what the recipe says, it counts as trained by the recipe: later
        calls leave it. Any other has to be given each time, or the recipe replaces it.
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
    recipe, syllable_recipe, codec_recipe, mert_recipe, invariant_recipe = (
        Recipe.read(path, kind)
        for path, kind in (
            (choices.recipe, KIND), (choices.syllable_recipe, SYLLABLE_KIND), (choices.codec_recipe, CODEC_KIND),
            (choices.mert_recipe, MERT_KIND), (choices.invariant_recipe, INVARIANT_KIND),
        )
    )  # fmt: skip
    job = Job(
        places, choices, recipe, syllable_recipe, codec_recipe, mert_recipe, invariant_recipe, device, command, on_event
    )
    sounds.cache_clear()  # files may have changed since the last call
    few, many, filters = choices.few, choices.many, choices.filters
    baselines = {f"mfcc-k{count}": count for count in (few, many)}
    result = [_fit_step(job, name, count, MfccEncoder()) for name, count in baselines.items()]
    result += [_row_step(job, name, count, encoder) for name, (encoder, count) in _rows(choices).items()]
    result += _measured(job, {name: [f"mfcc-k{count}", f"logmel-k{count}"] for name, count in baselines.items()})
    result.append(_fit_step(job, f"lipcot-k{filters}", filters, LipcotEncoder()))
    result += _measured(job, {f"lipcot-k{filters}": [f"mfcc-k{filters}"]})
    learned = _learned(few, many)
    result += [encoder_step(job, _pretraining(job), encoder), _layer_step(job)]
    result += [_fit_step(job, name, count) for name, count in learned.items()]
    result += _measured(job, {name: [f"mfcc-k{count}", f"logmel-k{count}"] for name, count in learned.items()})
    result += _robust(job, teacher=f"{MODEL}-k{few}", baseline=f"mfcc-k{few}")
    result += syllable_models.steps(job, syllable_encoder, base=MODEL, base_encoder=ENCODER)
    result += codec_models.steps(job, codec)
    return result + music_models.steps(job, mert_encoder, teacher=codec_models.MODEL, base=MODEL)


def _measured(job: Job, names: dict[str, list[str]]) -> list[Step]:
    """Tables and cards of tokenizers, given with what each is compared with."""
    tables = [step for name in names for step in (_units_step(job, name), _abx_step(job, name))]
    return tables + [_card_step(job, name, others) for name, others in names.items()]


def _robust(job: Job, *, teacher: str, baseline: str) -> list[Step]:
    name, others = invariant_models.MODEL, (teacher, baseline)
    tables = [step for other in others for step in _table_steps(job, other)]
    return [
        invariant_models.tokenizer_step(job, teacher=teacher, base=MODEL),
        _units_step(job, name),
        _abx_step(job, name),
        invariant_models.card_step(job, others, (*_table_steps(job, name), *tables)),
    ]


def _learned(few: int, many: int) -> dict[str, int]:
    return {MODEL: many, f"{MODEL}-k{few}": few}


def _rows(choices: Choices) -> dict[str, tuple[Encoder, int]]:
    """Rows of the tables that are not shipped."""
    counts = (choices.few, choices.many)
    rows: dict[str, tuple[Encoder, int]] = {f"logmel-k{count}": (LogMelEncoder(), count) for count in counts}
    if choices.filters not in counts:
        rows[f"mfcc-k{choices.filters}"] = (MfccEncoder(), choices.filters)
    return rows


# -- encoder ----------------------------------------------------------------------------------------------------------


def _pretraining(job: Job) -> Training:
    def train(run: Path, first: Product | None) -> None:
        pretrain(
            job.choices.recipe, job.speech("train"), run, held_out=job.speech("dev"), aligned=job.speech("dev"),
            noise=training_noise(job) if job.recipe.noisy else None, device=job.device, on_event=job.on_event,
        )  # fmt: skip

    return Training(ENCODER, job.choices.recipe, job.recipe, train, speech_data(job, job.recipe))


def _layer_step(job: Job) -> Step:
    choices = job.choices
    settings = {name: getattr(choices, name) for name in ("many", "standardize", "seed", "sweep_every")}
    data = {"train": sounds(job.speech("train")), **aligned(job.speech("dev"))}
    return Step(LAYER, "layer", partial(_layer, job), (ENCODER,), settings, data)


def _layer(job: Job, task: Task) -> Product:
    choices, encoder = job.choices, task.needs[ENCODER].file("encoder.json").parent
    rows = sweep(
        job.speech("train"), job.speech("dev"), encoder, job.places.runs / f"{LAYER}-{task.fingerprint[:8]}",
        clusters=choices.many, every=choices.sweep_every, standardize=choices.standardize, seed=choices.seed,
        device=job.device, on_event=job.on_event,
    )  # fmt: skip
    return Product((), {"layer": best(rows), "sweep": rows})


# -- quantizers -------------------------------------------------------------------------------------------------------


def _fit_step(job: Job, name: str, clusters: int, baseline: Encoder | None = None) -> Step:
    """Clusters on frames of an encoder without weights, or on those of the trained one."""
    settings = _settings(job, clusters, baseline)
    needs = () if baseline else (ENCODER, LAYER)
    data = {"train": sounds(job.speech("train"))}
    return Step(name, "tokenizer", partial(_bundle, job, name, baseline, settings), needs, settings, data)


def _settings(job: Job, clusters: int, baseline: Encoder | None) -> dict[str, Any]:
    choices = job.choices
    return {
        "clusters": clusters,
        "standardize": False if baseline else choices.standardize,
        "sample_frames": choices.sample_frames if baseline else choices.encoder_sample_frames,
        "iterations": choices.iterations,
        "restarts": choices.restarts,
        "seed": choices.seed,
    } | ({"encoder": baseline.config_dict()} if isinstance(baseline, LipcotEncoder) else {})


def _bundle(job: Job, name: str, baseline: Encoder | None, settings: dict[str, Any], task: Task) -> Product:
    begin, origin = process_time(), dict[str, Any]()
    if baseline is not None:
        encoder = baseline
    else:
        layer, trained = task.needs[LAYER].facts["layer"], task.needs[ENCODER]
        # Only the blocks below the layer are loaded, and only they are saved.
        encoder = from_pretrained(trained.file("encoder.json").parent, layer)
        kept = {key: trained.facts[key] for key in ("recipe", "steps", "hours") if key in trained.facts}
        origin = {"encoder": kept | {"layer": layer}}
    tokenizer, report = _fit(job, encoder, name, settings)
    tokenizer.training = report | origin
    curves = curves_of(task.needs[ENCODER]) if name == MODEL else None
    # In whole minutes of all threads, and not in the bundle: a fit that is repeated should come out as it was.
    return save_bundle(tokenizer, job.bundle(name), curves, report | {"minutes": ceil((process_time() - begin) / 60)})


def _fit(job: Job, encoder: Encoder, name: str, settings: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    options = {key: value for key, value in settings.items() if key not in ("clusters", "encoder")}
    return fit(
        str(job.speech("train")), encoder, settings["clusters"], name=name, licence=LICENCE, device=job.device,
        on_event=job.on_event, **options,
    )  # fmt: skip


# -- tables -----------------------------------------------------------------------------------------------------------


def _units_step(job: Job, name: str) -> Step:
    data = aligned(job.speech("eval")) | changes(job.places.data)
    return Step(f"units_{name}", "table", partial(_units, job, name), (name,), data=data)


def _units(job: Job, name: str, task: Task) -> Product:
    return Product((_units_table(job, Tokenizer.load(job.bundle(name)).to(job.device)),))


def _units_table(job: Job, tokenizer: Tokenizer) -> Path:
    table = units.evaluate(job.speech("eval"), tokenizer, augment_data=job.places.data, on_event=job.on_event)
    return write_table(job.table("units", tokenizer.name), [table])


def _abx_step(job: Job, name: str) -> Step:
    return Step(f"abx_{name}", "table", partial(_abx, job, name), (name,), data=aligned(job.speech("eval")))


def _abx(job: Job, name: str, task: Task) -> Product:
    return Product((_abx_table(job, Tokenizer.load(job.bundle(name)).to(job.device)),))


def _abx_table(job: Job, tokenizer: Tokenizer) -> Path:
    kinds: tuple[abx.Representation, ...] = ("frames", "units")
    tables = [abx.evaluate(job.speech("eval"), tokenizer, representation=x, on_event=job.on_event) for x in kinds]
    return write_table(job.table("abx", tokenizer.name), tables)


def _row_step(job: Job, name: str, clusters: int, encoder: Encoder) -> Step:
    settings = _settings(job, clusters, encoder)
    data = {"train": sounds(job.speech("train"))} | aligned(job.speech("eval")) | changes(job.places.data)
    return Step(name, "table", partial(_row, job, name, encoder, settings), settings=settings, data=data)


def _row(job: Job, name: str, encoder: Encoder, settings: dict[str, Any], task: Task) -> Product:
    tokenizer = _fit(job, encoder, name, settings)[0].to(job.device)
    return Product((_units_table(job, tokenizer), _abx_table(job, tokenizer)))


# -- cards ------------------------------------------------------------------------------------------------------------


def _card_step(job: Job, name: str, others: list[str]) -> Step:
    others = [other for other in others if other != name]
    tables = [step for other in (name, *others) for step in _table_steps(job, other)]
    learned = name in _learned(job.choices.few, job.choices.many)
    needs = (name, *tables, *((MODEL, ENCODER, LAYER) if learned else ()))
    data = {"credits of train": text(job.speech("train"), "metadata.jsonl")}
    if learned and job.recipe.noisy:
        data["credits of noise"] = text(job.places.data / "noise", "metadata.jsonl")
    command = job.command if learned else "make models"
    build = partial(_card, job, name, others, command)
    return Step(f"card_{name}", "card", build, tuple(dict.fromkeys(needs)), {"command": command}, data)


def _table_steps(job: Job, name: str) -> tuple[str, ...]:
    return (name,) if name in _rows(job.choices) else (f"units_{name}", f"abx_{name}")


def _card(job: Job, name: str, others: list[str], command: str, task: Task) -> Product:
    folder, origin = job.bundle(name), None
    made = [folder / "README.md"]
    (folder / "CREDITS.md").unlink(missing_ok=True)
    if ENCODER in task.needs:
        facts, layers = task.needs[ENCODER].facts, task.needs[LAYER].facts
        curves = ""
        if curves_of(task.needs[MODEL]) is not None:
            curves = CURVES if name == MODEL else f"../{MODEL}/{CURVES}"
        origin = Origin(facts["recipe"], facts["config"], facts, layers["layer"], layers["sweep"], curves)
        if mixes_noise(facts["config"]):
            made.append(write_credits(folder, job.places.data / "noise"))
    figures = [Figures.read(job.table("units", x), job.table("abx", x)) for x in (name, *others)]
    minutes = task.needs[name].facts.get("minutes")  # of fits before they were timed none are known
    write_card(folder, figures[0], figures[1:], corpora(job.speech("train")), command, origin, minutes)
    return Product(tuple(made))
