"""Steps of the shipped tokenizer of syllables: encoder, thresholds, units, tables, card."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from speechtok.encoders.pretrained import from_pretrained
from speechtok.evaluation import boundaries, categorical, cutters
from speechtok.segmenters.energy import EnergySeeds
from speechtok.segmenters.greedy import Greedy
from speechtok.training.cards import corpora, write_credits
from speechtok.training.encoder_steps import (
    Training,
    beginning_with,
    curves_of,
    encoder_step,
    mixes_noise,
    share_mels,
    speech_data,
    training_noise,
)
from speechtok.training.fingerprints import aligned, sounds, text
from speechtok.training.graph import Product, Step, Task
from speechtok.training.jobs import LICENCE, Job, save_bundle, write_table
from speechtok.training.kmeans import fit
from speechtok.training.syllable_card import Origin, write_card
from speechtok.training.syllables import self_segment

__all__ = ["steps"]

MODEL, ENCODER, THRESHOLDS = "sylber-mini", "sylber-mini-encoder", "sylber-mini-thresholds"
SYLLABLES, CONTINUA = f"syllables_{MODEL}", f"continua_{MODEL}"
SILENCE_GAP = 7  # frames: Sylber's 140 ms
CLOSE_GAP = 4  # frames: the gate shuts for about three between touching syllables
COMPARED = ("greedy", "min-cut")  # segmenters of the frames of the encoder that the training began with
OWN = "min-cut"  # another segmenter of the tokenizer's own frames


def steps(job: Job, given: Path | None, *, base: str, base_encoder: str) -> list[Step]:
    """All steps of the tokenizer of syllables.

    Parameters
    ----------
    job : Job
    given : Path, optional
        Take this trained encoder, see `speechtok.training.models.steps`.
    base : str
        Tokenizer that it is compared with, a step too.
    base_encoder : str
        Step of the encoder that the training begins with.
    """
    return [
        encoder_step(job, _training(job, base_encoder), given),
        _thresholds_step(job),
        _units_step(job),
        _syllables_step(job, base),
        _continua_step(job, base),
        _card_step(job),
    ]


def _training(job: Job, base_encoder: str) -> Training:
    def train(run: Path, first: Product | None) -> None:
        assert first is not None  # noqa: S101 - for the type checker
        begun = first.file("encoder.json").parent
        share_mels(begun.parent, run)
        self_segment(
            job.choices.syllable_recipe, job.speech("train"), run, init=begun, held_out=job.speech("dev"),
            aligned=job.speech("dev"), noise=training_noise(job) if job.syllable_recipe.noisy else None,
            device=job.device, on_event=job.on_event,
        )  # fmt: skip

    constants = {"seeds": asdict(EnergySeeds())}
    return Training(
        ENCODER, job.choices.syllable_recipe, job.syllable_recipe, train, speech_data(job, job.syllable_recipe),
        beginning_with(base_encoder), constants,
    )  # fmt: skip


# -- thresholds and units ---------------------------------------------------------------------------------------------


def _thresholds_step(job: Job) -> Step:
    settings = {"grid": cutters.GATED_GREEDY, "rates": boundaries.RATES}
    build = partial(_thresholds, job)
    return Step(THRESHOLDS, "thresholds", build, (ENCODER,), settings, aligned(job.speech("dev")))


def _thresholds(job: Job, task: Task) -> Product:
    encoder = from_pretrained(task.needs[ENCODER].file("encoder.json").parent)
    family = cutters.of_encoder(cutters.EncoderFrames(encoder, job.device), "greedy", name=MODEL)
    setting, tried = boundaries.choose(family, job.speech("dev"), on_event=job.on_event)
    return Product((), {"setting": dict(setting), "tried": tried})


def _units_step(job: Job) -> Step:
    choices = job.choices
    settings = {
        "clusters": choices.syllables,
        "silence_gap": SILENCE_GAP,
        "close_gap": CLOSE_GAP,
        "spherical": True,
        "sample_frames": choices.encoder_sample_frames,
        "iterations": choices.iterations,
        "restarts": choices.restarts,
        "seed": choices.seed,
    }
    data = {"train": sounds(job.speech("train"))}
    return Step(MODEL, "tokenizer", partial(_units, job, settings), (ENCODER, THRESHOLDS), settings, data)


def _units(job: Job, settings: dict[str, Any], task: Task) -> Product:
    trained, chosen = task.needs[ENCODER], task.needs[THRESHOLDS].facts["setting"]
    segmenter = Greedy(**{**chosen, "close_gap": settings["close_gap"]})
    options = {name: value for name, value in settings.items() if name not in ("clusters", "close_gap")}
    tokenizer, report = fit(
        str(job.speech("train")), from_pretrained(trained.file("encoder.json").parent), settings["clusters"],
        name=MODEL, segmenter=segmenter, licence=LICENCE, device=job.device, on_event=job.on_event, **options,
    )  # fmt: skip
    tokenizer.training = report | {
        "encoder": {key: trained.facts[key] for key in ("recipe", "steps", "hours") if key in trained.facts}
    }
    return save_bundle(tokenizer, job.bundle(MODEL), curves_of(trained), report)


# -- tables and card --------------------------------------------------------------------------------------------------


def _syllables_step(job: Job, base: str) -> Step:
    settings = {
        "segmenters": COMPARED,
        "grids": {kind: cutters.GRIDS[kind] for kind in COMPARED},
        "rates": boundaries.RATES,
        "own": OWN,
        "seeds": asdict(EnergySeeds()),
    }
    data = aligned(job.speech("eval")) | aligned(job.speech("dev"))
    return Step(SYLLABLES, "table", partial(_syllables, job, base), (MODEL, base), settings, data)


def _syllables(job: Job, base: str, task: Task) -> Product:
    names = [str(job.bundle(MODEL)), f"{job.bundle(MODEL)}+{OWN}", *(f"{job.bundle(base)}+{kind}" for kind in COMPARED)]
    tables = cutters.compare(job.speech("eval"), names, dev=job.speech("dev"), device=job.device, on_event=job.on_event)
    return Product((write_table(job.table("syllables", MODEL), tables),))


def _continua_step(job: Job, base: str) -> Step:
    build = partial(_continua, job, base)
    settings = {"continua": job.choices.continua}
    return Step(CONTINUA, "table", build, (MODEL, base), settings, aligned(job.speech("eval")))


def _continua(job: Job, base: str, task: Task) -> Product:
    tables = categorical.compare(
        [str(job.bundle(name)) for name in (MODEL, base)], words=job.speech("eval"), limit=job.choices.continua,
        device=job.device, on_event=job.on_event,
    )  # fmt: skip
    return Product((write_table(job.table("continua", MODEL), tables),))


def _card_step(job: Job) -> Step:
    data = {"credits of train": text(job.speech("train"), "metadata.jsonl")}
    if job.syllable_recipe.noisy:
        data["credits of noise"] = text(job.places.data / "noise", "metadata.jsonl")
    needs = (MODEL, SYLLABLES, CONTINUA, ENCODER, THRESHOLDS)
    return Step(f"card_{MODEL}", "card", partial(_card, job), needs, {"command": job.command}, data)


def _card(job: Job, task: Task) -> Product:
    folder, facts, chosen = job.bundle(MODEL), task.needs[ENCODER].facts, task.needs[THRESHOLDS].facts
    made = [folder / "README.md"]
    (folder / "CREDITS.md").unlink(missing_ok=True)
    if mixes_noise(facts["config"]):
        made.append(write_credits(folder, job.places.data / "noise"))
    curves = curves_of(task.needs[MODEL])
    origin = Origin(facts["recipe"], facts["config"], facts, curves="" if curves is None else curves.name)
    write_card(
        folder, job.table("syllables", MODEL), job.table("continua", MODEL), corpora(job.speech("train")), job.command,
        origin, chosen["tried"],
    )  # fmt: skip
    return Product(tuple(made))
